"""Writes checkpoints and results whole or not at all, and resumes a run from its own checkpoints only.

A process may be killed and a disk may fill up at any moment. So no folder gets its final name before it is complete:
the Trainer writes ``checkpoint-N``, which is renamed to ``step-N`` once it is on disk. Only ``step-N`` is resumed from.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerCallback

from ktlib.conversion.write import rename_for_peft
from ktlib.files import ownership
from ktlib.files.tensor_files import read_json
from ktlib.training.output_dir import CHECKPOINTS, NOTE, is_of_a_run, refuse_model_folder

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Texts in the errors of torch and safetensors for a failed write, which have no errno.
WRITE_FAILED = ("PytorchStreamWriter failed", "unexpected pos", "I/O error", "IoError")


class PublishCheckpoints(TrainerCallback):
    """Gives each checkpoint of a Trainer its final name in the output folder, then removes the previous checkpoint.

    The Trainer writes a checkpoint to the folder ``temporary``: ``args.output_dir`` is that folder while it saves, and
    the output folder at all other times, when other callbacks may write to it.
    """

    def __init__(self, temporary):
        self.temporary, self.folder = temporary, None

    def on_train_begin(self, args, state, control, **_):
        self.folder = args.output_dir

    def on_step_end(self, args, state, control, **_):
        if control.should_save:
            args.output_dir = str(self.temporary)

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **_):
        written = Path(args.output_dir, f"checkpoint-{state.global_step}")
        args.output_dir, folder = self.folder, Path(self.folder)
        if hasattr(model, "peft_config"):
            rename_for_peft(model, written)
        ownership.add_folder_to_list(written)
        for path in [*written.iterdir(), written]:
            ownership.sync(path)
        complete = folder / f"step-{state.global_step}"
        os.replace(written, complete)
        ownership.sync(folder)
        for old in folder.glob("step-*"):
            if old != complete:
                ownership.remove(old)

    def on_train_end(self, args, state, control, **_):
        args.output_dir = self.folder


def complete_checkpoint(folder):
    """``(path, step)`` of the newest complete checkpoint in ``folder``, or None."""
    named = ((re.fullmatch(r"step-([0-9]+)", path.name), path) for path in Path(folder).glob("step-*"))
    found = {int(match[1]): path for match, path in named if match and path.is_dir()}
    return (found[max(found)], max(found)) if found else None


def start_or_resume(checkpoints, identity):
    """``(path, step)`` of the checkpoint to resume this run from, or None after making a folder for a new run.

    The dict ``identity`` is that of :func:`run_identity`. A finished run with another identity is removed.

    Raises:
        ValueError: the folder holds an interrupted run with another identity, files that are not a run's, or a damaged
            note.
    """
    note = checkpoints / NOTE
    if not is_of_a_run(checkpoints):
        raise ValueError(
            f"output_dir: {checkpoints} holds files that are not a run's, needs another output_dir, such as "
            f"{ownership.free_name(checkpoints.parent)}"
        )
    ownership.delete_abandoned(checkpoints)
    if resume := complete_checkpoint(checkpoints):
        before = read_note(note)
        changed = [key for key, now in identity.items() if before.get(key) != now]
        if not changed:
            return resume
        if resume[1] < before["steps"]:
            key = changed[0]
            raise ValueError(
                f"output_dir: {checkpoints.parent} holds an interrupted run with another {key} ({before.get(key)}, now "
                f"{identity[key]}); finish that run, delete {checkpoints}, or choose another output_dir"
            )
    ownership.refuse_foreign([checkpoints], "output_dir", checkpoints.parent)
    with ownership.new_folder(checkpoints, "output_dir", replace=True) as fresh:
        (fresh / NOTE).write_text(json.dumps(identity))
    return None


def read_note(note):
    """The identity in the file ``note``; ValueError if the file is damaged."""
    with contextlib.suppress(ValueError):
        identity = read_json(note)
        if isinstance(identity.get("steps"), int):
            return identity
    raise ValueError(
        f"output_dir: {note} is damaged and does not say which run wrote these checkpoints; delete {note.parent}, or "
        "choose another output_dir"
    )


def run_identity(model, examples, **options):
    """A dict that is equal for two runs if they have the same ``options``, data, frozen weights, and first values of
    the adapters or of the trained weights.

    Only the first 16 values of each parameter are compared, which tells models apart without reading a large one.
    """
    trained, frozen = [], []
    for name, parameter in model.named_parameters():
        first = parameter.detach()[0] if parameter.dim() == 3 else parameter.detach()  # of a mapped weight one expert
        values = first.flatten()[:16].double().tolist()
        (trained if parameter.requires_grad else frozen).append((name, parameter.shape, str(parameter.dtype), values))
    adapters = getattr(model, "peft_config", {}).values()
    configs = [(c.r, c.lora_alpha, c.use_rslora, sorted(c.alpha_pattern.items())) for c in adapters]
    configs += [c.lora_dropout for c in adapters if c.lora_dropout]
    return options | {
        "adapters" if configs else "weights": fingerprint([trained, configs]),
        "model": fingerprint(frozen),
        "data": fingerprint(examples),
    }


def fingerprint(value):
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def place(model, folder, tokenizer=None):
    """Save an adapter, or a model with all weights, and the tokenizer in ``folder``, whole or not at all.

    An older model or adapter that ktlib saved there is replaced: all its files are removed before the first new file
    appears, and new weights appear last, so that the two never mix. The run's checkpoints are removed, and other files
    stay.

    Raises:
        ValueError: the folder holds a model or an adapter that ktlib did not write.
    """
    refuse_model_folder(folder, source_of(model))
    old = [*ownership.named(folder, ownership.MODEL_FILES), folder / "README.md"]
    ownership.refuse_foreign(old, "output_dir", folder)
    with ownership.temporary_folder(folder) as saved:
        model.save_pretrained(saved)
        if hasattr(model, "peft_config"):
            rename_for_peft(model, saved)
        if tokenizer is not None:
            tokenizer.save_pretrained(saved)
        ownership.publish(saved, folder, "output_dir", replace=True, old=old)
    checkpoints = folder / CHECKPOINTS
    if (checkpoints / NOTE).is_file() and not ownership.remove(checkpoints):
        warnings.warn(f"output_dir: {checkpoints} stays, ktlib did not write every file in it", stacklevel=3)


def source_of(model):
    """The folder that ``from_pretrained`` read a model from; None if its config does not say."""
    return getattr(getattr(model, "config", None), "name_or_path", None)


@contextlib.contextmanager
def locked(folder, wait=10.0):
    """Lock ``folder``, which is made if it does not exist, against other runs until the block or this process ends.

    The notebook kernel of a killed run takes a second or two to end and to unlock its folder, so a locked folder is
    waited for, ``wait`` seconds at most.

    Raises:
        ValueError: another run still has the folder locked.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = ownership.lock(folder.resolve(), wait)
    except BlockingIOError:
        raise ValueError(f"output_dir: {folder} is in use by another run, need another one") from None
    try:
        yield folder
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def writing(folder):
    """Turn the many errors of a failed write into an OSError that says where, why and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number not in CANNOT_WRITE and not any(text in str(error) for text in WRITE_FAILED):
            raise
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        free = f", {shutil.disk_usage(folder).free / 1e6:.0f} MB are free there" if Path(folder).exists() else ""
        raise OSError(
            f"output_dir: cannot write to {folder}: {reason}{free}. All complete files are intact: make room or "
            "permit writing, then start the same run again; it goes on from its last checkpoint."
        ) from error


def check_space(folder, model):
    """OSError if the disk has no room for two checkpoints and the result.

    A checkpoint holds the saved parameters and two moments of each trained parameter.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    need = sum(3 * p.nbytes for p in saved) + sum(2 * 2 * p.nbytes for p in trained) + 1_000_000
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"output_dir: {folder} has {free / 1e6:.1f} MB free, checkpoints and result need {need / 1e6:.1f}"
        )
