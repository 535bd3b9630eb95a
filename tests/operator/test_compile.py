"""torch.compile of a whole model with the operator in it, and the operator's phases in torch.profiler."""

import pytest
import torch
from peft import get_peft_model
from support.models import random_adapter, relative_error, tiny_model, tokens
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import ktlib

ONE_GRAPH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@pytest.fixture(scope="module")
def model():
    bare = tiny_model("olmoe", "ktlib", num_hidden_layers=1)
    return random_adapter(get_peft_model(bare, ktlib.lora_config(bare, r=4, target_modules=[]))).train()


def step(model, forward):
    """Logits, and gradients by name, of one step through ``forward`` (the model or its compiled form)."""
    model.zero_grad()
    output = forward(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.compatible("`torch.compile` of the whole model")
def test_a_compiled_model_computes_the_same(model):
    """Dynamo and AOT autograd, forward and backward: the operator is a node, from torch 2.13 on of a single graph."""
    torch._dynamo.reset()
    counters.clear()
    logits, gradients = step(model, model)
    got, got_gradients = step(model, torch.compile(model, backend="aot_eager", fullgraph=ONE_GRAPH))
    assert not ONE_GRAPH or counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert relative_error(got, logits) < 1e-3
    assert got_gradients.keys() == gradients.keys() and any(".experts." in name for name in gradients)
    assert all(relative_error(got_gradients[name], gradients[name]) < 1e-3 for name in gradients)
    torch._dynamo.reset()


@pytest.mark.compatible("`torch.profiler`")
def test_the_profiler_names_forward_and_backward(model):
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(model, model)
    events = {event.key: event for event in profiled.key_averages()}
    for name in ("ktlib::moe_experts", "ktlib::moe_experts_backward"):
        assert events[name].count == 1 and events[name].cpu_time_total > 0, name
