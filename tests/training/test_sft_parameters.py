"""Parameters of a fine-tuning run: every wrong one is named, with what is needed, before anything is loaded.

What the config, the tokenizer and the data decide is said by ``ktlib sft`` before it starts a kernel, with exit code 2.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, fields

import pytest
import transformers
import yaml
from support.models import tiny_checkpoint

from ktlib import cli
from ktlib.estimate import meta_model
from ktlib.runs import notebooks
from ktlib.training import sft
from ktlib.training.parameters import Parameters, read_config

LARGEST_FP32 = (2 - 2**-23) * 2.0**127


def test_defaults_are_valid():
    assert sft.check_parameters()["model"] == "base"


@pytest.mark.parametrize(
    "name, value",
    [
        ("model", "no/such/folder"),
        ("model", ""),
        ("model", 3),
        ("dataset", "datez"),
        ("dataset", None),
        ("rank", 0),
        ("rank", 8.0),
        ("rank", True),
        ("alpha", 0),
        ("alpha", "32"),
        ("alpha", True),
        ("alpha", math.nan),
        ("alpha", 1e39),
        ("targets", "attn"),
        ("targets", ""),
        ("targets", "attention+attention"),
        ("targets", "attention,experts"),
        ("lora_dtype", "fp16"),
        ("lora_dtype", ["fp32"]),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", math.nan),
        ("lora_dropout", "0.1"),
        ("lora_dropout", False),
        ("steps", 0),
        ("steps", "10"),
        ("batch_size", -1),
        ("grad_accumulation", 0),
        ("sequence_length", 7),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("learning_rate", "1e-3"),
        ("seed", -1),
        ("seed", 2**32),
        ("gradient_checkpointing", "yes"),
        ("output_dir", ""),
        ("output_dir", __file__),
        ("isa", "sse2"),
        ("isa", ""),
        ("finetuning", "dora"),
        ("finetuning", None),
        ("torch_threads", 0),
        ("torch_threads", True),
        ("torch_threads", "2"),
        ("torch_threads", 10**5),
        ("stream_rows", 0),
        ("stream_rows", True),
        ("stream_rows", 64.0),
        ("stream_rows", 2**31),
    ],
)
def test_a_wrong_parameter_is_named_before_anything_is_loaded(name, value, monkeypatch):
    monkeypatch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("loaded the model first"))
    for function in (sft.check_parameters, sft.run):
        with pytest.raises(ValueError, match=f"^{name}: got .*need") as error:
            function(**{name: value})
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "name, last, refused",
    [
        ("rank", 1, 0),
        ("alpha", LARGEST_FP32, math.nextafter(LARGEST_FP32, math.inf)),
        ("alpha", math.nextafter(0, 1), 0.0),
        ("lora_dropout", 0.0, math.nextafter(0, -1)),
        ("lora_dropout", math.nextafter(1, 0), 1.0),
        ("steps", 1, 0),
        ("batch_size", 1, 0),
        ("grad_accumulation", 1, 0),
        ("sequence_length", 8, 7),
        ("learning_rate", LARGEST_FP32, math.nextafter(LARGEST_FP32, math.inf)),
        ("learning_rate", math.nextafter(0, 1), 0.0),
        ("seed", 0, -1),
        ("seed", 2**32 - 1, 2**32),
        ("torch_threads", 1, 0),
        ("torch_threads", 8192, 8193),
        ("stream_rows", 1, 0),
        ("stream_rows", 2**31 - 1, 2**31),
    ],
)
def test_the_last_value_in_bounds_is_taken_and_the_next_is_refused(name, last, refused):
    assert getattr(Parameters(**{name: last}), name) == last
    with pytest.raises(ValueError, match=f"^{name}: got .*need"):
        Parameters(**{name: refused})


def test_the_notebook_has_the_parameters_of_a_run_with_their_types_and_defaults():
    written = notebooks.notebook_parameters(notebooks.SFT)
    assert written.pop("output_dir") == ("str | None", None), "the notebook chooses a folder"
    defined = {
        field.name: (field.type.__name__ if isinstance(field.type, type) else str(field.type), field.default)
        for field in fields(Parameters)
        if field.name != "output_dir"
    }
    assert list(written.items()) == list(defined.items())


def test_the_help_of_every_parameter_is_a_sentence():
    for field in fields(Parameters):
        assert re.fullmatch(r"\S+ .+\.", field.metadata["help"]), field.name


def test_parameters_cannot_be_changed_and_unknown_ones_are_refused():
    with pytest.raises(FrozenInstanceError):
        Parameters().rank = 3
    with pytest.raises(TypeError, match="ranks"):
        sft.check_parameters(ranks=3)


def test_dropout_is_of_adapters_only():
    with pytest.raises(ValueError, match="lora_dropout: got 0.1, need 0 with finetuning='full'"):
        sft.check_parameters(finetuning="full", lora_dropout=0.1)


def test_memory_is_estimated_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model, _ = sft.load_model("base")
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    parameters = sft.check_parameters(finetuning="full", targets="experts", output_dir=str(tmp_path))
    full = sft.estimate_run(parameters)
    assert full.host["expert weights"] == 2 * experts and full.host["expert gradients, moments"] == 6 * experts
    assert full.host["other gradients, moments"] == 0 and not full.gpu
    lora = sft.estimate_run(parameters | {"finetuning": "lora", "rank": 2, "lora_dtype": "bf16"})
    ranks = sum(p.shape[0] * 2 * sum(p.shape[1:]) for p in model.parameters() if p.dim() == 3)
    assert lora.host["expert adapters, gradients, moments"] == 8 * ranks
    monkeypatch.setattr("ktlib.estimate.available_memory", lambda: 1.5e9)
    with pytest.raises(MemoryError, match="GB of host memory, 1.5 GB are free"):
        sft.run(finetuning="full", output_dir=str(tmp_path / "out"), progress=False)


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    """A folder with DeepSeek-V3's config and nothing else: 671 billion parameters."""
    transformers.DeepseekV3Config().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("loaded the model first"))
    monkeypatch.setattr("ktlib.estimate.available_memory", lambda: 64e9)
    with pytest.raises(MemoryError, match=r"needs 1\d{3}\.\d GB of host memory, 64.0 GB are free"):
        sft.run(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), rank=8)
    assert not (tmp_path / "out").exists()
    estimated = str(sft.estimate_run(sft.check_parameters() | {"model": str(tmp_path / "model"), "rank": 8}))
    assert re.search(r"^host +expert weights +1307\.8\d GB$", estimated, re.MULTILINE)
    assert re.search(r"^time +2048 tokens per step: \d+ tokens/s$", estimated, re.MULTILINE)


