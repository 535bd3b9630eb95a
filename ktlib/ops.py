"""The operator: routed experts with LoRA, forward and backward, as a pure function of the tensors of one call.

``torch.ops.ktlib.moe_experts`` is registered with schema, fake kernel and autograd; :func:`moe_experts` is the
function to call. All checks live here. The C++ side (csrc/) sees addresses of tensors that this module has checked and
keeps alive during the call; it stores nothing.
"""

import os

import torch

from ktlib import _kernels

GATES = ("silu",)  # in the order of csrc/kernels.h, enum Gate
_TENSORS = (
    "hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj", "gate_up_lora lora_A",
    "gate_up_lora lora_B", "down_lora lora_A", "down_lora lora_B",
)  # fmt: skip
_LARGEST_SCALING = torch.finfo(torch.float32).max

_library = torch.library.Library("ktlib", "DEF")
_INPUTS = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_lora_A, Tensor? gate_up_lora_B, Tensor? down_lora_A, Tensor? down_lora_B, "
    "float gate_up_scaling, float down_scaling, str gate, str isa, bool whole"
)
_library.define(f"moe_experts({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"moe_experts_backward(Tensor grad_output, Tensor saved_gate_up, Tensor saved_t_gate_up, Tensor saved_t_down, "
    f"{_INPUTS}, bool[8] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


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
    isa=None,
):
    """Routed experts: ``out[t] = sum_j top_k_weights[t, j] * E_{top_k_index[t, j]}(hidden_states[t])``.

    ``E_e(x) = down_e(act(gate_e(x)) * up_e(x))``, where each projection is ``W_e + scaling * B_e A_e`` if it has LoRA.

    Args:
        hidden_states: (tokens, hidden), bf16 or fp32 (rounded to bf16 on entry).
        top_k_index: (tokens, top_k) int64 expert ids; an id may repeat within a token.
        top_k_weights: (tokens, top_k), fp32 or bf16.
        gate_up_proj: (experts, 2 * intermediate, hidden) bf16, CPU, contiguous, gate rows first; may be a memory map.
        down_proj: (experts, hidden, intermediate) bf16, CPU, contiguous; may be a memory map.
        gate_up_lora, down_lora: ``None`` or ``(lora_A, lora_B, scaling)`` in PEFT's layout: lora_A
            (experts * rank, in) expert-major, lora_B (out, rank * experts) with the expert as the fastest index; both
            bf16 or both fp32 (rounded to bf16 for the products; gradients come in their dtype). Any rank >= 1.
        gate: activation of the gate, one of ``"silu"``.
        isa: instruction set, one of ``ktlib.cpu_info()["isas"]``; default: ``KTLIB_ISA`` or the fastest here.

    Returns:
        (tokens, hidden) in the dtype and on the device of ``hidden_states``. Differentiable in hidden_states,
        top_k_weights, lora_A, lora_B, gate_up_proj and down_proj. ``hidden_states``, the routing and LoRA may live on
        another device: they are copied to the CPU, and the result and the gradients back.

    Raises:
        TypeError: an argument is not a tensor (or not such a tuple), or has the wrong dtype.
        ValueError: wrong shape, device or layout, an expert id out of range, an unknown gate or isa.
        RuntimeError: ``isa`` cannot run on this machine.
    """
    gate_up_lora, down_lora = _check(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_lora, down_lora
    )
    if gate not in GATES:
        raise ValueError(f"gate: got {gate!r}, needs one of {', '.join(map(repr, GATES))}")

    device = hidden_states.device
    *lora, gate_up_scaling, down_scaling = *gate_up_lora[:2], *down_lora[:2], gate_up_lora[2], down_lora[2]
    moved = [hidden_states, top_k_index, top_k_weights, *lora]
    moved = [t if t is None or t.device.type == "cpu" else t.to("cpu") for t in moved]
    hidden_states, top_k_index, top_k_weights, *lora = moved
    grad = torch.is_grad_enabled()
    whole = grad and (gate_up_proj.requires_grad or down_proj.requires_grad)
    save = whole or (grad and any(t is not None and t.requires_grad for t in (hidden_states, top_k_weights, *lora)))
    output, *_ = torch.ops.ktlib.moe_experts(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *lora, gate_up_scaling, down_scaling,
        gate, isa or os.environ.get("KTLIB_ISA", ""), whole, save,
    )  # fmt: skip
    return output if device.type == "cpu" else output.to(device)


# ---------------------------------------------------------------------------------------------------------- checks


def _check(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_lora, down_lora):
    """Types, devices and shapes of everything; returns both LoRA as ``(lora_A or None, lora_B or None, scaling)``."""
    _check_inputs(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    experts, hidden, intermediate = down_proj.shape
    return (
        _check_lora("gate_up_lora", gate_up_lora, experts, hidden, 2 * intermediate),
        _check_lora("down_lora", down_lora, experts, intermediate, hidden),
    )


def _describe(value):
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"


def _check_tensor(name, value, dtypes, ndim):
    needs = f"a {ndim}-d tensor of {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {_describe(value)}, needs {needs}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got {_describe(value)}, needs {needs}")
    if value.dim() != ndim:
        raise ValueError(f"{name}: got {_describe(value)}, needs {needs}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: got a tensor of layout {value.layout}, needs a dense (strided) one")
    if value.is_meta:
        raise ValueError(f"{name}: got a tensor on meta, needs one with values, expert weights on the CPU")


def _check_memory(name, tensor):
    """Someone may have given a tensor's memory back (``untyped_storage().resize_``), also since forward."""
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    have = tensor.untyped_storage().nbytes()
    if tensor.numel() and (last + 1) * tensor.itemsize > have:
        raise ValueError(f"{name}: got {_describe(tensor)}, but its memory was freed: {have} bytes are left of it")


def _check_shape(name, value, shape, why):
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, needs {tuple(shape)} {why}")


def _check_inputs(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj):
    floats = (torch.bfloat16, torch.float32)
    _check_tensor("hidden_states", hidden_states, floats, 2)
    _check_tensor("top_k_index", top_k_index, (torch.int64,), 2)
    _check_tensor("top_k_weights", top_k_weights, floats, 2)
    _check_tensor("gate_up_proj", gate_up_proj, (torch.bfloat16,), 3)
    _check_tensor("down_proj", down_proj, (torch.bfloat16,), 3)
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weight.device.type != "cpu":
            raise ValueError(f"{name}: got a tensor on {weight.device}, needs expert weights on the CPU")
        if not weight.is_contiguous():
            raise ValueError(f"{name}: got strides {weight.stride()} for shape {tuple(weight.shape)}, needs contiguous")
        if 0 in weight.shape:
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}, needs at least one of each dimension")
    experts, hidden, intermediate = down_proj.shape
    _check_shape("gate_up_proj", gate_up_proj, (experts, 2 * intermediate, hidden), "to match down_proj")
    tokens = hidden_states.shape[0]
    _check_shape("hidden_states", hidden_states, (tokens, hidden), "to match down_proj")
    _check_shape("top_k_index", top_k_index, (tokens, top_k_index.shape[1]), "to match hidden_states")
    _check_shape("top_k_weights", top_k_weights, top_k_index.shape, "to match top_k_index")
    if top_k_index.shape[1] == 0:
        raise ValueError("top_k_index: got top_k = 0, needs at least 1")
    if tokens * top_k_index.shape[1] >= 2**31:
        raise ValueError(
            f"hidden_states: got {tokens} tokens with top_k {top_k_index.shape[1]}, needs below 2**31 slots"
        )


