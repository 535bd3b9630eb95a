"""The check, before anything is loaded, that a fine-tuning run may write to its output folder."""

import os
from pathlib import Path

from ktlib.files import ownership

CHECKPOINTS = "checkpoints"  # folder in the output folder
NOTE = "run.json"  # file in the folder CHECKPOINTS: the identity of the run that wrote them
LAST_GOOD = "last_good"  # folder in the output folder, written by StopOnNonFinite
RESULTS = (  # names that a run or a stock Trainer gives to files and folders in its output folder
    *ownership.MODEL_FILES,
    "README.md",
    "nonfinite.txt",
    "nonfinite.json",
    LAST_GOOD,
    "checkpoint-[0-9]*",
    "trainer_state.json",
)


def check_output_dir(folder, model_folder):
    """ValueError if a run that trains the model in ``model_folder`` cannot or must not write to ``folder``."""
    if os.path.lexists(folder) and not Path(folder).is_dir():
        raise ValueError(f"output_dir: got {str(folder)!r}, need a folder, not a file")
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise ValueError(f"output_dir: got {str(folder)!r}, need one that can be written to: {existing} cannot")
    refuse_foreign(folder, model_folder)


def refuse_foreign(folder, model_folder):
    """ValueError if ``folder`` holds the model that is trained, or a model, an adapter, checkpoints or results that
    ktlib did not write. Files with other names are allowed and stay.
    """
    folder, checkpoints = Path(folder), Path(folder) / CHECKPOINTS
    refuse_model_folder(folder, model_folder)
    paths = ownership.named(folder, RESULTS)
    if checkpoints.is_symlink() or not is_of_a_run(checkpoints):
        paths.append(checkpoints)
    ownership.refuse_foreign(paths, "output_dir", folder)


def refuse_model_folder(folder, model_folder):
    """ValueError if ``model_folder`` is ``folder``, or lies in a folder in it that a run replaces or removes."""
    folder, model_folder = Path(folder), Path(model_folder or os.devnull)
    if not folder.is_dir() or not model_folder.is_dir():
        return
    replaced = {(folder / name).resolve() for name in (CHECKPOINTS, LAST_GOOD)}
    if os.path.samefile(folder, model_folder) or replaced & {model_folder.resolve(), *model_folder.resolve().parents}:
        raise ValueError(
            f"output_dir: got {str(folder)!r}, which holds the model that is trained, {model_folder}; needs another "
            f"folder, such as {str(ownership.free_name(folder))!r}"
        )


def is_of_a_run(checkpoints):
    """Whether the folder ``checkpoints`` has the note of a run, is empty, or does not exist."""
    return (checkpoints / NOTE).is_file() or not checkpoints.exists() or not any(checkpoints.iterdir())