# ---------------------------------------------------------------------------- what the files of a model and data decide


def no_config(folder):
    (folder / "config.json").unlink()


def damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": "mixtral",')


def unknown_type(folder):
    settings(folder, model_type="mixtrall", auto_map={"AutoConfig": "code.Config"})


def no_language_model(folder):
    transformers.ViTConfig().save_pretrained(folder)


def no_experts(folder):
    transformers.LlamaConfig(vocab_size=1024, hidden_size=64, num_hidden_layers=1).save_pretrained(folder)


def sizes_that_do_not_fit(folder):
    settings(folder, num_attention_heads=4, num_key_value_heads=0)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def half_downloaded(folder):
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(size // 2)


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def no_end_token(folder):
    change(folder / "tokenizer_config.json", lambda content: content.pop("eos_token"))


def an_adapter(folder):
    for file in folder.glob("*"):
        file.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "models/Mixtral"}')


def an_adapter_beside_the_model(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "models/Mixtral"}')


def settings(folder, **values):
    change(folder / "config.json", lambda content: content.update(values))


def change(file, function):
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


FILES = {
    no_config: "model: got .*need 'base' or a checkpoint folder with a config.json",
    an_adapter: "model: got .*holds an adapter of models/Mixtral, need a checkpoint folder",
    an_adapter_beside_the_model: "model: got .*holds an adapter beside the model, need a folder without",
    damaged_config: "model: got .*need one whose config.json transformers can read",
    unknown_type: "model: got .*need one whose config.json transformers can read",
    no_language_model: "model: got .*need .*",
    no_experts: "model: got .*, a LlamaForCausalLM without routed experts .*need a Mixture-of-Experts model",
    sizes_that_do_not_fit: "model: got .*need .*config",
    no_weights: "model: got .*need a checkpoint folder with all its weights",
    half_downloaded: "model: .*model.safetensors is damaged or was not downloaded whole",
    no_tokenizer: "model: got .*need a folder with a tokenizer, too",
    no_end_token: "model: .*has no eos_token, needs one",
}
CHOICES = {
    "targets": ("attention+shared", "targets: got 'attention.shared', but MixtralForCausalLM has no shared; it has .*"),
    "sequence_length": (129, "sequence_length: got 129, need at most 128, the max_position_embeddings of the model"),
    "model": ("no/such/folder", "model: got 'no/such/folder', need 'base' or a checkpoint folder"),
    "dataset": (
        "no-such.jsonl",
        "dataset: got 'no-such.jsonl', need one of dates, codebook or a JSONL file: /.*/no-such.jsonl does not exist",
    ),
    "batch_size": (10**9, "batch_size: got 1000000000 rows of 128 tokens, .*needs .* GB of host memory"),
    "lora_dropout": (1.5, "lora_dropout: got 1.5, need a number from 0 to below 1"),
    "output_dir": (__file__, "output_dir: got .*need a folder, not a file"),
    "seed": (2**32, "seed: got 4294967296, need a whole number below 2..32"),
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "mixtral", "mixtral")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Give ``ktlib sft`` a file of parameters that it must refuse; returns the line that it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("started a kernel"))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("read weights"))

    def ask(**parameters):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(parameters))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cli.main(["sft", "mine.yaml"]) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert not printed.out and not (tmp_path / "runs").exists()
        return line

    return ask


