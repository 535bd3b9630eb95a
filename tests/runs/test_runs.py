"""Recording results, reading them back, and running a notebook with other parameters."""

import os
import shutil

import nbformat
import pytest

from ktlib.runs import notebooks

PARAMETERS = """\
learning_rate: float = 1.0e-3
steps: int = 10
dataset: str = "dates"
rank: int | None = None
checkpointing: bool = False
targets: list = ["attention"]
"""
BODY = """\
import os
from pathlib import Path

from ktlib.runs.notebooks import record

print(f"lr {learning_rate:g}, {steps} steps of {dataset}")
if dataset == "bad":
    raise RuntimeError("no such data")
if dataset == "crash":
    os.abort()
record(loss=learning_rate / 3, checkpointing=checkpointing, here=Path("marker").exists())
"""


@pytest.fixture
def notebook(tmp_path):
    """A small notebook in a folder of its own."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(BODY)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "notebooks" / "small.ipynb"
    path.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_parameters_are_read_with_types_and_defaults(notebook):
    parameters = notebooks.notebook_parameters(notebook)
    assert parameters["learning_rate"] == ("float", 1e-3)
    assert parameters["rank"] == ("int | None", None)
    assert list(parameters) == ["learning_rate", "steps", "dataset", "rank", "checkpointing", "targets"]


def test_parameters_are_converted(notebook):
    given = {"learning_rate": "1e-3", "steps": 3, "rank": None, "targets": ["experts"], "checkpointing": True}
    checked = notebooks.check_parameters(notebook, given)
    assert checked == given | {"learning_rate": 1e-3}
    assert type(notebooks.check_parameters(notebook, {"learning_rate": 1})["learning_rate"]) is float


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rte": 1.0}, "no parameter named learning_rte; there are: learning_rate, steps"),
        ({1: 2, "no": 3, None: 4}, "no parameter named 1, no, None; there are"),
        ({"learning_rate": "fast"}, r"learning_rate: got 'fast' \(str\), needs float"),
        ({"steps": "1e3"}, r"steps: got '1e3' \(str\), needs int"),
        ({"steps": 1.5}, "steps: got 1.5"),
        ({"steps": True}, "steps: got True"),
        ({"checkpointing": 1}, "checkpointing: got 1"),
        ({"dataset": 7}, "dataset: got 7"),
        ({"dataset": None}, "dataset: got None"),
    ],
)
def test_wrong_parameters_are_refused(notebook, given, message):
    with pytest.raises(ValueError, match=message):
        notebooks.check_parameters(notebook, given)


def test_run_record_and_load(notebook, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marker").touch()
    result = notebooks.run(notebook, "runs/good", {"learning_rate": 3e-3, "dataset": "names"})
    assert result.error is None
    assert "lr 0.003, 10 steps of names" in capfd.readouterr().out
    html = result.report.read_text()
    assert "lr 0.003, 10 steps of names" in html and "loss=0.001" in html
    assert sorted(path.name for path in (tmp_path / "runs/good").glob("[!.]*")) == ["report.html", "small.ipynb"]

    (row,) = notebooks.load_runs("runs")
    assert row["run"] == "good/small" and not row["failed"] and row["seconds"] > 0
    assert row["learning_rate"] == 3e-3 and row["dataset"] == "names"
    assert row["loss"] == 3e-3 / 3 and row["checkpointing"] is False
    assert row["here"], "relative paths must mean what they mean to the caller"


SLOW = """\
import time

handlers = get_ipython().kernel.shell_handlers
reply = handlers["kernel_info_request"]


async def reply_slowly(*arguments):
    await reply(*arguments)
    time.sleep(1)


