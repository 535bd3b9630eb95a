"""Sweeps: a notebook is run for every combination of parameter values; a sweep can be interrupted and continued.

    # rates.yaml
    notebook: sft                # or init, or the path of a notebook
    fixed: {dataset: dates, steps: 100}
    grid:
      rank: [4, 16]
      learning_rate: [1.0e-3, 3.0e-3]

``ktlib sweep rates.yaml`` makes one folder per run, such as ``runs/rates/rank=4,learning_rate=0.001/``.
``ktlib.load_runs`` and the notebook ``09_compare_runs`` read these folders.
"""

import itertools
import math
import os
import re
from pathlib import Path

from ktlib.runs import notebooks

NAMES = {"sft": notebooks.SFT, "init": notebooks.NOTEBOOKS / "04_lora_init_sensitivity.ipynb"}


def plan(notebook, folder, grid, fixed=None):
    """Check a sweep without running it; returns ``{run folder: parameters}`` in the order of the grid.

    Args:
        notebook: "sft", "init", or the path of a notebook with a cell of parameters.
        folder: the folder of the run folders.
        grid: ``{parameter: list of values}``; the last parameter varies fastest.
        fixed: ``{parameter: value}``, the same in every run.

    Raises:
        ValueError: a parameter is unknown, has a value of a wrong type, has no values or equal ones, or is in both
            ``grid`` and ``fixed``; ``grid`` or ``fixed`` is no dict; the notebook does not exist or refuses a run.
        MemoryError: a run needs more memory than is available.
    """
    notebook, fixed = find(notebook), {} if fixed is None else fixed
    if not isinstance(fixed, dict):
        raise ValueError(f"fixed: got {fixed!r}, needs a value for each of its parameters")
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise ValueError(f"grid: got {grid!r}, needs a list of values for each of its parameters")
    if both := [str(key) for key in grid if key in fixed]:
        raise ValueError(f"grid: {', '.join(both)} is among the fixed parameters too")
    planned = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        run_folder = Path(folder) / name(notebooks.check_parameters(notebook, point))
        if run_folder in planned:
            raise ValueError(f"grid: {run_folder.name} occurs twice")
        parameters = notebooks.check_parameters(notebook, fixed | point)
        planned[run_folder] = notebooks.with_output_dir(notebook, parameters, run_folder)
        notebooks.check_run(notebook, planned[run_folder])
    return planned


def run_missing(notebook, folder, grid, fixed=None, progress=None):
    """Run those runs of :func:`plan` that have no good result in ``folder`` yet; returns ``load_runs(folder)``.

    The sweep goes on after a failed run.

    Raises:
        ValueError: as :func:`plan`; or a finished run in ``folder`` had other parameters, and so belongs to another
            sweep; or a run's folder holds results that ktlib did not write.
    """
    planned, notebook = plan(notebook, folder, grid, fixed), find(notebook)
    finished = {run_folder: finished_parameters(notebook, run_folder) for run_folder in planned}
    for run_folder, parameters in planned.items():
        before = finished[run_folder]
        if before is not None and before != parameters:
            changed = sorted(key for key in {*before, *parameters} if before.get(key) != parameters.get(key))
            raise ValueError(
                f"{run_folder} was run with another {', '.join(changed)}: give the sweep another name, or move it away"
            )
    todo = [run_folder for run_folder in planned if finished[run_folder] is None]
    for run_folder in todo:
        notebooks.refuse_foreign(notebook, run_folder)
    print(f"{len(planned)} runs, {len(planned) - len(todo)} of them finished before", flush=True)
    for i, run_folder in enumerate(todo, 1):
        print(f"[{i}/{len(todo)}] {run_folder.name}", flush=True)
        error = notebooks.run(notebook, run_folder, planned[run_folder], progress=progress, quiet=True).error
        if error == "interrupted":
            raise KeyboardInterrupt
        if error:
            print(f"      failed: {error}", flush=True)
    return notebooks.load_runs(folder)


def find(notebook):
    """The path of a notebook that is given by a name in ``NAMES`` or by its path; ValueError if it does not exist."""
    if isinstance(notebook, str | os.PathLike):
        path = NAMES.get(notebook) or Path(notebook)
        if path.is_file():
            return path
    raise ValueError(f"notebook: got {str(notebook)!r}, needs one of {', '.join(NAMES)} or the path of a notebook")


def name(parameters):
    """The name of a run's folder: ``rank=4,learning_rate=0.001``."""
    text = ",".join(f"{key}={value}" for key, value in parameters.items())
    return "".join("-" if character in "/\\ '\"" else character for character in text)


def finished_parameters(notebook, run_folder):
    """The parameters of the good run in ``run_folder``, None if it holds no good run."""
    path = run_folder / notebook.name
    if not path.is_file():
        return None
    papermill = notebooks.read(path).metadata.get("papermill", {})
    return None if papermill.get("exception") else dict(papermill.get("parameters", {}))


def axes(rows):
    """``{parameter: sorted values}`` of a sweep's grid, from its ``rows`` (of ``load_runs``).

    The names of the run folders tell the parameters, and the rows tell their values. None comes first, then numbers,
    then other values in the order of their text.

    Raises:
        ValueError: there are no rows, or they do not come from one sweep.
    """
    in_folder_name = re.compile(r"(?:^|,)(\w+)=")
    names = {tuple(key for key in in_folder_name.findall(row["run"].split("/")[0]) if key in row) for row in rows}
    if len(names) != 1 or names == {()}:
        raise ValueError(f"rows: need the runs of one sweep, got {len(rows)} runs with parameters {sorted(names)}")
    found = {}
    for key in names.pop():
        values = found[key] = []
        for row in rows:
            if row[key] not in values:  # a set would not do: a value may be a list
                values.append(row[key])
        values.sort(key=_order)
    return found


def is_finite_number(value):
    """Whether a value of a run is a finite number, so that runs can be ranked by it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_curve(value):
    """Whether a value of a run is a list of numbers, so that it can be drawn as a curve."""
    return isinstance(value, list) and bool(value) and all(isinstance(number, int | float) for number in value)


def _order(value):
    is_number = isinstance(value, int | float)
    return value is not None, not is_number, value if is_number else str(value)
