"""The operator: routed experts with LoRA, forward and backward, as a pure function of the tensors of one call.

:func:`moe_experts` checks its arguments (checks.py), brings them to the CPU and calls the registered op
(registered_op.py).
"""

import os

from ktlib.operator.checks import (
    check_all,
    check_dropout,
    check_flags,
    check_gate,
    check_isa,
    check_no_tangents,
    check_parts,
    check_stream_rows,
)
from ktlib.operator.host_copies import to_device, to_host
from ktlib.operator.registered_op import NAMES, NOTHING_STORED, Settings, Stored, Tensors, call_op, for_backward
from ktlib.operator.weight import Weight


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
    isa=None,
    recompute=False,
    parts=1,
    stream_rows=None,
):
    """Routed experts: ``out[t] = sum_j top_k_weights[t, j] * E_{top_k_index[t, j]}(hidden_states[t])``.

    ``E_e(x) = down_e(act(gate_e(x)) * up_e(x))``. The matrix of a projection with LoRA is ``W_e + scaling * B_e A_e``;
    biases are optional.

    Args:
        hidden_states: (tokens, hidden), bf16 or fp32 (rounded to bf16 on entry).
        top_k_index: (tokens, top_k) int64 expert ids; an id may repeat within a token.
        top_k_weights: (tokens, top_k), fp32 or bf16.
        gate_up_proj: (experts, 2 * intermediate, hidden) bf16, CPU, contiguous, gate rows first; may be a memory map.
        down_proj: (experts, hidden, intermediate) bf16, CPU, contiguous; may be a memory map.
            Either may be a :class:`ktlib.Weight` of that shape: frozen, in another format or in several tensors.
        gate_up_lora, down_lora: ``None`` or ``(lora_A, lora_B, scaling)`` in PEFT's layout: lora_A
            (experts * rank, in) expert-major, lora_B (out, rank * experts) with the expert as the fastest index; both
            bf16 or both fp32 (rounded to bf16 for the products; gradients come in their dtype). Any rank >= 1.
        lora_dropout: probability p in [0, 1) with which each element of a LoRA pair's input (the token for gate_up, the
            activation for down) is dropped; the kept elements are divided by 1 - p, as in PEFT's linear layers. The
            base weights get their input without dropout. Every choice of an expert by a token has masks of its own;
            gate and up share one.
        dropout_seed: an int, or a 0-d int64 tensor on the CPU; with p and an element's position it determines the
            masks. Default: drawn from torch's default generator if p > 0, so that masks repeat after
            ``torch.manual_seed`` and in the recomputation of activation checkpointing. Backward uses the masks of its
            forward. They depend neither on the instruction set, nor on the number of threads, nor on ``recompute``.
        gate_up_bias, down_bias: ``None`` or (experts, 2 * intermediate) and (experts, hidden), bf16 or fp32.
        gate: the function of gate and up: ``"silu"``, ``"gelu"`` (erf) or ``"gelu_tanh"`` of gate, times up; or
            ``"swiglu_oai"``, which is ``gate * sigmoid(alpha * gate) * (up + 1)``.
        limit: ``None`` or a positive number. Before that function is applied, gate is clamped to at most ``limit`` and
            up to ``[-limit, limit]``. Beyond these bounds the gradient is 0, as with torch.clamp; at a NaN it passes.
        alpha: of ``"swiglu_oai"`` only, default 1.702.
        transposed: the weights are stored as (experts, in, out): gate_up_proj (experts, hidden, 2 * intermediate),
            down_proj (experts, intermediate, hidden). The shapes of LoRA do not change, as in PEFT.
        interleaved: gate and up alternate (gate 0, up 0, gate 1, ...) in the outputs of gate_up_proj, in gate_up_bias
            and in the rows of gate_up's lora_B.
        isa: instruction set, one of ``ktlib.cpu_info()["isas"]``; default: ``KTLIB_ISA`` or the fastest here.
        recompute: save only the arguments for backward, which then computes gate and up again. That is half a forward
            more work, and the same bits.
        parts: number of NUMA parts: runs of consecutive rows into which each weight matrix is split on machines with
            several NUMA nodes, see :func:`ktlib.place_experts`. It decides which thread computes a row, and changes no
            result.
        stream_rows: ``None``, or a number of rows. If ``hidden_states`` are on a GPU, an expert on which at least so
            many choices of this batch fall is computed on that GPU; its weights are copied to the GPU for this call,
            and again for backward (gpu/streamed_experts.py). All other experts are computed on the CPU. Implies
            ``recompute``. Refused if weights or biases are trained. LoRA's products on the GPU use TF32 if the process
            allows it (``torch.set_float32_matmul_precision``): a single call cannot change that for itself alone.

    Returns:
        (tokens, hidden) in the dtype and on the device of ``hidden_states``. Differentiable in hidden_states,
        top_k_weights, lora_A, lora_B, the weights and the biases. ``hidden_states``, the routing, biases and LoRA may
        be on another device: they are copied to the CPU, and the result and their gradients are copied back.

    With a Weight the result and all gradients have the same bits as with its ``decoded()``. It can be neither
    ``transposed`` nor streamed (``stream_rows``).

    Memory: the weights are not copied. After a step on a layer these are resident: at most ``weights * 1.05``, plus
    ``2 * tokens * (top_k * (2 * intermediate + 4 * rank) + 2 * hidden)`` bytes saved for backward, plus outputs and
    gradients, plus scratch memory, which all layers of a process share, and of which at most 512 MiB stay allocated.
    ``recompute`` removes the terms in ``intermediate`` and ``rank``.

    Raises:
        TypeError: an argument has the wrong type, or a tensor the wrong dtype.
        ValueError: wrong shape, device or layout, an expert id out of range, an unknown gate or isa, a limit that is
            not positive and finite, an alpha that is not finite or belongs to another gate, parts outside [1, 1024], a
            lora_dropout outside [0, 1), stream_rows below 1 or with weights or biases that require a gradient, a Weight
            with transposed or stream_rows.
        RuntimeError: ``isa`` cannot run on this machine.
        NotImplementedError: forward-mode derivatives (``torch.autograd.forward_ad``, ``torch.func.jvp``) or
            ``torch.func.grad``, ``vjp``, ``jacrev`` of the call; second derivatives, in backward. ``torch.func.vmap``
            of CPU tensors works; it computes one element of the batch after the other.
    """
    check_flags(transposed=transposed, interleaved=interleaved, recompute=recompute)
    check_isa(isa)
    check_parts(parts)
    check_stream_rows(stream_rows)
    gate_up_proj, *gate_up_stored = _unpack("gate_up_proj", gate_up_proj, transposed, stream_rows)
    down_proj, *down_stored = _unpack("down_proj", down_proj, transposed, stream_rows)
    tensors = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_bias, down_bias)
    _, gate_up_lora, down_lora = check_all(tensors, (gate_up_lora, down_lora), transposed)
    limit, alpha = check_gate(gate, limit, alpha)
    dropout_seed = check_dropout(lora_dropout, dropout_seed)

    device = hidden_states.device
    hidden_states, top_k_index, top_k_weights, *biases_and_lora = to_host(
        hidden_states, top_k_index, top_k_weights, gate_up_bias, down_bias, *gate_up_lora[:2], *down_lora[:2]
    )
    routed = (hidden_states, top_k_index, top_k_weights)
    tensors = Tensors(*routed, gate_up_proj, down_proj, *biases_and_lora, dropout_seed)
    check_no_tangents(NAMES, tensors)
    stream_device = _stream_device(device) if stream_rows else ""
    whole, save = for_backward(tensors, stream_rows)
    settings = Settings(
        gate_up_scaling=gate_up_lora[2],
        down_scaling=down_lora[2],
        lora_dropout=float(lora_dropout),
        gate=gate,
        limit=limit,
        alpha=alpha,
        transposed=transposed,
        interleaved=interleaved,
        isa=isa or os.environ.get("KTLIB_ISA", ""),
        recompute=recompute or bool(stream_device),
        numa_parts=parts,
        stream_rows=stream_rows or 0,
        stream_device=stream_device,
        whole=whole,
    )
    try:
        output, *_ = call_op("moe_experts", tensors, Stored(*gate_up_stored, *down_stored), settings, save)
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        # torch.func.grad of ops registered with torch.library: https://github.com/pytorch/pytorch/issues/179652
        raise NotImplementedError(
            "ktlib.moe_experts: torch.func.grad and what is made of it are not implemented; use torch.autograd.grad"
        ) from error
    return to_device(output, device)


def _unpack(name, weight, transposed, stream_rows):
    """``(tensor, stored, format, numbers)``: a weight as the registered op takes it."""
    if not isinstance(weight, Weight):
        return weight, *NOTHING_STORED[:3]
    for option, value in (("transposed", transposed), ("stream_rows", stream_rows)):
        if value:
            raise ValueError(f"{option}: got {value} with a ktlib.Weight as {name}, needs none of it")
    return weight.placeholder(), *weight.pack()


def _stream_device(device):
    """Name of the device to which experts may be streamed if the hidden states are on ``device``; "" if to none."""
    return str(device) if device.type == "cuda" else ""
