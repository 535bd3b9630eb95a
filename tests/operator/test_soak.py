"""Short shares of the long runs in tests/long, and what the recorded long runs say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LONG = Path(__file__).parents[1] / "long"
SHARES = {
    "fine-tuning": ["--steps", "18", "--every", "5"],
    "operator": ["--operator", "10000", "--seconds", "8"],
}


def output(done):
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    return json.loads(done.stdout[done.stdout.index("{\n") :])


@pytest.mark.parametrize("share", SHARES)
def test_memory_stays_flat_and_values_finite(share):
    command = [sys.executable, LONG / "soak.py", *SHARES[share]]
    result = output(subprocess.run(command, capture_output=True, text=True))
    assert result["finite"] and result["steps"] >= 18
    if share == "fine-tuning":
        assert [row["first_step"] for row in result["sessions"]] == [1, 6, 11] and result["last_resumed_from"] == 10


def test_growing_memory_is_seen():
    sys.path.insert(0, str(LONG))
    try:
        from soak import growth
    finally:
        sys.path.remove(str(LONG))
    assert growth([100.0] * 100)["flat"] and growth([50.0] * 10 + [100.0] * 90)["flat"]
    assert not growth([100.0 + 0.1 * step for step in range(100)])["flat"]


RECORDED = {
    "soak_1000_steps": lambda run: run["steps"] == 1000 and run["good"] and len(run["sessions"]) == 3,
    "soak_operator": lambda run: run["steps"] == 10000 and run["good"],
    "notebook_parameters": lambda run: (
        run["good"] and run["runs"] == sum(sum(n.values()) for n in run["counts"].values())
    ),
    "interrupted": lambda run: run["same_adapter_bits"] and len(run["kills"]) == 10,
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_long_runs(name):
    run = json.loads((LONG / "recorded" / f"{name}.json").read_text())
    assert RECORDED[name](run)
    assert {"command", "date", "processor", "torch", "seconds"} <= set(run)
    script = run["command"].split()[1]
    assert (LONG.parents[1] / script).exists()