def _check_lora(name, lora, experts, in_features, out_features):
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        raise TypeError(f"{name}: got {type(lora).__name__}, needs None or (lora_A, lora_B, scaling)")
    lora_A, lora_B, scaling = lora
    floats = (torch.bfloat16, torch.float32)
    _check_tensor(f"{name} lora_A", lora_A, floats, 2)
    _check_tensor(f"{name} lora_B", lora_B, floats, 2)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"{name}: got lora_A {lora_A.dtype} and lora_B {lora_B.dtype}, needs the same dtype")
    rank = lora_A.shape[0] // experts
    if rank == 0 or lora_A.shape[0] != rank * experts:
        raise ValueError(f"{name} lora_A: got {lora_A.shape[0]} rows, needs rank * {experts} (experts), rank >= 1")
    _check_shape(f"{name} lora_A", lora_A, (rank * experts, in_features), "(experts * rank, in)")
    _check_shape(f"{name} lora_B", lora_B, (out_features, rank * experts), "(out, rank * experts)")
    if not isinstance(scaling, int | float):
        raise TypeError(f"{name} scaling: got {type(scaling).__name__}, needs a float")
    if not abs(scaling) <= _LARGEST_SCALING:  # also NaN; C++ has it as a float
        raise ValueError(f"{name} scaling: got {scaling}, needs a finite number in the range of fp32")
    return lora_A, lora_B, float(scaling)


