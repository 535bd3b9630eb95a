"""Checkpoints and results on disk: whole or not there, kept until no longer needed, never those of another run.

A process may be killed and a disk may fill up at any moment. So nothing gets its final name before it is complete: the
Trainer writes ``checkpoint-N``, which is renamed to ``step-N`` once it is on disk, and only ``step-N`` is resumed from.
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
# torch and safetensors report a failed write without its errno
WRITE_FAILED = ("PytorchStreamWriter failed", "unexpected pos", "I/O error", "IoError")


class KeepWhole(TrainerCallback):
    """Gives each checkpoint of a Trainer its final name in the output folder, then removes the one before.

    The Trainer writes it to the folder ``temporary``, which is its output folder for that moment. Whatever else a
    callback writes to ``args.output_dir`` is not ours, and stays where it is.
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
        ownership.record_all(written)
        for path in [*written.iterdir(), written]:
            ownership.sync(path)
        whole = folder / f"step-{state.global_step}"
        os.replace(written, whole)
        ownership.sync(folder)
        for old in folder.glob("step-*"):
            if old != whole:
                ownership.remove(old)

    def on_train_end(self, args, state, control, **_):
        args.output_dir = self.folder


def complete_checkpoint(folder):
    """``(path, step)`` of the newest checkpoint in ``folder`` that was written to its end, or None."""
    named = ((re.fullmatch(r"step-([0-9]+)", path.name), path) for path in Path(folder).glob("step-*"))
    found = {int(match[1]): path for match, path in named if match and path.is_dir()}
    return (found[max(found)], max(found)) if found else None


def start_or_resume(checkpoints, identity):
    """What ``complete_checkpoint`` finds of this run, or None after making the folder for a new run.

    ``identity`` (dict) says what the run is. ValueError if the folder holds an interrupted run that is another, or
    other files. A finished run that is another was not saved, nor interrupted: it makes room.
    """
    note = checkpoints / NOTE
    if not is_of_a_run(checkpoints):
        raise ValueError(
            f"output_dir: {checkpoints} holds files of something else, needs another output_dir, such as "
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
    """The identity in the file ``note``; ValueError if it is damaged."""
    with contextlib.suppress(ValueError):
        identity = read_json(note)
        if isinstance(identity.get("steps"), int):
            return identity
    raise ValueError(
        f"output_dir: {note} is damaged and does not say whose checkpoints these are; delete {note.parent}, or choose "
        "another output_dir"
    )


def run_identity(model, examples, **options):
    """What must be equal for two runs to be the same: ``options``, data, frozen weights, and as they start the adapters
    or the weights that are trained.

    Of each parameter the first values are looked at: enough to tell models apart, without reading all of a large one.
    """
    trained, frozen = [], []
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:16].double().tolist()
        (trained if parameter.requires_grad else frozen).append((name, parameter.shape, str(parameter.dtype), first))
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
    """Save what ``model.save_pretrained`` does (an adapter, or all weights) and the tokenizer in ``folder``, whole.

    Takes the place of a model or an adapter that ktlib saved there; ValueError if the folder holds another. Other files
    stay, checkpoints of the run that made it go. A mixture with the older adapter or model cannot be: all its files go
    first, new weights come last.
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
    """Keep other processes out of ``folder`` (made if need be) as long as this one works there, however it ends.

    A killed run's notebook kernel takes a second or two to notice and leave, so this waits. ValueError after that.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = ownership.lock(folder.resolve(), wait)
    except BlockingIOError:
        raise ValueError(f"output_dir: {folder} is in use by another run, need another one") from None
    try:
        yield folder
    finally:
        if held is not None:
            os.close(held)


@contextlib.contextmanager
def writing(folder):
    """Turn the many ways in which a write can fail into an OSError that says where, why and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number not in CANNOT_WRITE and not any(text in str(error) for text in WRITE_FAILED):
            raise
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        free = f", {shutil.disk_usage(folder).free / 1e6:.0f} MB are free there" if Path(folder).exists() else ""
        raise OSError(
            f"output_dir: cannot write to {folder}: {reason}{free}. What was complete there is intact: make room or "
            "permit writing, then start the same run again; it goes on from its last checkpoint."
        ) from error


def check_space(folder, model):
    """Raise OSError before any work if two checkpoints (what is saved, two moments of what is trained) and the result
    cannot fit.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    need = sum(3 * p.nbytes for p in saved) + sum(2 * 2 * p.nbytes for p in trained) + 1_000_000
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"output_dir: {folder} has {free / 1e6:.1f} MB free, checkpoints and result need {need / 1e6:.1f}"
        )
