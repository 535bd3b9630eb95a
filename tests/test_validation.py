"""The yardstick itself: what the validation helpers call equal, and what they notice."""

import math

import pytest
import torch

from ktlib import reference, validation

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


def test_relative_error():
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    assert validation.relative_error(zero, zero).item() == 0
    assert validation.relative_error(one, zero).item() == math.inf
    assert validation.relative_error(1.5 * one, one).item() == 0.5
    assert math.isnan(validation.relative_error(one * math.nan, one).item())
    assert validation.relative_error(torch.eye(2), torch.ones(2, 2), dim=-1).tolist() == pytest.approx([0.5**0.5] * 2)
