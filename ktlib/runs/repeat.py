"""Provenance of fine-tuning runs: a notebook records it, and a run can be repeated from it and compared.

With the same seed, parameters, instruction set and versions of packages, a run gives the same adapter, bit for bit, on
any number of threads.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from ktlib.files import tensor_files
from ktlib.files.ownership import free_name
from ktlib.runs import notebooks
from ktlib.runs.versions import facts
from ktlib.system.cpu import cpu_info

RECORD = "repeat"  # the name under which a notebook records its provenance


class Repetition(NamedTuple):
    """A repeated run, and how it differs from the first one: lines of text, both None if the repetition failed."""

    run: notebooks.Executed
    results: list[str] | None
    circumstances: list[str] | None


def provenance(parameters, result, folder):
    """Everything that is needed to repeat a run, and the digest of its result: a dict for ``record(repeat=...)``.

    Args:
        parameters: what ``sft.check_parameters`` returned. ``output_dir`` is left out, since no result depends on it.
        result: what ``sft.train`` returned.
        folder: where the adapter or model was saved.
    """
    return {
        "parameters": {name: value for name, value in parameters.items() if name != "output_dir"},
        "identity": result["identity"],
        "isa": cpu_info()["isa"],
        "threads": torch.get_num_threads(),
        "environment": facts(),
        "adapter": digest(folder),
    }


def digest(folder):
    """SHA-256 of the names, types, shapes and bits of the tensors of the adapter or model saved in a folder.

    Raises:
        FileNotFoundError: the folder has no safetensors file.
        ValueError: a file is damaged.
    """
    return tensor_files.digest(tensor_files.read(*tensor_files.weight_files(folder)))


def recorded(notebook):
    """The :func:`provenance` that an executed notebook recorded; ValueError if it has none, or is no notebook."""
    records = notebooks.records(notebooks.read(notebook))
    if RECORD not in records:
        raise ValueError(f"{notebook}: has no record of a run, needs an SFT notebook that ran to its end")
    return records[RECORD]


def differences(before, now):
    """``(results, circumstances)``: the differences of two provenances, as lines of text.

    Circumstances are parameters and environment; results are the adapter and the identity of the training.
    """
    results, circumstances = [], []
    if before["adapter"] != now["adapter"]:
        results.append(f"adapter: {before['adapter'][:16]}, now {now['adapter'][:16]}")
    for section, lines in (("identity", results), ("parameters", circumstances), ("environment", circumstances)):
        for name in before[section] | now[section]:
            old, new = before[section].get(name), now[section].get(name)
            if old != new:
                lines.append(f"{name}: {old}, now {new}")
    return results, circumstances


def run_again(run, notebook, folder, changes=None):
    """Execute ``notebook`` with the parameters of the executed notebook ``run``; returns a :class:`Repetition`.

    Args:
        run: path of the executed notebook.
        notebook: path of the notebook to execute.
        folder: where the results go.
        changes: parameters that replace those of ``run``.

    Raises:
        ValueError: ``run`` is in ``folder``, has no provenance, or used an instruction set that cannot run here; or as
            :func:`ktlib.runs.notebooks.run`.
    """
    if Path(run).resolve().parent == Path(folder).resolve():
        raise ValueError(
            f"folder: {folder} is where {run} is, which the repetition would replace; needs another name, such as "
            f"{free_name(folder)}"
        )
    before = recorded(run)
    if missing := cpu_info()["isas"].get(before["isa"], "is unknown here"):
        raise ValueError(f"{run}: ran on {before['isa']}, which cannot run here: {missing}")
    parameters = before["parameters"] | {"isa": before["isa"], "output_dir": str(Path(folder) / "adapter")}
    executed = notebooks.run(notebook, folder, parameters | (changes or {}))
    if executed.error:
        return Repetition(executed, None, None)
    now = recorded(executed.notebook)
    # The first run may have chosen its instruction set by default, but the repetition got it as a parameter. That is no
    # difference: "environment" holds the instruction set that each run used.
    now["parameters"]["isa"] = before["parameters"]["isa"]
    return Repetition(executed, *differences(before, now))
