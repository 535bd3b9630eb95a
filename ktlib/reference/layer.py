"""The layer of routed experts in plain torch at float64: the definition every kernel is tested against.

Nothing here is fast and nothing is rounded. It is differentiable, so that its gradients are the reference too.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): four uint32 of a counter.

    Args:
        counter: four arrays of integers below 2**32, of shapes that broadcast together.
        key: two such integers.
    """
    a, b, c, d = (np.asarray(word, dtype=np.uint64) for word in counter)
    low, word = np.uint64(2**32 - 1), np.uint64(32)
    for i in range(10):
        key_a, key_c = np.uint64((key[0] + i * 0x9E3779B9) % 2**32), np.uint64((key[1] + i * 0xBB67AE85) % 2**32)
        of_a, of_c = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (of_c >> word) ^ b ^ key_a, of_c & low, (of_a >> word) ^ d ^ key_c, of_a & low
    return a, b, c, d


def drop_threshold(p):
    """Dropout with probability ``p`` drops where a random uint32 is below this: in effect p is this over 2**32."""
    return min(round(p * 2**32), 2**32 - 1)


def keep_mask(seed, p, projection, slots, columns):
    """Which elements of the input of a LoRA pair dropout keeps, (len(slots), columns) bool.

    Args:
        seed: an int of 64 bits, or a tensor of one.
        p: the probability to drop, in [0, 1).
        projection: 0 for gate_up, 1 for down.
        slots: int64 numbers ``token * top_k + j`` of a token's choices of experts.
        columns: number of elements of each.
    """
    seed, slots, column = int(seed) % 2**64, np.asarray(slots)[:, None], np.arange(columns)
    counter = column // 64 * 16 + column % 16, slots % 2**32, slots >> 32, projection
    words = np.broadcast_arrays(*philox(counter, (seed % 2**32, seed >> 32)))
    kept = np.choose(column // 16 % 4, words) >= drop_threshold(p)
    return torch.from_numpy(kept)


def lora_delta(lora, expert, num_experts):
    """Dense update ``scaling * B @ A`` of one expert, (out, in); zero-rank ``None`` gives 0.

    PEFT's layout (peft/tuners/lora/layer.py, ``ParamWrapper.get_delta_weight``): ``lora_A (E*r, in)`` is
    expert-major, ``lora_B (out, r*E)`` rank-major with the expert as the fastest index.
    """
    if lora is None:
        return 0.0
    lora_A, lora_B, scaling = lora
    rank = lora_A.shape[0] // num_experts
    a = lora_A.double().reshape(num_experts, rank, -1)[expert]
    b = lora_B.double().reshape(-1, rank, num_experts)[:, :, expert]
    return scaling * (b @ a)


def clamp_gate(gate_proj, up_proj, limit):
    """Gate and up within ``limit`` (see :func:`ktlib.moe_experts`), if there is one."""
    if limit is not None:  # not torch.clamp: at a NaN its gradient is 0, which would hide it
        gate_proj = torch.where(gate_proj > limit, limit, gate_proj)
        up_proj = torch.where(up_proj > limit, limit, torch.where(up_proj < -limit, -limit, up_proj))
    return gate_proj, up_proj


def apply_gate(gate_proj, up_proj, gate="silu", limit=None, alpha=None):
    """The gate of :func:`ktlib.moe_experts` (see there), elementwise, in the dtype of its arguments.

    Both GELUs are written without the sum 1 + erf or 1 + tanh, which loses the lower tail even in float64.
    """
    gate_proj, up_proj = clamp_gate(gate_proj, up_proj, limit)
    if gate == "silu":
        return F.silu(gate_proj) * up_proj
    if gate == "gelu":
        return gate_proj * torch.special.erfc(-gate_proj / math.sqrt(2)) / 2 * up_proj
    if gate == "gelu_tanh":
        return gate_proj * torch.sigmoid(math.sqrt(8 / math.pi) * (gate_proj + 0.044715 * gate_proj**3)) * up_proj
    if gate == "swiglu_oai":
        return gate_proj * torch.sigmoid((1.702 if alpha is None else alpha) * gate_proj) * (up_proj + 1)
    raise ValueError(f"gate: got {gate!r}, the reference knows 'silu', 'gelu', 'gelu_tanh' and 'swiglu_oai'")


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

    Same arguments as :func:`ktlib.moe_experts`; any device, any dtype. With lora_dropout the seed must be given.
    ValueError if an expert id is out of range.
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

    def project(x, weight, lora, bias, expert, projection, slots):
        dense, delta = weight[expert].double(), lora_delta(lora, expert, num_experts)
        dense = dense.T if transposed else dense
        bias = None if bias is None else bias[expert].double()
        if not lora_dropout or lora is None:
            return F.linear(x, dense + delta, bias)
        kept = keep_mask(dropout_seed, lora_dropout, projection, slots.cpu(), x.shape[1]).to(x.device)
        dropped = torch.where(kept, x / share_kept, 0.0)  # not x * kept: a NaN is dropped like any other
        return F.linear(x, dense, bias) + F.linear(dropped, delta)

    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        slots = token * top_k_index.shape[1] + slot
        gate_up = project(hidden_states[token], gate_up_proj, gate_up_lora, gate_up_bias, expert, 0, slots)
        halves = (gate_up[:, 0::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
        activated = apply_gate(*halves, gate, limit, alpha)
        expert_output = project(activated, down_proj, down_lora, down_bias, expert, 1, slots)
        output = output.index_add(0, token, expert_output * top_k_weights[token, slot, None])
    return output
