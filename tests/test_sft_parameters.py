"""Parameters of a fine-tuning run: every wrong one is named, with what is needed, before anything is loaded."""

import math
import re

import pytest
import transformers

from ktlib import sft


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
        ("stream_rows", 0),
        ("stream_rows", True),
        ("stream_rows", 64.0),
    ],
)
def test_a_wrong_parameter_is_named_before_anything_is_loaded(name, value, monkeypatch):
    monkeypatch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("loaded the model first"))
    for function in (sft.check_parameters, sft.run):
        with pytest.raises(ValueError, match=f"^{name}: got .*need") as error:
            function(**{name: value})
        assert repr(value) in str(error.value)


def test_more_tokens_than_the_model_has_positions_are_refused(monkeypatch):
    monkeypatch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("loaded the model first"))
    with pytest.raises(ValueError, match="sequence_length: got 1025, need at most 1024, the max_position_embeddings"):
        sft.run(sequence_length=1025, progress=False)
    sft.estimate_run(sft.check_parameters(sequence_length=1024))


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


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, capsys):
    """A folder with DeepSeek-V3's config and nothing else: 671 billion parameters."""
    transformers.DeepseekV3Config().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("loaded the model first"))
    monkeypatch.setattr("ktlib.estimate.available_memory", lambda: 64e9)
    with pytest.raises(MemoryError, match=r"needs 1\d{3}\.\d GB of host memory, 64.0 GB are free"):
        sft.run(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), rank=8)
    printed = capsys.readouterr().out
    assert re.search(r"^host +expert weights +1307\.8\d GB$", printed, re.MULTILINE)
    assert re.search(r"^time +2048 tokens per step: \d+ tokens/s$", printed, re.MULTILINE)
    assert not (tmp_path / "out").exists()
