"""Whether a fine-tuning run may write to its output folder: looked at before anything is loaded."""

import os
from pathlib import Path

from ktlib.files import ownership

CHECKPOINTS = "checkpoints"  # the folder in the output folder
NOTE = "run.json"  # in it: whose checkpoints these are
LAST_GOOD = "last_good"  # beside it: of StopOnNonFinite
RESULTS = (  # what a run puts into its output folder, and what a stock Trainer puts there
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
    above = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not os.access(above, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise ValueError(f"output_dir: got {str(folder)!r}, need one that can be written to: {above} cannot")
    refuse_foreign(folder, model_folder)


def refuse_foreign(folder, model_folder):
    """ValueError if ``folder`` holds the model that is trained, or a model, an adapter, checkpoints or results that are
    not ktlib's. Other files in it do not matter, and stay.
    """
    folder, checkpoints = Path(folder), Path(folder) / CHECKPOINTS
    refuse_model_folder(folder, model_folder)
    paths = ownership.named(folder, RESULTS)
    if checkpoints.is_symlink() or not is_of_a_run(checkpoints):
        paths.append(checkpoints)
    ownership.refuse_foreign(paths, "output_dir", folder)


def refuse_model_folder(folder, model_folder):
    """ValueError if ``model_folder`` is ``folder``, or one of those in it that a run replaces or removes."""
    folder, model_folder = Path(folder), Path(model_folder or os.devnull)
    if not folder.is_dir() or not model_folder.is_dir():
        return
    within = [(folder / name).resolve() for name in (CHECKPOINTS, LAST_GOOD)]
    if os.path.samefile(folder, model_folder) or {*within} & {model_folder.resolve(), *model_folder.resolve().parents}:
        raise ValueError(
            f"output_dir: got {str(folder)!r}, which holds the model that is trained, {model_folder}; needs another "
            f"folder, such as {str(ownership.free_name(folder))!r}"
        )


def is_of_a_run(checkpoints):
    """Whether the folder ``checkpoints`` is one of ours by its note, or has nothing in it, or is not there."""
    return (checkpoints / NOTE).is_file() or not checkpoints.exists() or not any(checkpoints.iterdir())
