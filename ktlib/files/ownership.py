"""Which files ktlib may replace or remove: those that it wrote itself, and no others. Every writer goes through here.

Results go to folders of the user, where the name of a file (``model.safetensors``, ``README.md``) does not say who
wrote it. So a writer that may be run again with the same output (``replace=True``) adds what it writes to a list in the
same folder, ``.ktlib-files-UID.jsonl``: name, size, time of change and a hash. A file is ktlib's own as long as the
list of this user describes it as it is. Everything else is somebody's and stays: files that were there before or were
changed since, files of other users, symbolic links and what they point to. Other writers (``replace=False``) only make
what is not there yet.

Whatever is written is made in a temporary folder on the same file system first, and gets its final name when it is
complete. A process that dies leaves that folder behind. A note in it says that it is temporary, and it is locked as
long as its process lives; the next writer in the same place deletes it.
"""

import contextlib
import fcntl
import filecmp
import fnmatch
import hashlib
import itertools
import json
import math
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from ktlib.names import first_of

# the files of a model or an adapter, by which from_pretrained knows a folder as one
WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model*.bin",
    "adapter_config.json",
)
MODEL_FILES = (
    *WEIGHT_FILES,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.*",
)
LIST = ".ktlib-files-"  # how the names of lists begin; then comes the user's number
ENDS = 2**16  # bytes at the start and at the end of a file that its description has the hash of
TEMPORARY = ".ktlib-partial-"  # how the names of temporary folders begin
TEMPORARY_NOTE = "temporary folder of ktlib, deleted with all that is in it.txt"
HEADER = json.dumps({"ktlib": "the files in this folder that ktlib wrote, and may replace or remove"})


# ---- whose file is it -----------------------------------------------------------------------------------------------


def is_own(path):
    """Whether ktlib wrote the file ``path``, or every file below the folder ``path``, and nobody changed it since."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        try:
            return not foreign(path.iterdir())
        except OSError:
            return False
    if path.name == _list_of(path.parent).name:
        return _records(path.parent) is not None
    described = describe(path)
    return described is not None and described in (_records(path.parent) or ())


def foreign(paths):
    """Those of ``paths`` that are there and are not ktlib's own."""
    return [path for path in map(Path, paths) if not is_own(path) and os.path.lexists(path)]


def named(folder, patterns):
    """The paths in ``folder`` whose names match one of ``patterns``, sorted; [] without a folder."""
    folder = Path(folder)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [folder / name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def refuse_foreign(paths, argument, given, replace=True):
    """ValueError if one of ``paths`` is there and is not ktlib's own; without ``replace``, if it is there at all.

    ``argument`` is the name of the argument with the value ``given``, the folder of the paths or the one path itself:
    the error says which files there are and proposes another value.
    """
    paths, given = list(map(Path, paths)), Path(given)
    if replace:
        paths = foreign([*paths, *sorted({_list_of(given), *(_list_of(path.parent) for path in paths)})])
        reason = (
            "not written by ktlib for this user, or changed since; ktlib replaces its own files only (it lists them in "
            f"{_list_of(given).name})"
        )
    else:
        paths = [path for path in paths if os.path.lexists(path)]
        reason = "there already, with other contents"
    if not paths:
        return
    among = "" if given in paths else first_of([path.name for path in paths])
    holds = f"which holds {among}: " if among else ""
    other = str(free_name(given, folder=bool(among)))
    raise ValueError(f"{argument}: got {str(given)!r}, {holds}{reason}; needs another name, such as {other!r}")


def free_name(path, folder=True):
    """A path like ``path`` at which there is nothing and can be something: ``runs/dates-2`` for ``runs/dates``."""
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()
    stem, suffix = (path.name or "ktlib", "") if folder else (path.stem, path.suffix)
    above = path.parent if os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True) else Path("runs")
    names = (above / f"{stem}-{i}{suffix}" for i in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def describe(path, name=None):
    """The entry of a list for the file ``path`` under its final ``name``; None if it is no file that can be read."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            ends = file.read(ENDS)
            file.seek(max(ENDS, status.st_size - ENDS))
            ends += file.read(ENDS)
    except OSError:
        return None
    return {
        "file": name or path.name,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "sha256_of_ends": hashlib.sha256(ends).hexdigest(),
    }


def _list_of(folder):
    return Path(folder) / f"{LIST}{os.geteuid()}.jsonl"


def _records(folder):
    """What the list in ``folder`` describes: ``[]`` without a list, None if the file of that name is not ktlib's."""
    file = _list_of(folder)
    if not os.path.lexists(file):
        return []
    if describe(file) is None:
        return None
    header, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    if header not in (HEADER, ""):
        return None
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # a line that a full disk or a crash cut off
            records.append(json.loads(line))
    return records


def record(folder, files):
    """Add ``{final name: file}`` to the list in ``folder``, before the files get these names there.

    Lines are only ever added, each by one write, so processes do not disturb each other.
    """
    lines = "".join(f"\n{json.dumps(describe(file, name))}" for name, file in files.items())
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(_list_of(folder), flags, 0o644), "ab") as file:
        file.write((lines if file.tell() else HEADER + lines).encode())
        file.flush()
        os.fsync(file.fileno())


def record_all(folder):
    """List every file below ``folder``, a folder that ktlib made and that is about to get its final name."""
    for inner, _, names in os.walk(folder):
        if new := {name: Path(inner, name) for name in names if not is_own(Path(inner, name))}:
            record(inner, new)


