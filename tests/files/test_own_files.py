"""In the output folder of a run, ktlib replaces and removes only the files that it wrote itself."""

import errno
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from support.planted import put, snapshot, survives
from transformers import Trainer, TrainingArguments

import ktlib
from ktlib.assets import BASE
from ktlib.diagnosis.trainer_guard import StopOnNonFinite
from ktlib.files import ownership
from ktlib.training import resume, sft
from ktlib.training.output_dir import check_output_dir

IDENTITY = {"steps": 9, "seed": 1}


class Saved:
    """A stand-in for a model: saving it writes files with the given names."""

    def __init__(self, content, names, source):
        self.content, self.names, self.config = content, names, type("Config", (), {"name_or_path": source})

    def save_pretrained(self, folder):
        Path(folder).mkdir(exist_ok=True)
        for name in self.names:
            Path(folder, name).write_text(f"{self.content}: {name}")


def small_adapter(content="an adapter", source=None):
    return Saved(content, ("README.md", "adapter_config.json", "adapter_model.safetensors"), source)


def small_model(shards):
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    return Saved("a model", ("config.json", "model.safetensors.index.json", *names), None)


# ---- the output folder of a run --------------------------------------------------------------------------------------

FOREIGN = {
    "a model": ("config.json", "model.safetensors"),
    "a model in shards": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "the index of a model": ("model.safetensors.index.json",),
    "a pickled model": ("pytorch_model.bin",),
    "a pickled model in shards": ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
    "a merge": ("merged.safetensors",),
    "a quantised model": ("model-q4_k_m.gguf",),
    "an adapter": ("adapter_config.json", "adapter_model.safetensors", "README.md"),
    "a pickled adapter": ("adapter_model.bin",),
    "a tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "a text about it": ("README.md",),
}
RESULTS = {
    "checkpoints of a Trainer": ("checkpoint-500/optimizer.pt",),
    "checkpoints of something else": ("checkpoints/thesis.txt",),
    "a report": ("nonfinite.txt",),
    "the model before a bad step": ("last_good/adapter_model.safetensors",),
}


@pytest.mark.parametrize("names", [*FOREIGN.values(), *RESULTS.values()], ids=[*FOREIGN, *RESULTS])
def test_a_folder_with_results_of_somebody_else_is_refused_before_anything_runs(tmp_path, names):
    folder = tmp_path / "mine"
    put(folder, *names, "data.jsonl")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir: got '.*mine', which holds .*: not written by ktlib") as caught:
        sft.check_parameters(output_dir=str(folder))
    for name in names:
        assert name.split("/")[0] in str(caught.value)
    assert "data.jsonl" not in str(caught.value) and snapshot(tmp_path) == before
    assert acceptable_proposal(caught.value) == str(tmp_path / "mine-2")


def acceptable_proposal(error):
    """The folder that a refusal proposes, after a check that ktlib accepts it."""
    other = re.search(r"such as '(.*)'$", str(error))[1]
    assert not Path(other).exists()
    check_output_dir(other, BASE)
    return other


@pytest.mark.parametrize("new", [small_adapter(), small_model(2)], ids=["adapter", "model"])
@pytest.mark.parametrize("names", FOREIGN.values(), ids=FOREIGN)
def test_saving_refuses_a_folder_with_foreign_results_and_removes_nothing(tmp_path, names, new):
    put(tmp_path, *names)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="output_dir: .*not written by ktlib"):
        sft.save(new, tmp_path)
    assert snapshot(tmp_path) == before


def test_training_refuses_a_folder_with_foreign_results(tmp_path):
    put(tmp_path, "model.safetensors")
    before = snapshot(tmp_path)
    model, tokenizer = sft.load_model("base")
    model = sft.add_lora(model, "attention", rank=1)
    with pytest.raises(ValueError, match="output_dir: .*model.safetensors"):
        sft.train(model, tokenizer, [{"prompt": "a", "response": "b"}], tmp_path, steps=1, progress=False)
    assert snapshot(tmp_path) == before


