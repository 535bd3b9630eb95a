"""All writing of files. ktlib replaces and removes only files that it wrote itself, and files appear only complete.

Results go to folders of the user, where the name of a file (``model.safetensors``, ``README.md``) does not tell who
wrote it. So a writer that can be run again with the same output (``replace=True``) adds an entry for each file that it
writes to a list in the same folder, ``.ktlib-files-UID.jsonl``: name, size, time of change and a hash. A file is
ktlib's own if its entry in the list of this user matches its current state. All other files are foreign, and ktlib
never changes them: files that existed before, files that somebody changed later, files of other users, symbolic links
and their targets. Writers without ``replace`` only create files that do not exist.

Every file is first written to a temporary folder on the same file system, and gets its final name when it is complete.
The temporary folder contains a note that says that it is temporary, and is locked while its process lives. If the
process dies, the folder is left over, and the next writer in the same parent folder deletes it.
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

# names of the files of a model or an adapter; from_pretrained loads a folder that has them
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
LIST_PREFIX = ".ktlib-files-"  # the name of a list is this, the user's number and .jsonl
HASHED_BYTES = 2**16  # an entry has a hash of so many bytes at the start and at the end of its file
TEMPORARY = ".ktlib-partial-"  # the names of temporary folders begin so
TEMPORARY_NOTE = "temporary folder of ktlib, deleted with all that is in it.txt"
HEADER = json.dumps({"ktlib": "the files in this folder that ktlib wrote, and may replace or remove"})


# ---- ownership ------------------------------------------------------------------------------------------------------


def is_own(path):
    """Whether ktlib wrote the file ``path``, or each file below the folder ``path``, and nobody changed it since."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        try:
            return not foreign(path.iterdir())
        except OSError:
            return False
    if path == _list_file(path.parent):
        return _entries(path.parent) is not None
    entry = _entry(path)
    return entry is not None and entry in (_entries(path.parent) or ())


def foreign(paths):
    """Those of ``paths`` that exist and are not ktlib's own."""
    return [path for path in map(Path, paths) if not is_own(path) and os.path.lexists(path)]


def named(folder, patterns):
    """The paths in ``folder`` whose names match one of ``patterns``, sorted; [] if there is no such folder."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return [Path(folder, name) for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def refuse_foreign(paths, argument, given, replace=True):
    """Raise a ValueError if one of ``paths`` exists and is not ktlib's own; without ``replace``, if one exists.

    The user passed ``given`` as ``argument``: the folder of the paths, or the single path itself. The error names the
    files and proposes another value for the argument.
    """
    paths, given = list(map(Path, paths)), Path(given)
    if replace:
        paths = foreign([*paths, *sorted({_list_file(given), *(_list_file(path.parent) for path in paths)})])
        reason = (
            "not written by ktlib for this user, or changed since; ktlib replaces its own files only (it lists them in "
            f"{_list_file(given).name})"
        )
    else:
        paths = [path for path in paths if os.path.lexists(path)]
        reason = "there already, with other contents"
    if not paths:
        return
    is_folder = given not in paths
    holds = f"which holds {first_of([path.name for path in paths])}: " if is_folder else ""
    other = str(free_name(given, folder=is_folder))
    raise ValueError(f"{argument}: got {str(given)!r}, {holds}{reason}; needs another name, such as {other!r}")


def free_name(path, folder=True):
    """A similar path that does not exist and can be written: ``runs/dates-2`` for ``runs/dates``.

    The number comes before the suffix of a file, and at the end of the name of a ``folder``.
    """
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()
    stem, suffix = (path.name or "ktlib", "") if folder else (path.stem, path.suffix)
    parent = path.parent if os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True) else Path("runs")
    names = (parent / f"{stem}-{i}{suffix}" for i in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def _entry(path, name=None):
    """The list's entry for the file ``path`` under its final ``name``; None if ``path`` is no readable regular file."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            ends = file.read(HASHED_BYTES)
            file.seek(max(HASHED_BYTES, status.st_size - HASHED_BYTES))
            ends += file.read(HASHED_BYTES)
    except OSError:
        return None
    return {
        "file": name or path.name,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "sha256_of_ends": hashlib.sha256(ends).hexdigest(),
    }


def _list_file(folder):
    return Path(folder) / f"{LIST_PREFIX}{os.geteuid()}.jsonl"


def _entries(folder):
    """The entries of the list in ``folder``: ``[]`` without a list, None if a foreign file has the list's name."""
    file = _list_file(folder)
    if not os.path.lexists(file):
        return []
    if _entry(file) is None:
        return None
    header, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    if header not in (HEADER, ""):
        return None
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # a full disk or a crash cut the line off
            entries.append(json.loads(line))
    return entries


def add_to_list(folder, files):
    """Add entries for ``{final name: file}`` to the list in ``folder``, before the files are moved to these names.

    Several processes can do this at once: all entries are appended in a single write, and no entry is ever changed.
    The line breaks at both ends separate them from a line that a crash cut off, and from a second header, which appears
    if two processes begin the list at the same time.
    """
    lines = "".join(f"\n{json.dumps(_entry(file, name))}" for name, file in files.items()) + "\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(_list_file(folder), flags, 0o644), "ab") as file:
        file.write((lines if file.tell() else HEADER + lines).encode())
        file.flush()
        os.fsync(file.fileno())


