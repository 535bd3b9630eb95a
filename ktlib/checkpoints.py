"""Checkpoints and results on disk: whole or not there, kept until no longer needed, never those of another run.

A process may be killed and a disk may fill up at any moment. So nothing gets its final name before it is complete: the
Trainer writes ``checkpoint-N``, which is renamed to ``step-N`` once it is on disk, and only ``step-N`` is resumed from.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerCallback

CHECKPOINTS = "checkpoints"  # the folder in the output folder
NOTE = "run.json"  # in it: whose checkpoints these are
WEIGHTS = (  # the files that save_pretrained makes of an adapter or a model
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# torch and safetensors report a failed write without its errno
WRITE_FAILED = ("PytorchStreamWriter failed", "unexpected pos", "I/O error", "IoError")


class KeepWhole(TrainerCallback):
    """Gives each checkpoint of a Trainer its final name, then removes the one before."""

    def on_save(self, args, state, control, **_):
        folder = Path(args.output_dir)
        written = folder / f"checkpoint-{state.global_step}"
        for path in [*written.iterdir(), written]:
            sync(path)
        whole = folder / f"step-{state.global_step}"
        os.replace(written, whole)
        sync(folder)
        for old in folder.glob("step-*"):
            if old != whole:
                discard(old)


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
    if checkpoints.exists() and not note.is_file() and any(checkpoints.iterdir()):
        raise ValueError(f"output_dir: {checkpoints} holds files of something else, need another output_dir")
    for rubbish in [*checkpoints.parent.glob(f".{checkpoints.name}.*"), *checkpoints.glob("checkpoint-*")]:
        shutil.rmtree(rubbish)
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
    discard(checkpoints)
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{checkpoints.name}.", dir=checkpoints.parent))
    (fresh / NOTE).write_text(json.dumps(identity))
    os.replace(fresh, checkpoints)
    return None


def read_note(note):
    """The identity in the file ``note``; ValueError if it is damaged."""
    try:
        identity = json.loads(note.read_bytes())
        if isinstance(identity, dict) and isinstance(identity.get("steps"), int):
            return identity
    except (ValueError, RecursionError):
        pass
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

    Other files stay, checkpoints of the run that made it go. A mixture with an older adapter or model cannot be: old
    weights go first, all of them, new ones come last. With an older adapter goes its config if a whole model takes its
    place: from_pretrained would load that.
    """
    for rubbish in folder.glob(".saved-*"):
        shutil.rmtree(rubbish)
    with tempfile.TemporaryDirectory(prefix=".saved-", dir=folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        paths = sorted(Path(temporary).iterdir(), key=lambda path: path.suffix == ".safetensors")
        for path in paths:
            sync(path)
        old = [*WEIGHTS] if hasattr(model, "peft_config") else [*WEIGHTS, "adapter_config.json"]
        for path in [path for pattern in old for path in folder.glob(pattern)]:
            path.unlink()
        for path in paths:
            os.replace(path, folder / path.name)
    if (folder / CHECKPOINTS / NOTE).is_file():
        discard(folder / CHECKPOINTS)


@contextlib.contextmanager
def locked(folder, wait=10.0):
    """Keep other processes out of ``folder`` (made if need be) as long as this one works there, however it ends.

    A killed run's notebook kernel takes a second or two to notice and leave, so this waits. ValueError after that.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(f"output_dir: {folder} is in use by another run, need another one") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield folder
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(folder):
    """Turn the many ways in which a write can fail into an OSError that says where, why and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number not in CANNOT_WRITE and not any(text in str(error) for text in WRITE_FAILED):
            raise
        for partial in Path(folder).glob(f"{CHECKPOINTS}/checkpoint-*"):
            shutil.rmtree(partial, ignore_errors=True)
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


def discard(folder):
    """Remove a folder, in one step for whoever looks at its name; the next run removes what a kill leaves of it."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sync(path):
    """Make sure that a file's or folder's contents survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