def test_an_adapter_that_is_in_no_list_is_foreign(tmp_path):
    """Such as one that an older ktlib or stock PEFT saved, or one that was copied to this folder."""
    sft.save(small_adapter(), tmp_path / "a")
    sft.check_parameters(output_dir=str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "a").glob(f"{ownership.LIST_PREFIX}*"):
        path.unlink()
    for name in ("a", "copy"):
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match="holds README.md, adapter_config.json, adapter_model.safetensors: not"):
            sft.check_parameters(output_dir=str(tmp_path / name))
        with pytest.raises(ValueError, match="output_dir"):
            sft.save(small_adapter("another"), tmp_path / name)
        assert snapshot(tmp_path) == before


def test_other_files_of_the_user_are_accepted_and_stay(tmp_path):
    """Also those whose names look like what ktlib cleared away, or has in the works."""
    put(tmp_path, "data.jsonl", "notes.ipynb", "train.bin", "checkpoint-notes.txt", "merged/model.safetensors")
    put(tmp_path, ".saved-by-me/thesis", ".checkpoints.gone/thesis", ".checkpoints.old/thesis", ".step-2.gone/thesis")
    put(tmp_path, "README.md.partial", "adapter_model.safetensors.partial", f"{ownership.TEMPORARY}mine/thesis")
    put(tmp_path / "elsewhere", ownership.TEMPORARY_NOTE, "thesis")
    (tmp_path / f"{ownership.TEMPORARY}link").symlink_to("elsewhere")
    before = snapshot(tmp_path)
    sft.check_parameters(output_dir=str(tmp_path))
    assert resume.start_or_resume(tmp_path / "checkpoints", IDENTITY) is None
    sft.save(small_adapter(), tmp_path)
    sft.save(small_model(2), tmp_path)
    with ownership.new_folder(tmp_path / "made") as made:
        put(made, "x")
    assert survives(before, tmp_path) and not (tmp_path / "checkpoints").exists()


def test_the_folder_of_the_model_is_refused_however_it_is_spelled(tmp_path, monkeypatch):
    """Also if ktlib wrote the model: an adapter in its place would be one of nothing."""
    monkeypatch.chdir(tmp_path)
    sft.save(small_model(2), tmp_path / "model")
    put(tmp_path, "file")
    (tmp_path / "link").symlink_to("model")
    before = snapshot(tmp_path)
    for spelling in ("model", "model/", "./model", "model/../model", str(tmp_path / "model"), "link"):
        for model in ("model", str(tmp_path / "link")):
            with pytest.raises(ValueError, match="output_dir: got .*which holds the model that is trained") as caught:
                sft.check_parameters(model=model, output_dir=spelling)
            assert acceptable_proposal(caught.value)
            with pytest.raises(ValueError, match="output_dir: got .*which holds the model that is trained"):
                sft.save(small_adapter(source=model), spelling)
    with pytest.raises(ValueError, match="output_dir: got '.*', which holds the model that is trained"):
        sft.check_parameters(output_dir=str(BASE))
    assert snapshot(tmp_path) == before


