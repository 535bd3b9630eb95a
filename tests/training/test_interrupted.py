"""A run that is killed, or whose disk fills up, leaves nothing half-written behind and goes on from where it was."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from ktlib.files import ownership
from ktlib.runs import notebooks
from ktlib.runs.repeat import digest
from ktlib.training import resume, sft
from ktlib.training.tasks import dates

SCRIPT = Path(__file__).parents[1] / "long" / "interrupted.py"
ROWS = dates(n_train=32, n_test=8)[0]
SMALL = {"steps": 4, "batch_size": 4, "sequence_length": 64, "progress": False, "save_every": 2}
IDENTITY = {"steps": 9, "seed": 1}


@pytest.fixture
def adapted(one_thread):
    model, tokenizer = sft.load_model("base")
    return sft.add_lora(model, rank=2, alpha=4), tokenizer


def test_killed_four_times_and_the_same_bits():
    done = subprocess.run([sys.executable, SCRIPT, "--small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    result = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert result["same_adapter_bits"] and len(result["kills"]) == 4
    assert any(row.get("resumes_from") for row in result["kills"]), "every run started from nothing"


def test_only_whole_checkpoints_are_found(tmp_path):
    folder = tmp_path / "checkpoints"
    assert resume.start_or_resume(folder, IDENTITY) is None
    assert resume.start_or_resume(folder, IDENTITY) is None, "nothing is whole yet"
    for step in (3, 6):
        (folder / f"step-{step}").mkdir()
    assert resume.start_or_resume(folder, IDENTITY) == (folder / "step-6", 6)
    with pytest.raises(ValueError, match="interrupted run with another seed"):
        resume.start_or_resume(folder, IDENTITY | {"seed": 2})
    (folder / "step-9").mkdir()
    assert resume.start_or_resume(folder, IDENTITY | {"seed": 2}) is None, "a finished run makes room"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_checkpoint_is_of_this_model_and_these_adapters(adapted):
    model, _ = adapted
    before = resume.run_identity(model, [])
    model.peft_config["default"].lora_alpha += 1
    assert [key for key in before if before[key] != resume.run_identity(model, [])[key]] == ["adapters"]
    model.peft_config["default"].lora_alpha -= 1
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    frozen.data.view(-1)[0] += 1
    assert [key for key in before if before[key] != resume.run_identity(model, [])[key]] == ["model"]


def test_a_finished_training_that_was_not_saved_is_not_done_again(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted
    first = sft.train(model, tokenizer, ROWS, tmp_path, **SMALL)
    expected = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    again = sft.add_lora(sft.load_model("base")[0], rank=2, alpha=4)
    monkeypatch.setattr(sft.Trainer, "training_step", lambda *_: pytest.fail("trained again"))
    second = sft.train(again, tokenizer, ROWS, tmp_path, **SMALL)
    assert second["resumed_from"] == 4 and second["log"] == first["log"]
    for name, parameter in again.named_parameters():
        assert name not in expected or (parameter.requires_grad and torch.equal(parameter, expected[name])), name
    sft.save(again, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_nothing_is_left_of_the_weights_that_were_there_before(adapted, tmp_path, monkeypatch):
    """A model in one file, in many, and an adapter, each in the place of another; and no weights of somebody else."""
    model, _ = sft.load_model("base")
    adapter = sft.save(adapted[0], tmp_path / "adapter")
    wanted = digest(adapter)

    def names():
        return {path.name for path in tmp_path.glob("*.safetensors*")}

    sft.save(model, tmp_path)
    assert names() == {"model.safetensors"}
    (tmp_path / "notes.safetensors").touch()
    with pytest.raises(ValueError, match="output_dir: .*, which holds notes.safetensors: not written by ktlib"):
        sft.save(model, tmp_path)
    (tmp_path / "notes.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pretrained", partial(model.save_pretrained, max_shard_size="3MB"))
        sft.save(model, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {*index["weight_map"].values(), "model.safetensors.index.json"}
    assert len(shards) > 2 and names() == shards
    sft.save(adapted[0], tmp_path)
    assert names() == {"adapter_model.safetensors"} and digest(tmp_path) == wanted
    sft.save(model, tmp_path)
    assert names() == {"model.safetensors"} and not (tmp_path / "adapter_config.json").exists()


def test_two_runs_cannot_share_a_folder(tmp_path):
    with resume.locked(tmp_path), pytest.raises(ValueError, match="output_dir: .* in use by another run"):
        with resume.locked(tmp_path, wait=0.2):
            pass
    (tmp_path.parent / "link").symlink_to(tmp_path)
    with resume.locked(tmp_path.parent / "link"), pytest.raises(ValueError, match="in use by another run"):
        with resume.locked(tmp_path, wait=0):
            pass
    with resume.locked(tmp_path, wait=0):
        pass


@contextlib.contextmanager
def file_limit():
    """A function that lets this process write files up to so many bytes: to a program, much like a full disk.

    Ends with the block, before pytest itself writes, perhaps to a log file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_in_training_keeps_the_checkpoint_before(adapted, tmp_path):
    model, tokenizer = adapted

    class FillUp(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                limit(100_000)

    with (
        file_limit() as limit,
        pytest.raises(OSError, match="output_dir: cannot write to .*intact.*goes on from its last checkpoint"),
    ):
        sft.train(model, tokenizer, ROWS, tmp_path, **SMALL, callbacks=[FillUp()])
    assert resume.complete_checkpoint(tmp_path / "checkpoints")[1] == 2
    assert not list(tmp_path.glob("**/checkpoint-*"))


def test_disk_full_in_saving_keeps_the_adapter_before(adapted, tmp_path):
    model, _ = adapted
    before = digest(sft.save(model, tmp_path))
    next(p for p in model.parameters() if p.requires_grad).data.add_(1)
    with file_limit() as limit, pytest.raises(OSError, match="output_dir: cannot write to"):
        limit(1000)
        sft.save(model, tmp_path)
    assert digest(tmp_path) == before and not list(tmp_path.glob(f"{ownership.TEMPORARY}*"))


def test_too_little_room_is_said_first(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted
    usage = resume.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    with pytest.raises(OSError, match=r"output_dir: .* has 0.5 MB free, checkpoints and result need \d"):
        sft.train(model, tokenizer, ROWS, tmp_path, **SMALL)


@pytest.fixture
def read_only():
    """A folder that its own user may not write to; root may, and so becomes nobody (who has none of our modules)."""
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own are closed to nobody
        os.chmod(temporary, 0o755)
        folder = Path(temporary) / "read_only"
        folder.mkdir(mode=0o555)
        yield folder


@contextlib.contextmanager
def nobody():
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_refused_first_and_by_name(read_only, adapted, tmp_path):
    import nbclient.exceptions  # noqa: F401
    import papermill.exceptions  # noqa: F401

    sft.save(adapted[0], tmp_path)  # imports what saving needs
    with nobody():
        with pytest.raises(ValueError, match="output_dir: .*need one that can be written to: .*read_only cannot"):
            sft.check_parameters(output_dir=str(read_only / "run" / "adapter"))
        with pytest.raises(OSError, match="output_dir: cannot write to .*Permission denied"):
            sft.save(adapted[0], read_only)
        with pytest.raises(PermissionError, match="read_only"):
            notebooks.run(notebooks.SFT, read_only / "runs", {"output_dir": f"{tempfile.gettempdir()}/adapter"})


def test_other_errors_keep_their_own_words(tmp_path):
    for error in (RuntimeError("shapes differ"), OSError(errno.ENOENT, "no such data")):
        with pytest.raises(type(error), match="shapes differ|no such data"), resume.writing(tmp_path):
            raise error
