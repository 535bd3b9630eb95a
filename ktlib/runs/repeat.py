"""What a fine-tuning run was made of and came to, in its notebook; and the same run once more, compared.

Same seed and parameters, same instruction set, same versions: the same adapter, bit for bit, on any number of threads.
"""

from pathlib import Path

import torch

from ktlib.files import tensor_files
from ktlib.files.ownership import free_name
from ktlib.runs import notebooks
from ktlib.runs.versions import facts
from ktlib.system.cpu import cpu_info

RECORD = "repeat"  # the name under which a notebook records it


def provenance(parameters, result, folder):
    """Everything needed to repeat a run, and the digest of its adapter or model: a dict for ``record(repeat=...)``.

    ``parameters``: of ``sft.check_parameters``; ``result``: of ``sft.train``; ``folder``: of what was saved. Where
    results went is left out: it changes nothing.
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
        FileNotFoundError: nothing is saved there.
        ValueError: a file is damaged.
    """
    return tensor_files.digest(tensor_files.read(*tensor_files.weight_files(folder)))


def recorded(notebook):
    """What an executed notebook recorded with ``provenance``. ValueError if it is no notebook or recorded nothing."""
    records = notebooks.records(notebooks.read(notebook))
    if RECORD not in records:
        raise ValueError(f"{notebook}: has no record of a run, needs an SFT notebook that ran to its end")
    return records[RECORD]


def differences(before, now):
    """``(results, circumstances)``: lines that say what differs between two provenances."""
    results, circumstances = [], []
    if before["adapter"] != now["adapter"]:
        results.append(f"adapter: {before['adapter'][:16]}, now {now['adapter'][:16]}")
    for table, lines in (("identity", results), ("parameters", circumstances), ("environment", circumstances)):
        names = [*before[table], *(name for name in now[table] if name not in before[table])]
        for name in names:
            old, new = before[table].get(name), now[table].get(name)
            if old != new:
                lines.append(f"{name}: {old}, now {new}")
    return results, circumstances


def repeat(run, notebook, folder, changes=None):
    """Execute ``notebook`` as the executed notebook ``run`` was, results in ``folder``.

    ``changes``: parameters to set otherwise. Returns the dict of :func:`ktlib.runs.notebooks.run` with ``results`` and
    ``circumstances`` (``differences``); both are None if the run failed.
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
    result = notebooks.run(notebook, folder, parameters | (changes or {}))
    if result["error"]:
        return result | {"results": None, "circumstances": None}
    now = recorded(result["notebook"])
    # named above, chosen there; the environment says if it differs
    now["parameters"]["isa"] = before["parameters"]["isa"]
    results, circumstances = differences(before, now)
    return result | {"results": results, "circumstances": circumstances}
