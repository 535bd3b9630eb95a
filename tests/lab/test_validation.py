"""The validation helpers accept right results, and notice wrong values anywhere."""

import math

import pytest
import torch

import ktlib
from ktlib import reference
from ktlib.lab import validation

SMALL = {"tokens": 7, "experts": 4, "top_k": 2, "hidden": 24, "intermediate": 16, "rank": 3}


@pytest.mark.parametrize("kind", ["log", "trained"])
def test_the_reference_is_what_transformers_and_peft_compute(kind):
    layer = validation.in_float64(validation.random_layer(kind, **SMALL))
    ours, theirs = (validation.evaluate(f, layer) for f in (reference.moe_experts, validation.stock_experts))
    assert all(error < 1e-13 for error in validation.errors(theirs, ours).values())
    assert all(ours[quantity].abs().sum() > 0 for quantity in validation.QUANTITIES) == (kind == "trained")


def test_the_log_inputs_are_the_log_inputs():
    layer = validation.random_layer("log", **SMALL)
    assert layer["gate_up_lora"][1].count_nonzero() == layer["down_lora"][1].count_nonzero() == 0
    for matrix in (layer["gate_up_proj"], layer["down_proj"], layer["gate_up_lora"][0], layer["hidden_states"]):
        assert matrix.float().std().item() == pytest.approx(0.01, rel=0.15)
    with pytest.raises(ValueError, match="kind: got 'other'"):
        validation.random_layer("other")


@pytest.mark.parametrize("quantity", validation.QUANTITIES)
def test_a_wrong_value_anywhere_is_noticed(quantity):
    right = validation.evaluate(reference.moe_experts, validation.random_layer("trained", **SMALL))
    wrong = {name: value.clone() for name, value in right.items()}
    wrong[quantity].flatten()[0] += right[quantity].norm()
    assert {name for name, error in validation.errors(wrong, right).items() if error > 0.5} == {quantity}


@pytest.mark.parametrize(
    ("seeds", "sizes"),
    [
        (12, {"tokens": 17, "experts": 5, "top_k": 2, "hidden": 96, "intermediate": 80, "rank": 3}),
        (12, {"tokens": 1, "experts": 1, "top_k": 1, "hidden": 8, "intermediate": 8, "rank": 1}),
        (12, {"tokens": 1, "experts": 1, "top_k": 1, "hidden": 1, "intermediate": 1, "rank": 1}),
    ],
)
@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["log", "trained"])
def test_the_operator_is_within_simulated_roundings_at_any_size(one_thread, seeds, sizes, lora_dtype, kind):
    for seed in range(seeds):
        layer = validation.random_layer(kind, lora_dtype=lora_dtype, seed=seed, **sizes)
        expected = validation.evaluate(reference.moe_experts, layer)
        allowed = validation.allowed(validation.with_roundings(layer, seed=seed), expected)
        actual = validation.errors(validation.evaluate(ktlib.moe_experts, layer), expected)
        assert {name: error for name, error in actual.items() if error > allowed[name][0]} == {}, seed


def test_simulated_roundings_are_a_tight_bound_for_a_large_layer():
    """Stock PyTorch in bf16 rounds once or twice more, and most of its quantities exceed the bound already."""
    sizes = {"tokens": 400, "experts": 8, "top_k": 4, "hidden": 256, "intermediate": 192, "rank": 8}
    layer = validation.random_layer("trained", **sizes)
    expected = validation.evaluate(reference.moe_experts, layer)
    allowed = validation.allowed(validation.with_roundings(layer), expected)
    assert max(bound for bound, _ in allowed.values()) < 0.007 and allowed["hidden_states"][0] < 0.0046
    actual, stock = (
        validation.errors(validation.evaluate(function, layer), expected)
        for function in (ktlib.moe_experts, validation.stock_experts)
    )
    assert all(bound < 2.8 * actual[name] for name, (bound, _) in allowed.items())
    assert sum(stock[name] > bound for name, (bound, _) in allowed.items()) >= 4


def test_a_rounding_is_what_torch_rounds_by():
    numbers = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    error = validation.relative_error(numbers.bfloat16().double(), numbers.double()).item()
    assert validation.ROUNDING == pytest.approx(error, rel=0.02)


def test_relative_error():
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    assert validation.relative_error(zero, zero).item() == 0
    assert validation.relative_error(one, zero).item() == math.inf
    assert validation.relative_error(1.5 * one, one).item() == 0.5
    assert math.isnan(validation.relative_error(one * math.nan, one).item())
    assert validation.relative_error(torch.eye(2), torch.ones(2, 2), dim=-1).tolist() == pytest.approx([0.5**0.5] * 2)
