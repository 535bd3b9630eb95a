"""The plugin and the runner of ``make test-peers`` themselves, on small tests made here; nothing is downloaded."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

PEERS = Path(__file__).parent / "peers"
TESTS = """
import torch, transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

NAME = "trl-internal-testing/tiny-GptOssForCausalLM"

def experts(model):
    return next(m for m in model.modules() if hasattr(m, "_apply_gate"))

def test_experts_are_ours():
    model = transformers.AutoModelForCausalLM.from_pretrained(NAME).float()
    assert model.config._experts_implementation == "ktlib" and model.lm_head.weight.dtype == torch.float32
    assert experts(model).down_proj.dtype == torch.bfloat16
    model(input_ids=torch.arange(8)[None])

def test_adapters_are_ours():
    model = transformers.AutoModelForCausalLM.from_pretrained(NAME)
    model = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["0.mlp.experts.down_proj"]))
    (wrapper,) = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert type(wrapper).__module__ == "ktlib.integrations.peft_lora"
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()

def test_stock_experts_are_left_to_those_who_name_them():
    model = transformers.AutoModelForCausalLM.from_pretrained(NAME, experts_implementation="eager")
    assert model.config._experts_implementation == "eager"

def test_fails():
    assert False
"""
TWO, STOCK = "experts_are_ours or adapters_are_ours", "left_to_those_who_name_them"


def run(tests, folder, chosen, differences=None):
    (folder / "test_made.py").write_text(tests)
    (folder / "differences.json").write_text(json.dumps(differences or {}))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "plugin"]
    command += ["-c", PEERS / "pytest.ini"]
    command += ["--rootdir", folder, "--differences", folder / "differences.json", "-k", chosen, "test_made.py"]
    paths = os.pathsep.join([str(PEERS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_plugin_puts_ktlib_in_place_and_counts_its_calls(tmp_path):
    code, output = run(TESTS, tmp_path, f"{TWO} or fails", {"::test_fails$": "it says False"})
    assert code == 0 and "2 passed, 1 deselected, 1 xfailed" in output, output
    assert "ktlib's operator: 4 forward and 2 backward calls, in 2 tests" in output  # two layers


def test_tests_that_never_call_the_operator_count_as_failed(tmp_path):
    code, output = run(TESTS, tmp_path, STOCK)
    assert "1 passed" in output and "0 forward and 0 backward calls, in 0 tests" in output
    assert code == 1 and "say nothing about ktlib" in output


def test_a_difference_that_is_expected_has_to_be_there(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PEERS))
    import plugin

    file, marks = tmp_path / "differences.json", []
    file.write_text(json.dumps({"::test_a\\[1\\]$": "reason"}))
    items = [SimpleNamespace(nodeid=f"file.py::test_a[{i}]", add_marker=marks.append) for i in (1, 11)]
    plugin.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: str(file)), items)
    assert [(mark.name, mark.kwargs) for mark in marks] == [("xfail", {"reason": "reason", "strict": True})]


@pytest.fixture
def runner(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PEERS))
    import run

    monkeypatch.setattr(run, "BUILD", tmp_path / "peers")
    return run


def checkout(folder, version):
    (folder / "src" / "transformers").mkdir(parents=True)
    (folder / "tests" / "models").mkdir(parents=True)
    (folder / "src" / "transformers" / "__init__.py").write_text(f'# comment\n__version__ = "{version}"\n')
    return folder


def test_a_checkout_is_the_installed_version_or_refused(runner, tmp_path, monkeypatch):
    folder = checkout(tmp_path / "transformers", "5.24.0")
    assert runner.find_checkout(str(folder), "5.24.0") == folder
    with pytest.raises(RuntimeError, match=r"got 5\.24\.0 in .*, needs 5\.17\.0.*--branch v5\.17\.0"):
        runner.find_checkout(str(folder), "5.17.0")
    with pytest.raises(RuntimeError, match="no git checkout of transformers"):
        runner.find_checkout(str(tmp_path / "nothing"), "5.24.0")
    monkeypatch.setattr(runner, "URL", str(tmp_path / "not there"))
    assert runner.find_checkout(None, "5.24.0") is None


def test_a_source_distribution_is_used_again_and_is_the_installed_version(runner):
    runner.BUILD.mkdir()
    for name, version in (("peft-1.0", "1.0"), ("peft-2.0", "1.0")):
        with tarfile.open(runner.BUILD / f"{name}.tar.gz", "w:gz") as archive:
            entry, text = tarfile.TarInfo(f"{name}/PKG-INFO"), f"Name: peft\nVersion: {version}\n".encode()
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    assert runner.source("peft", "1.0") == runner.BUILD / "peft-1.0"
    with pytest.raises(RuntimeError, match="got version 1.0 of peft, needs 2.0"):
        runner.source("peft", "2.0")


def test_every_expected_difference_has_a_pattern_and_a_reason():
    for pattern, reason in json.loads((PEERS / "differences.json").read_text()).items():
        assert "::test_" in pattern and re.compile(pattern) and len(reason.split()) > 5
