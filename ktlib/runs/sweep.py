"""A notebook once for every combination of parameter values, in folders named after them, going on where it stopped.

    # rates.yaml
    notebook: sft                # or init, or the path of a notebook
    fixed: {dataset: dates, steps: 100}
    grid:
      rank: [4, 16]
      learning_rate: [1.0e-3, 3.0e-3]

``ktlib sweep rates.yaml`` makes ``runs/rates/rank=4,learning_rate=0.001/`` and so on; ``ktlib.load_runs`` and the
notebook ``09_compare_runs`` read them.
"""

import itertools
import math
import os
import re
from pathlib import Path

from ktlib.runs import notebooks

NAMES = {"sft": notebooks.SFT, "init": notebooks.NOTEBOOKS / "04_lora_init_sensitivity.ipynb"}


def plan(notebook, folder, grid, fixed=None):
    """``{run folder: parameters}`` of a sweep in the order of the grid, everything checked, nothing run.

    Args:
        notebook: "sft", "init", or the path of a notebook with a cell of parameters.
        folder: where the run folders go.
        grid: ``{parameter: list of values}``; the last one varies fastest.
        fixed: ``{parameter: value}``, the same in every run.

    Raises:
        ValueError: an unknown parameter or a value of a wrong type; one that is in both tables; no values, or equal
            ones; no such notebook; ``grid`` or ``fixed`` is no table; a run that its notebook would refuse.
        MemoryError: a run cannot fit in the memory that is free.
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


def sweep(notebook, folder, grid, fixed=None, progress=None):
    """Run what of :func:`plan` has not been run, and return ``load_runs(folder)``. A failed run does not stop it.

    Run again, it repeats the failed and the missing runs only.

    Raises:
        ValueError: as :func:`plan`; or a finished run in ``folder`` has other parameters, so that its results would
            stand among those of another sweep; or a run's folder holds results that ktlib did not write.
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
        error = notebooks.run(notebook, run_folder, planned[run_folder], progress=progress, quiet=True)["error"]
        if error == "interrupted":
            raise KeyboardInterrupt
        if error:
            print(f"      failed: {error}", flush=True)
    return notebooks.load_runs(folder)


def find(notebook):
    """The path of a notebook given by its name in a sweep file or by its path; ValueError if there is none."""
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
    """The parameters of the good run in ``run_folder``, None if there is none."""
    path = run_folder / notebook.name
    if not path.is_file():
        return None
    papermill = notebooks.read(path).metadata.get("papermill", {})
    return None if papermill.get("exception") else dict(papermill.get("parameters", {}))


def axes(rows):
    """``{parameter: its values in order}`` of the runs of a sweep (rows of ``load_runs``): None, numbers, all else.

    The run folders' names say which parameters these are, the rows their values.

    Raises:
        ValueError: no rows, or runs that were not made by a sweep.
    """
    names = {tuple(k for k in re.findall(r"(?:^|,)(\w+)=", row["run"].split("/")[0]) if k in row) for row in rows}
    if len(names) != 1 or names == {()}:
        raise ValueError(f"rows: need the runs of one sweep, got {len(rows)} runs with parameters {sorted(names)}")
    found = {}
    for key in names.pop():
        values = found[key] = []
        for row in rows:
            if row[key] not in values:  # no set: a list may be a value
                values.append(row[key])
        values.sort(key=_order)
    return found


def is_finite_number(value):
    """Whether a value of a run can be compared with others: a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_curve(value):
    """Whether a value of a run can be drawn along its steps: a list of at least one number."""
    return isinstance(value, list) and bool(value) and all(isinstance(number, int | float) for number in value)


def _order(value):
    number = isinstance(value, int | float)
    return value is not None, not number, value if number else str(value)
