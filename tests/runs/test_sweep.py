"""Sweeps: everything is checked before the first run, and a second call runs only what is missing."""

import itertools
import re

import nbformat
import pytest

from ktlib import cli
from ktlib.runs import notebooks, sweep

PARAMETERS = 'a: int = 1\nb: float = 2.0\ntask: str = "dates"\noutput_dir: str = ""'
BODY = """\
from pathlib import Path
from ktlib.runs.notebooks import record
if Path("fail").exists() and a == 3:
    raise RuntimeError("no luck")
record(product=a * b, out=output_dir)
"""


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    cells = [nbformat.v4.new_code_cell(text) for text in (PARAMETERS, BODY)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    monkeypatch.chdir(tmp_path)
    return path


def count_runs(monkeypatch):
    started, run = [], notebooks.run
    monkeypatch.setattr(notebooks, "run", lambda *args, **kwargs: started.append(args[1].name) or run(*args, **kwargs))
    return started


@pytest.mark.compatible("papermill sweeps that go on where they stopped")
def test_a_sweep_goes_on_where_it_stopped(notebook, tmp_path, monkeypatch, capsys):
    started = count_runs(monkeypatch)
    (tmp_path / "grid.yaml").write_text("notebook: small.ipynb\nfixed: {b: 1e-1}\ngrid: {a: [2, 3]}\n")
    (tmp_path / "fail").touch()
    assert cli.main(["sweep", "grid.yaml"]) == 1
    printed = capsys.readouterr()
    assert "2 runs, 0 of them finished before" in printed.out and "failed: cell 3: RuntimeError: no luck" in printed.out
    assert "FAILED    runs/grid/a=3/failed.html" in printed.err and started == ["a=2", "a=3"]
    assert [row["failed"] for row in notebooks.load_runs("runs/grid")] == [False, True]

    (tmp_path / "fail").unlink()
    assert cli.main(["sweep", "grid.yaml"]) == 0
    assert started == ["a=2", "a=3", "a=3"], "only the failed one runs again"
    assert cli.main(["sweep", "grid.yaml"]) == 0 and len(started) == 3
    rows = notebooks.load_runs("runs/grid")
    assert [(row["run"], row["a"], row["product"], row["failed"]) for row in rows] == [
        ("a=2/small", 2, pytest.approx(0.2), False),
        ("a=3/small", 3, pytest.approx(0.3), False),
    ]
    assert rows[0]["out"] == "runs/grid/a=2/adapter", "each run has its own folder of results"

    (tmp_path / "grid.yaml").write_text("notebook: small.ipynb\nfixed: {b: 5}\ngrid: {a: [2, 3, 4]}\n")
    assert cli.main(["sweep", "grid.yaml"]) == 2
    assert "a=2 was run with another b" in capsys.readouterr().err and len(started) == 3


def test_an_interrupted_sweep_keeps_its_finished_runs(notebook, monkeypatch):
    run = notebooks.run

    def interrupted(path, folder, parameters, **options):
        if parameters["a"] == 3:
            return notebooks.Executed(folder / "failed.ipynb", folder / "failed.html", "interrupted")
        return run(path, folder, parameters, **options)

    monkeypatch.setattr(notebooks, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_missing(notebook, "runs", {"a": [2, 3, 4]})
    monkeypatch.setattr(notebooks, "run", run)
    started = count_runs(monkeypatch)
    assert len(sweep.run_missing(notebook, "runs", {"a": [2, 3, 4]})) == 3 and started == ["a=3", "a=4"]


def test_the_plan_is_the_grid(notebook):
    planned = sweep.plan(notebook, "runs", {"a": [2, 3], "task": ["x/y", "names"]}, {"b": 3})
    assert [path.name for path in planned] == ["a=2,task=x-y", "a=2,task=names", "a=3,task=x-y", "a=3,task=names"]
    first = next(iter(planned.values()))
    assert first == {"output_dir": "runs/a=2,task=x-y/adapter", "b": 3.0, "a": 2, "task": "x/y"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("grid: {aa: [1]}", "no parameter named aa"),
        ("grid: {a: [1]}\nfixed: {c: 1}", "no parameter named c"),
        ("grid: {a: [1, x]}", "a: got 'x'"),
        ("grid: {a: 1}", "grid: got .*needs a list of values"),
        ("grid: {a: []}", "needs a list of values"),
        ("fixed: {a: 1}", "grid: got None"),
        ("grid: {a: [1]}\nfixed: {a: 2}", "a is among the fixed parameters too"),
        ("grid: {a: [1, 1]}", "a=1 occurs twice"),
        ("grids: {a: [1]}", "has grids, needs notebook, grid"),
        ("notebook: none.ipynb\ngrid: {a: [1]}", "notebook: got 'none.ipynb', needs one of sft, init"),
        ("notebook: 5\ngrid: {a: [1]}", "notebook: got '5', needs one of"),
        ("notebook: [5]\ngrid: {a: [1]}", "notebook: got .*5.*, needs one of"),
        ("notebook: grid.yaml\ngrid: {a: [1]}", "grid.yaml: not a notebook"),
        ("grid: [1, 2]", r"grid: got \[1, 2\], needs a list of values for each"),
        ("grid: {a: [1]}\nfixed: [1]", r"fixed: got \[1\], needs a value for each"),
        ("grid: {a: [1]}\nfixed: 0", "fixed: got 0, needs a value for each"),
        ("grid: {a: [1]}\n5: 6\nx: 7", "needs text as a name"),
        ("grid: {1: [2]}", "needs text as a name"),
        ("grid: {a: [1], a: [2]}", "a is given twice"),
    ],
)
def test_wrong_sweeps_are_refused_before_anything_runs(notebook, tmp_path, capsys, text, message):
    (tmp_path / "grid.yaml").write_text(text if "notebook" in text else f"notebook: small.ipynb\n{text}")
    assert cli.main(["sweep", "grid.yaml"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_axes_of_any_values():
    grid = {
        "isa": [None, "avx2"],
        "rows": [None, 0.5, 8],
        "parts": [["a", "b"], ["a"]],
        "task": ["x,y=2", "z"],
    }
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    rows = [{"run": f"{sweep.name(point)}/small", "failed": False} | point for point in points]
    assert sweep.axes(rows[::-1]) == grid and list(sweep.axes(rows)) == list(grid)


@pytest.mark.parametrize("names", [[], ["small"], ["a=1/small", "b=1/small"], ["c=1/small"]])
def test_axes_are_of_one_sweep(names):
    with pytest.raises(ValueError, match=f"rows: need the runs of one sweep, got {len(names)} runs"):
        sweep.axes([{"run": run, "a": 1, "b": 1} for run in names])


@pytest.mark.parametrize("file", sorted((notebooks.NOTEBOOKS / "sweeps").glob("*.yaml")), ids=lambda file: file.name)
def test_sweep_files_of_the_repository_are_valid(file, tmp_path, capsys):
    assert cli.main(["sweep", str(file), "--out", str(tmp_path), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1 and not any(tmp_path.iterdir())


def test_the_notebooks_that_have_names_exist():
    assert all(sweep.find(name).is_file() for name in sweep.NAMES)
    assert notebooks.SFT == sweep.find("sft")
