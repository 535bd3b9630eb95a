"""The order of the house: which wing of ktlib/ and csrc/ may use which."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top to the bottom: a wing imports only wings that stand further down. What is one file stands here too.
PYTHON = (
    *("cli", "lab", "runs", "training", "estimate", "diagnosis", "conversion", "placement", "integrations"),
    *("operator", "reference", "plots", "files", "system", "names", "assets", "_kernels"),
)
CPP = ("python", "layer", "weights", "system", "kernels")


def wing_of(parts):
    return parts[0].removesuffix(".py")


def python_modules():
    package = ROOT / "ktlib"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts != ("__init__.py",):
            yield path, parts


def imported(path):
    """The modules of ktlib that a file imports, also within functions: ``("integrations", "peft_lora")``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("ktlib"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, needs `from ktlib.`..."
            module = tuple((node.module or "").split("."))
            if module == ("ktlib",):
                yield from ((alias.name,) for alias in node.names)
            elif module[0] == "ktlib":
                for alias in node.names:
                    name = (*module[1:], alias.name)
                    is_module = (ROOT / "ktlib").joinpath(*name).with_suffix(".py").is_file()
                    yield name if is_module else module[1:]


def test_every_file_stands_in_a_wing():
    assert {wing_of(parts) for _, parts in python_modules()} | {"_kernels"} == set(PYTHON)
    assert {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} == set(CPP)


def test_a_wing_imports_only_wings_below_it():
    for path, parts in python_modules():
        own = wing_of(parts)
        for module in imported(path):
            if module and module[0] in PYTHON and module[0] != own and own != "cli":
                assert PYTHON.index(module[0]) > PYTHON.index(own), f"{own}: {path.name} imports {'.'.join(module)}"


def test_no_circles_of_modules():
    graph = {}
    for path, parts in python_modules():
        name = tuple(part.removesuffix(".py") for part in parts if part != "__init__.py")
        graph[name] = {module for module in imported(path) if module and module != name}
    done, under_way = set(), []

    def visit(name):
        assert name not in under_way, f"a circle: {' -> '.join('.'.join(n) for n in (*under_way, name))}"
        if name in done or name not in graph:
            return
        under_way.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(under_way.pop())

    for name in graph:
        visit(name)


def includes():
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.suffix in (".h", ".cpp"):
            for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
                yield path, name


@pytest.mark.parametrize("own", CPP)
def test_a_wing_of_csrc_includes_only_wings_below_it(own):
    for path, name in includes():
        if path.parent.name == own:
            assert (ROOT / "csrc" / name).is_file(), f"{path.name} includes {name}"
            assert CPP.index(name.partition("/")[0]) >= CPP.index(own), f"{own}: {path.name} includes {name}"
