"""The layer of routed experts in plain torch at float64, without any rounding to smaller types, and not fast.

It is differentiable: its gradients are the reference for those of the kernels.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ktlib.reference import lora_layout
from ktlib.reference.gates import apply_gate, split_gate_up


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): four uint32 of a counter.

    Args:
        counter: four arrays of integers below 2**32, of shapes that broadcast together.
        key: two such integers.
    """
    a, b, c, d = (np.asarray(word, dtype=np.uint64) for word in counter)
    low_mask, high_shift = np.uint64(2**32 - 1), np.uint64(32)
    for i in range(10):
        key_a, key_c = np.uint64((key[0] + i * 0x9E3779B9) % 2**32), np.uint64((key[1] + i * 0xBB67AE85) % 2**32)
        product_a, product_c = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, c = (product_c >> high_shift) ^ b ^ key_a, (product_a >> high_shift) ^ d ^ key_c
        b, d = product_c & low_mask, product_a & low_mask
    return a, b, c, d


def drop_threshold(p):
    """Dropout drops an element if its random uint32 is below this; its probability is exactly threshold / 2**32."""
    return min(round(p * 2**32), 2**32 - 1)


def keep_mask(seed, p, projection, slots, columns):
    """Mask of the elements that dropout keeps of a LoRA pair's input, (len(slots), columns) bool.

    Args:
        seed: an int of 64 bits, or a 0-d tensor of it.
        p: the probability to drop, in [0, 1).
        projection: 0 for gate_up, 1 for down.
        slots: int64 numbers ``token * top_k + j`` of a token's choices of experts.
        columns: number of elements in each slot's input.
    """
    seed, slots, column = int(seed) % 2**64, np.asarray(slots)[:, None], np.arange(columns)
    counter = column // 64 * 16 + column % 16, slots % 2**32, slots >> 32, projection
    words = np.broadcast_arrays(*philox(counter, (seed % 2**32, seed >> 32)))
    kept = np.choose(column // 16 % 4, words) >= drop_threshold(p)
    return torch.from_numpy(kept)


def expert_weight(weight, expert, transposed):
    """One expert's matrix (out, in) of a stack of weights, a view in the stored dtype."""
    return weight[expert].T if transposed else weight[expert]


def expert_lora(lora, expert, num_experts):
    """One expert's A (rank, in) and B (out, rank) from ``(lora_A, lora_B, scaling)`` in PEFT's layout."""
    lora_A, lora_B, _ = lora
    return lora_layout.split_a(lora_A, num_experts)[expert], lora_layout.split_b(lora_B, num_experts)[expert]


def lora_delta(lora, expert, num_experts):
    """Dense update ``scaling * B @ A`` of one expert in float64, (out, in); 0 without LoRA."""
    if lora is None:
        return 0.0
    a, b = expert_lora(lora, expert, num_experts)
    return lora[2] * (b.double() @ a.double())


def project(x, expert, weight, lora=None, bias=None, transposed=False, lora_input=None):
    """``x @ (W + scaling * B A).T + bias`` of one expert in float64, (rows, out).

    Args:
        x: (rows, in) float64.
        expert: the expert's id.
        weight, lora, bias, transposed: those of all experts, as :func:`moe_experts` takes them.
        lora_input: ``x`` after dropout; None without dropout.
    """
    dense, delta = expert_weight(weight, expert, transposed).double(), lora_delta(lora, expert, weight.shape[0])
    bias = None if bias is None else bias[expert].double()
    if lora_input is None:
        return F.linear(x, dense + delta, bias)
    return F.linear(x, dense, bias) + F.linear(lora_input, delta)


def moe_experts(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    gate_up_lora=None,
    down_lora=None,
    *,
    lora_dropout=0.0,
    dropout_seed=None,
    gate_up_bias=None,
    down_bias=None,
    gate="silu",
    limit=None,
    alpha=None,
    transposed=False,
    interleaved=False,
):
    """``sum_j top_k_weights[t, j] * expert(top_k_index[t, j])(hidden_states[t])`` in float64, (tokens, hidden).

    The arguments are those of :func:`ktlib.moe_experts`, on any device and of any dtype. With ``lora_dropout``,
    ``dropout_seed`` is required. ValueError if an expert id is out of range.
    """
    hidden_states, top_k_weights = hidden_states.double(), top_k_weights.double()
    num_experts = gate_up_proj.shape[0]
    wrong = (top_k_index < 0) | (top_k_index >= num_experts)
    if wrong.any():
        token, slot = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"top_k_index: got expert id {top_k_index[token, slot]} for token {token}, slot {slot}; "
            f"ids must be in [0, {num_experts})"
        )
    share_kept = 1 - drop_threshold(lora_dropout) / 2**32

    def project_all(x, weight, lora, bias, expert, projection, slots):
        lora_input = None
        if lora_dropout and lora is not None:
            kept = keep_mask(dropout_seed, lora_dropout, projection, slots.cpu(), x.shape[1]).to(x.device)
            lora_input = torch.where(kept, x / share_kept, 0.0)  # x * kept would let a dropped NaN pass
        return project(x, expert, weight, lora, bias, transposed, lora_input)

    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        slots = token * top_k_index.shape[1] + slot
        gate_up = project_all(hidden_states[token], gate_up_proj, gate_up_lora, gate_up_bias, expert, 0, slots)
        activated = apply_gate(*split_gate_up(gate_up, interleaved), gate, limit, alpha)
        expert_output = project_all(activated, down_proj, down_lora, down_bias, expert, 1, slots)
        output = output.index_add(0, token, expert_output * top_k_weights[token, slot, None])
    return output
