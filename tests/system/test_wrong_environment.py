"""A wrong environment gives one message that says what to do. (tests/test_environment.py tests `make setup`.)"""

import os
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ktlib import cli
from ktlib.lab import base_model
from ktlib.system import environment
from ktlib.training import sft

ROOT = Path(__file__).parents[2]


def installed(monkeypatch, **versions):
    real = metadata.version
    monkeypatch.setattr(environment, "version", lambda name: versions[name] if name in versions else real(name))


def test_this_environment_passes_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.check()


@pytest.mark.parametrize(("package", "old"), [("torch", "2.9.1"), ("transformers", "4.57.0"), ("peft", "0.18.0")])
def test_a_package_that_is_too_old(monkeypatch, package, old):
    installed(monkeypatch, **{package: old})
    with pytest.raises(ImportError, match=rf"ktlib needs {package}<.*, found {old}: pip install '{package}<"):
        environment.check()


def test_a_package_that_is_missing(monkeypatch):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", none)
    with pytest.raises(ImportError, match="ktlib needs torch<.*found none: pip install 'torch<"):
        environment.check()


def test_a_newer_package_is_a_warning(monkeypatch):
    installed(monkeypatch, torch="2.99.0+cu130")
    with pytest.warns(UserWarning, match="not tested with torch 2.99.0.*pip install 'torch<"):
        environment.check()


def test_the_extension_is_not_built(tmp_path):
    """A fresh clone on the path has ktlib's Python files, but not its compiled extension."""
    shutil.copytree(ROOT / "ktlib", tmp_path / "ktlib", ignore=shutil.ignore_patterns("*.so", "assets", "__pycache__"))
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
        f"sys.path.insert(0, {str(tmp_path)!r}); import ktlib"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ktlib's compiled extension cannot be loaded") and "make setup" in last


def test_only_the_files_are_here(monkeypatch):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "requires", none)
    with pytest.raises(ImportError, match="ktlib is not installed, only its files are here: .*make setup"):
        environment.check()


def test_no_compiler(tmp_path):
    ninja = shutil.which("ninja") or ROOT / ".venv" / "bin" / "ninja"
    command = [
        sys.executable,
        "-m",
        "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
    ]
    done = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("CMake Error") == 1 and "ktlib needs a C++ compiler: apt install g++" in done.stderr


class NoAvx2:
    """The extension on a processor from before 2015."""

    isas = staticmethod(lambda: [("avx2", "needs AVX2"), ("portable", "")])
    select_isa = staticmethod(lambda name: name or "portable")


def test_no_avx2_is_said_once_with_the_reason(monkeypatch):
    monkeypatch.setattr(environment.importlib, "import_module", lambda _: NoAvx2)
    monkeypatch.delenv("KTLIB_ISA", raising=False)
    with pytest.warns(UserWarning, match="portable kernels.*slower.*avx2 needs AVX2.*pass the host's CPU through"):
        environment.check()
    monkeypatch.setenv("KTLIB_ISA", "portable")  # the user chose it, so there is no warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.check()


def test_an_unknown_instruction_set_is_traced_to_the_variable(monkeypatch, capsys):
    monkeypatch.setenv("KTLIB_ISA", "sse9")
    assert cli.main(["info"]) == 2
    error = capsys.readouterr().err
    assert "KTLIB_ISA=sse9: isa: got 'sse9', known are" in error and "unset it" in error


def test_a_name_of_the_hub_is_refused_with_the_way_to_get_it():
    with pytest.raises(
        ValueError, match="model: got 'deepseek-ai/DeepSeek-V2-Lite'.*nothing is downloaded.*hf download"
    ):
        sft.check_parameters(model="deepseek-ai/DeepSeek-V2-Lite")


OFFLINE = """
import socket
def refuse(*arguments, **keywords):
    raise SystemExit("something reached for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import sys
from ktlib.training import sft
from ktlib.training.tasks import dates
model, tokenizer = sft.load_model("base")
model = sft.add_lora(model, rank=2)
options = {"steps": 1, "batch_size": 2, "sequence_length": 64, "progress": False}
sft.train(model, tokenizer, dates(n_train=8, n_test=2)[0], sys.argv[1], **options)
sft.save(model, sys.argv[1])
"""


def test_the_built_in_model_needs_no_network(tmp_path):
    hub = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", OFFLINE, tmp_path], env=hub, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.fixture
def broken_cuda(monkeypatch):
    real = torch.zeros

    def zeros(*arguments, device=None, **options):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image.\nCompile with TORCH_USE_CUDA_DSA")
        return real(*arguments, device=device, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)


def test_cuda_that_cannot_be_used_is_left_alone(broken_cuda, tmp_path, monkeypatch):
    message = r"CUDA is present but unusable \(CUDA error: no kernel image\): running on the CPU.*nvidia-smi"
    monkeypatch.setattr(base_model, "pretrain", lambda model, *_: [float(model.device.type == "cpu")])
    with pytest.warns(UserWarning, match=message):
        assert base_model.make(tmp_path / "base", steps=1) == [1.0]
    seen = {}

    def arguments(**options):
        seen.update(options)
        raise InterruptedError

    monkeypatch.setattr(sft, "TrainingArguments", arguments)
    monkeypatch.setattr(sft.inspect, "signature", lambda _: type("Signature", (), {"parameters": ()}))
    model, tokenizer = sft.load_model("base")
    with pytest.warns(UserWarning, match=message), pytest.raises(InterruptedError):
        sft.train(sft.add_lora(model), tokenizer, [{"prompt": "Say fox", "response": "fox"}], tmp_path)
    assert seen["use_cpu"] and not seen["dataloader_pin_memory"]
