"""Files of somebody else, planted where ktlib writes, and a look whether they are as they were."""

import os
from pathlib import Path


def snapshot(folder):
    """``{path: bytes of the file, target of the link, or None for a folder}`` of all that is below a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        found[str(path.relative_to(folder))] = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
    return found


def survives(before, folder):
    """Whether everything in the snapshot is there as it was, whatever came in addition."""
    after = snapshot(folder)
    return [name for name, content in before.items() if name not in after or after[name] != content] == []


def put(folder, *names):
    for name in names:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"somebody's {name}")
