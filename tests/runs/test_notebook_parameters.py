"""Notebooks with other parameters than their defaults: valid ones run to the end, others are refused at once by name.

``notebooks/params/ci`` holds a second, small set for each; tests/long/notebook_parameters.py draws random sets.
"""

import json
import re
from pathlib import Path

import pytest
import transformers

from ktlib import cli
from ktlib.lab import notebook_parameters as parameters
from ktlib.runs import notebooks

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SECOND = {name: ROOT / "notebooks" / "params" / "ci" / f"{name}.yaml" for name in NOTEBOOKS}


# ---- runs -----------------------------------------------------------------------------------------------------------


def failing_cell(notebook):
    """The source of the cell that papermill marks as the one that raised."""
    cells = [cell for cell in notebooks.read(notebook).cells if cell.metadata.get("papermill", {}).get("exception")]
    return "\n".join(cell.source for cell in cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_to_its_end_with_other_parameters(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the folder that a notebook is run from is nobody's business
    given = notebooks.with_output_dir(NOTEBOOKS[name], cli.read_yaml(SECOND[name]), "run")
    result = notebooks.run(NOTEBOOKS[name], "run", given, progress=False, quiet=True)
    assert result.error is None, f"{result.error}\nin this cell:\n{failing_cell(result.notebook)}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_second_set_is_another_one(name):
    defaults = {key: value for key, (_, value) in notebooks.notebook_parameters(NOTEBOOKS[name]).items()}
    given = notebooks.check_parameters(NOTEBOOKS[name], cli.read_yaml(SECOND[name]))
    assert given and {key for key, value in given.items() if value == defaults[key]} == set()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def check(monkeypatch):
    """``check(number, **parameters)`` runs a notebook up to the first code cell after its parameters, in here."""
    verbosity = transformers.logging.get_verbosity()
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")

    def run(number, **given):
        (path,) = (path for name, path in NOTEBOOKS.items() if name.startswith(number))
        cells = [cell for cell in notebooks.read(path).cells if cell.cell_type == "code"]
        at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
        names = {}
        for cell in cells[: at + 1]:
            exec(cell.source, names)
        assert set(given) <= set(names), "no such parameter"
        names |= given
        exec(cells[at + 1].source, names)

    yield run
    transformers.logging.set_verbosity(verbosity)


REFUSED = [
    ("01", {"models": {}}, "models: got {}, needs a table of at least one model"),
    ("01", {"models": {"a": [1, 2, 3]}}, "models['a']: got [1, 2, 3], needs five numbers"),
    ("01", {"models": {"a": [1, 2, 1, 0, 4]}}, "models['a'][3]: got 0, needs a whole number >= 1"),
    ("01", {"models": {"a": [1, 2, 3, 4, 5]}}, "models['a']: got [1, 2, 3, 4, 5], needs at most as many experts"),
    ("01", {"megabytes": 63}, "megabytes: got 63, needs a whole number >= 64"),
    ("01", {"megabytes": 10**9}, "megabytes: got 1000000000, needs 1048576.0 GB of memory, "),
    ("02", {"tokens": 0}, "tokens: got 0, needs a whole number >= 1"),
    ("02", {"experts": 5, "top_k": 6}, "top_k: got 6, needs at most as many as there are experts, 5"),
    ("02", {"rank": 2.0}, "rank: got 2.0, needs a whole number >= 1"),
    ("02", {"seed": -1}, "seed: got -1, needs a whole number from 0 to 4294967295"),
    ("02", {"hidden": 10**9}, "experts, hidden, intermediate: got 16, 1000000000, 1408, needs "),
    ("03", {"shape": "huge"}, "shape: got 'huge', needs one of deepseek_v2_lite, "),
    ("03", {"tokens": "64 many"}, "tokens: got '64 many', needs whole numbers >= 1 with spaces"),
    ("03", {"tokens": "64 64"}, "tokens: got '64 64', needs whole numbers"),
    ("03", {"tokens": ""}, "tokens: got '', needs whole numbers"),
    ("03", {"repeat": True}, "repeat: got True, needs a whole number >= 1"),
    ("03", {"budget": 0}, "budget: got 0, needs a finite number > 0"),
    ("04", {"rank": 0}, "rank: got 0, needs a whole number >= 1"),
    ("04", {"scale_of_b": 1.5}, "scale_of_b: got 1.5, needs a number > 0 and <= 1"),
    ("04", {"scale_of_b": float("nan")}, "scale_of_b: got nan, needs a number > 0"),
    ("04", {"train_inits": ["xavier"]}, "train_inits: got 'xavier', needs one of kaiming, "),
    ("04", {"learning_rates": []}, "learning_rates: got [], needs a list of at least one value"),
    ("04", {"learning_rates": ["1e-3"]}, "learning_rates: got '1e-3', needs a finite number > 0"),
    ("04", {"seeds": [1, 1]}, "seeds: got [1, 1], needs values that differ"),
    ("04", {"seeds": 3}, "seeds: got 3, needs a list of at least one value"),
    ("04", {"dataset": "names"}, "dataset: got 'names', need"),
    ("04", {"runs_folder": "nowhere"}, "runs_folder: got 'nowhere', needs nothing or the folder of a sweep"),
    ("06", {"poison_step": 7}, "poison_step: got 7, needs a whole number from 1 to 6"),
    ("06", {"poison_layer": 0}, "poison_layer: got 0, needs a whole number from 1 to 3"),
    ("06", {"poison_expert": 16}, "poison_expert: got 16, needs an expert of layer 2 that gets tokens: ["),
    ("06", {"dataset": "names"}, "dataset: got 'names', need"),
    ("07", {"depth": 1}, "depth: got 1, needs a whole number >= 2"),
    ("07", {"layers": 1}, "layers: got 1, needs a whole number >= 2"),
    ("07", {"rank": 0}, "rank: got 0, needs a whole number >= 1"),
    ("08", {"tokens": 700}, "tokens: got 700, needs a multiple of 512, whole rows"),
    ("08", {"sequence_length": 0}, "sequence_length: got 0, needs a whole number from 1 to 1048576"),
    ("08", {"rank": 1.0}, "rank: got 1.0, needs a whole number from 1 to 65536"),
    ("08", {"cpu_rate": 0}, "cpu_rate: got 0, needs a finite number > 0"),
    ("08", {"bandwidth": "20e9"}, "bandwidth: got '20e9', needs a finite number > 0"),
    ("09", {"runs_folder": "nowhere"}, "runs_folder: got 'nowhere', needs nothing or the folder of a sweep"),
    ("09", {"metric": "accuracy"}, "metric: got 'accuracy', needs a number that a run recorded: after, before, "),
    ("09", {"metric": "dataset"}, "metric: got 'dataset', needs a number"),
    ("09", {"curve": "after"}, "curve: got 'after', needs nothing or a list of numbers"),
    ("09", {"higher_is_better": 1}, "higher_is_better: got 1, needs true or false"),
    ("10", {"tasks": "codebook"}, "tasks: got 'codebook', needs a list of at least one value"),
    ("10", {"tasks": ["names"]}, "tasks: got 'names', needs one of dates, codebook"),
    ("10", {"seed": 2**32 - 1, "seeds": 2}, "seed, seeds: got 4294967295, 2, needs all seeds below 2**32"),
    ("10", {"steps": 0}, "steps: got 0, needs a whole number >= 1"),
    ("10", {"dropout_steps": 2}, "dropout_steps: got 2, needs a whole number >= 3"),
    ("10", {"output_dir": ""}, "output_dir: got '', needs none or a folder"),
    ("10", {"isa": "vax"}, "isa: got 'vax', need none or what runs on this CPU"),
    ("11", {"layers": 1}, "layers: got 1, needs a whole number >= 2"),
    ("11", {"experts": 2}, "experts: got 2, needs a whole number >= "),
    ("11", {"hidden": 202}, "hidden: got 202, needs a multiple of 8, for stock grouped_mm"),
    ("11", {"tokens": 500}, "tokens: got 500, needs whole rows of 64"),
    ("11", {"length": 5000}, "length: got 5000, needs a whole number from 2 to 4096"),
    ("11", {"response": 64}, "response: got 64, needs fewer than a row has, 64"),
    ("11", {"learning_rate": float("inf")}, "learning_rate: got inf, needs a finite number > 0"),
    ("11", {"device": "tpu"}, "device: got 'tpu', needs one of auto, cpu"),
    ("11", {"hidden": 10**6, "experts": 1000}, "layers, hidden, experts, intermediate, tokens: got 4, 1000000, 1000, "),
    ("12", {"bases": ["int3"]}, "bases: got 'int3', needs one of bf16, int8, fp8, int4, nf4, mxfp4"),
    ("12", {"bases": []}, "bases: got [], needs a list of at least one value"),
    ("12", {"prompts": 201}, "prompts: got 201, needs a whole number from 1 to 200"),
    ("12", {"steps": 0}, "steps: got 0, needs a whole number >= 1"),
    ("12", {"seed": 2**32 - 1, "seeds": 2}, "seed, seeds: got 4294967295, 2, needs all seeds below 2**32"),
    ("12", {"tokens": "8 1"}, "tokens: got '8 1', needs whole numbers >= 1"),
    ("12", {"budget": 0}, "budget: got 0, needs a finite number > 0"),
    ("12", {"output_dir": ""}, "output_dir: got '', needs none or a folder"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "given", "message"), REFUSED, ids=[f"{n}-{'-'.join(g)}" for n, g, _ in REFUSED])
def test_the_first_cell_after_the_parameters_refuses_by_name(check, number, given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check(number, **given)


def test_a_folder_that_is_no_sweep_is_refused(check, tmp_path):
    with pytest.raises(ValueError, match="^runs_folder: got .*, needs a folder with finished runs"):
        check("09", runs_folder=str(tmp_path))


# ---- ktlib.lab.notebook_parameters
# ------------------------------------------------------------------------------------


def test_parameters_that_do_not_fit_together_are_named_together():
    parameters.need(True, "anything", a=1)
    with pytest.raises(ValueError, match="^a, b: got 1, 'x', needs more$"):
        parameters.need(False, "more", a=1, b="x")


def test_values_at_the_limits_are_taken():
    parameters.whole(1, 3, a=1, b=3)
    parameters.positive(2.5, a=2.5)
    parameters.each(parameters.whole, 0, 4, a=[4, 0])
    parameters.memory(1, a=1)


def test_a_claim_is_judged_only_where_it_is_claimed(capsys):
    parameters.judge({"right": True})
    parameters.judge({"right": True, "wrong": False}, judged=False, about="small ones")
    assert capsys.readouterr().out == (
        "right: yes\nright: yes\nwrong: no\nnot judged, because it is claimed of small ones\n"
    )
    with pytest.raises(AssertionError, match=r"\['wrong'\]"):
        parameters.judge({"right": True, "wrong": False}, about="small ones")


# ---- the sweep over random sets -------------------------------------------------------------------------------------


@pytest.fixture
def long(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "long")
    import notebook_parameters

    return notebook_parameters


def test_a_sweep_goes_on_where_it_stopped_and_reports_failures(long, tmp_path, monkeypatch):
    errors = iter([None, "cell 3: ValueError: poison_expert: got 1, needs an expert of layer 2 that gets tokens: [2]",
                   "cell 9: AssertionError: no", None])  # fmt: skip
    monkeypatch.setattr(
        long.notebooks, "run", lambda *arguments, **options: long.notebooks.Executed(None, None, next(errors))
    )
    out = tmp_path / "done" / "runs.json"
    assert len(long.sweep(["02", "06"], 1, 60, 0, out)) == 2
    done = long.sweep(["02", "06"], 2, 60, 0, out)
    assert [run["outcome"] for run in done] == ["ran", "refused", "FAILED", "ran"] and next(errors, "none") == "none"
    assert done == json.loads(out.read_text())
    (failure,) = long.summary(done)["failures"]
    assert failure["notebook"] == "02_kernel_validation" and failure["error"] == "cell 9: AssertionError: no"
    assert long.sweep(["02"], 5, -1, 0, out) == done, "no time is left"


def test_the_sweep_draws_every_parameter_of_every_notebook(long, tmp_path):
    assert sorted(path.stem for path in long.NOTEBOOKS) == list(NOTEBOOKS)
    apart = {"runs_folder", "output_dir", "model", "finetuning", "isa", "torch_threads", "stream_rows",
             "sequence_length"}  # fmt: skip
    for path, draw in long.NOTEBOOKS.items():
        given = notebooks.check_parameters(path, draw(long.random.Random(0), tmp_path))
        assert set(notebooks.notebook_parameters(path)) - set(given) <= apart, path.stem
