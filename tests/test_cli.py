"""The command line: exit codes, where results go, and refusal of wrong parameters."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import fields

import nbformat
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.models import random_adapter, tiny_model

from ktlib import cli
from ktlib.conversion import merge, quantise_checkpoint
from ktlib.integrations.peft_lora import lora_config
from ktlib.training.parameters import Parameters

PARAMETERS = """\
learning_rate: float = 1.0e-3
dataset: str = "dates"
rank: int | None = None
parts: list[str] = []
tag: str | None = "x"
output_dir: str | None = None
"""
BODY = """\
from ktlib.runs.notebooks import record
assert dataset != "bad"
print(f"{learning_rate:g} {dataset} {rank} {output_dir} {parts} {tag}")
record(saved="adapter")
assert dataset != "bad at the end"
"""


@pytest.fixture
def sft(tmp_path, monkeypatch):
    """Call ``ktlib sft`` on a small notebook in an empty working directory."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(BODY)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebook)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.main(["sft", "--notebook", str(notebook), *map(str, arguments)])


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert "isa" in capsys.readouterr().out


@pytest.mark.parametrize("command", ("info", "audit", "sft", "sweep", "adapter", "fuse", "merge"))
def test_help_of_a_command_says_what_it_does(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = []
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0
        shown.append(capsys.readouterr().out)
    (said,) = re.findall(rf"\n    {command} +(\S.*)\n", shown[0])
    assert f"\n\n{said}.\n" in shown[1], "the same words as in the list of commands"


def test_help_of_sft_lists_every_parameter_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["sft", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for field in fields(Parameters):
        assert field.metadata["help"] and f"\n  {field.name} (" in shown
    assert "\n  rank (16): " in shown and "\n  isa (none): " in shown


def test_sft_reads_yaml_and_pairs_and_says_where_the_report_is(sft, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("learning_rate: 2e-3\ndataset: names\nrank: null\n")
    assert (
        sft(
            "mine.yaml", "--param", "rank=4", "--param", "dataset=007", "--param", "parts=[a, b]", "--param", "tag=null"
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "0.002 007 4 runs/mine/adapter ['a', 'b'] None" in out
    assert out.splitlines()[-2:] == ["report    runs/mine/report.html", "adapter   runs/mine/adapter"]
    assert (tmp_path / "runs/mine/report.html").exists() and (tmp_path / "runs/mine/small.ipynb").exists()


def test_sft_with_an_empty_file(sft, tmp_path):
    (tmp_path / "mine.yaml").write_text("# all as it is\n")
    assert sft("mine.yaml") == 0


def test_sft_says_where_the_adapter_is_also_if_a_later_check_fails(sft, capsys):
    assert sft("--param", "dataset=bad at the end") == 1
    printed = capsys.readouterr()
    assert "AssertionError" in printed.err
    assert printed.out.splitlines()[-2:] == ["report    runs/sft/failed.html", "adapter   runs/sft/adapter"]


def test_sft_says_nothing_that_a_user_cannot_act_on(sft, capfd):
    """papermill does know the parameters, and the kernel's traffic cannot be read by others."""
    assert sft("--param", "rank=4", "--param", "tag=y", "--param", "output_dir=here") == 0
    said = capfd.readouterr().err
    assert "unknown parameter" not in said and "encryption" not in said


def test_sft_names(sft, tmp_path):
    assert sft("--out", tmp_path / "elsewhere", "--name", "first", "--param", "output_dir=here") == 0
    assert (tmp_path / "elsewhere/first/report.html").exists()


def test_sft_fails_with_1_and_keeps_the_outputs(sft, tmp_path, capsys):
    assert sft("--param", "dataset=bad") == 1
    printed = capsys.readouterr()
    assert "AssertionError" in printed.err and "runs/sft/failed.html" in printed.out
    assert "adapter " not in printed.out
    assert (tmp_path / "runs/sft/failed.ipynb").exists() and not (tmp_path / "runs/sft/report.html").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1.0", "no parameter named learning_rte"),
        ("learning_rate: fast", "learning_rate: got 'fast' (str), needs float"),
        ("dataset: 7", "dataset: got 7 (int), needs str"),
        ("- a\n- b", "needs lines of the form `name: value`, has a list"),
        ("a: [", "mine.yaml"),
        ("1: 2", "mine.yaml: needs text as a name"),
        ("no: 5\nnone: 6", "mine.yaml: needs text as a name"),
        ("rank: 8\nrank: 16", "mine.yaml: rank is given twice"),
        ("rank: 2024-13-45", "mine.yaml: month must be in 1..12"),
        (None, "mine.yaml"),
    ],
)
def test_sft_refuses_wrong_files_with_2(sft, tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    assert sft("mine.yaml") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("pair", ["rank", "rank=four", "rank=[", "rnk=4"])
def test_sft_refuses_wrong_pairs_with_2(sft, capsys, pair):
    assert sft("--param", pair) == 2
    assert pair.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", (["sft", "{}"], ["sweep", "{}"], ["sft", "--repeat", "{}"], ["audit", "{}"]), ids=" ".join
)
def test_a_file_that_is_missing_is_named_first(arguments, tmp_path, capsys):
    path = tmp_path / "nowhere"
    assert cli.main([argument.format(path) for argument in arguments]) == 2
    assert capsys.readouterr().err == f"ktlib {arguments[0]}: {path}: no such file or directory\n"


def test_sft_outside_a_clone(tmp_path, capsys):
    assert cli.main(["sft", "--notebook", str(tmp_path / "none.ipynb")]) == 2
    assert "none.ipynb not found" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["audit"]])
def test_usage_errors_exit_with_2(arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2


def test_the_installed_command():
    done = subprocess.run([sys.executable, "-m", "ktlib.cli", "info"], capture_output=True, text=True)
    assert done.returncode == 0 and "isa" in done.stdout


@pytest.mark.parametrize(
    ("value", "code", "word"), [(1.0, 0, "clean"), (float("nan"), 1, "NaN"), (None, 2, "no-adapter")]
)
def test_audit_says_what_it_found_in_its_exit_code(tmp_path, capsys, value, code, word):
    folder = tmp_path / "no-adapter"
    if value is not None:
        folder.mkdir()
        pair = {f"layers.0.self_attn.q_proj.lora_{letter}.weight": torch.full((3, 3), value) for letter in "AB"}
        save_file(pair, folder / "adapter_model.safetensors")
    assert cli.main(["audit", str(folder)]) == code
    printed = capsys.readouterr()
    assert word in (printed.err if code == 2 else printed.out)


def test_audit_of_an_adapter_that_should_be_trained(tmp_path):
    pair = {f"layers.0.self_attn.q_proj.lora_{x}.weight": torch.full((3, 3), float(x == "A")) for x in "AB"}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    assert cli.main(["audit", str(tmp_path)]) == 0 and cli.main(["audit", "--trained", str(tmp_path)]) == 1


def test_audit_with_base_model_and_figure(tmp_path, capsys):
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 16, "num_experts": 2, "vocab_size": 9}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8, "moe_intermediate_size": 8}
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "target_modules": ["q_proj", "o_proj"]}))
    pair = {f"layers.0.self_attn.q_proj.lora_{letter}.weight": torch.ones(3, 3) for letter in "AB"}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    arguments = ["audit", str(tmp_path), "--figure", str(tmp_path / "map.png")]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--base", str(tmp_path / "base")]) == 1
    assert "self_attn: missing (2), as both matrices of model.layers.0.self_attn.o_proj" in capsys.readouterr().out
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert cli.main([*arguments, "--base", str(tmp_path / "nowhere")]) == 2


