"""Runs of notebooks, conversions, figures and measurements replace only files that ktlib wrote."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from peft import get_peft_model
from support.models import tiny_model
from support.planted import put, snapshot, survives

import ktlib
from ktlib import cli
from ktlib.assets import BASE
from ktlib.files import ownership, tensor_files
from ktlib.lab import bench, synthetic
from ktlib.runs import notebooks, sweep
from ktlib.runs.repeat import run_again

# ---- notebooks that are run -----------------------------------------------------------------------------------------


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """``(path of a notebook with a parameter, list of executions)``; papermill only copies the notebook."""
    cells = [nbformat.v4.new_code_cell("a: int = 1")]
    cells[0].metadata.tags = ["parameters"]
    node = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "x"}})
    path = tmp_path / "source" / "small.ipynb"
    path.parent.mkdir()
    nbformat.write(node, path)
    executed = []

    def execute(source, target, parameters, **_):
        executed.append(Path(target))
        node.metadata["papermill"] = {"parameters": parameters, "exception": None, "number": len(executed)}
        nbformat.write(node, target)

    monkeypatch.setattr("papermill.execute_notebook", execute)
    monkeypatch.chdir(tmp_path)
    return path, executed


@pytest.mark.parametrize("name", ["report.html", "small.ipynb", "failed.ipynb", "failed.html"])
def test_a_run_folder_with_files_of_somebody_else_is_refused_before_the_notebook_runs(notebook, tmp_path, name):
    path, executed = notebook
    put(tmp_path / "runs/a", name)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"folder: got 'runs/a', which holds {name}: .*such as 'runs/a-2'"):
        notebooks.run(path, "runs/a")
    assert snapshot(tmp_path) == before and not executed
    (tmp_path / "runs/a" / name).unlink()
    put(tmp_path / "runs/a", "partial.ipynb", "report.html.partial", "other.html")
    before = snapshot(tmp_path)
    for _ in range(2):
        assert notebooks.run(path, "runs/a").error is None
    assert survives(before, tmp_path)
    with open(tmp_path / "runs/a/small.ipynb", "a") as file:
        file.write("\n")  # as Jupyter does when somebody saves notes in it
    with pytest.raises(ValueError, match="holds small.ipynb"):
        notebooks.run(path, "runs/a")
    assert len(executed) == 2


def test_the_notebook_itself_is_not_replaced_by_its_run(notebook, tmp_path, capsys):
    path, executed = notebook
    before = snapshot(tmp_path)
    assert cli.main(["sft", "--notebook", str(path), "--out", ".", "--name", "source"]) == 2
    assert "folder: got 'source', which holds small.ipynb" in capsys.readouterr().err
    assert snapshot(tmp_path) == before and not executed


def test_results_go_beside_a_file_that_appeared_while_the_notebook_ran(notebook, tmp_path, monkeypatch):
    path, _ = notebook
    execute = __import__("papermill").execute_notebook

    def meanwhile(*arguments, **options):
        execute(*arguments, **options)
        put(tmp_path / "runs/a", "report.html")

    monkeypatch.setattr("papermill.execute_notebook", meanwhile)
    result = notebooks.run(path, "runs/a")
    assert result.report.name == "report-2.html" and result.report.is_file() and result.notebook.is_file()
    assert (tmp_path / "runs/a/report.html").read_text() == "somebody's report.html"


def test_a_sweep_with_a_foreign_report_in_a_run_folder_is_refused_before_its_first_run(notebook, tmp_path):
    path, executed = notebook
    put(tmp_path / "runs/a=2", "report.html")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="folder: got 'runs/a=2', which holds report.html"):
        sweep.run_missing(path, "runs", {"a": [1, 2]})
    assert snapshot(tmp_path) == before and not executed


def test_a_repetition_does_not_replace_the_run_that_it_repeats(notebook, tmp_path, monkeypatch):
    path, executed = notebook
    first = notebooks.run(path, "runs/a")
    monkeypatch.setattr("ktlib.runs.repeat.recorded", lambda _: pytest.fail("goes on"))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"folder: .*runs/a is where .*small.ipynb is.* such as .*runs/a-2"):
        run_again(first.notebook, path, tmp_path / "runs/../runs/a")
    assert snapshot(tmp_path) == before and len(executed) == 1


# ---- converted checkpoints and adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "pytorch_model.bin", "adapter_config.json", "model.safetensors.index.json"]
)
def test_fusing_into_a_folder_with_something_else_is_refused_before_anything_is_written(tmp_path, name):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(BASE, source)
    put(source, "README.md")
    put(out, name, "thesis.txt")
    (out / name).write_text("other contents")
    before = snapshot(out)
    with pytest.raises(ValueError, match=f"out: .*out.*({name}|made from something else).*such as .*out-2"):
        ktlib.fuse_checkpoint(source, out, progress=False)
    assert snapshot(out) == before
    (out / name).unlink()
    ktlib.fuse_checkpoint(source, out, progress=False)
    again = snapshot(out)
    ktlib.fuse_checkpoint(source, out, progress=False)
    assert snapshot(out) == again and survives({"thesis.txt": before["thesis.txt"]}, out)
    (source / "README.md").write_text("of a later version")
    with pytest.raises(ValueError, match="holds README.md: there already, with other contents"):
        ktlib.fuse_checkpoint(source, out, progress=False)
    assert snapshot(out) == again


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00009.safetensors", "fused_from.json"])
def test_fusing_follows_no_links(tmp_path, name):
    put(tmp_path, "out/thesis.txt")
    (tmp_path / "out" / name).symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="out: .*out"):
        ktlib.fuse_checkpoint(BASE, tmp_path / "out", progress=False)
    assert snapshot(tmp_path) == before
    (tmp_path / "out" / name).unlink()
    shard = next(ktlib.fuse_checkpoint(BASE, tmp_path / "out", progress=False).glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"out: .*out.*which holds {shard.name}"):
        ktlib.fuse_checkpoint(BASE, tmp_path / "out", progress=False)
    assert snapshot(tmp_path) == before


def test_a_synthetic_checkpoint_replaces_no_config(tmp_path):
    put(tmp_path, "config.json")
    before = snapshot(tmp_path)
    config = synthetic.deepseek_v2_small(num_hidden_layers=1, vocab_size=64)
    with pytest.raises(ValueError, match="folder: .*which holds config.json: there already, with other contents"):
        synthetic.write_checkpoint(config, tmp_path, progress=False)
    assert snapshot(tmp_path) == before


def test_a_single_file_of_weights_is_new_or_refused(tmp_path):
    tensor = tensor_files.Stored((2,), torch.float32, lambda: torch.ones(2))
    put(tmp_path, "a.safetensors", "b.safetensors.partial")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="path: got .*a.safetensors.*such as .*a-2.safetensors"):
        tensor_files.write(tmp_path / "a.safetensors", {"x": tensor})
    for _ in range(2):
        tensor_files.write(tmp_path / "b.safetensors", {"x": tensor})
    assert survives(before, tmp_path)


def test_converting_an_adapter_touches_nothing_beside_it(tmp_path):
    model = tiny_model("deepseek_v2")
    adapter = tmp_path / "adapter"
    get_peft_model(model, ktlib.lora_config(model, r=2)).save_pretrained(adapter)
    put(tmp_path, ".out.ktlib-partial-mine/thesis", ".out.settings/thesis", "out/thesis", "base/.x")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="out: .*out exists and is not an empty folder.* such as .*out-2"):
        ktlib.export_adapter(adapter, tmp_path / "out", model.config)
    ktlib.export_adapter(adapter, tmp_path / "out-2", model.config)
    ktlib.import_adapter(tmp_path / "out-2", tmp_path / "back", model.config)
    assert survives(before, tmp_path)
    assert not [name for name in snapshot(tmp_path) if Path(name).name.startswith(ownership.LIST_PREFIX)]


# ---- single files that the user names -------------------------------------------------------------------------------


def test_a_figure_replaces_only_a_figure_of_ktlib(tmp_path, capsys):
    model = tiny_model("deepseek_v2")
    get_peft_model(model, ktlib.lora_config(model, r=2)).save_pretrained(tmp_path / "adapter")
    put(tmp_path, "mine.png", "elsewhere.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere.png")
    before = snapshot(tmp_path)
    for name in ("mine.png", "link.png"):
        assert cli.main(["audit", str(tmp_path / "adapter"), "--figure", str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert f"--figure: got '{tmp_path / name}', not written by ktlib" in printed.err and not printed.out
        assert f"{name[:4]}-2.png" in printed.err
    assert cli.main(["audit", str(tmp_path / "adapter"), "--figure", str(tmp_path / "no/map.png")]) == 2
    assert f"--figure: got '{tmp_path / 'no/map.png'}', but there is no folder" in capsys.readouterr().err
    for _ in range(2):
        assert cli.main(["audit", str(tmp_path / "adapter"), "--figure", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").stat().st_size > 1000 and survives(before, tmp_path)


def test_measurements_replace_only_measurements_of_ktlib(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(tmp_path / "mine.json")])
    monkeypatch.setattr(bench, "bench", lambda *_: [])
    put(tmp_path, "mine.json")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="--json: got .*mine.json', not written by"):
        patch.setattr(bench, "ceilings", lambda: pytest.fail("measures"))
        bench.main()
    assert (tmp_path / "mine.json").read_text() == "somebody's mine.json"
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(tmp_path / "new.json")])
    monkeypatch.setattr(bench, "ceilings", dict)
    for _ in range(2):
        bench.main()
    assert json.loads((tmp_path / "new.json").read_text())["shapes"] == {"deepseek_v2_lite": []}