# ------------------------------------------------------------------------------------------------- the registered op


def _address(tensor):
    return (0, False) if tensor is None else (tensor.data_ptr(), tensor.dtype == torch.float32)


def _lora_arguments(lora_A, lora_B, experts, scaling):
    if lora_A is None:
        return (0, 0, False, 0, 1.0)
    return (lora_A.data_ptr(), lora_B.data_ptr(), lora_A.dtype == torch.float32, lora_A.shape[0] // experts, scaling)


def _arguments(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, lora, scalings, gate):
    """Arguments of the C++ functions, and the tensors whose memory they name: hold on to these during the call.

    All is checked here again, right before addresses are taken: shapes and memory may have changed since forward.
    """
    given = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *lora)
    factors = [None if a is None else (a, b, s) for a, b, s in zip(lora[::2], lora[1::2], scalings, strict=True)]
    _check(*given[:5], *factors)
    for name, tensor in zip(_TENSORS, given, strict=True):
        if tensor is not None:
            _check_memory(name, tensor)
    experts, hidden, intermediate = down_proj.shape
    tensors = [
        hidden_states.to(torch.bfloat16).contiguous(),
        top_k_index.contiguous(),
        top_k_weights.float().contiguous(),
        gate_up_proj,
        down_proj,
        *(None if t is None else t.contiguous() for t in lora),
    ]
    sizes = (hidden_states.shape[0], hidden, intermediate, experts, top_k_index.shape[1])
    inputs = (
        *(t.data_ptr() for t in tensors[:5]),
        _lora_arguments(tensors[5], tensors[6], experts, scalings[0]),
        _lora_arguments(tensors[7], tensors[8], experts, scalings[1]),
        GATES.index(gate),
    )
    return sizes, inputs, tensors