def test_a_model_in_the_output_folder_and_the_other_way_round(tmp_path):
    put(tmp_path, "all/model/config.json", "all/checkpoints/step-2/config.json", "all/checkpoints/run.json")
    put(tmp_path, "all/last_good/config.json")
    before = snapshot(tmp_path)
    for inner in ("checkpoints/step-2", "last_good"):
        with pytest.raises(ValueError, match="output_dir: got '.*/all', which holds the model that is trained"):
            sft.check_parameters(model=str(tmp_path / "all" / inner), output_dir=str(tmp_path / "all"))
    shutil.rmtree(tmp_path / "all/last_good")
    del before["all/last_good"], before["all/last_good/config.json"]
    model = str(tmp_path / "all/model")
    for folder in (tmp_path / "all", tmp_path / "all/model/adapter"):
        check_output_dir(str(folder), model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sft.save(small_adapter(source=model), folder)
    assert survives(before, tmp_path)


def test_a_result_of_ktlib_is_replaced_until_somebody_changes_it(tmp_path):
    first, second, last = map(small_adapter, ("first", "second", "last"))
    for model in (first, second, small_model(3), small_model(2), last):
        check_output_dir(tmp_path, BASE)
        sft.save(model, tmp_path)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {*last.names}
    sft.save(last, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_text() == "last: adapter_model.safetensors"
    for name in ("README.md", "adapter_model.safetensors"):
        content, times = (tmp_path / name).read_bytes(), (tmp_path / name).stat()
        (tmp_path / name).write_bytes(content[::-1])
        os.utime(tmp_path / name, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time of change tells nothing
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match=f"output_dir: .*which holds {name}: not written by ktlib"):
            sft.check_parameters(output_dir=str(tmp_path))
        with pytest.raises(ValueError, match="output_dir"):
            sft.save(small_adapter("next"), tmp_path)
        assert snapshot(tmp_path) == before
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_results_of_another_command_are_not_results_of_a_run(tmp_path):
    """ktlib wrote the fused checkpoint, but does not list its files, so a run may not replace them."""
    ktlib.fuse_checkpoint(BASE, tmp_path / "fused", progress=False)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="output_dir: .*which holds .*config.json"):
        sft.check_parameters(output_dir=str(tmp_path / "fused"))
    with pytest.raises(ValueError, match="output_dir"):
        sft.save(small_adapter(), tmp_path / "fused")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["elsewhere/weights", "nowhere"])
