"""Files that are damaged or made to do harm: refused with a reason, nothing executed, memory bounded."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from support.models import tiny_model

from ktlib import cli
from ktlib.diagnosis.audit import audit
from ktlib.integrations.peft_lora import lora_config
from ktlib.training import resume, tasks


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tiny_model("olmoe", "ktlib")
    directory = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, lora_config(model, r=2)).save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def refused(adapter, capsys, *words):
    """``ktlib audit`` exits with 2 and one line that says why."""
    assert cli.main(["audit", str(adapter)]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message


def with_header(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


class Explosive:
    """What a hostile pickle does when it is read."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


HUGE = 2**40
WEIGHTS = {
    "a header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "a header that is no JSON": with_header(b"{'a': 1}"),
    "a header that is no object": with_header([1, 2]),
    "an unknown dtype": with_header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 4]}}, b"abcd"),
    "a huge shape": with_header({"a": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4]}}, b"abcd"),
    "huge offsets": with_header({"a": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}, b"abcd"),
    "negative offsets": with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"abcd"),
    "overlapping tensors": with_header(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a.lora_A", "a.lora_B")}, b"abcd"
    ),
    "a pickle under another name": pickle.dumps(Explosive()),
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_damaged_weights(adapter, content, capsys, monkeypatch):
    monkeypatch.chdir(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused(adapter, capsys, "adapter_model.safetensors: damaged or not a safetensors file")
    assert not (adapter / "executed").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_pickles_are_not_read(tmp_path, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Explosive()))
    refused(tmp_path / name, capsys, f"{name}: pickled weights can run code when read")
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_at_any_byte(adapter, capsys):
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1}:
        file.write_bytes(content[:length])
        refused(adapter, capsys, "damaged")