def add_folder_to_list(folder):
    """Add every file below ``folder`` to the lists there, before this folder of ktlib's gets its final name."""
    for subfolder, _, names in os.walk(folder):
        if new := {name: Path(subfolder, name) for name in names if not is_own(Path(subfolder, name))}:
            add_to_list(subfolder, new)


# ---- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(parent):
    """An empty, hidden folder in the folder ``parent``, deleted at the end of the block with all that is left in it.

    Temporary folders that dead processes left in ``parent`` are deleted first.
    """
    delete_abandoned(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        descriptor = lock(folder, wait=math.inf)
        try:
            (folder / TEMPORARY_NOTE).touch()
            break
        except FileNotFoundError:  # another process locked the folder first, saw no note and deleted it as abandoned
            if descriptor is not None:
                os.close(descriptor)
    try:
        made = folder / "made"  # unlike ``folder``, it has the usual permissions and no note in it
        made.mkdir()
        yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def delete_abandoned(parent):
    """Delete the temporary folders in the folder ``parent`` whose processes died."""
    for folder in named(parent, [f"{TEMPORARY}*"]):
        descriptor = None
        with contextlib.suppress(OSError):  # BlockingIOError: the folder's process lives
            descriptor = lock(folder)
            if descriptor is None or os.fstat(descriptor).st_uid != os.geteuid():
                pass  # nothing tells whether the folder's process lives
            elif (folder / TEMPORARY_NOTE).is_file():
                shutil.rmtree(folder)
            else:
                folder.rmdir()  # the process died before it wrote the note; fails if the folder is not empty
        if descriptor is not None:
            os.close(descriptor)


def lock(folder, wait=0.0):
    """Lock a folder; returns a descriptor that holds the lock until it is closed, None where folders cannot be locked.

    Raises:
        BlockingIOError: another process held the lock for ``wait`` seconds.
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
    """A temporary path; the file that the block writes to it becomes the file ``path`` at the end of the block.

    With ``replace``, it replaces a file of ktlib's own, and is entered in the list so that it can be replaced later.

    Raises:
        ValueError: another file ``path`` exists, or appeared during the block; the error names it as ``argument``.
        FileNotFoundError: the folder of ``path`` does not exist.
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
    """A temporary folder, which becomes the folder ``path`` at the end of the block unless the block raises an error.

    With ``replace``, it replaces a folder in which all files are ktlib's own. Several processes may do this at once, as
    those of a distributed training do.

    Raises:
        FileExistsError: ``path`` exists before or after the block and is not an empty folder; with ``replace``, after
            the block only, and if it holds a foreign file.
    """
    path = Path(path)
    if not replace:
        refuse_existing(path, argument)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent) as made:
        yield made
        if replace:
            add_folder_to_list(made)
        until = time.monotonic() + 1
        while True:
            try:
                os.replace(made, path if replace else path.resolve())  # resolved: a link to an empty folder stays
                return
            except OSError:
                if not replace or time.monotonic() > until:
                    refuse_existing(path, argument)
                    raise
            remove(path)


def refuse_existing(path, argument="out"):
    """Raise a FileExistsError, before any work is done, if ``path`` exists and is not an empty folder."""
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        other = free_name(path)
        raise FileExistsError(
            f"{argument}: {path} exists and is not an empty folder, needs another name, such as {other}"
        )


def publish(made, folder, argument, given=None, replace=False, old=()):
    """Move the contents of the folder ``made`` into ``folder``, weights last.

    With ``replace``, files and folders of ktlib's own are replaced, and those in ``old`` are removed first. A file in
    ``folder`` with the same bytes is left unchanged.

    Raises:
        ValueError: a foreign file has one of the names, and nothing was changed; ``argument`` and ``given`` (default:
            ``folder``) as in :func:`refuse_foreign`.
    """
    folder, given = Path(folder), given or folder
    paths = sorted(Path(made).iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
    unchanged = {folder / path.name for path in paths if same_bytes(path, folder / path.name)}
    paths = [path for path in paths if folder / path.name not in unchanged]
    refuse_foreign([folder / path.name for path in paths], argument, given, replace)
    for path in paths:
        if path.is_dir() and replace:
            add_folder_to_list(path)
        sync(path)
    if replace:
        add_to_list(folder, {path.name: path for path in paths if not path.is_dir()})
    for path in {*old} - unchanged:
        remove(path)
    for path in paths:
        target = folder / path.name
        if path.is_dir():
            if replace:
                remove(target)
            os.replace(path, target)  # fails if a file, or a folder that is not empty, appeared since
            continue
        try:
            os.link(path, target)  # unlike os.replace, this never replaces a file that appeared since the check
        except OSError:  # the target exists, or the file system has no hard links
            if same_bytes(path, target):
                continue
            refuse_foreign([target], argument, given, replace)
            os.replace(path, target)
    sync(folder)


def same_bytes(path, other):
    """Whether both paths are files with the same contents."""
    filecmp.clear_cache()  # a cached result ignores changes that leave size and time as they were
    return path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)


def remove(path):
    """Delete a file or a folder of ktlib's own; returns whether nothing exists at ``path`` any more.

    A folder disappears in one step, by renaming. A folder that holds a foreign file is left unchanged as a whole.
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
    """Write a file's or folder's contents to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