def test_links_are_neither_followed_nor_replaced(tmp_path, target):
    put(tmp_path, "elsewhere/weights")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/adapter_model.safetensors").symlink_to(tmp_path / target)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere at all")
    before = snapshot(tmp_path)
    for folder in ("out", "other", "dangling"):
        with pytest.raises(ValueError, match="output_dir: got"):
            sft.check_parameters(output_dir=str(tmp_path / folder))
    with pytest.raises(ValueError, match="output_dir"):
        sft.save(small_adapter(), tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_link_to_a_folder_is_an_output_folder(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "runs").symlink_to("large_disk")
    for folder in (tmp_path / "runs", tmp_path / "runs/adapter"):
        sft.check_parameters(output_dir=str(folder))
        sft.save(small_adapter(), folder)
    with ownership.new_folder(tmp_path / "runs/new") as made:
        put(made, "x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "to_empty").symlink_to("empty")
    with ownership.new_folder(tmp_path / "to_empty") as made:
        put(made, "x")
    assert (tmp_path / "runs").is_symlink() and (tmp_path / "to_empty").is_symlink()
    assert (tmp_path / "large_disk/new/x").exists() and (tmp_path / "empty/x").exists()


def test_results_of_another_user_are_foreign(tmp_path, monkeypatch):
    sft.save(small_adapter(), tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match=r"output_dir: .*for this user.*\.ktlib-files-12345\.jsonl"):
        sft.check_parameters(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="output_dir"):
        sft.save(small_adapter("another"), tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["text", "link", "folder"])
def test_a_foreign_file_with_the_name_of_a_list_is_refused(tmp_path, kind):
    folder, name = tmp_path / "out", f"{ownership.LIST_PREFIX}{os.geteuid()}.jsonl"
    put(tmp_path, "elsewhere")
    folder.mkdir()
    if kind == "text":
        put(folder, name)
    elif kind == "link":
        (folder / name).symlink_to(tmp_path / "elsewhere")
    else:
        put(folder, f"{name}/x")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"output_dir: .*holds {re.escape(name)}"):
        sft.check_parameters(output_dir=str(folder))
    with pytest.raises(ValueError, match=f"output_dir: .*holds {re.escape(name)}"):
        sft.save(small_adapter(), folder)
    assert snapshot(tmp_path) == before


def test_a_line_that_a_crash_cut_off_costs_that_file_alone(tmp_path):
    sft.save(small_adapter(), tmp_path)
    (path,) = tmp_path.glob(f"{ownership.LIST_PREFIX}*")
    path.write_text(path.read_text()[:-30])
    sft.save(small_model(2), tmp_path / "b")
    lost = ownership.foreign(tmp_path / name for name in ("README.md", "adapter_config.json"))
    assert len(lost) + len(ownership.foreign([tmp_path / "adapter_model.safetensors"])) == 1
    ownership.write_text(tmp_path / "other.txt", "x", replace=True)
    assert ownership.is_own(tmp_path / "other.txt")


def test_a_list_that_two_processes_began_at_once_has_the_entries_of_both(tmp_path):
    list_file = tmp_path / f"{ownership.LIST_PREFIX}{os.geteuid()}.jsonl"
    written = b""
    for name in ("a", "b"):
        put(tmp_path, name)
        ownership.add_to_list(tmp_path, {name: tmp_path / name})
        written += list_file.read_bytes()
        list_file.unlink()
    list_file.write_bytes(written)
    assert ownership.is_own(tmp_path / "a") and ownership.is_own(tmp_path / "b")


# ---- races ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_foreign_file_that_appears_while_ktlib_writes_stays(tmp_path, monkeypatch, links):
    add_to_list, link = ownership.add_to_list, os.link

    def late(folder, files):
        add_to_list(folder, files)
        put(tmp_path, "adapter_model.safetensors")

    def without(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link if links else without)
    with monkeypatch.context() as patch:
        patch.setattr(ownership, "add_to_list", late)
        with pytest.raises(ValueError, match="output_dir: .*which holds adapter_model.safetensors: not written"):
            sft.save(small_adapter(), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_text() == "somebody's adapter_model.safetensors"
    (tmp_path / "adapter_model.safetensors").unlink()
    for content in ("first", "second"):
        sft.save(small_adapter(content), tmp_path)
    assert (tmp_path / "README.md").read_text() == "second: README.md"


def test_a_foreign_folder_that_appears_while_ktlib_writes_stays(tmp_path):
    for replace in (False, True):
        with pytest.raises(FileExistsError, match=r"out: .*out .*needs another name, such as .*out-2"):
            with ownership.new_folder(tmp_path / "out", replace=replace) as made:
                put(made, "x")
                put(tmp_path, "out/thesis")
        assert snapshot(tmp_path) == {"out": None, "out/thesis": b"somebody's out/thesis"}
        shutil.rmtree(tmp_path / "out")


def test_processes_that_write_the_same_names_do_not_disturb_each_other(tmp_path):
    """As in distributed training, where each process writes the same report: none takes the others' for foreign."""

    def write():
        for i in range(25):
            ownership.write_text(tmp_path / "report.txt", f"{os.getpid()} {i}", replace=True)
            with ownership.new_folder(tmp_path / "last_good", replace=True) as made:
                (made / "weights").write_text(f"{os.getpid()} {i}")

    children = []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                write()
                code = 0
            finally:
                os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert ownership.is_own(tmp_path / "report.txt") and ownership.is_own(tmp_path / "last_good")
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"report.txt", "last_good"}
    assert not list(tmp_path.glob(f"{ownership.TEMPORARY}*"))


def test_the_temporary_folder_of_a_killed_process_is_deleted_and_that_of_a_living_one_stays(tmp_path):
    put(tmp_path, f"{ownership.TEMPORARY}mine/thesis")
    before = snapshot(tmp_path)
    child = os.fork()
    if child == 0:
        with ownership.temporary_folder(tmp_path) as made:
            put(made, "half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob("*/made/half"))) == 1
    (tmp_path / f"{ownership.TEMPORARY}younger").mkdir()  # its process died before it wrote the note
    with ownership.temporary_folder(tmp_path) as first, ownership.temporary_folder(tmp_path) as second:
        assert first.is_dir() and second.is_dir() and not list(tmp_path.glob("*/made/half"))
    assert snapshot(tmp_path) == before


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def finished(folder):
    """Write the checkpoints of a run that came to its end and was not saved."""
    assert resume.start_or_resume(folder, IDENTITY) is None
    for step in (6, 9):
        with ownership.new_folder(folder / f"step-{step}", replace=True) as made:
            put(made, "optimizer.pt", "default/adapter_model.safetensors")


@pytest.mark.parametrize("name", ["notes.txt", "step-9/notes.txt", "step-9/default/notes.txt", "step-9/optimizer.pt"])
def test_checkpoints_stay_as_a_whole_if_somebody_put_or_changed_a_file_there(tmp_path, name):
    finished(tmp_path / "checkpoints")
    put(tmp_path / "checkpoints", name)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="output_dir: .*which holds checkpoints: not written by ktlib.*-2'"):
        resume.start_or_resume(tmp_path / "checkpoints", IDENTITY | {"seed": 2})
    assert snapshot(tmp_path) == before
    assert resume.start_or_resume(tmp_path / "checkpoints", IDENTITY) == (tmp_path / "checkpoints/step-9", 9)
    with pytest.warns(UserWarning, match="output_dir: .*checkpoints stays"):
        sft.save(small_adapter(), tmp_path)
    assert survives(before, tmp_path)


def test_checkpoints_with_files_of_ktlib_only_are_deleted(tmp_path):
    finished(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / f"{ownership.TEMPORARY}dead").mkdir()
    check_output_dir(tmp_path, BASE)
    sft.save(small_adapter(), tmp_path)
    assert not (tmp_path / "checkpoints").exists() and not list(tmp_path.glob(f"{ownership.TEMPORARY}*"))


def test_a_run_among_files_of_the_user(tmp_path):
    """A run is trained and saved twice, beside a user's notebook, and with notes in the first run's checkpoints."""
    put(tmp_path, "notes.ipynb", "checkpoint-best/x", "step-2/x", "checkpoints-old/step-2/x")
    before = snapshot(tmp_path)

    class Note(sft.StopOnNonFinite):
        def on_save(self, args, state, control, **_):
            put(tmp_path / "checkpoints/step-1", "thesis.txt")

        def on_step_begin(self, args, state, control, **_):
            put(args.output_dir, f"{state.global_step}.log")

        def on_train_end(self, args, state, control, **_):
            put(args.output_dir, "end.log")

    rows = [{"prompt": f"a{i}", "response": "b"} for i in range(8)]
    for callbacks in ((Note(trace=False, folder=tmp_path / "reports"),), ()):
        model, tokenizer = sft.load_model("base")
        model = sft.add_lora(model, "attention", rank=1)
        options = {"steps": 3, "batch_size": 2, "sequence_length": 32, "save_every": 1, "progress": False}
        sft.train(model, tokenizer, rows, tmp_path, **options, callbacks=callbacks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sft.save(model, tmp_path)
        assert [w for w in caught if "checkpoints stays" in str(w.message)]
    assert survives(before, tmp_path)
    found = {path.name for path in (tmp_path / "checkpoints").glob("[!.]*")}
    assert found == {"0.log", "1.log", "2.log", "end.log", "run.json", "step-1", "step-3"}


# ---- the guard of a training ----------------------------------------------------------------------------------------


class Bad(torch.nn.Module):
    """A module whose loss is not finite."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.layer(x).sum() * torch.nan}

    def save_pretrained(self, folder):
        Path(folder, "model.safetensors").write_text("whole")


@pytest.mark.parametrize("name", ["nonfinite.txt", "nonfinite.json", "last_good/model.safetensors"])
def test_the_guard_replaces_its_own_reports_only(tmp_path, name):
    def train():
        arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
        guard = StopOnNonFinite(trace=False)
        Trainer(Bad(), arguments, train_dataset=[{"x": torch.ones(2)}] * 4, callbacks=[guard]).train()

    for _ in range(2):
        with pytest.warns(UserWarning, match="stopped in step 1"):
            train()
        assert (tmp_path / "last_good/model.safetensors").read_text() == "whole"
    put(tmp_path, name)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"folder: .*which holds {name.split('/')[0]}: not written by ktlib"):
        train()
    assert snapshot(tmp_path) == before