def test_the_command_has_the_choices_of_the_function(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fuse", "source", "out", "--quantise", "int3"])
    error = capsys.readouterr().err  # which lists them; cli.py names them itself, so that it need not import torch
    assert set(re.findall(r"'(\w+)'", error)) == {"int3", *quantise_checkpoint.CHOICES}
    for option, choices in (("--dtype", merge.DTYPES), ("--layout", merge.LAYOUTS)):
        with pytest.raises(SystemExit):
            cli.main(["merge", "adapter", "out", "--base", "base", option, "other"])
        assert set(re.findall(r"'(\w+)'", capsys.readouterr().err)) == {"other", *choices}


def test_merge_prints_what_rounding_lost(tmp_path, capsys):
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    random_adapter(get_peft_model(model, lora_config(model, r=2))).save_pretrained(tmp_path / "adapter")
    command = ["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert cli.main(command) == 0
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    printed = capsys.readouterr().out
    line = f"lost      {report['lost']:.2%} of the update by rounding, at most {report['worst']:.2%} in model.layers."
    assert line in printed and "--dtype fp32 loses none\n" in printed
    assert printed.splitlines()[-2:] == [
        f"report    {tmp_path / 'out/merge_report.json'}",
        f"model     {tmp_path / 'out'}",
    ]
    assert cli.main([*command, "--dtype", "fp32"]) == 2 and "made from something else" in capsys.readouterr().err
    command[2] += "-fp32"
    assert cli.main([*command, "--dtype", "fp32"]) == 0
    assert "lost      0.00% of the update" in (printed := capsys.readouterr().out) and "loses none" not in printed
    assert cli.main([*command[:-1], str(tmp_path)]) == 2
    error = f"ktlib merge: base: {tmp_path} has no config.json; {tmp_path / 'adapter/adapter_config.json'} names "
    assert capsys.readouterr().err == f"{error}'{tmp_path / 'base'}'\n"


def test_warnings_are_sentences_without_code(tmp_path):
    model = tiny_model("deepseek_v2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    random_adapter(get_peft_model(model, lora_config(model, r=2))).save_pretrained(tmp_path / "peft")
    command = [sys.executable, "-m", "ktlib.cli", "adapter", "peft", "out", "--base", "base", "--to", "per_expert"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    warned = [line for line in done.stderr.splitlines() if "kv_b_proj" in line]
    assert warned and all(line.startswith("ktlib adapter: target_modules: ") for line in warned)
    assert "UserWarning" not in done.stderr and "cli.py" not in done.stderr


def test_the_folder_of_a_run_names_the_one_with_its_adapter(tmp_path, capsys):
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    random_adapter(get_peft_model(model, lora_config(model, r=2))).save_pretrained(tmp_path / "run/adapter")
    run, base = str(tmp_path / "run"), str(tmp_path / "base")
    for command in (["audit", run], ["merge", run, str(tmp_path / "out"), "--base", base]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.endswith(f"; {tmp_path / 'run/adapter'} has\n")


def test_adapter_and_fuse_convert_files(tmp_path, capsys):
    model = tiny_model("deepseek_v2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    assert cli.main(["fuse", str(tmp_path / "base"), str(tmp_path / "fused")]) == 0
    assert cli.main(["fuse", str(tmp_path / "fused"), str(tmp_path / "int4"), "--quantise", "int4"]) == 0
    report = json.loads((tmp_path / "int4/quantise_report.json").read_text())
    errors = report["relative_l2"]
    worst = max(errors, key=errors.get)
    assert report["mean"] == pytest.approx(sum(errors.values()) / len(errors))
    line = f"error     {report['mean']:.3g} on average, {errors[worst]:.3g} in {worst} (relative L2)\n"
    assert line in capsys.readouterr().out and 0.05 < errors[worst] < 0.2
    random_adapter(get_peft_model(model, lora_config(model, r=2))).save_pretrained(tmp_path / "peft")
    convert = ["adapter", "--base", str(tmp_path / "fused")]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert cli.main([*convert, "--to", "ktransformers", str(tmp_path / "peft"), str(tmp_path / "kt")]) == 0
    assert not [str(one.message) for one in warned if one.category is FutureWarning], "what no user can act on"
    assert cli.main([*convert, str(tmp_path / "kt"), str(tmp_path / "back")]) == 0
    assert f"adapter   {tmp_path / 'back'}" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert cli.main([*convert, str(tmp_path / "kt"), str(tmp_path / "back")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert cli.main(["adapter", "--base", str(tmp_path), str(tmp_path / "kt"), str(tmp_path / "new")]) == 2
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text()) | {"lora_B_layout": "mixed"}
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(settings))
    first["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(first, tmp_path / "peft/adapter_model.safetensors")
    command = [*convert, str(tmp_path / "peft"), str(tmp_path / "foreign")]
    order = ["--lora-b-order", "grouped_by_expert", "--lora-a-features", "in"]
    for options, refused in (
        (order, "--allow-nonfinite"),
        (["--allow-nonfinite"], "--lora-b-order"),
        ([*order, "--to", "per_expert"], "need --to peft"),
    ):
        assert cli.main([*command, *options]) == 2 and refused in capsys.readouterr().err
    assert cli.main([*command, *order, "--allow-nonfinite"]) == 0
    assert cli.main(["fuse", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
