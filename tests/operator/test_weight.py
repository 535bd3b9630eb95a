"""moe_experts with a ktlib.Weight: the bits of the decoded weights."""

import re
from pathlib import Path

import pytest
import torch
from support.weights import random_weight

import ktlib
from ktlib.lab.validation import QUANTITIES, evaluate, random_layer
from ktlib.operator.weight import Weight
from ktlib.reference import formats

ROOT = Path(__file__).parents[2]
ISAS = [name for name, missing in ktlib.cpu_info()["isas"].items() if not missing]


def assert_same_bits(layer, gate_up_proj, down_proj, **options):
    """With the weights, and with what they decode to."""
    coded = evaluate(ktlib.moe_experts, layer | {"gate_up_proj": gate_up_proj, "down_proj": down_proj}, **options)
    plain = layer | {"gate_up_proj": gate_up_proj.decoded(), "down_proj": down_proj.decoded()}
    decoded = evaluate(ktlib.moe_experts, plain, **options)
    assert decoded["output"].abs().sum() > 0
    assert [name for name in QUANTITIES if not torch.equal(coded[name], decoded[name])] == []


def small_layer(hidden, intermediate, rank=3, experts=5):
    layer = random_layer(
        "trained", tokens=60, experts=experts, top_k=2, hidden=hidden, intermediate=intermediate, rank=rank
    )
    layer["top_k_index"][:, 1] = layer["top_k_index"][:, 0]  # an expert twice; others without tokens
    layer["top_k_index"][layer["top_k_index"] == 2] = 0
    return layer


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", formats.FORMATS[1:])
@pytest.mark.parametrize("hidden, intermediate, group", [(75, 41, (3, 32)), (96, 64, (1, 32)), (200, 136, (128, 128))])
def test_same_bits_as_the_decoded_weights(isa, format, hidden, intermediate, group):
    layer = small_layer(hidden, intermediate)
    for zeros in {False, format in ("int8", "int4")}:
        gate_up_proj = random_weight(format, (5, 2 * intermediate, hidden), group, zeros)
        down_proj = random_weight(format, (5, hidden, intermediate), group, zeros, seed=1)
        assert_same_bits(layer, gate_up_proj, down_proj, isa=isa)
        assert_same_bits(layer, gate_up_proj, down_proj, isa=isa, recompute=True, interleaved=True, gate="swiglu_oai")
        assert_same_bits(layer, gate_up_proj, down_proj, isa=isa, lora_dropout=0.3, dropout_seed=5)


@pytest.mark.parametrize("isa", ISAS)
def test_one_projection_may_be_coded_and_the_other_not(isa):
    layer = small_layer(96, 64)
    coded = random_weight("int4", (5, 128, 96))
    assert_same_bits(layer, coded, Weight("bf16", layer["down_proj"]), isa=isa)


@pytest.mark.parametrize("tensors", ["one for each expert", "gate and up apart", "one for each row"])
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_from_weights_in_several_tensors(isa, tensors):
    """The tensors lie apart from each other, at addresses that are aligned to an element only."""

    def cut(stack):
        experts, rows, columns = stack.shape
        count = {"one for each expert": experts, "gate and up apart": 2 * experts}.get(tensors, experts * rows)
        if experts * rows % count:  # down_proj, whose rows are no gates and ups
            count = experts
        pieces = []
        for piece in stack.reshape(count, -1, columns):
            memory = torch.full((piece.numel() + 2,), torch.nan, dtype=torch.bfloat16)
            pieces.append(memory[1:-1].view(piece.shape).copy_(piece))
        return Weight("bf16", pieces, shape=stack.shape)

    for hidden, intermediate in ((75, 41), (96, 64)):
        layer = small_layer(hidden, intermediate)
        assert_same_bits(layer, cut(layer["gate_up_proj"]), cut(layer["down_proj"]), isa=isa)


def test_the_example_of_the_page():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "ktlib" / "operator" / "README.md").read_text(), re.S)
    names = {}
    exec(code, names)
    decoded = names["gate_up_proj"].decoded()
    assert names["gate_up_proj"].nbytes < 0.3 * decoded.nbytes
    assert names["output"].shape == (10, 64) and names["output"].isfinite().all()


def test_any_number_of_threads(monkeypatch):
    layer = small_layer(96, 64)
    coded = layer | {
        "gate_up_proj": random_weight("nf4", (5, 128, 96)),
        "down_proj": random_weight("int8", (5, 96, 64)),
    }
    results = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        results.append(evaluate(ktlib.moe_experts, coded))
    torch.set_num_threads(2)
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in QUANTITIES)


def test_nan_codes_reach_the_output():
    layer = small_layer(32, 32)
    coded = random_weight("e4m3", (5, 64, 32))
    coded.codes[0][0, 3, 7] = 0x7F
    output = ktlib.moe_experts(**(layer | {"gate_up_proj": coded}))
    tokens = (layer["top_k_index"] == 0).any(1)
    assert output[tokens].isnan().all() and not output[~tokens].isnan().any()


def test_what_a_weight_cannot_be_used_for_is_refused_by_name():
    layer = small_layer(96, 64)
    coded = layer | {"gate_up_proj": random_weight("int4", (5, 128, 96))}
    with pytest.raises(ValueError, match="transposed: got True with a ktlib.Weight as gate_up_proj"):
        ktlib.moe_experts(**coded, transposed=True)
    with pytest.raises(ValueError, match="stream_rows: got 1 with a ktlib.Weight as gate_up_proj"):
        ktlib.moe_experts(**coded, stream_rows=1)
    with pytest.raises(ValueError, match=r"gate_up_proj: got shape \(5, 128, 64\), needs \(5, 128, 96\)"):
        ktlib.moe_experts(**(layer | {"gate_up_proj": random_weight("int4", (5, 128, 64))}))
    with pytest.raises(ValueError, match="gate_up_proj: got strides"):  # what stands for a Weight in the registered op
        ktlib.moe_experts(**(layer | {"gate_up_proj": coded["gate_up_proj"].placeholder()}))


def test_memory_that_was_freed_between_forward_and_backward_is_not_read():
    layer = small_layer(96, 64)
    coded = random_weight("int4", (5, 128, 96))
    coded.scales[0] = coded.scales[0].clone()
    layer["hidden_states"].requires_grad_()
    output = ktlib.moe_experts(**(layer | {"gate_up_proj": coded}))
    coded.scales[0].untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="gate_up_proj: got bfloat16 .* its memory was freed or is too small"):
        output.sum().backward()


def test_opcheck_and_compile():
    layer = small_layer(96, 64)
    coded = random_weight("int4", (5, 128, 96))
    layer["hidden_states"].requires_grad_()

    def loss(hidden_states):
        return ktlib.moe_experts(**(layer | {"gate_up_proj": coded, "hidden_states": hidden_states})).float().sum()

    want = torch.autograd.grad(loss(layer["hidden_states"]), layer["hidden_states"])
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(layer["hidden_states"]), layer["hidden_states"])
    assert torch.equal(want[0], got[0])


def test_vmap_of_the_tokens():
    layer = small_layer(96, 64)
    layer["gate_up_proj"] = random_weight("int4", (5, 128, 96))
    batch = torch.stack([layer["hidden_states"], layer["hidden_states"].flip(0)])
    batched = torch.func.vmap(lambda x: ktlib.moe_experts(**(layer | {"hidden_states": x})))(batch)
    one_by_one = [ktlib.moe_experts(**(layer | {"hidden_states": x})) for x in batch]
    assert torch.equal(batched, torch.stack(one_by_one))
