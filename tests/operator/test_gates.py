"""Gates, biases and weight layouts of the operator against the float64 reference, on every instruction set."""

import itertools

import pytest
import torch
from test_moe_experts import BOUNDS, FAST, ISAS

import ktlib
from ktlib import reference
from ktlib.lab.validation import random_layer, relative_error
from ktlib.reference import stages

GATES = {
    "silu": {"gate": "silu"},
    "clamped silu": {"gate": "silu", "limit": 0.7},
    "gelu": {"gate": "gelu"},
    "clamped gelu": {"gate": "gelu", "limit": 0.75},
    "gelu_tanh": {"gate": "gelu_tanh"},
    "gpt-oss": {"gate": "swiglu_oai", "limit": 1.5, "alpha": 1.702},  # a limit that half of the values exceed
    "swiglu_oai": {"gate": "swiglu_oai", "alpha": 0.9},
}
LAYOUTS = {
    "plain": {},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True},
    "gpt-oss's": {"transposed": True, "interleaved": True},
}
BASE = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
# Bounds of weights and biases: those of LoRA, and for weights one more rounding, of the factor with the routing weight.
ALL_BOUNDS = BOUNDS | dict.fromkeys(BASE, 0.005)


def layer_of(tokens, experts, top_k, hidden, intermediate, rank, bias_dtype=torch.bfloat16, seed=0):
    """Arguments of ``moe_experts`` in the plain layout, with biases, and with values in the whole range of a gate."""
    layer = random_layer(
        "trained", tokens=tokens, experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate, rank=rank,
        seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    layer["hidden_states"] = (1.5 * torch.randn(tokens, hidden, generator=generator)).bfloat16()
    for name, size in (("gate_up_bias", 2 * intermediate), ("down_bias", hidden)):
        layer[name] = torch.randn(experts, size, generator=generator).bfloat16().to(bias_dtype)
    return layer


def alternating(tensor, dim):
    """Gates first, then ups -> gate, up, gate, up, ... along ``dim``."""
    return torch.stack(tensor.chunk(2, dim=dim), dim=dim + 1).flatten(dim, dim + 1).contiguous()


def in_layout(layer, transposed=False, interleaved=False):
    """The same experts stored in another layout."""
    layer = dict(layer)
    if interleaved:
        lora_A, lora_B, scaling = layer["gate_up_lora"]
        layer["gate_up_lora"] = (lora_A, alternating(lora_B, 0), scaling)
        for name in ("gate_up_proj", "gate_up_bias"):
            layer[name] = alternating(layer[name], 1)
    if transposed:
        for name in ("gate_up_proj", "down_proj"):
            layer[name] = layer[name].transpose(1, 2).contiguous()
    return layer


def results(function, layer, wanted=None, **options):
    """Output and gradients by name; ``wanted``: names to differentiate, default all."""
    leaves = {}

    def leaf(name, tensor):
        leaves[name] = tensor.detach().clone().requires_grad_(wanted is None or name in wanted)
        return leaves[name]

    arguments = dict(layer)
    for name in ("hidden_states", "top_k_weights", *BASE):
        if layer[name] is not None:
            arguments[name] = leaf(name, layer[name])
    for name in ("gate_up", "down"):
        lora_A, lora_B, scaling = layer[f"{name}_lora"]
        arguments[f"{name}_lora"] = (leaf(f"{name} lora_A", lora_A), leaf(f"{name} lora_B", lora_B), scaling)
    output = function(**arguments, **options)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    output.backward(gradient.to(output.dtype))
    grads = {name: tensor.grad for name, tensor in leaves.items() if tensor.requires_grad}
    return {"output": output.detach()} | grads


def check(layer, isa, bounds=ALL_BOUNDS, **options):
    """Every output and gradient within its bound, and of the argument's dtype; returns the errors."""
    actual = results(ktlib.moe_experts, layer, isa=isa, **options)
    expected = results(reference.moe_experts, layer, **options)
    errors = {name: relative_error(actual[name].double(), expected[name].double()).item() for name in expected}
    assert {name: round(error, 5) for name, error in errors.items() if not error <= bounds[name]} == {}
    for name in ("hidden_states", "top_k_weights", *(name for name in BASE if layer[name] is not None)):
        assert actual[name].dtype == layer[name].dtype and actual[name].shape == layer[name].shape
    return errors


SHAPES = [(300, 8, 2, 96, 72, 8), (96, 3, 3, 75, 41, 5), (300, 4, 2, 136, 600, 70)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_gates_biases_and_layouts(gate, layout, isa):
    for shape in SHAPES:
        check(in_layout(layer_of(*shape), **LAYOUTS[layout]), isa, **LAYOUTS[layout], **GATES[gate])


@pytest.mark.parametrize("biases", [("gate_up_bias",), ("down_bias",), ()], ids=str)
def test_each_bias_is_optional(biases):
    layer = layer_of(300, 8, 2, 96, 72, 8)
    check(layer | {name: None for name in ("gate_up_bias", "down_bias") if name not in biases}, FAST)


def test_biases_in_fp32_are_not_rounded():
    layer = layer_of(300, 4, 2, 96, 72, 8, bias_dtype=torch.float32)
    for name in ("gate_up_bias", "down_bias"):
        layer[name] = layer[name] * (1 + 2.0**-10)
    errors = check(layer, FAST)
    rounded = layer | {name: layer[name].bfloat16() for name in ("gate_up_bias", "down_bias")}
    assert errors["down_bias"] < 1e-5  # fp32 sums of exact products
    assert not torch.equal(results(ktlib.moe_experts, rounded)["output"], results(ktlib.moe_experts, layer)["output"])


def test_a_bias_alone_trains():
    """Gradients for any one tensor of the base model are those of the full set, bit for bit."""
    layer = layer_of(60, 4, 2, 96, 72, 4)
    full = results(ktlib.moe_experts, layer)
    for name in (*BASE, "top_k_weights"):
        alone = results(ktlib.moe_experts, layer, wanted=[name])
        assert list(alone) == ["output", name] and torch.equal(alone[name], full[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_batches_go_in_chunks(layout):
    """More slots than one chunk holds; gradients of the base model make the whole batch one chunk."""
    options = LAYOUTS[layout] | GATES["gpt-oss"]
    layer = in_layout(layer_of(4200, 8, 7, 64, 32, 2), **LAYOUTS[layout])
    lora = [f"{name} lora_{letter}" for name in ("gate_up", "down") for letter in "AB"]
    wanted = ["hidden_states", "top_k_weights", *lora]
    chunked = results(ktlib.moe_experts, layer, wanted, **options)
    whole = results(ktlib.moe_experts, layer, **options)
    for name in chunked:  # sums over tokens are taken in another order
        same = name in ("output", "hidden_states", "top_k_weights")
        assert relative_error(chunked[name].double(), whole[name].double()) <= (0 if same else 0.002), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_with_its_token(layout):
    options = LAYOUTS[layout] | GATES["gpt-oss"]
    layer = in_layout(layer_of(40, 6, 2, 75, 41, 3), **LAYOUTS[layout])
    layer["hidden_states"][7, 3] = float("nan")
    for isa in ISAS:
        actual = results(ktlib.moe_experts, layer, isa=isa, **options)
        for name in ("output", "hidden_states", "top_k_weights"):
            assert actual[name].isnan().any(dim=1).nonzero().flatten().tolist() == [7]


def test_experts_without_tokens_get_zero_gradients():
    layer = layer_of(40, 4, 2, 96, 72, 4)
    layer["top_k_index"][layer["top_k_index"] == 2] = 1
    for options in LAYOUTS.values():
        grads = results(ktlib.moe_experts, in_layout(layer, **options), **options)
        for name in BASE:
            assert grads[name].flatten(1).any(dim=1).tolist() == [True, True, False, True], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(layout):
    options = LAYOUTS[layout] | GATES["gpt-oss"]
    layer = in_layout(layer_of(400, 6, 3, 160, 144, 5), **LAYOUTS[layout])
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(ktlib.moe_experts, layer, **options))
    finally:
        torch.set_num_threads(before)
    for other, name in itertools.product(runs[1:], runs[0]):
        assert torch.equal(runs[0][name], other[name]), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_whether_or_not_torch_flushes_denormals(layout, isa):
    """Only the thread that set the mode flushes; these routing weights make numbers that would be flushed."""
    layer = in_layout(layer_of(200, 4, 2, 96, 72, 3), **LAYOUTS[layout])
    layer["top_k_weights"] = layer["top_k_weights"] * 1e-38
    options = LAYOUTS[layout] | {"isa": isa}
    before, wanted, runs, flushed = torch.get_num_threads(), results(ktlib.moe_experts, layer, **options), [], []
    tiny = torch.tensor(1e-40)
    assert torch.set_flush_denormal(True)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(results(ktlib.moe_experts, layer, **options))
            flushed.append((tiny * 1).view(torch.int32).item() == 0)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    for run, name in itertools.product(runs, wanted):
        assert torch.equal(run[name], wanted[name]), name
    assert flushed == [True, True] and wanted["top_k_weights"].any()


@pytest.mark.parametrize("isa", [name for name in ISAS if name != "portable"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_instruction_sets_agree(layout, isa):
    options = LAYOUTS[layout] | {"gate": "gelu"}
    layer = in_layout(layer_of(64, 4, 2, 128, 96, 8), **LAYOUTS[layout])
    portable, other = (results(ktlib.moe_experts, layer, isa=name, **options) for name in ("portable", isa))
    for name in portable:
        assert relative_error(other[name].double(), portable[name].double()) <= 0.0008, name


def test_reference_gradients_are_those_of_its_output():
    """torch.autograd.gradcheck in float64 for every gate and layout of the reference."""
    plain = layer_of(3, 2, 1, 3, 2, 1)
    for gate, layout in itertools.product(GATES.values(), LAYOUTS.values()):
        layer = in_layout(plain, **layout)
        names = ("hidden_states", "top_k_weights", *BASE)

        def function(*values, layer=layer, options=gate | layout, names=names):
            lora = {"gate_up_lora": None, "down_lora": None}
            return reference.moe_experts(**(layer | lora | dict(zip(names, values, strict=True))), **options)

        assert torch.autograd.gradcheck(function, [layer[name].double().requires_grad_() for name in names])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_end_in_the_reference(layout):
    """The tracer's computation stage by stage (ktlib.reference.stages) knows biases and layouts too."""
    gate = GATES["gpt-oss"]
    layer = in_layout(layer_of(9, 4, 2, 16, 8, 2), **LAYOUTS[layout]) | LAYOUTS[layout]

    def apply_gate(both):
        halves = (both[:, 0::2], both[:, 1::2]) if layer.get("interleaved") else both.chunk(2, dim=-1)
        return reference.apply_gate(*halves, **gate)

    output, gradient = torch.zeros(9, 16, dtype=torch.float64), torch.ones(9, 16)
    for expert in range(4):
        token, _, values = stages.stages(layer, expert, apply_gate, gradient)
        output.index_add_(0, token, values["output"])
        assert values["up"].shape == values["gradient of gate"].shape == (len(token), 8)
    torch.testing.assert_close(output, reference.moe_experts(**layer, **gate), rtol=1e-6, atol=1e-6)
    assert stages.locate(layer, apply_gate) is None and stages.locate(layer, apply_gate, gradient) is None


def test_unknown_gate_in_the_reference():
    with pytest.raises(ValueError, match="gate: got 'relu', the reference knows 'silu'"):
        reference.moe_experts(**layer_of(2, 2, 1, 8, 8, 1), gate="relu")


def test_gradients_stop_at_the_limit():
    """Beyond the limit gradients are exactly zero; below it they are those of the gate without a limit."""
    layer = layer_of(50, 2, 1, 32, 16, 1)
    layer |= {"gate_up_bias": torch.zeros(2, 32), "gate_up_lora": None, "down_lora": None}
    layer["gate_up_bias"][:, 3] = 1000.0  # one gate and one up, far beyond the limit
    layer["gate_up_bias"][:, 16 + 5] = -1000.0
    bias = layer["gate_up_bias"].requires_grad_()
    ktlib.moe_experts(**layer, limit=900.0).sum().backward()
    clamped, bias.grad = bias.grad, None
    ktlib.moe_experts(**layer).sum().backward()
    same = torch.ones(32, dtype=torch.bool)
    same[[3, 5, 16 + 3, 16 + 5]] = False
    assert torch.equal(clamped[:, same], bias.grad[:, same])
    assert not clamped[:, [3, 16 + 5]].any() and bias.grad[:, [3, 16 + 5]].all()