# ---- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(parent):
    """An empty folder on the file system of the folder ``parent``, hidden in it until it is deleted at the end.

    Such folders of processes that died are deleted too.
    """
    delete_abandoned(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        held = lock(folder, wait=math.inf)
        try:
            (folder / TEMPORARY_NOTE).touch()
            break
        except FileNotFoundError:  # another process locked the folder first, took it for abandoned and deleted it
            if held is not None:
                os.close(held)
    try:
        made = folder / "made"  # has no note in it, and the usual permissions
        made.mkdir()
        yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def delete_abandoned(parent):
    """Delete the temporary folders in the folder ``parent`` whose processes died."""
    for folder in Path(parent).glob(f"{TEMPORARY}*"):
        held = None
        with contextlib.suppress(OSError):  # BlockingIOError: its process lives
            held = lock(folder)
            if held is None or os.fstat(held).st_uid != os.geteuid():  # there is no way to know
                pass
            elif (folder / TEMPORARY_NOTE).is_file():
                shutil.rmtree(folder)
            else:
                folder.rmdir()  # its process died before it wrote the note; fails if anything is in it
        if held is not None:
            os.close(held)


def lock(folder, wait=0.0):
    """A descriptor that keeps a folder locked until it is closed; None where there is no lock to be had.

    Raises:
        BlockingIOError: another process has the lock for longer than ``wait`` seconds.
    """
    descriptor, until = None, time.monotonic() + wait
    while True:
        try:
            if descriptor is None:
                descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(descriptor)
                raise
            time.sleep(0.1)
        except OSError:
            if descriptor is not None:
                os.close(descriptor)
            return None


@contextlib.contextmanager
def new_file(path, argument="path", replace=False):
    """A path to write to; the file that is there at the end of the block becomes the file ``path``.

    With ``replace``, it takes the place of a file of ktlib's own, and may be replaced itself the next time.

    Raises:
        ValueError: something else is there, before the block or since; the error calls it ``argument``.
        FileNotFoundError: there is no folder to put it in.
    """
    path = Path(path)
    if replace:
        refuse_foreign([path], argument, path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{argument}: got {str(path)!r}, but there is no folder {path.parent}")
    with temporary_folder(path.parent) as made:
        yield made / path.name
        publish(made, path.parent, argument, path, replace)


def write_text(path, text, argument="path", replace=False):
    """Write a text file as :func:`new_file` does."""
    with new_file(path, argument, replace) as file:
        file.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path, argument="out", replace=False):
    """A folder to write to, which becomes the folder ``path`` at the end of the block, if that is reached.

    With ``replace``, it takes the place of a folder in which all is ktlib's own, also if several processes write it at
    once, as those of a distributed training do.

    Raises:
        FileExistsError: ``path`` is there and is not an empty folder (said before the block too); with ``replace``, it
            holds anything else.
    """
    path = Path(path)
    if not replace:
        refuse_existing(path, argument)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent) as made:
        yield made
        if replace:
            record_all(made)
        until = time.monotonic() + 1
        while True:
            try:
                os.replace(made, path if replace else path.resolve())  # of a link to an empty folder, the folder
                return
            except OSError:
                if not replace or time.monotonic() > until:
                    refuse_existing(path, argument)
                    raise
            remove(path)


def refuse_existing(path, argument="out"):
    """FileExistsError if there is anything at ``path`` but an empty folder: for before the work."""
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        other = free_name(path)
        raise FileExistsError(
            f"{argument}: {path} exists and is not an empty folder, needs another name, such as {other}"
        )


def publish(made, folder, argument, given=None, replace=False, old=()):
    """Move what is in the folder ``made`` into ``folder``, weights last.

    With ``replace``, into the place of files of ktlib's own, of which those in ``old`` are removed before. A file that
    is there with the same bytes is left alone.

    Raises:
        ValueError: something else is in the way of one of them, and nothing was changed; ``argument`` and ``given``
            (default: ``folder``) as in :func:`refuse_foreign`.
    """
    folder, given = Path(folder), given or folder
    paths = sorted(Path(made).iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
    unchanged = {folder / path.name for path in paths if same_bytes(path, folder / path.name)}
    paths = [path for path in paths if folder / path.name not in unchanged]
    refuse_foreign([folder / path.name for path in paths], argument, given, replace)
    for path in paths:
        if path.is_dir() and replace:
            record_all(path)
        sync(path)
    if replace:
        record(folder, {path.name: path for path in paths if not path.is_dir()})
    for path in {*old} - unchanged:
        remove(path)
    for path in paths:
        target = folder / path.name
        if path.is_dir():
            if replace:
                remove(target)
            os.replace(path, target)  # fails if somebody put something else there since
            continue
        try:
            os.link(path, target)  # unlike a renaming, it never replaces a file that somebody put there since
        except OSError:  # the name is taken, or the file system has no such links
            if same_bytes(path, target):
                continue
            refuse_foreign([target], argument, given, replace)
            os.replace(path, target)
    sync(folder)


def same_bytes(path, other):
    """Whether both are files, and have the same contents."""
    filecmp.clear_cache()  # which takes files for unchanged by size and time
    return path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)


def remove(path):
    """Delete a file or a folder of ktlib's own, a folder in one step for whoever looks at its name.

    Returns whether nothing is there any more: a folder with anything else in it stays as a whole.
    """
    path = Path(path)
    is_folder = path.is_dir() and not path.is_symlink()
    if is_folder:
        delete_abandoned(path)
    if not is_own(path):
        return not os.path.lexists(path)
    if not is_folder:
        path.unlink(missing_ok=True)
        return True
    with temporary_folder(path.parent) as removed, contextlib.suppress(FileNotFoundError):
        os.replace(path, removed)
    return True


def sync(path):
    """Make sure that a file's or folder's contents survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
