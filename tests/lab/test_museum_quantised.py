"""Stock PEFT on quantised experts fails in silence; ktlib on the same codes gives the effect that float64 gives."""

import pytest
import torch

import ktlib
from ktlib.lab import museum_quantised as museum
from ktlib.reference import lora_layout

RANK = 4


def gradients(lora):
    return [matrix.grad for lora_A, lora_B, _ in lora.values() for matrix in (lora_A, lora_B)]


def fill_b(lora):
    for _, lora_B, _ in lora.values():
        torch.nn.init.normal_(lora_B)


def backward(model, inputs):
    """The output, and the gradient of its sum in hidden_states."""
    hidden_states = inputs["hidden_states"].clone().requires_grad_()
    output = model(**inputs | {"hidden_states": hidden_states})
    output.sum().backward()
    return output.detach(), hidden_states.grad


@pytest.fixture
def kernel():
    with museum.decoding_kernel():
        yield


def fp8(seed=0):
    """A layer of FP8 experts with a new PEFT adapter, and the output without the adapter."""
    inputs, weights, _ = museum.quantised_layer("e4m3", rank=RANK, seed=seed)
    stock = museum.stock_experts(weights)
    return inputs, weights, museum.adapt(stock, RANK, seed), stock(**inputs)


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_without_an_adapter_the_stand_ins_compute_what_the_codes_mean(kernel, format):
    inputs, weights, _ = museum.quantised_layer(format)
    want = museum.exact(inputs, weights)
    assert museum.effect(museum.stock_experts(weights)(**inputs), want) < 1e-6
    if format == "e2m1":
        assert torch.equal(museum.PackedExperts(weights)(**inputs), want)


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_fp8_stock_peft_loses_the_effect_of_an_adapter_and_ktlib_does_not(kernel, size, seed):
    inputs, weights, model, plain = fp8(seed)
    lora = museum.adapter(model)
    museum.set_size(lora, weights, size)
    exact = museum.exact(inputs, weights, lora)
    want = museum.effect(exact, museum.exact(inputs, weights))
    assert museum.effect(model(**inputs), plain) < 5e-4 * want
    output = ktlib.moe_experts(**inputs, **weights, **lora)
    assert museum.effect(output, ktlib.moe_experts(**inputs, **weights)) == pytest.approx(want, rel=0.05)
    assert museum.effect(output, exact) < 0.01
    decoded = {name: weight.decoded() for name, weight in weights.items()}
    assert torch.equal(output, ktlib.moe_experts(**inputs, **decoded, **lora))


def test_fp8_stock_peft_draws_a_on_the_grid_of_e4m3(kernel):
    inputs, weights, model, _ = fp8()
    for name, (lora_A, _, _) in museum.adapter(model).items():
        assert lora_A.dtype == torch.float32 and lora_A.unique().numel() < 128
        assert torch.equal(lora_A, lora_A.to(torch.float8_e4m3fn).float()), name
    decoded = torch.nn.ParameterDict({name: weight.decoded() for name, weight in weights.items()})
    for lora_A, _, _ in museum.adapter(museum.adapt(decoded.requires_grad_(False), RANK)).values():
        assert not torch.equal(lora_A, lora_A.to(torch.float8_e4m3fn).float()), "of bf16 experts it is not"


def test_fp8_adapters_of_stock_peft_get_no_gradient_and_those_of_ktlib_do(kernel):
    inputs, weights, model, _ = fp8()
    lora = museum.adapter(model)
    fill_b(lora)
    _, grad = backward(model, inputs)
    assert grad.abs().max() > 0 and gradients(lora) == [None] * 4
    ktlib.moe_experts(**inputs, **weights, **lora).sum().backward()
    assert all(grad.abs().max() > 0 for grad in gradients(lora))


@pytest.mark.parametrize("format", ["int4", "nf4", "e2m1"])
def test_4_bit_stock_peft_makes_adapters_of_the_packed_width_that_do_nothing(format):
    inputs, weights, _ = museum.quantised_layer(format, rank=RANK)
    packed = museum.PackedExperts(weights)
    plain = packed(**inputs)
    model = museum.adapt(packed, RANK)
    lora = museum.adapter(model)
    for name, lora_name in museum.NAMES.items():
        experts, rows, columns = weights[name].shape
        lora_A, lora_B, _ = lora[lora_name]
        assert (lora_A.shape, lora_B.shape) == lora_layout.shapes(RANK, experts, rows, columns // 2)
        assert not lora_A.trunc().any(), "cut to integers, A is zero"
    fill_b(lora)
    output, grad = backward(model, inputs)
    assert torch.equal(output, plain) and grad.abs().max() > 0 and gradients(lora) == [None] * 4


@pytest.mark.parametrize("format", ["int4", "nf4", "e2m1"])
def test_4_bit_ktlib_refuses_that_width_and_gives_the_right_effect(format):
    inputs, weights, lora = museum.quantised_layer(format, rank=RANK)
    narrow = museum.adapter(museum.adapt(museum.PackedExperts(weights), RANK))
    with pytest.raises(ValueError, match=r"gate_up_lora lora_A: got shape \(16, 128\), needs \(16, 256\)"):
        ktlib.moe_experts(**inputs, **weights, **narrow)
    museum.set_size(lora, weights, 0.1)
    want = museum.exact(inputs, weights, lora)
    output = ktlib.moe_experts(**inputs, **weights, **lora)
    assert museum.effect(want, museum.exact(inputs, weights)) > 0.05 and museum.effect(output, want) < 0.01
    decoded = {name: weight.decoded() for name, weight in weights.items()}
    assert torch.equal(output, ktlib.moe_experts(**inputs, **decoded, **lora))


def test_4_bit_experts_of_transformers_get_the_same_adapters(kernel):
    """Newer transformers refuse their backward by name; the adapters get no gradient either way."""
    inputs, weights, _ = museum.quantised_layer("e2m1", rank=RANK)
    stock = museum.stock_experts(weights)
    plain = stock(**inputs)
    model = museum.adapt(stock, RANK)
    lora = museum.adapter(model)
    assert [tuple(lora_A.shape) for lora_A, _, _ in lora.values()] == [(16, 64), (16, 128)]
    fill_b(lora)
    assert torch.equal(model(**inputs), plain)
    try:
        backward(model, inputs)
    except NotImplementedError as error:
        assert "FP4" in str(error)
    assert gradients(lora) == [None] * 4