CONFIGS = {
    "no JSON": (b"{'r': 8", "not JSON"),
    "not UTF-8": (b'{"r": "\xff"}', "not JSON"),
    "a list": (b"[8]", "needs an object, holds a list"),
    "too deep": (b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
    "a rank of text": (b'{"r": "8"}', "r is '8', needs a number >= 1"),
    "a negative rank": (b'{"r": -8}', "r is -8, needs a number >= 1"),
    "a rank that is no number": (b'{"r": true}', "r is True, needs a number"),
    "an alpha of a list": (b'{"r": 8, "lora_alpha": [16]}', "lora_alpha is [16], needs a number"),
    "an alpha of NaN": (b'{"r": 8, "lora_alpha": NaN}', "lora_alpha is nan, needs a number"),
}


@pytest.mark.parametrize("content, words", CONFIGS.values(), ids=CONFIGS)
def test_damaged_settings(adapter, content, words, capsys):
    (adapter / "adapter_config.json").write_bytes(content)
    refused(adapter, capsys, "adapter_config.json: ", words)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_damaged_trainer_state(adapter, content, capsys):
    (adapter / "trainer_state.json").write_bytes(content)
    refused(adapter, capsys, "trainer_state.json: ")


@pytest.mark.parametrize(
    "index, words",
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "names '../outside.safetensors', which is no file of this"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd', which is no file of this folder"),
        ({"weight_map": {"a": 7}}, "lacks 7, which adapter_model.safetensors.index.json names"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_cannot_point_elsewhere(adapter, index, words, capsys):
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, adapter.parent / "outside.safetensors")
    (adapter / "adapter_model.safetensors").unlink()  # which counts before an index
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    refused(adapter, capsys, "adapter_model.safetensors.index.json", words)


def test_tensor_names_are_only_names(adapter):
    """Paths, control characters and very long names among the tensors change nothing but the table."""
    names = ["../../etc/passwd.lora_A.weight", "a\n\x1b[31m", "x" * 100_000, "layers.99999999999999999999.mlp.w", ""]
    save_file({name: torch.ones(2, 2) for name in names}, adapter / "adapter_model.safetensors")
    report = audit(adapter)
    assert sum(row.tensors for row in report.rows) == len(names) and "has no partner" in report.problems[0]


def test_what_is_no_regular_file_is_not_opened(tmp_path, capsys):
    os.mkfifo(tmp_path / "adapter_model.safetensors")  # opening it would wait forever
    (tmp_path / "more.safetensors").mkdir()
    refused(tmp_path, capsys, "no *.safetensors file")


AUDIT_WITHIN = """
import resource, sys
from ktlib import audit, cli

def peak():  # getrusage counts the parent's too
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

start = peak()
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
code = cli.main(["audit", sys.argv[1]])
print("peak MiB:", peak() - start)
sys.exit(code)
"""


@pytest.mark.parametrize("size, code", [(2**36, 2), (100 * 2**20, 0)], ids=["64 GiB", "100 MiB"])
def test_a_large_tensor_is_mapped_and_looked_at_in_parts(tmp_path, size, code):
    """A sparse file of one tensor, in a process of 8 GiB of addresses: refused if that is not enough; and there is no
    copy of the whole, which in fp32 would be four times as large."""
    file = tmp_path / "x.safetensors"
    header = {"layers.0.mlp.up_proj.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    file.write_bytes(with_header(header))
    os.truncate(file, file.stat().st_size + size)
    done = subprocess.run([sys.executable, "-c", AUDIT_WITHIN, file], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    if code:
        assert "x.safetensors: too large for this process" in done.stderr
    else:
        assert int(done.stdout.split("peak MiB:")[1]) < 500


# ---- checkpoints and data ------------------------------------------------------------------------------------------


def test_folders_that_only_look_like_checkpoints(tmp_path):
    """Names that are almost right, a file for a folder, and what a Trainer may have written only half of."""
    for name in ("step-best", "step-", "step-٣", "step-3x", "step--5", "step-+5", "checkpoint-5"):
        make_checkpoint(tmp_path / name)
    (tmp_path / "step-7").write_text("x")
    assert resume.complete_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path / "step-2")
    assert resume.complete_checkpoint(tmp_path) == (tmp_path / "step-2", 2)


def make_checkpoint(folder):
    folder.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (folder / file).write_text("x")
    (folder / "trainer_state.json").write_text("x")


def test_checkpoints_of_someone_else_are_neither_resumed_nor_removed(tmp_path):
    for name in ("checkpoint-5", "step-5"):
        make_checkpoint(tmp_path / name)
        with pytest.raises(ValueError, match="output_dir: .* holds files that are not a run's"):
            resume.start_or_resume(tmp_path, {"steps": 5})
        assert len(list((tmp_path / name).iterdir())) == 6


NOTES = {
    "cut off": b"{",
    "not UTF-8": b'{"steps": 5, "seed": "\xff"}',
    "a list": b"[5]",
    "without steps": b"{}",
    "steps of text": b'{"steps": "9"}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", NOTES.values(), ids=NOTES)
def test_a_damaged_note_of_an_interrupted_run(tmp_path, content):
    make_checkpoint(tmp_path / "step-5")
    (tmp_path / resume.NOTE).write_bytes(content)
    with pytest.raises(ValueError, match="output_dir: .*run.json is damaged"):
        resume.start_or_resume(tmp_path, {"steps": 5})
    assert (tmp_path / "step-5").is_dir()


GOOD = b'{"prompt": "a", "response": "b"}\n'
ROWS = {
    "huge": (b'{"prompt": "' + b"x" * 2**20 + b'", "response": "b"}', "more than 1,048,576 bytes"),
    "no end": (b"x" * (3 * 2**20), "more than 1,048,576 bytes"),
    "half a character": (b'{"prompt": "\\ud800", "response": "b"}', "'prompt' holds half a character"),
    "a number of 5000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON"),
    "too deep": (b'{"prompt": ' + b"[" * 200_000, "not JSON"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
    "zeros": (b"\0" * 100, "not JSON"),
    "an empty prompt": (b'{"prompt": "", "response": "b"}', "'prompt' must be a non-empty string"),
}


@pytest.mark.parametrize("line, words", ROWS.values(), ids=ROWS)
def test_the_row_is_named(tmp_path, line, words):
    (tmp_path / "rows.jsonl").write_bytes(GOOD * 2 + line + b"\n")
    with pytest.raises(ValueError, match="rows.jsonl, line 3: .*") as error:
        tasks.load_jsonl(tmp_path / "rows.jsonl")
    assert words in str(error.value) and len(str(error.value)) < 500