@pytest.mark.parametrize("fault", FILES, ids=lambda fault: fault.__name__)
def test_a_folder_that_cannot_be_trained_is_refused_before_a_kernel_starts(fault, mixtral, refused, tmp_path):
    folder = shutil.copytree(mixtral, tmp_path / "model")
    fault(folder)
    assert re.fullmatch(f"ktlib sft: {FILES[fault]}.*", refused(model=str(folder)))


@pytest.mark.parametrize("name", CHOICES)
def test_what_does_not_fit_the_model_is_refused_before_a_kernel_starts(name, mixtral, refused):
    value, message = CHOICES[name]
    given = {"model": str(mixtral)} | {name: value}
    assert re.fullmatch(f"ktlib sft: {message}.*", refused(**given))


def test_rows_that_are_all_too_long_or_damaged_are_refused_before_a_kernel_starts(mixtral, refused, tmp_path):
    (tmp_path / "long.jsonl").write_text("".join(f'{{"prompt": "{i}", "response": "{"a b " * 99}"}}\n' for i in "12"))
    assert "sequence_length: got 64, need more: none of 1 rows fits" in refused(
        model=str(mixtral), dataset="long.jsonl", sequence_length=64
    )
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    assert "bad.jsonl, line 2" in refused(model=str(mixtral), dataset="bad.jsonl")


def test_experts_that_the_operator_does_not_have_are_named(mixtral, refused, tmp_path):
    """They run in transformers, which has no dropout for their adapters."""
    folder = shutil.copytree(mixtral, tmp_path / "model")
    settings(folder, hidden_act="relu")
    assert "lora_dropout: got 0.1, need 0: MixtralForCausalLM's routed experts run in transformers" in refused(
        model=str(folder), lora_dropout=0.1
    )
    with pytest.warns(UserWarning, match="MixtralForCausalLM's routed experts run in transformers.*gate is none of"):
        sft.check_parameters(model=str(folder))


def test_a_sweep_with_a_run_that_cannot_work_is_refused_before_the_first(mixtral, refused, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(f"fixed: {{model: {mixtral}}}\ngrid: {{targets: [attention, dense]}}\n")
    assert cli.main(["sweep", "grid.yaml"]) == 2
    assert "targets: got 'dense', but MixtralForCausalLM has no dense" in capsys.readouterr().err


def test_the_default_targets_are_what_the_model_has(mixtral):
    assert sft.check_parameters(model=str(mixtral))["targets"] == "all"
    found = sft.chosen_modules(meta_model(read_config(str(mixtral))), "all")
    assert {target: len(names) for target, names in found.items()} == {
        "attention": 8,
        "experts": 2,
        "shared": 0,
        "dense": 0,
    }


def test_refusal_of_a_missing_file_takes_seconds(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: nowhere\n")
    command = [sys.executable, "-X", "importtime", "-m", "ktlib.cli", "sft", "mine.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "ktlib sft: model: got 'nowhere'" in done.stderr
    assert not re.search(r"\| +(transformers|peft|papermill)$", done.stderr, re.MULTILINE)
