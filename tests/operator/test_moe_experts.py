"""The operator against the float64 reference, over shapes, routings, dtypes and instruction sets."""

import itertools

import pytest
import torch

import ktlib
from ktlib import reference
from ktlib.lab.validation import QUANTITIES, evaluate, random_layer, relative_error

# Rounding to bf16 changes a number by 2^-8 of it at most, and a tensor by about 0.0017 of its L2 norm
# (ktlib.lab.validation.ROUNDING). The output sees two such roundings (h and the result), a LoRA gradient up to four
# (gate and up as saved, d(gate) or h, the result), dx one more on its way through both projections. Independent errors
# add as squares: four are 0.0033, five 0.0037.
BOUNDS = dict.fromkeys(QUANTITIES, 0.004) | {"hidden_states": 0.006}

ISAS = [name for name, missing in ktlib.cpu_info()["isas"].items() if not missing]
FAST = ktlib.cpu_info()["isa"]


def compare(layers, isa, **options):
    """Relative L2 error per quantity over all layers together, since sums in one small layer may nearly cancel."""
    actual = [evaluate(ktlib.moe_experts, layer, isa=isa, **options) for layer in layers]
    expected = [evaluate(reference.moe_experts, layer, **options) for layer in layers]
    return {
        name: relative_error(
            torch.cat([result[name].flatten() for result in actual]),
            torch.cat([result[name].flatten() for result in expected]),
        ).item()
        for name in actual[0]
    }


def assert_within(errors, bounds=BOUNDS):
    assert {name: round(error, 5) for name, error in errors.items() if not error <= bounds[name]} == {}


