"""Models whose experts are streamed, with the CPU in the place of a GPU."""

import pickle

import pytest
import torch
from peft import get_peft_model
from support.models import random_adapter, relative_error, tiny_model, tokens
from test_streaming import place, streamed_experts  # noqa: F401  a fixture

import ktlib


@pytest.fixture
def model():
    made = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    made.config.use_cache = False
    made = get_peft_model(ktlib.pin_experts(made, stream_rows=4), ktlib.lora_config(made, r=4))
    return random_adapter(made).train()


def loss_and_gradients(model):
    model.zero_grad()
    ids = tokens()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("place")
def test_a_model_says_what_is_streamed(model, monkeypatch):
    seen = streamed_experts(monkeypatch)
    got = loss_and_gradients(model)
    assert any(seen) and not all(len(experts) == 8 for experts in seen)
    copied = loss_and_gradients(pickle.loads(pickle.dumps(model)))
    assert all(torch.equal(copied[name], value) for name, value in got.items())
    seen.clear()
    ktlib.pin_experts(model)
    want = loss_and_gradients(model)
    assert not any(seen) and want.keys() == got.keys()
    assert {n: e for n in want if (e := relative_error(got[n], want[n])) > 0.03} == {}


@pytest.mark.usefixtures("place")
def test_weights_of_a_model_that_are_trained_are_refused():
    model = ktlib.pin_experts(tiny_model("mixtral", "ktlib", dtype=torch.bfloat16), stream_rows=1)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="stream_rows: got 1 with expert weights"):
        loss_and_gradients(model)


@pytest.mark.parametrize("value, error", [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_model_is_not_given_a_wrong_number_of_rows(model, value, error):
    with pytest.raises(error, match="stream_rows: got"):
        ktlib.pin_experts(model, stream_rows=value)
    assert all(m.ktlib_stream_rows == 4 for m in model.modules() if hasattr(m, "ktlib_stream_rows"))
