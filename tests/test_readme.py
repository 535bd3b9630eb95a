"""What the README tells its readers to type and to write is run as it stands there.

The long commands, such as ``make test``, are what CI itself runs: tests/test_environment.py compares. Here are the
others, in a folder that holds what they name.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from support.models import random_adapter, tiny_checkpoint
from support.pages import README, TEXT
from transformers import AutoModelForCausalLM

import ktlib
from ktlib import cli
from ktlib.assets import BASE
from ktlib.training.parameters import Parameters
from ktlib.training.tasks import dates

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(set(re.findall(r"`((?:ktlib|make sft) [^`]+)`", TEXT)))
# words that stand for the reader's own, where they are not the names of what is in the folder below
OWN = {"LAYOUT": "per_expert", "ADAPTER": "SOURCE"}
NOT_HERE = {
    "ktlib sft": "the built-in model: `make sft`, as CI runs it",
    "ktlib fuse": "the command's name alone, run with its arguments under the other",
    "ktlib sft PARAMS.yaml": "`ktlib sft mine.yaml` is run",
    "ktlib sweep GRID.yaml": "the one of the repository is checked",
    "ktlib sft --repeat RUN.ipynb": "CI runs it after `make sft`, on another number of threads",
}
RUN = [command for command in COMMANDS if command not in NOT_HERE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader's folder: checkpoints, two with an adapter beside, data, the README's ``mine.yaml``, the repository."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "notebooks").symlink_to(ROOT / "notebooks")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    tiny_checkpoint(folder / "checkpoint", "mixtral")
    for name in ("DIR", "SOURCE"):
        shutil.copytree(folder / "checkpoint", folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16)
        random_adapter(get_peft_model(model, ktlib.lora_config(model, r=2))).save_pretrained(folder / name)
    rows = dates(n_train=24, n_test=1)[0]
    (folder / "my-data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (text,) = re.findall(r"```yaml\n(# mine.yaml\n.*?)```", README, re.DOTALL)
    assert "/path/to/a/moe/checkpoint" in text and "my-data.jsonl" in text
    (folder / "mine.yaml").write_text(text.replace("/path/to/a/moe/checkpoint", "checkpoint"))
    return folder


def test_there_are_commands():
    assert {command.split()[1] for command in RUN} >= {"info", "audit", "sft", "sweep", "adapter", "fuse", "merge"}


@pytest.mark.parametrize("command", RUN)
def test_the_command_runs(command, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    words = [OWN.get(word, word) for word in shlex.split(command)]
    words = [str(tmp_path / "OUT") if word == "OUT" else word for word in words]
    if words[0] == "make":  # what it runs once set-up is done: the next command, on the same file
        # This make is nobody's child: under `make test` it would print the folders that it enters and leaves as well.
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        make = ["make", "-n", "-o", "setup", "-f", str(ROOT / "Makefile"), *words[1:]]
        shown = subprocess.run(make, capture_output=True, text=True, check=True, env=outside).stdout
        assert shown.strip() == '.venv/bin/python -m ktlib.cli sft "mine.yaml"'
        return
    if words[1] == "sweep":  # nine runs of a minute
        words.append("--dry-run")
    if words[1] == "sft":
        (first_look,) = re.findall(r"`(--param steps=\d+)` for a first look", README)
        words += [*first_look.split(), "--out", str(tmp_path)]
    assert cli.main(words[1:]) == 0
    if words[1] == "sft":
        assert (tmp_path / "mine" / "report.html").is_file()
        assert ktlib.audit(tmp_path / "mine" / "adapter").clean


@pytest.mark.parametrize("family", [None, "mixtral", "qwen3_moe"])
def test_the_code_runs(family, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {"path": tiny_checkpoint(tmp_path, family) if family else BASE}
    exec(code, scope)
    ids = torch.arange(8)[None]
    scope["model"](input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, parameter in scope["model"].named_parameters() if parameter.grad is not None]
    assert any(".experts." in name for name in trained) and all(".lora_" in name for name in trained)


def test_the_example_names_parameters_of_a_run_and_gives_the_right_defaults(folder):
    chosen, at_default = re.split("# The following are defaults.*", (folder / "mine.yaml").read_text())
    chosen, at_default = yaml.safe_load(chosen), yaml.safe_load(at_default)
    defaults = {field.name: field.default for field in fields(Parameters)}
    assert chosen.keys() < defaults.keys()
    assert len(at_default) == 3 and at_default.items() < defaults.items()
