"""Committed notebooks are executed, in order, portable, small, and listed in the README.

A cell without an execution count is run but not compared by nbval, so the order test guards the comparison itself.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from ktlib import cli
from ktlib.runs import notebooks

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TAGS = {"parameters", "nbval-ignore-output", "nbval-skip", "skip-execution"}
ABSOLUTE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|opt|usr|var|mnt|etc)/\S|site-packages|\b[A-Z]:\\\w")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request):
    return request.param


@pytest.fixture
def nb(path):
    return nbformat.read(path, as_version=4)


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_there_are_notebooks_and_their_numbers_are_unique():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers and all(number.isdigit() for number in numbers) and len(set(numbers)) == len(numbers)


def test_outputs_are_stored_and_in_order(nb):
    counts = [cell.execution_count for cell in code_cells(nb)]
    assert counts == list(range(1, len(counts) + 1)), "run `make refs`"


def test_title_says_question_time_and_needs_and_the_end_says_conclusion_and_next(nb, path):
    title = nb.cells[0].source
    assert re.match(rf"# {path.name[:2]} \S", title)
    assert all(f"**{word}.**" in title for word in ("Question", "Time", "Needs"))
    assert all(f"**{word}.**" in nb.cells[-1].source for word in ("Conclusion", "Next"))


def test_kernel_is_portable(nb):
    assert nb.metadata.kernelspec.name == "python3"
    assert "papermill" not in nb.metadata


def test_tags(nb):
    used = [tag for cell in nb.cells for tag in tags(cell)]
    assert set(used) <= TAGS and used.count("parameters") <= 1
    for cell in nb.cells:
        assert ("nbval-skip" in tags(cell)) == ("skip-execution" in tags(cell)), (
            "one tool skips the cell, another runs it"
        )


def test_something_is_compared(nb):
    compared = [cell for cell in code_cells(nb) if cell.outputs and "nbval-ignore-output" not in tags(cell)]
    assert compared, "every output is excluded from comparison"


def test_parameters_are_annotated_literals(nb):
    for cell in nb.cells:
        if "parameters" in tags(cell):
            for node in ast.parse(cell.source).body:
                assert isinstance(node, ast.AnnAssign), f"not an annotated assignment: {ast.unparse(node)}"
                ast.literal_eval(node.value)


def test_cells(nb):
    for cell in code_cells(nb):
        assert not cell.source.rstrip().endswith(";"), "nbval does not hide the value of a last line that ends in `;`"
        assert "sys.stdout" not in cell.source, "progress bars belong on stderr"
        assert len(cell.source.splitlines()) <= 40, "move the code into ktlib"


def test_claims_are_asserted(nb):
    assert any(re.search(r"^\s*(assert |judge\()", cell.source, re.MULTILINE) for cell in code_cells(nb))


def test_outputs_hold_no_errors_and_no_absolute_paths(nb):
    for cell in code_cells(nb):
        for output in cell.outputs:
            assert output.output_type != "error"
            texts = [output.get("text", "")]
            texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
            for text in texts:
                assert not ABSOLUTE_PATH.search(text), ABSOLUTE_PATH.search(text)


def test_size(nb):
    assert len(nbformat.writes(nb)) < 600_000


def test_readme_lists_every_notebook_once():
    listed = re.findall(r"\]\(notebooks/([^)]+\.ipynb)\)", (ROOT / "README.md").read_text())
    assert sorted(set(listed)) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("file", sorted((ROOT / "notebooks" / "params").glob("*.yaml")), ids=lambda file: file.name)
def test_parameter_files_fit_the_sft_notebook(file):
    assert notebooks.check_parameters(notebooks.SFT, cli.read_yaml(file))


def test_the_sft_notebook_saves_as_soon_as_it_has_trained():
    """So the adapter is saved, and the record says so, even if a later cell fails."""
    sources = [cell.source for cell in code_cells(nbformat.read(notebooks.SFT, as_version=4))]
    (trains,) = [i for i, source in enumerate(sources) if source.startswith("result = sft.train(")]
    assert sources[trains + 1].startswith("sft.save(adapted, output_dir") and "record(saved=" in sources[trains + 1]
