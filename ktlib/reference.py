"""The layer of routed experts in plain torch at float64: the definition every kernel is tested against.

Nothing here is fast and nothing is rounded. It is differentiable, so that its gradients are the reference too.
"""

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


def moe_experts(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    gate_up_lora=None,
    down_lora=None,
    *,
    gate="silu",
):
    """``sum_j top_k_weights[t, j] * expert(top_k_index[t, j])(hidden_states[t])`` in float64, (tokens, hidden).

    Same arguments as :func:`ktlib.moe_experts`; any device, any dtype.
    """
    if gate != "silu":
        raise ValueError(f"gate: got {gate!r}, the reference knows 'silu'")
    hidden_states, top_k_weights = hidden_states.double(), top_k_weights.double()
    num_experts = gate_up_proj.shape[0]
    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        gate_up = gate_up_proj[expert].double() + lora_delta(gate_up_lora, expert, num_experts)
        down = down_proj[expert].double() + lora_delta(down_lora, expert, num_experts)
        gate_proj, up_proj = F.linear(hidden_states[token], gate_up).chunk(2, dim=-1)
        expert_output = F.linear(F.silu(gate_proj) * up_proj, down)
        output = output.index_add(0, token, expert_output * top_k_weights[token, slot, None])
    return output
