"""Every wrong argument of the operator is an error that names it, what came and what is needed."""

import pytest
import torch
from test_ops import EXPERTS, HIDDEN, INTERMEDIATE, RANK, small_layer

import ktlib


def with_lora(layer, which, A=None, B=None, scaling=None):
    lora_A, lora_B, old = layer[which]
    return {which: (lora_A if A is None else A, lora_B if B is None else B, old if scaling is None else scaling)}


WRONG = {
    # name: (change of the arguments, exception, words that the message must have)
    "hidden_states is a list": (lambda a: {"hidden_states": [1.0]}, TypeError, "hidden_states: got list"),
    "hidden_states fp16": (
        lambda a: {"hidden_states": a["hidden_states"].half()},
        TypeError,
        "hidden_states: got float16",
    ),
    "hidden_states 3-d": (
        lambda a: {"hidden_states": a["hidden_states"][None]},
        ValueError,
        "hidden_states: got bfloat16",
    ),
    "hidden_states too wide": (
        lambda a: {"hidden_states": torch.zeros(10, HIDDEN + 8, dtype=torch.bfloat16)},
        ValueError,
        r"hidden_states: got shape \(10, 72\), needs \(10, 64\)",
    ),
    "hidden_states sparse": (
        lambda a: {"hidden_states": a["hidden_states"].float().to_sparse()},
        ValueError,
        "hidden_states: got a tensor of layout",
    ),
    "ids int32": (lambda a: {"top_k_index": a["top_k_index"].int()}, TypeError, "top_k_index: got int32"),
    "ids of other tokens": (lambda a: {"top_k_index": a["top_k_index"][:5]}, ValueError, "top_k_index: got shape"),
    "no ids": (
        lambda a: {n: a[n][:, :0] for n in ("top_k_index", "top_k_weights")},
        ValueError,
        "top_k_index: got top_k = 0",
    ),
    "id too large": (
        lambda a: {
            "top_k_index": a["top_k_index"].index_put((torch.tensor(7), torch.tensor(1)), torch.tensor(EXPERTS))
        },
        ValueError,
        r"top_k_index: got expert id 4 for token 7, slot 1; ids must be in \[0, 4\)",
    ),
    "id negative": (lambda a: {"top_k_index": a["top_k_index"] - EXPERTS}, ValueError, "top_k_index: got expert id -"),
    "weights fp64": (lambda a: {"top_k_weights": a["top_k_weights"].double()}, TypeError, "top_k_weights: got float64"),
    "weights of other shape": (
        lambda a: {"top_k_weights": a["top_k_weights"][:, :1]},
        ValueError,
        "top_k_weights: got shape",
    ),
    "gate_up_proj fp32": (
        lambda a: {"gate_up_proj": a["gate_up_proj"].float()},
        TypeError,
        "gate_up_proj: got float32",
    ),
    "gate_up_proj elsewhere": (
        lambda a: {"gate_up_proj": a["gate_up_proj"].to("meta")},
        ValueError,
        "gate_up_proj: got a tensor on meta, needs .* CPU",
    ),
    "gate_up_proj strided": (
        lambda a: {"gate_up_proj": a["gate_up_proj"].transpose(1, 2).contiguous().transpose(1, 2)},
        ValueError,
        "gate_up_proj: got strides",
    ),
    "gate_up_proj of other size": (
        lambda a: {"gate_up_proj": a["gate_up_proj"][:, :-2].contiguous()},
        ValueError,
        "gate_up_proj: got shape",
    ),
    "gate_up_proj emptied": (
        lambda a: {"gate_up_proj": torch.empty(0, dtype=torch.bfloat16)},
        ValueError,
        "gate_up_proj: got bfloat16 \\(0,\\)",
    ),
    "down_proj fp16": (lambda a: {"down_proj": a["down_proj"].half()}, TypeError, "down_proj: got float16"),
    "down_proj emptied": (lambda a: {"down_proj": a["down_proj"][:0]}, ValueError, "down_proj: got shape"),
    "too many slots": (
        lambda a: {
            "hidden_states": torch.zeros(1, HIDDEN).bfloat16().expand(2**30, HIDDEN),
            "top_k_index": torch.zeros(1, 2, dtype=torch.int64).expand(2**30, 2),
            "top_k_weights": torch.zeros(1, 2).expand(2**30, 2),
        },
        ValueError,
        "hidden_states: got 1073741824 tokens with top_k 2, needs below 134217728 slots",
    ),
    "hidden too large": (  # views of a few elements, so that the test needs no memory
        lambda a: {
            "gate_up_proj": torch.zeros(1, 1, 1).bfloat16().expand(1, 2, 2**31),
            "down_proj": torch.zeros(1, 1, 1).bfloat16().expand(1, 2**31, 1),
        },
        ValueError,
        r"gate_up_proj: got shape \(1, 2, 2147483648\), needs each dimension below 134217728",
    ),
    "intermediate too large": (
        lambda a: {
            "gate_up_proj": torch.zeros(1, 1, 1).bfloat16().expand(1, 2**27, 2),
            "down_proj": torch.zeros(1, 1, 1).bfloat16().expand(1, 2, 2**26),
        },
        ValueError,
        r"gate_up_proj: got shape \(1, 134217728, 2\), needs each dimension below 134217728",
    ),
    "too many experts": (
        lambda a: {"down_proj": torch.zeros(1, 1, 1).bfloat16().expand(2**27, HIDDEN, INTERMEDIATE)},
        ValueError,
        r"down_proj: got shape \(134217728, 64, 96\), needs each dimension below 134217728",
    ),
    "lora a tensor of three": (lambda a: {"down_lora": torch.zeros(3)}, TypeError, "down_lora: got Tensor, needs None"),
    "lora without scaling": (lambda a: {"down_lora": a["down_lora"][:2]}, TypeError, "down_lora: got tuple, needs"),
    "lora of rank 0": (
        lambda a: with_lora(a, "down_lora", A=a["down_lora"][0][:0], B=a["down_lora"][1][:, :0]),
        ValueError,
        r"down_lora lora_A: got 0 rows, needs rank \* 4 \(experts\), rank >= 1",
    ),
    "lora not a tuple": (lambda a: {"down_lora": a["down_proj"]}, TypeError, "down_lora: got Tensor"),
    "lora rank 16 for 8": (  # a rank that the sizes cannot mean
        lambda a: with_lora(a, "gate_up_lora", B=torch.zeros(2 * INTERMEDIATE, 2 * RANK * EXPERTS).bfloat16()),
        ValueError,
        r"gate_up_lora lora_B: got shape \(192, 24\), needs \(192, 12\)",
    ),
    "lora_A a list": (lambda a: with_lora(a, "down_lora", A=[1.0]), TypeError, "down_lora lora_A: got list"),
    "lora_B fp16": (
        lambda a: with_lora(a, "gate_up_lora", B=a["gate_up_lora"][1].half()),
        TypeError,
        "gate_up_lora lora_B: got float16",
    ),
    "lora rows not per expert": (
        lambda a: with_lora(a, "down_lora", A=a["down_lora"][0][1:]),
        ValueError,
        "down_lora lora_A: got 11 rows",
    ),
    "lora of too high a rank": (
        lambda a: with_lora(a, "down_lora", A=torch.zeros(1, 1).expand(2**27, 1), B=torch.zeros(1, 1)),
        ValueError,
        "down_lora lora_A: got 134217728 rows, needs below 134217728",
    ),
    "lora of other width": (
        lambda a: with_lora(a, "down_lora", A=a["gate_up_lora"][0]),
        ValueError,
        "down_lora lora_A: got shape",
    ),
    "lora of two dtypes": (
        lambda a: with_lora(a, "down_lora", A=a["down_lora"][0].float()),
        TypeError,
        "down_lora: got lora_A torch.float32",
    ),
    "lora scaling None": (lambda a: with_lora(a, "down_lora", scaling="2"), TypeError, "down_lora scaling: got str"),
    "lora scaling nan": (
        lambda a: with_lora(a, "down_lora", scaling=float("nan")),
        ValueError,
        "down_lora scaling: got nan",
    ),
    "lora scaling beyond fp32": (
        lambda a: with_lora(a, "down_lora", scaling=-1e39),
        ValueError,
        r"down_lora scaling: got -1e\+39",
    ),
    "lora scaling beyond fp64": (lambda a: with_lora(a, "down_lora", scaling=10**400), ValueError, "down_lora scaling"),
    "gate unknown": (lambda a: {"gate": "relu"}, ValueError, "gate: got 'relu', needs one of 'silu', 'gelu', 'gelu_"),
    "limit infinite": (lambda a: {"limit": float("inf")}, ValueError, "limit: got inf, needs None or a finite number"),
    "limit nan": (lambda a: {"limit": float("nan")}, ValueError, "limit: got nan"),
    "limit zero": (lambda a: {"limit": 0.0}, ValueError, "limit: got 0.0, needs None or a positive number"),
    "limit a string": (lambda a: {"limit": "7"}, TypeError, "limit: got str"),
    "alpha without its gate": (lambda a: {"alpha": 1.7}, ValueError, "alpha: got 1.7 with gate 'silu'"),
    "alpha infinite": (
        lambda a: {"gate": "swiglu_oai", "alpha": float("-inf")},
        ValueError,
        "alpha: got -inf, needs None or a finite number",
    ),
    "bias a list": (lambda a: {"down_bias": [0.0]}, TypeError, "down_bias: got list"),
    "bias fp16": (
        lambda a: {"down_bias": torch.zeros(EXPERTS, HIDDEN).half()},
        TypeError,
        "down_bias: got float16",
    ),
    "bias of one expert": (
        lambda a: {"gate_up_bias": torch.zeros(2 * INTERMEDIATE)},
        ValueError,
        r"gate_up_bias: got float32 \(192,\) .* needs a 2-d tensor",
    ),
    "bias of other size": (
        lambda a: {"gate_up_bias": torch.zeros(EXPERTS, INTERMEDIATE)},
        ValueError,
        r"gate_up_bias: got shape \(4, 96\), needs \(4, 192\)",
    ),
    "weights not transposed": (
        lambda a: {"transposed": True},
        ValueError,
        r"gate_up_proj: got shape \(4, 192, 64\), needs \(4, 96, 128\) to match down_proj transposed",
    ),
    "dropout a string": (lambda a: {"lora_dropout": "0.1"}, TypeError, "lora_dropout: got str, needs a number"),
    "dropout true": (lambda a: {"lora_dropout": True}, TypeError, "lora_dropout: got bool"),
    "dropout negative": (lambda a: {"lora_dropout": -0.1}, ValueError, "lora_dropout: got -0.1, needs a probability"),
    "dropout of all": (lambda a: {"lora_dropout": 1}, ValueError, "lora_dropout: got 1, .* at least 0 and below 1"),
    "dropout nan": (lambda a: {"lora_dropout": float("nan")}, ValueError, "lora_dropout: got nan"),
    "scaling beyond fp32 with dropout": (
        lambda a: with_lora(a, "down_lora", scaling=3e38) | {"lora_dropout": 0.5},
        ValueError,
        r"down_lora scaling: got 6e\+38",
    ),
    "seed a float": (lambda a: {"dropout_seed": 1.0}, TypeError, "dropout_seed: got float, needs None, an int"),
    "seed too large": (lambda a: {"dropout_seed": 2**63}, ValueError, f"dropout_seed: got {2**63}, needs an int of"),
    "seed of other dtype": (lambda a: {"dropout_seed": torch.tensor(1.0)}, TypeError, "dropout_seed: got float32"),
    "seed of two": (lambda a: {"dropout_seed": torch.tensor([1, 2])}, ValueError, "dropout_seed: got int64 \\(2,\\)"),
    "seed on meta": (
        lambda a: {"dropout_seed": torch.tensor(1, device="meta")},
        ValueError,
        "dropout_seed: got a tensor on meta",
    ),
    "isa unknown": (lambda a: {"isa": "neon"}, ValueError, "isa: got 'neon', known are 'amx_bf16'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    change, exception, words = WRONG[case]
    layer = small_layer()
    with pytest.raises(exception, match=words):
        ktlib.moe_experts(**(layer | change(layer)))
