"""The set-up says one thing in one place: pins, ranges, Makefile, CI and README agree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import test_readme
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import compatibility
from support.pages import README, TEXT

from ktlib import cli

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def by_name(lines):
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pins():
    """environment.yml's pip list, extracted by the Makefile's own sed command."""
    (command,) = re.findall(r"(sed -n .*environment\.yml) >", MAKEFILE)
    lines = subprocess.run(command.replace("$$", "$"), shell=True, cwd=ROOT, check=True, capture_output=True, text=True)
    return by_name(lines.stdout.splitlines())


def ranges():
    """Every requirement that pyproject.toml states: run time, extras, build."""
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return by_name(PROJECT["dependencies"] + extras + PYPROJECT["build-system"]["requires"])


def test_the_pins_are_a_subset_of_what_conda_users_get():
    yaml = pytest.importorskip("yaml")
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert by_name(pip) == pins()


@pytest.mark.parametrize("name", sorted(ranges()))
def test_every_requirement_is_in_the_environment_and_its_pin_is_supported(name):
    assert name in pins(), f"pyproject.toml asks for {name}, environment.yml does not install it"
    for specifier in pins()[name].specifier:
        if specifier.operator == "==":
            assert ranges()[name].specifier.contains(specifier.version)


def test_the_exact_pins_that_results_depend_on():
    for name in ("torch", "transformers", "peft", "nbval", "papermill", "pytest", "ruff"):
        assert [specifier.operator for specifier in pins()[name].specifier] == ["=="], name


def test_supported_ranges_include_the_known_seams():
    supported = {
        "torch": ("2.11.0", "2.13.0"),
        "transformers": ("5.17.0", "5.24.0"),
        "peft": ("0.21.0", "0.21.2"),
    }
    for name, versions in supported.items():
        assert all(ranges()[name].specifier.contains(one) for one in versions), name


def test_the_oldest_environment_is_the_lower_bounds():
    oldest = by_name(line for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines() if line[0] != "#")
    assert {"torch", "transformers", "peft"} < set(oldest)
    for name, requirement in oldest.items():
        (pin,) = (specifier.version for specifier in requirement.specifier if specifier.operator == "==")
        (bound,) = (s.version for s in ranges()[name].specifier if s.operator == ">=")
        assert Version(pin) == Version(bound), f"{name}: tested from {pin}, promised from {bound}"
        assert ranges()[name].specifier.contains(pin)


def make_targets():
    return set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))


def test_readme_commands_exist():
    code = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", TEXT, re.DOTALL) + re.findall(r"`([^`\n]+)`", TEXT))
    targets = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert {"sft", "test"} <= targets <= make_targets()
    commands = set(re.findall(r"\bktlib ([a-z]+)", code))
    (choices,) = [action.choices for action in cli.parser()._actions if action.dest == "command"]
    assert commands and commands <= set(choices)
    for path in re.findall(r"\b(?:notebooks|tests|csrc|ktlib)/[\w./-]*\w", code):
        assert (ROOT / path).exists(), f"README names {path}"


def test_help_lists_every_target():
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert make_targets() == set(re.findall(r"^  make ([a-z-]+)", done.stdout, re.MULTILINE))


def test_ci_runs_what_a_contributor_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text and re.search(r"^make test$", text, re.MULTILINE)


def test_ci_says_how_long_each_stage_took(tmp_path):
    """The script itself, with every command it calls replaced by one that does nothing, or fails."""
    for name in ("make", "ls", "chromedriver"):
        (tmp_path / name).write_text("#!/bin/sh\n[ $# -eq 1 ] && [ $1 = sanitize ] && [ -e fail ] && exit 3\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text().replace("budget=4500", "budget=-1"))
    (tmp_path / ".venv" / "bin" / "python").symlink_to("/bin/true")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for code in (0, 3):
        done = subprocess.run(["bash", tmp_path / ".ci" / "run"], env=environment, capture_output=True, text=True)
        assert done.returncode == code
        stages = re.findall(r"^ +\d+ s  (.+)$", done.stdout, re.MULTILINE)
        assert stages[0].startswith("a browser") and stages[1:3] == ["make test", "make sanitize"]
        assert stages[-1].startswith("together") and "SLOW" in done.stdout
        assert any(stage.startswith("FAILED with 3") for stage in stages) == (code == 3)
        (tmp_path / "fail").touch()


# Commands of the README that CI does not run, each with its reason.
NOT_IN_CI = {
    "make lab": "opens a browser",
    "make refs": "rewrites the stored outputs that `make test` compares with",
    "conda env": "downloads an environment; that its pins are those CI installs is tested above",
    "make test-oldest": "several gigabytes of old packages; run by hand for the table of compatibility",
    "make test-notebooks": "an hour; its result is recorded",
    "make test-peers": "downloads the tests of others; run by hand after a change of versions",
    "python -m ktlib.lab.bench": "half an hour; its kernels are timed in notebook 03",
}
# Those that it runs in other words: where, and what of them must stand there.
ELSEWHERE = {
    "pip install": ("Makefile", "--no-build-isolation --editable ."),
    "python -m ktlib.lab.base_model": ("tests/lab/test_base_model.py", "base_model.make("),
}


def test_the_commands_of_the_readme_are_those_that_ci_runs():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).splitlines()
    commands = [line.split("#")[0].strip() for line in blocks] + re.findall(r"`([^`\n]+)`", TEXT)
    commands = {c for c in commands if re.match(r"(make|ktlib|conda|pip|python -m) \w|python -m", c)}
    assert len(commands) >= 10
    ci = (ROOT / ".ci" / "run").read_text()
    for command in commands:
        words = command.split()
        start = " ".join(words[: 3 if words[0] == "python" else 2])
        if start in NOT_IN_CI or command in test_readme.COMMANDS:
            continue
        file, text = ELSEWHERE.get(start, (".ci/run", start))
        assert text in (ROOT / file).read_text(), f"README says `{command}`, nothing in CI runs it"
    for option in re.findall(r"--\w+", " ".join(c for c in commands if c.startswith("ktlib sft"))):
        assert option in ci or option in (ROOT / "tests" / "test_cli.py").read_text(), option


def promises():
    """Rows of the table of promises in tests/README.md: (promise, the tests and records in its last column)."""
    (table,) = re.findall(r"## What we promise.*?\n\n(\|.*?)\n\n", TEXT, re.DOTALL)
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return [(cells[0].strip(), re.findall(r"`([^`]+)`", cells[-1])) for cells in rows]


def test_every_promise_names_what_tests_it():
    assert len(promises()) >= 8
    for promise, sources in promises():
        assert sources, promise
        for source in sources:
            path, _, name = source.partition("::")
            file = ROOT / path
            assert file.exists(), f"{promise}: no {path}"
            if name:
                assert re.search(rf"^def {name}\(", file.read_text(), re.MULTILINE), f"{promise}: no {source}"


@pytest.mark.parametrize(
    ("python", "message"),
    [("no-such-python", "no-such-python not found"), ("./old", "needs 3.11 or newer"), ("./bare", "python3-venv")],
)
def test_set_up_says_what_is_missing(tmp_path, python, message):
    (tmp_path / "Makefile").write_text(MAKEFILE)
    fakes = {"old": "case $* in *version_info*) exit 1;; *) echo Python 3.9.1;; esac", "bare": "! [[ $* == *venv* ]]"}
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["make", ".venv/.python", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stdout


def test_readme_numbers_are_the_recorded_ones():
    recorded = json.loads((ROOT / "notebooks" / "recorded" / "layer_xeon_amx_16cpu.json").read_text())
    rows, avx512 = recorded["shapes"]["deepseek_v2_lite"], recorded["avx512_run"]
    sources = {
        "ktlib, AMX": (rows, "ktlib amx_bf16"),
        "kt-kernel 0.7.2 (KTransformers), AMX": (rows, "kt-kernel amx"),
        "ktlib, AVX-512 (`KTLIB_ISA=avx512f`)": (avx512, "ktlib avx512f"),
        "ktlib, AVX512-BF16": (avx512, "ktlib avx512_bf16"),
        "kt-kernel 0.7.2, AVX512-BF16": (avx512, "kt-kernel avx512_bf16"),
        "stock PEFT on grouped_mm experts": (rows, "grouped_mm + PEFT"),
    }
    for label, (table, name) in sources.items():
        rates = {row["tokens"]: str(round(row["tokens_per_s"])) for row in table if row["name"] == name}
        numbers = [rates.get(tokens, "not measured") for tokens in (512, 2048, 8192)]
        assert f"| {label} | " + " | ".join(numbers) + " |" in TEXT
    names = ("ktlib amx_bf16", "kt-kernel amx")
    ours, theirs = ([row["tokens_per_s"] for row in rows if row["name"] == name] for name in names)
    few, many = (f"{ours[i] / theirs[i]:.2f}" for i in (0, 2))
    assert f"{few} times as fast as kt-kernel at 512 tokens, {many} times at 8192" in " ".join(README.split())
    rates = [row["gflops"] * 1e9 for row in rows if row["name"] == "ktlib amx_bf16"]
    shares = [round(100 * rate / recorded["ceilings"]["amx_bf16"]) for rate in rates]
    assert f"{shares[0]}, {shares[1]} and {shares[2]} % of the tile registers' peak rate" in TEXT


def test_readme_says_the_memory_that_the_parameter_files_say():
    files = {"DeepSeek-V2-Lite": "deepseek_v2_lite", "Qwen3-30B-A3B": "qwen3_30b_a3b", "Mixtral-8x7B": "mixtral_8x7b"}
    for name, file in files.items():
        said = (ROOT / "notebooks" / "params" / f"{file}.yaml").read_text()
        host, gpu = re.search(r"(\d+) GB of host memory, (\d+) GB of GPU memory", said).groups()
        assert f"{host} GB for {name}" in README and 5 <= int(gpu) <= 14, file
    assert "A GPU of 5 to 14 GB" in " ".join(README.split())


def test_the_compatibility_table_is_that_of_the_tests():
    """Every row has tests that carry its name, every such test has its row, and no row claims what did not pass."""
    marked = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        marked |= set(re.findall(r'^@pytest\.mark\.compatible\("(.*)"\)$', path.read_text(), re.MULTILINE))
    rows = compatibility.rows_of(TEXT)
    assert set(rows) == marked, "run `make compatibility`"
    for what, cells in rows.items():
        passed, of = cells[0].split(" of ")
        assert passed == of and int(of) > 0, f"{what}: {cells[0]} with the newest versions"


def test_the_compatibility_table_is_made_from_results(tmp_path):
    file = tmp_path / "results.json"
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.compatible('a')\n@pytest.mark.parametrize('x', [1, 2, 3])\ndef test_a(x): assert x < 3\n"
        "@pytest.mark.compatible('b')\ndef test_b(): pytest.skip('no')\n"
    )
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    shutil.copytree(ROOT / "tests/support", tmp_path / "support")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "compatible", str(tmp_path)]
    subprocess.run([*command, "--compatibility", str(file)], cwd=tmp_path, capture_output=True)
    results = json.loads(file.read_text())
    lines = compatibility.table(results, {"versions": results["versions"], "rows": {}})
    assert lines[2:] == ["| a | 2 of 3 | not tested |", "| b | 0 of 1 | not tested |"]
