"""How much memory this process can still allocate."""

from pathlib import Path, PurePath

import psutil


def available_memory(mount="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """Bytes that this process can still allocate: what the machine has available, within control groups' limits.

    File pages in memory, such as those of mapped experts, count as available, because the kernel can drop them.

    Args:
        mount: folder where the kernel shows control groups (version 2).
        membership: file that names the control group of this process.
    """
    available = psutil.virtual_memory().available
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:  # a kernel without control groups
        lines = []
    group = PurePath(next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), ""))
    for ancestor in (group, *group.parents):  # each of them may have a limit
        try:
            files = {name: Path(mount, ancestor, f"memory.{name}").read_text() for name in ("max", "current", "stat")}
            counts = dict(line.split() for line in files["stat"].splitlines())
            cached = int(counts["inactive_file"]) + int(counts["active_file"])
            available = min(available, int(files["max"]) - int(files["current"]) + cached)
        except (OSError, ValueError, KeyError):  # the group is not visible in this container, or has no limit ("max")
            pass
    return available
