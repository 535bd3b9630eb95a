"""The first call of a model's experts comes under torch.export, fake tensors, a tracer or a transform.

What their gate computes is not known then and has to be found out by calling it with real numbers, in whatever mode the
call is.
"""

import contextlib

import pytest
import torch
import transformers
from peft import get_peft_model
from support.models import expert_modules, random_adapter, tiny_model, tokens
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ktlib
from ktlib.integrations import transformers_experts

ONE_GRAPH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
OPERATOR = "ktlib.moe_experts"
SILU = ("silu", None, None)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(transformers_experts, "_gates", {})


def known():
    """What is known of gates, after a first call. What was found in any mode is what is found without one."""
    return set(transformers_experts._gates.values())


def layer(seed=0):
    """An experts module and arguments of one call."""
    (module, *_) = expert_modules(tiny_model("qwen3_moe", "ktlib", num_hidden_layers=1)).values()
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(6, 64, generator=generator)
    weights, index = torch.randn(6, 8, generator=generator).softmax(-1).topk(2)
    return module, (hidden_states, index, weights)


def adapted():
    model = tiny_model("qwen3_moe", "ktlib", num_hidden_layers=1)
    return random_adapter(get_peft_model(model, ktlib.lora_config(model, r=2))).eval()


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@torch.no_grad()
def test_export(strict, dynamic):
    if strict and not ONE_GRAPH:
        pytest.skip("before 2.13 torch's compiler cannot take a module's answer as constant")
    model = Logits(adapted())
    dimension = torch.export.Dim.AUTO
    shapes = {"input_ids": {0: dimension, 1: dimension}} if dynamic else None
    exported = torch.export.export(model, (tokens(2, 12),), dynamic_shapes=shapes, strict=strict)
    assert known() == {SILU} and OPERATOR in str(exported.graph)
    other = tokens(3, 9, seed=1) if dynamic else tokens(2, 12, seed=1)
    torch.testing.assert_close(exported.module()(other), model(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", ["fake", "real"])
def test_fake_tensors_forward_and_backward(weights):
    model = tiny_model("qwen3_moe", "ktlib", num_hidden_layers=1)
    with FakeTensorMode(allow_non_fake_inputs=weights == "real"):
        if weights == "fake":
            model = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
            model.set_experts_implementation("ktlib")
        ids = torch.zeros(2, 12, dtype=torch.long)
        output = model(ids, labels=ids, use_cache=False)
        assert isinstance(output.logits, FakeTensor) and output.logits.shape == (2, 12, 96)
        if weights == "fake":
            output.loss.backward()
            assert all(isinstance(p.grad, FakeTensor) for p in model.parameters())
    assert known() == {SILU}


def test_a_gate_that_is_not_ours_is_recognised_under_fake_tensors_too(logged):
    module, arguments = layer()
    del module.act_fn
    module.act_fn = torch.relu
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = module(*map(mode.from_tensor, arguments))
    assert isinstance(fake, FakeTensor) and known() == {None} and "its gate is none of" in logged()[0]


MODES = {
    "no mode": contextlib.nullcontext,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta as the default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    module, arguments = layer()
    with torch.no_grad(), MODES[mode]():
        first = module(*arguments)
    assert known() == {SILU} and torch.equal(first, module(*arguments))


def test_inference_mode_first_does_not_hinder_training():
    module, arguments = layer()
    with torch.inference_mode():
        module(*arguments)
    arguments[0].requires_grad_()
    module(*arguments).sum().backward()
    assert arguments[0].grad.isfinite().all()


@torch.no_grad()
def test_vmap():
    module, _ = layer()
    batch = [torch.stack(rows) for rows in zip(layer(0)[1], layer(1)[1], strict=True)]
    mapped = torch.func.vmap(lambda *one: module(*one))(*batch)
    assert known() == {SILU}
    assert torch.equal(mapped, torch.stack([module(*one) for one in zip(*batch, strict=True)]))


@torch.no_grad()
def test_jit_trace():
    """The trace holds the operator, and nothing of how the gate was found."""
    module, arguments = layer()
    traced = torch.jit.trace(lambda *one: module(*one), arguments, check_trace=False)
    assert known() == {SILU} and "ktlib::moe_experts" in str(traced.graph) and "linspace" not in str(traced.graph)
    other = layer(1)[1]
    assert torch.equal(traced(*other), module(*other))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@torch.no_grad()
def test_make_fx(tracing_mode):
    module, arguments = layer()
    graph = make_fx(lambda *one: module(*one), tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(*arguments)
    assert known() == {SILU} and OPERATOR in str(graph.graph) and "linspace" not in str(graph.graph)
    other = layer(1)[1]
    assert torch.equal(graph(*other), module(*other))


@pytest.mark.parametrize("served", [True, False])
@torch.no_grad()
def test_compile(served, logged):
    torch._dynamo.reset()
    module, arguments = layer()
    if not served:
        module.float()
    compiled = torch.compile(module, backend="eager", fullgraph=ONE_GRAPH)
    first = compiled(*arguments)
    assert known() == ({SILU} if served else set()) and len(logged()) == (not served)
    assert torch.equal(first, module(*arguments))
    torch._dynamo.reset()


def test_the_meta_device_is_left_to_stock_experts():
    module, arguments = layer()
    result = module.to("meta")(*(one.to("meta") for one in arguments))
    assert result.is_meta and result.shape == (6, 64) and known() == set()
