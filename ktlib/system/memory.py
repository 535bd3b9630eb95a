"""How much memory this process may still take."""

from pathlib import Path, PurePath

import psutil


def available_memory(mount="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """Bytes that this process can still get: what the machine has available, or up to the limits of its control groups.

    Files in memory, such as mapped experts, count as available, as the machine's do: they make room. ``mount`` and
    ``membership`` say where the kernel shows control groups (version 2) and of which of them this process is a member.
    """
    available = psutil.virtual_memory().available
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:  # a kernel without control groups
        lines = []
    group_of_process = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in map(str, (PurePath(group_of_process), *PurePath(group_of_process).parents)):  # each may have a limit
        try:
            files = {name: Path(mount, group, f"memory.{name}").read_text() for name in ("max", "current", "stat")}
            counts = dict(line.split() for line in files["stat"].splitlines())
            cached = int(counts["inactive_file"]) + int(counts["active_file"])
            available = min(available, int(files["max"]) - int(files["current"]) + cached)
        except (OSError, ValueError, KeyError):  # no such group here, or no limit ("max")
            pass
    return available