handlers["kernel_info_request"] = reply_slowly
"""


def test_a_kernel_is_not_interrupted_as_it_is_shut_down(notebook, tmp_path, capfd):
    """The kernel may still be in the handler of papermill's last request when the reply has arrived."""
    small = nbformat.read(notebook, as_version=4)
    small.cells.append(nbformat.v4.new_code_cell(SLOW))
    nbformat.write(small, notebook)
    assert notebooks.run(notebook, tmp_path / "out", quiet=True).error is None
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def test_an_interrupted_run_keeps_its_outputs(notebook, tmp_path, monkeypatch):
    def interrupted(source, target, *arguments, **options):
        shutil.copy(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr("papermill.execute_notebook", interrupted)
    result = notebooks.run(notebook, tmp_path / "runs")
    assert result.error == "interrupted" and result.report.name == "failed.html" and result.report.exists()


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "a"}, {"PYTORCH_CUDA_ALLOC_CONF": "b"}])
def test_gpu_memory_is_reserved_in_segments_that_grow_unless_the_user_says_how(notebook, tmp_path, monkeypatch, own):
    seen = {}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, own.get(name, ""))
        if name not in own:
            monkeypatch.delenv(name)

    def executed(source, target, *arguments, **options):
        seen.update({name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")})
        shutil.copy(source, target)

    monkeypatch.setattr("papermill.execute_notebook", executed)
    notebooks.run(notebook, tmp_path / "runs")
    assert seen == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_checkpoints_of_jupyter_are_no_runs(notebook, tmp_path):
    for folder in ("runs/a", "runs/a/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(notebook, tmp_path / folder)
    assert [row["run"] for row in notebooks.load_runs(tmp_path / "runs")] == ["a/small"]


@pytest.mark.parametrize("text", ["", '{"cells": [', "[1]", "{}", '{"nbformat": 4, "nbformat_minor": 5}', "[" * 10**5])
def test_a_damaged_notebook_is_named(notebook, text):
    (notebook.parent / "bad.ipynb").write_text(text)
    for read in (notebooks.load_runs, lambda folder: notebooks.notebook_parameters(folder / "bad.ipynb")):
        with pytest.raises(ValueError, match="bad.ipynb: not a notebook"):
            read(notebook.parent)


def test_a_missing_folder_is_an_error_and_no_empty_table(notebook, tmp_path):
    for path in (tmp_path / "none", notebook):
        with pytest.raises(FileNotFoundError, match=f"folder: there is no folder .*{path.name}"):
            notebooks.load_runs(path)
    assert notebooks.load_runs(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty") == []


def test_failures_of_papermill_itself_are_marked(notebook, tmp_path):
    node = nbformat.read(notebook, as_version=4)
    node.metadata["papermill"] = {"exception": True, "parameters": {"steps": 3}}
    (tmp_path / "runs").mkdir()
    nbformat.write(node, tmp_path / "runs" / "swept.ipynb")
    assert [(row["failed"], row["steps"]) for row in notebooks.load_runs(tmp_path / "runs")] == [(True, 3)]


def test_a_failed_run_keeps_its_outputs_and_the_last_good_report(notebook, tmp_path):
    good = notebooks.run(notebook, tmp_path / "runs")
    before = good.report.read_text()
    for dataset, error in (("bad", "RuntimeError: no such data"), ("crash", "DeadKernelError")):
        failed = notebooks.run(notebook, tmp_path / "runs", {"dataset": dataset})
        assert error in failed.error
        assert failed.report.name == "failed.html" and failed.notebook.name == "failed.ipynb"
        assert "papermill-error-cell-tag" in failed.notebook.read_text() or dataset == "crash"
        assert failed.report.stat().st_size > 10_000
        assert good.report.read_text() == before and good.notebook.exists()
        marks = {row["run"]: row["failed"] for row in notebooks.load_runs(tmp_path / "runs")}
        assert marks == {"small": False, "failed": True}

    notebooks.run(notebook, tmp_path / "runs")
    assert not failed.report.exists() and not failed.notebook.exists()
    assert not list((tmp_path / "runs").glob("*partial*"))