def _saved_shapes(hidden_states, top_k_index, down_proj, gate_up_A, down_A, save):
    """Shapes of what backward needs: gate and up before the activation, the inner values of both LoRA pairs (twice:
    csrc/lora.h keeps them as sums of two bf16)."""
    slots, (experts, _, intermediate) = top_k_index.numel(), down_proj.shape
    if not save:
        return (0,), (0,), (0,)
    ranks = [0 if a is None else a.shape[0] // experts for a in (gate_up_A, down_A)]
    return (slots, 2 * intermediate), (2 * ranks[0], slots), (2 * ranks[1], slots)


def _forward(
    hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_A, gate_up_B, down_A, down_B,
    gate_up_scaling, down_scaling, gate, isa, whole, save,
):  # fmt: skip
    lora = (gate_up_A, gate_up_B, down_A, down_B)
    sizes, inputs, tensors = _arguments(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, lora, (gate_up_scaling, down_scaling), gate
    )
    output = torch.empty(hidden_states.shape, dtype=hidden_states.dtype)
    shapes = _saved_shapes(hidden_states, top_k_index, down_proj, gate_up_A, down_A, save)
    saved = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    addresses = tuple(t.data_ptr() if save else 0 for t in saved)
    _kernels.forward(isa, torch.get_num_threads(), sizes, inputs, _address(output), addresses, whole)
    return output, *saved


def _backward(
    grad_output, saved_gate_up, saved_t_gate_up, saved_t_down, hidden_states, top_k_index, top_k_weights, gate_up_proj,
    down_proj, gate_up_A, gate_up_B, down_A, down_B, gate_up_scaling, down_scaling, gate, isa, whole, wanted,
):  # fmt: skip
    lora = (gate_up_A, gate_up_B, down_A, down_B)
    sizes, inputs, tensors = _arguments(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, lora, (gate_up_scaling, down_scaling), gate
    )
    _check_memory("grad_output", grad_output)
    shapes = _saved_shapes(hidden_states, top_k_index, down_proj, gate_up_A, down_A, True)
    names = ("hidden_states or down_proj", "gate_up_lora", "down_lora")
    for name, tensor, shape in zip(names, (saved_gate_up, saved_t_gate_up, saved_t_down), shapes, strict=True):
        if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous() or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: changed since forward, which saved {_describe(tensor)}; needs bfloat16 {shape}")
        _check_memory(name, tensor)
    grad_output = grad_output.to(torch.bfloat16).contiguous()
    wrt = (hidden_states, top_k_weights, gate_up_proj, down_proj, *lora)
    grads = [torch.empty(t.shape, dtype=t.dtype) if w else None for t, w in zip(wrt, wanted, strict=True)]
    grad_weights = None if grads[1] is None else torch.empty(top_k_weights.shape, dtype=torch.float32)
    _kernels.backward(
        isa, torch.get_num_threads(), sizes, inputs,
        (saved_gate_up.data_ptr(), saved_t_gate_up.data_ptr(), saved_t_down.data_ptr()), grad_output.data_ptr(),
        _address(grads[0]), _address(grad_weights)[0],
        (_address(grads[4]), _address(grads[5])), (_address(grads[6]), _address(grads[7])),
        (_address(grads[2])[0], _address(grads[3])[0]), whole,
    )  # fmt: skip
    if grad_weights is not None:
        grads[1] = grad_weights.to(top_k_weights.dtype)
    return tuple(torch.empty(0) if g is None else g for g in grads)


def _forward_fake(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *rest):
    shapes = _saved_shapes(hidden_states, top_k_index, down_proj, rest[0], rest[2], rest[-1])
    saved = (hidden_states.new_empty(shape, dtype=torch.bfloat16) for shape in shapes)
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format), *saved


def _backward_fake(grad_output, gate_up, t_gate_up, t_down, *rest):
    wrt = (rest[0], rest[2], *rest[3:9])
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else grad_output.new_empty(0)
        for t, wanted in zip(wrt, rest[-1], strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:9])
    ctx.settings = inputs[9:14]


def _autograd_backward(ctx, grad_output, *_):
    wrt = (0, 2, 3, 4, 5, 6, 7, 8)  # all tensors but top_k_index
    result = [None] * 15
    if grad_output is not None:
        wanted = [ctx.needs_input_grad[i] for i in wrt]
        grads = torch.ops.ktlib.moe_experts_backward(grad_output, *ctx.saved_tensors, *ctx.settings, wanted)
        for i, grad, want in zip(wrt, grads, wanted, strict=True):
            result[i] = grad if want else None
    return tuple(result)


def _no_second_derivative(ctx, *_):
    raise NotImplementedError("ktlib.moe_experts: second derivatives are not implemented (create_graph=True)")


_library.impl("moe_experts", _forward, "CPU")
_library.impl("moe_experts_backward", _backward, "CPU")
torch.library.register_fake("ktlib::moe_experts", _forward_fake, lib=_library)
torch.library.register_fake("ktlib::moe_experts_backward", _backward_fake, lib=_library)
torch.library.register_autograd("ktlib::moe_experts", _autograd_backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("ktlib::moe_experts_backward", _no_second_derivative, lib=_library)
