"""Where people keep a clone and its results: folders with spaces and other letters, long paths, no home to write to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_sft(folder, **environment):
    """`ktlib sft` for one step in ``folder``; returns what it printed."""
    command = [sys.executable, "-m", "ktlib.cli", "sft", "--param", "steps=1"]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600, umask=0o077)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_run_under_spaces_other_letters_and_a_long_path_with_no_home_and_files_for_its_user_alone(tmp_path):
    folder = tmp_path / "My Projects" / "Größe ж" / ("long" * 50)
    folder.mkdir(parents=True)
    run_sft(folder, HOME="/proc/no-home")  # where not even root can make one
    results = folder / "runs" / "sft"
    written = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    assert {"05_full_sft.ipynb", "report.html", "adapter/adapter_model.safetensors"} <= written
    assert all(path.stat().st_mode & 0o077 == 0 for path in [results, *results.rglob("*")])


@pytest.mark.parametrize("file", ["Makefile", ".ci/run"])
def test_tools_run_as_python_modules_since_a_script_cannot_name_a_python_under_a_path_with_a_space(file):
    text = (ROOT / file).read_text()
    named = set(re.findall(r"\.venv(?:-oldest)?/bin/(\S+?)(?=[\s\"'$)]|$)", text))
    assert named <= {"python", "ninja"}, "these are scripts; ninja is a program"
