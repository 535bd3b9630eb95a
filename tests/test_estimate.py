"""What memory a run can still get: the machine's, within the limits of control groups."""

import psutil
import pytest

from ktlib.system.memory import available_memory

FREE = 100e9


@pytest.fixture
def available(tmp_path, monkeypatch):
    """Make control groups ``{folder: (limit, used, files)}`` and ask in the group ``own`` what is available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": FREE}))

    def ask(groups, own="/"):
        for name, (limit, used, files) in groups.items():
            folder = tmp_path / "cgroup" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            lines = {"anon": used - files, "file": files, "inactive_file": files // 4, "active_file": files * 3 // 4}
            (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        (tmp_path / "membership").write_text(f"1:memory:/of/version/1\n0::{own}\n")
        return available_memory(tmp_path / "cgroup", tmp_path / "membership")

    return ask


GB = 10**9


def test_files_in_memory_make_room_in_a_container(available):
    """Mapped experts count as used by a control group until something needs the memory."""
    assert available({"": (64 * GB, 60 * GB, 0)}) == 4 * GB
    assert available({"": (64 * GB, 60 * GB, 40 * GB)}) == 44 * GB


def test_never_more_than_the_machine_has(available):
    assert available({"": (640 * GB, 60 * GB, 40 * GB)}) == FREE
    assert available({"": ("max", 60 * GB, 40 * GB)}) == FREE


def test_each_group_from_its_own_to_the_top_may_have_a_limit(available):
    groups = {"jobs": (32 * GB, 12 * GB, 0), "jobs/7": ("max", 4 * GB, 0)}
    assert available(groups, "/jobs/7") == 20 * GB
    assert available({"jobs/7": (5 * GB, 4 * GB, 0)}, "/jobs/7") == GB
    assert available({"jobs/7": (5 * GB, 4 * GB, 0)}, "/jobs/8") == 20 * GB
    # a container sees its own group as the mount, and its name may be the host's
    assert available({"": (16 * GB, GB, 0)}, "/docker/0af3") == 15 * GB


def test_without_control_groups_it_is_the_machine_s(tmp_path, available):
    assert available({}) == FREE
    assert available_memory(tmp_path, tmp_path / "none") == FREE
