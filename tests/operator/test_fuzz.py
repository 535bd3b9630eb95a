"""Any call of the operator ends as it must: right within bounds, or refused by name (fuzz.py says how).

The 100,000 calls of ``fuzz_long.py`` are recorded in notebooks/recorded/fuzz.json.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import fuzz

ROOT = Path(__file__).parents[2]


class Drawn(fuzz.Seeded):
    """Choices that hypothesis makes, and makes simpler when one fails."""

    def __init__(self, data):
        self.data = data

    def integer(self, low, high):
        return self.data.draw(st.integers(low, high))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,  # CI says the same every time; fuzz_long.py looks further
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_any_call_is_right_or_refused(data):
    fuzz.try_one(Drawn(data))


@pytest.mark.parametrize("mistake", fuzz.MISTAKES)
def test_every_mistake_can_be_made_and_is_refused(mistake, monkeypatch):
    monkeypatch.setattr(fuzz, "MISTAKES", {mistake: fuzz.MISTAKES[mistake]})
    monkeypatch.setattr(fuzz, "_computed", lambda *_: None)
    assert mistake in {fuzz.try_one(fuzz.Seeded(seed)) for seed in range(12)}


def without_last_token(output):
    return output * (torch.arange(len(output)) < len(output) - 1)[:, None]


class HalfTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def failures(monkeypatch, wrong_call, calls):
    """How many of the calls the fuzzer finds wrong when its ``call`` is replaced by ``wrong_call(call)``."""
    monkeypatch.setattr(fuzz, "call", wrong_call(fuzz.call))
    found = 0
    for seed in range(calls):
        try:
            fuzz.try_one(fuzz.Seeded(seed))
        except AssertionError:
            found += 1
    return found


@pytest.mark.parametrize("wrong", [lambda output: output * 1.25, without_last_token, HalfTheGradient.apply])
def test_wrong_results_are_noticed(wrong, monkeypatch):
    """In a good part of the calls that are valid, have tokens and (for gradients) want some: a sixth of all."""

    def wrong_call(call):
        return lambda *given: call(*given) if len(given) == 3 else wrong(call(*given))  # the third: the reference

    assert failures(monkeypatch, wrong_call, calls=80) > 6


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("gate", lambda gate: {"silu": "gelu", "gelu": "silu"}.get(gate, gate)),
        ("limit", lambda limit: None),
        ("alpha", lambda alpha: None),
        ("interleaved", lambda interleaved: not interleaved),
    ],
)
def test_a_setting_that_is_not_obeyed_is_noticed(setting, change, monkeypatch):
    def wrong_call(call):
        def changed(tensors, options, *function):
            return call(tensors, options if function else options | {setting: change(options[setting])}, *function)

        return changed

    monkeypatch.setattr(fuzz, "MISTAKES", {"dtype": fuzz.MISTAKES["dtype"]})
    assert failures(monkeypatch, wrong_call, calls=120) > 3


def test_the_long_run(tmp_path):
    """A short one, in which a call hangs and another crashes: both are recorded, and the rest goes on."""
    command = [sys.executable, "tests/fuzz_long.py", "--calls", "12", "--json", str(tmp_path / "fuzz.json")]
    command += ["--hang", "3", "--crash", "7", "--patience", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["calls"] == 12 and sum(result["kinds"].values()) == 10
    assert {f["seed"]: f["what"] for f in result["failures"]} == {3: "hang", 7: "crash: SIGABRT"}


def test_the_recorded_run_is_of_this_generator():
    result = json.loads((ROOT / "notebooks/recorded/fuzz.json").read_text())
    assert result["calls"] >= 100_000 and result["failures"] == []
    assert set(result["kinds"]) == {"valid", *fuzz.MISTAKES}
