"""The layer of routed experts in plain torch at float64: the definition every kernel is tested against.

Nothing here is fast and nothing is rounded. It is differentiable, so that its gradients are the reference too.
"""

import math

import torch
import torch.nn.functional as F


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


def apply_gate(gate_proj, up_proj, gate="silu", limit=None, alpha=None):
    """The gate of :func:`ktlib.moe_experts` (see there), elementwise, in the dtype of its arguments.

    Both GELUs are written without the sum 1 + erf or 1 + tanh, which loses the lower tail even in float64.
    """
    if limit is not None:  # not torch.clamp: at a NaN its gradient is 0, which would hide it
        gate_proj = torch.where(gate_proj > limit, limit, gate_proj)
        up_proj = torch.where(up_proj > limit, limit, torch.where(up_proj < -limit, -limit, up_proj))
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
    gate_up_bias=None,
    down_bias=None,
    gate="silu",
    limit=None,
    alpha=None,
    transposed=False,
    interleaved=False,
):
    """``sum_j top_k_weights[t, j] * expert(top_k_index[t, j])(hidden_states[t])`` in float64, (tokens, hidden).

    Same arguments as :func:`ktlib.moe_experts`; any device, any dtype.
    """
    hidden_states, top_k_weights = hidden_states.double(), top_k_weights.double()
    num_experts = gate_up_proj.shape[0]

    def project(x, weight, lora, bias, expert):
        dense = weight[expert].double()
        dense = (dense.T if transposed else dense) + lora_delta(lora, expert, num_experts)
        return F.linear(x, dense, None if bias is None else bias[expert].double())

    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        gate_up = project(hidden_states[token], gate_up_proj, gate_up_lora, gate_up_bias, expert)
        halves = (gate_up[:, 0::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
        activated = apply_gate(*halves, gate, limit, alpha)
        expert_output = project(activated, down_proj, down_lora, down_bias, expert)
        output = output.index_add(0, token, expert_output * top_k_weights[token, slot, None])
    return output
