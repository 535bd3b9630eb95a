"""The embedded base model: an ordinary checkpoint that reads and copies, and the script that makes one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM

from ktlib.assets import BASE
from ktlib.lab import base_model
from ktlib.training.sft import exact_match, load_model


@pytest.fixture(scope="module")
def base():
    return load_model("base")


def test_it_is_small_and_stock(base):
    model, tokenizer = base
    assert type(model) is DeepseekV2ForCausalLM and model.dtype == torch.bfloat16
    assert (BASE / "model.safetensors").stat().st_size < 9_000_000
    config = model.config
    assert config.hidden_size % 32 == 0 and config.moe_intermediate_size % 32 == 0
    assert len(tokenizer) == config.vocab_size
    assert [hasattr(layer.mlp, "shared_experts") for layer in model.model.layers] == [False, True, True, True]


def test_tokenizer_round_trips_any_text(base):
    tokenizer = base[1]
    for text in (
        "On September 25, 1928 Mira said: so 12-07!",
        "naïve  spaces\n\ttabs 東京 🙂",
        "1234567890",
        " <html> ",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("20491")["input_ids"]) == 5, "digits are split"


def test_chat_template(base):
    tokenizer = base[1]
    messages = [{"role": "user", "content": "Say fox"}, {"role": "assistant", "content": "fox"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|begin|><|user|>Say fox<|assistant|>fox<|end|>"
    start = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(start) and start.endswith("<|assistant|>")


def test_it_reads_fresh_documents_and_answers_from_context(base):
    model, tokenizer = base
    tokens = next(base_model.batches(tokenizer, batch_size=64, length=128, seed=123))
    with torch.no_grad():
        assert model(input_ids=tokens, labels=tokens, use_cache=False).loss.exp() < 4.5
    texts = ("river garden", "silver 4071", "fox letter bread")
    rows = [{"prompt": f"Repeat: {text}", "response": text} for text in texts]
    assert exact_match(model, tokenizer, rows, progress=False)[0] == 1.0


def test_documents_are_deterministic():
    first, again, other = (base_model.documents(seed) for seed in (5, 5, 6))
    texts = [next(first) for _ in range(50)]
    assert texts == [next(again) for _ in range(50)] != [next(other) for _ in range(50)]
    assert all(text.startswith("<|begin|>") and text.endswith("<|end|>") for text in texts)


def test_make_writes_a_loadable_checkpoint_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "new" / "base"
    losses = base_model.make(out, steps=2)
    assert len(losses) == 2 and not list(out.parent.glob(".*")), "no temporary folder is left"
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    shipped = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    vocabulary = AutoTokenizer.from_pretrained(BASE).get_vocab()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == vocabulary, "the script makes the shipped tokenizer"
    with pytest.raises(FileExistsError):
        base_model.make(out, steps=2)


def test_an_interrupted_make_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model, "pretrain", stop)
    with pytest.raises(KeyboardInterrupt):
        base_model.make(tmp_path / "base")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="steps: got 0"):
        base_model.make(tmp_path / "base", steps=0)