def layers(tokens, experts, top_k, hidden, intermediate, rank, **options):
    """Enough layers of this shape, from different seeds, that some hundred rows contribute to each error.

    Inputs are plain normal numbers: outlier channels would concentrate a small layer's gradient in a few elements, and
    errors average out only over many. test_outlier_channels has them at a size where they do.
    """
    repeats = max(1, min(24, 384 // max(1, tokens * top_k)))
    cases = [
        random_layer(
            "trained", tokens=tokens, experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate, rank=rank,
            seed=seed, **options,
        )
        for seed in range(repeats)
    ]  # fmt: skip
    for seed, layer in enumerate(cases):
        layer["hidden_states"] = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return cases


SHAPES = [
    # tokens, experts, top_k, hidden, intermediate, rank
    (1, 1, 1, 96, 80, 8),
    (1, 64, 6, 96, 72, 8),
    (2, 3, 2, 72, 96, 3),
    (2, 8, 8, 80, 80, 1),
    (17, 3, 3, 80, 72, 16),
    (17, 8, 4, 72, 1408, 8),
    (48, 64, 5, 96, 80, 33),
    (48, 8, 7, 1408, 96, 16),
    (48, 1, 1, 72, 72, 1),
    (300, 8, 2, 96, 72, 8),
    (300, 64, 6, 80, 96, 3),
    (300, 3, 1, 96, 1408, 33),
    (17, 4, 2, 75, 41, 5),  # odd sizes
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, isa):
    assert_within(compare(layers(*shape), isa))


@pytest.mark.parametrize("isa", [name for name in ISAS if name not in ("portable", "amx_emulated")] or ISAS)
def test_outlier_channels(isa):
    """Realistic inputs at a realistic size, to tighter bounds."""
    layer = random_layer("trained", tokens=300, experts=8, top_k=4, hidden=1024, intermediate=512)
    tight = dict.fromkeys(QUANTITIES, 0.004) | {"output": 0.0025, "hidden_states": 0.0045}
    assert_within(compare([layer], isa), tight)


@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
def test_dtypes(lora_dtype, hidden_dtype, weights_dtype):
    cases = layers(48, 8, 4, 96, 80, 8, lora_dtype=torch.bfloat16)
    # fp32 arguments that are exact in bf16: what the rounding on entry would change is not measured
    for layer in cases:
        layer["hidden_states"] = layer["hidden_states"].to(hidden_dtype)
        layer["top_k_weights"] = layer["top_k_weights"].bfloat16().to(weights_dtype)
        for name in ("gate_up_lora", "down_lora"):
            lora_A, lora_B, scaling = layer[name]
            layer[name] = (lora_A.to(lora_dtype), lora_B.to(lora_dtype), scaling)
    result = evaluate(ktlib.moe_experts, cases[0])
    assert_within(compare(cases, FAST))
    arguments = {name: value.requires_grad_() for name, value in cases[0].items() if name in ("hidden_states",)}
    output = ktlib.moe_experts(**(cases[0] | arguments))
    assert output.dtype == hidden_dtype and result["output"].shape == output.shape


def test_fp32_arguments_are_rounded_once_on_entry():
    layer = random_layer("trained", tokens=17, experts=4, top_k=2, hidden=64, intermediate=96, rank=4)
    generator = torch.Generator().manual_seed(0)

    def perturbed(t):  # by less than half a unit in the last place of bf16
        return t.float() * (1 + (torch.rand(t.shape, generator=generator) - 0.5) * 2**-9)

    exact = dict(layer, hidden_states=layer["hidden_states"].float())
    rounded = dict(layer, hidden_states=perturbed(layer["hidden_states"]))
    for name in ("gate_up_lora", "down_lora"):
        lora_A, lora_B, scaling = layer[name]
        exact[name] = (lora_A.float(), lora_B.float(), scaling)
        rounded[name] = (perturbed(lora_A), perturbed(lora_B), scaling)
    for first, second in zip(
        evaluate(ktlib.moe_experts, exact).values(), evaluate(ktlib.moe_experts, rounded).values(), strict=True
    ):
        assert torch.equal(first, second)


ROUTINGS = {
    "one expert takes all": lambda ids, weights: (torch.full_like(ids, 2), weights),
    "half of the slots on one": lambda ids, weights: (torch.where(ids % 2 == 0, 1, ids), weights),
    "duplicates in a token": lambda ids, weights: (ids[:, :1].expand(-1, ids.shape[1]), weights),
    "zero weights": lambda ids, weights: (ids, weights * (torch.arange(weights.shape[1]) > 0)),
    "huge weights": lambda ids, weights: (ids, weights * 1e4),
    "negative weights": lambda ids, weights: (ids, -weights),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, isa):
    cases = layers(300, 8, 4, 96, 80, 4)
    for layer in cases:
        layer["top_k_index"], layer["top_k_weights"] = ROUTINGS[routing](layer["top_k_index"], layer["top_k_weights"])
    assert_within(compare(cases, isa))


@pytest.mark.parametrize("isa", ISAS)
def test_no_tokens(isa):
    (layer,) = layers(300, 4, 2, 64, 64, 4)[:1]
    empty = dict(layer) | {n: layer[n][:0] for n in ("hidden_states", "top_k_index", "top_k_weights")}
    results = evaluate(ktlib.moe_experts, empty, isa=isa)
    assert results["output"].shape == (0, 64)
    assert all(results[name].count_nonzero() == 0 for name in QUANTITIES)
    weights = {name: layer[name].clone().requires_grad_() for name in ("gate_up_proj", "down_proj")}
    trash = [torch.full_like(weight, 7.0) for weight in weights.values()]
    del trash  # memory that gradients are likely to get
    ktlib.moe_experts(**(empty | weights), isa=isa).sum().backward()
    assert all(weight.grad.count_nonzero() == 0 for weight in weights.values())


def test_experts_without_tokens_get_zero_gradients():
    layer = random_layer("trained", tokens=9, experts=8, top_k=1, hidden=64, intermediate=64, rank=4)
    layer["top_k_index"] = torch.full_like(layer["top_k_index"], 5)
    results = evaluate(ktlib.moe_experts, layer)
    for name in ("gate_up lora_A", "down lora_A"):
        by_expert = results[name].reshape(8, -1).norm(dim=1)
        assert by_expert.nonzero().flatten().tolist() == [5]
    for name in ("gate_up lora_B", "down lora_B"):
        by_expert = results[name].reshape(-1, 4, 8).norm(dim=(0, 1))
        assert by_expert.nonzero().flatten().tolist() == [5]


def test_non_contiguous_arguments():
    layer = random_layer("trained", tokens=33, experts=4, top_k=2, hidden=64, intermediate=96, rank=4)
    strided = dict(layer)
    for name in ("hidden_states", "top_k_index", "top_k_weights"):
        strided[name] = layer[name].T.contiguous().T
        assert not strided[name].is_contiguous()
    for name in ("gate_up_lora", "down_lora"):
        lora_A, lora_B, scaling = layer[name]
        strided[name] = (lora_A.T.contiguous().T, lora_B.T.contiguous().T, scaling)
    for first, second in zip(
        evaluate(ktlib.moe_experts, layer).values(), evaluate(ktlib.moe_experts, strided).values(), strict=True
    ):
        assert torch.equal(first, second)
    x = layer["hidden_states"].clone().requires_grad_()
    ktlib.moe_experts(**(layer | {"hidden_states": x})).sum().backward()  # an expanded grad_output
    assert torch.isfinite(x.grad).all() and x.grad.any()


@pytest.mark.parametrize("which", ["none", "gate_up_lora", "down_lora"])
def test_lora_on_a_subset_of_projections(which):
    cases = layers(48, 8, 2, 96, 80, 8)
    for layer in cases:
        x = layer["hidden_states"].clone().requires_grad_()
        y = layer["hidden_states"].clone().requires_grad_()
        kept = {name: layer[name] if name == which else None for name in ("gate_up_lora", "down_lora")}
        actual, expected = ktlib.moe_experts(**(layer | kept | {"hidden_states": x})), None
        expected = reference.moe_experts(**(layer | kept | {"hidden_states": y}))
        gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        actual.backward(gradient)
        expected.backward(gradient.double())
        assert relative_error(actual.detach().double(), expected.detach()) <= BOUNDS["output"]
        assert relative_error(x.grad.double(), y.grad.double()) <= BOUNDS["hidden_states"]


@pytest.mark.parametrize("isa", ISAS)
def test_log_inputs(isa):
    """randn/100 weights, lora_A and inputs, lora_B zero, 48 tokens, rank 8: gradients of lora_A are exactly zero."""
    layer = random_layer("log", experts=8, hidden=256, intermediate=192)
    actual, expected = (
        evaluate(f, layer, **o) for f, o in ((ktlib.moe_experts, {"isa": isa}), (reference.moe_experts, {}))
    )
    assert_within({name: relative_error(actual[name], expected[name]).item() for name in QUANTITIES})
    assert actual["gate_up lora_A"].count_nonzero() == actual["down lora_A"].count_nonzero() == 0


def test_the_reference_refuses_a_gate_that_it_does_not_define():
    with pytest.raises(ValueError, match="gate: got 'tanh'"):
        reference.moe_experts(**random_layer("log", tokens=2, experts=8, hidden=8, intermediate=8), gate="tanh")


def test_reference_gradients_are_those_of_its_output():
    """torch.autograd.gradcheck in float64: the reference's gradients, which all others are measured by."""
    layer = random_layer("trained", tokens=5, experts=3, top_k=2, hidden=6, intermediate=4, rank=2)
    x, weights = (layer[n].double().requires_grad_() for n in ("hidden_states", "top_k_weights"))
    lora = [t.double().requires_grad_() for name in ("gate_up_lora", "down_lora") for t in layer[name][:2]]
    base = {name: layer[name].double().requires_grad_() for name in ("gate_up_proj", "down_proj")}

    def function(x, weights, gate_up_proj, down_proj, *lora):
        return reference.moe_experts(
            x, layer["top_k_index"], weights, gate_up_proj, down_proj, (*lora[:2], 2.0), (*lora[2:], 2.0)
        )

    assert torch.autograd.gradcheck(function, (x, weights, *base.values(), *lora))


@pytest.mark.parametrize("name", ["hidden_states", "top_k_weights", "gate_up_lora", "down_lora"])
def test_directional_derivatives(name):
    """The operator's own output against its own gradient by central differences, independent of the reference."""
    layer = random_layer("trained", tokens=300, experts=4, top_k=2, hidden=96, intermediate=64, rank=8)
    layer["hidden_states"] = layer["hidden_states"].float()
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(300, 96, generator=generator).bfloat16().float()
    is_lora = name.endswith("lora")
    points = list(layer[name][:2]) if is_lora else [layer[name]]
    leaves = [t.float().clone().requires_grad_() for t in points]

    def loss(tensors):
        value = (*tensors, layer[name][2]) if is_lora else tensors[0]
        return (ktlib.moe_experts(**(layer | {name: value})).double() * gradient).sum()

    loss(leaves).backward()
    # along the gradient itself, so that the change stands far above the rounding noise
    steps = [0.05 * leaf.detach().norm() * leaf.grad / leaf.grad.norm() for leaf in leaves]
    with torch.no_grad():
        ahead = loss([leaf + step for leaf, step in zip(leaves, steps, strict=True)])
        behind = loss([leaf - step for leaf, step in zip(leaves, steps, strict=True)])
    predicted = sum((leaf.grad.double() * step.double()).sum() for leaf, step in zip(leaves, steps, strict=True))
    assert ((ahead - behind) / 2).item() == pytest.approx(predicted.item(), rel=0.02)


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa):
    """Skewed routing, several row blocks and ragged sizes; 1, 2 and 5 threads (more than cores: any schedule)."""
    tokens = 700 if isa == FAST else 300
    layer = random_layer("trained", tokens=tokens, experts=8, top_k=3, hidden=160, intermediate=144, rank=5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(evaluate(ktlib.moe_experts, layer, isa=isa))
    finally:
        torch.set_num_threads(before)
    for other, name in itertools.product(results[1:], QUANTITIES):
        assert torch.equal(results[0][name], other[name]), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_token_has_the_same_bits_whatever_else_is_in_the_batch(recompute, isa):
    """Output and gradients of a token's inputs: alone, in a slice of a batch, and in batches of several row blocks, in
    which some experts have few rows and others many. Also if the other tokens are not finite."""
    layer = random_layer("trained", tokens=150, experts=8, top_k=3, hidden=160, intermediate=144, rank=5)
    gradient = torch.randn(150, 160, generator=torch.Generator().manual_seed(1)).bfloat16()

    def results_of(rows, **changes):
        selected = {name: layer[name][rows].clone() for name in ("hidden_states", "top_k_index", "top_k_weights")}
        arguments = layer | selected | changes
        leaves = [arguments[name].requires_grad_() for name in ("hidden_states", "top_k_weights")]
        output = ktlib.moe_experts(**arguments, isa=isa, recompute=recompute)
        output.backward(gradient[rows])
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    whole = results_of(slice(None))
    for rows in (slice(0, 1), slice(77, 78), slice(149, 150), slice(3, 5), slice(20, 41), slice(60, 149)):
        for got, want in zip(results_of(rows), whole, strict=True):
            assert torch.equal(got, want[rows]), rows
    others_bad = layer["hidden_states"].clone()
    others_bad[40:] = float("nan")
    for got, want in zip(results_of(slice(None), hidden_states=others_bad), whole, strict=True):
        assert torch.equal(got[:40], want[:40])


@pytest.mark.parametrize("isa", [name for name in ISAS if name != "portable"])
def test_instruction_sets_agree(isa):
    """All of them round at the same points: results differ by the order of fp32 sums, and the bf16 bits it flips."""
    layer = random_layer("trained", tokens=64, experts=4, top_k=2, hidden=128, intermediate=96, rank=8)
    portable, other = (evaluate(ktlib.moe_experts, layer, isa=name) for name in ("portable", isa))
    for name in QUANTITIES:
        assert relative_error(other[name], portable[name]) <= 0.0005, name


def test_only_what_is_asked_for():
    """Gradients for any subset of inputs are those of the full set, bit for bit."""
    layer = random_layer("trained", tokens=40, experts=4, top_k=2, hidden=96, intermediate=64, rank=4)
    full = evaluate(ktlib.moe_experts, layer)
    names = QUANTITIES[1:]
    gradient = torch.randn(full["output"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for wanted in itertools.chain(itertools.combinations(names, 1), itertools.combinations(names, 2)):
        leaves = {
            "hidden_states": layer["hidden_states"].clone(),
            "top_k_weights": layer["top_k_weights"].clone(),
            **{f"{p} lora_{m}": layer[f"{p}_lora"][i].clone() for p in ("gate_up", "down") for i, m in enumerate("AB")},
        }
        for name in wanted:
            leaves[name].requires_grad_()
        arguments = dict(layer, hidden_states=leaves["hidden_states"], top_k_weights=leaves["top_k_weights"])
        for p in ("gate_up", "down"):
            arguments[f"{p}_lora"] = (leaves[f"{p} lora_A"], leaves[f"{p} lora_B"], layer[f"{p}_lora"][2])
        ktlib.moe_experts(**arguments).backward(gradient)
        for name in names:
            assert (leaves[name].grad is not None) == (name in wanted)
            if name in wanted:
                assert torch.equal(leaves[name].grad.double(), full[name]), (wanted, name)


def test_nan_stays_with_its_token_and_expert():
    """A NaN input reaches the outputs and gradients of its own token, and LoRA gradients of its own experts only."""
    layer = random_layer("trained", tokens=40, experts=6, top_k=2, hidden=96, intermediate=64, rank=3)
    layer["hidden_states"][7, 3] = float("nan")
    for isa in ISAS:
        results = evaluate(ktlib.moe_experts, layer, isa=isa)
        for name in ("output", "hidden_states"):
            assert results[name].isnan().any(dim=1).nonzero().flatten().tolist() == [7]
        hit = sorted(layer["top_k_index"][7].tolist())
        for name in ("gate_up lora_A", "down lora_A"):
            assert results[name].reshape(6, -1).isnan().any(dim=1).nonzero().flatten().tolist() == hit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(300, 8, 2, 96, 72, 3), (17, 4, 2, 75, 41, 5), (260, 2, 1, 160, 144, 4)], ids=str)
def test_gradients_of_expert_weights(shape, isa):
    """Full fine-tuning: dense gradients, alone and beside LoRA's; experts without tokens get zeros."""
    layer = layers(*shape)[0]
    layer["top_k_index"][layer["top_k_index"] == 1] = 0
    results = []
    for function, options in ((ktlib.moe_experts, {"isa": isa}), (reference.moe_experts, {})):
        leaves = {name: layer[name].clone().requires_grad_() for name in ("gate_up_proj", "down_proj", "hidden_states")}
        output = function(**(layer | leaves), **options)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        output.backward(gradient.to(output.dtype))
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    actual, expected = results
    for name in actual:
        assert relative_error(actual[name].double(), expected[name].double()) <= BOUNDS.get(name, 0.005), (
            name
        )  # five roundings
    for name in ("gate_up_proj", "down_proj"):
        assert actual[name].dtype == torch.bfloat16 and actual[name][1].count_nonzero() == 0
    plain = layer["hidden_states"].clone().requires_grad_()
    ktlib.moe_experts(**(layer | {"hidden_states": plain}), isa=isa).backward(gradient.to(plain.dtype))
    assert torch.equal(plain.grad, actual["hidden_states"])


def test_long_batches_go_in_chunks():
    """More slots than one chunk holds: close to the reference, and each token has the bits of a short batch."""
    layer = random_layer("trained", tokens=4200, experts=8, top_k=7, hidden=64, intermediate=32, rank=2)
    layer["hidden_states"] = torch.randn(4200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_within(compare([layer], FAST))
    output = ktlib.moe_experts(**layer)
    for start in (0, 3510, 4100):
        few = layer | {n: layer[n][start : start + 60] for n in ("hidden_states", "top_k_index", "top_k_weights")}
        assert torch.equal(ktlib.moe_experts(**few), output[start : start + 60])
