"""The operator: routed experts with LoRA, forward and backward, as a pure function of the tensors of one call.

:func:`moe_experts` is the function to call. It checks its arguments (checks.py) and calls
``torch.ops.ktlib.moe_experts``, which is registered here with schema, fake kernel and autograd. The C++ side (csrc/)
gets the addresses of checked tensors, to which Python holds references during the call. It stores nothing.
"""

import functools
import itertools
import os
from collections import namedtuple
from typing import NamedTuple

import torch

from ktlib import _kernels
from ktlib.operator.checks import (
    GATES,
    check_all,
    check_dropout,
    check_flags,
    check_gate,
    check_isa,
    check_memory,
    check_no_tangents,
    check_parts,
    check_shape,
    check_stream_rows,
    check_tensor,
    describe,
    sizes,
)
from ktlib.operator.gpu.streamed_experts import Streamed, choose
from ktlib.operator.host_copies import to_device, to_host
from ktlib.operator.recompute_once import compute_or_reuse
from ktlib.reference.layer import drop_threshold
from ktlib.system.threads import operator_threads

_library = torch.library.Library("ktlib", "DEF")
_TENSORS = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor? gate_up_lora_A, Tensor? gate_up_lora_B, Tensor? down_lora_A, Tensor? down_lora_B, Tensor? dropout_seed"
)
_SETTINGS = (
    "float gate_up_scaling, float down_scaling, float lora_dropout, str gate, float limit, float alpha, "
    "bool transposed, bool interleaved, str isa, bool recompute, int numa_parts, int stream_rows, str stream_device, "
    "bool whole"
)
_Tensors, _Settings = (
    namedtuple(name, [argument.split()[-1] for argument in schema.split(",")])
    for name, schema in (("_Tensors", _TENSORS), ("_Settings", _SETTINGS))
)
_NAMES = tuple(name.replace("lora_", "lora lora_") for name in _Tensors._fields)  # as error messages name them
_DIFFERENTIABLE = [name for name in _Tensors._fields if name not in ("top_k_index", "dropout_seed")]
_BASE = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")  # tensors of the base model
_library.define(f"moe_experts({_TENSORS}, {_SETTINGS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"moe_experts_backward(Tensor grad_output, Tensor saved_gate_up, Tensor saved_t_gate_up, Tensor saved_t_down, "
    f"{_TENSORS}, {_SETTINGS}, bool[{len(_DIFFERENTIABLE)}] wanted) "
    f"-> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})"
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

    Memory: the weights are not copied. After a step on a layer these are resident: at most ``weights * 1.05``, plus
    ``2 * tokens * (top_k * (2 * intermediate + 4 * rank) + 2 * hidden)`` bytes saved for backward, plus outputs and
    gradients, plus scratch memory, which all layers of a process share, and of which at most 512 MiB stay allocated.
    ``recompute`` removes the terms in ``intermediate`` and ``rank``.

    Raises:
        TypeError: an argument has the wrong type, or a tensor the wrong dtype.
        ValueError: wrong shape, device or layout, an expert id out of range, an unknown gate or isa, a limit that is
            not positive and finite, an alpha that is not finite or belongs to another gate, parts outside [1, 1024], a
            lora_dropout outside [0, 1), stream_rows below 1 or with weights or biases that require a gradient.
        RuntimeError: ``isa`` cannot run on this machine.
        NotImplementedError: forward-mode derivatives (``torch.autograd.forward_ad``, ``torch.func.jvp``) or
            ``torch.func.grad``, ``vjp``, ``jacrev`` of the call; second derivatives, in backward. ``torch.func.vmap``
            of CPU tensors works; it computes one element of the batch after the other.
    """
    check_flags(transposed=transposed, interleaved=interleaved, recompute=recompute)
    check_isa(isa)
    check_parts(parts)
    tensors = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_bias, down_bias)
    _, gate_up_lora, down_lora = check_all(tensors, (gate_up_lora, down_lora), transposed)
    limit, alpha = check_gate(gate, limit, alpha)
    dropout_seed = check_dropout(lora_dropout, dropout_seed)
    check_stream_rows(stream_rows)

    device = hidden_states.device
    hidden_states, top_k_index, top_k_weights, *biases_and_lora = to_host(
        hidden_states, top_k_index, top_k_weights, gate_up_bias, down_bias, *gate_up_lora[:2], *down_lora[:2]
    )
    routed = (hidden_states, top_k_index, top_k_weights)
    tensors = _Tensors(*routed, gate_up_proj, down_proj, *biases_and_lora, dropout_seed)
    check_no_tangents(_NAMES, tensors)
    stream_device = _stream_device(device) if stream_rows else ""
    whole, save = _for_backward(tensors, stream_rows)
    settings = _Settings(
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
        output, *_ = torch.ops.ktlib.moe_experts(*tensors, *settings, save)
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        # torch.func.grad of ops registered with torch.library: https://github.com/pytorch/pytorch/issues/179652
        raise NotImplementedError(
            "ktlib.moe_experts: torch.func.grad and what is made of it are not implemented; use torch.autograd.grad"
        ) from error
    return to_device(output, device)


def _stream_device(device):
    """Name of the device to which experts may be streamed if the hidden states are on ``device``; "" if to none."""
    return str(device) if device.type == "cuda" else ""


def _for_backward(tensors, stream_rows):
    """``(whole, save)``: whether the batch must be computed as a whole, and whether backward may be called at all.

    C++ computes long batches in chunks. Gradients of weights and biases sum over all tokens, so backward computes them
    from the whole batch at once. ValueError if these gradients are needed and experts are to be streamed.
    """

    def required(names):
        named = (getattr(tensors, name) for name in names)
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in named)

    whole = required(_BASE)
    if stream_rows and whole:
        raise ValueError(
            f"stream_rows: got {stream_rows} with expert weights or biases that require a gradient, needs None for them"
        )
    return whole, required(_DIFFERENTIABLE)


# ------------------------------------------------------------------------------------------------- the registered op


class _Call(NamedTuple):
    """One call as C++ takes it; it must be alive until C++ returns, since ``inputs`` hold addresses of its tensors."""

    inputs: _kernels.Inputs
    tensors: _Tensors
    streamed: Streamed | None  # computes the chosen experts, which C++ leaves out; None if there are none


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor):
    return _kernels.Matrix(data=_address(tensor), fp32=tensor is not None and tensor.dtype == torch.float32)


def _weight(stack):
    """The C++ description of a stack of expert weights (experts, rows, columns)."""
    experts, rows, columns = stack.shape
    bf16 = 0  # csrc/weights/weight.h, enum Format
    return _kernels.Weight(
        format=bf16, tensors=[stack.data_ptr()], tensor_rows=experts * rows, rows=rows, columns=columns
    )


def _lora(lora_A, lora_B, scaling, experts):
    rank = 0 if lora_A is None else lora_A.shape[0] // experts
    return _kernels.Lora(A=_matrix(lora_A), B=_matrix(lora_B), rank=rank, scaling=scaling)


def _native_call(tensors, settings):
    """The :class:`_Call` of these arguments of the registered op.

    Everything is checked again, right before addresses are taken: shapes and memory may have changed since forward.
    """
    seed = check_dropout(settings.lora_dropout, tensors.dropout_seed)
    threshold = 0 if seed is None else drop_threshold(settings.lora_dropout)
    share_kept = 1 - threshold / 2**32
    lora = [
        None if a is None else (a, b, scaling / share_kept)
        for a, b, scaling in (
            (tensors.gate_up_lora_A, tensors.gate_up_lora_B, settings.gate_up_scaling),
            (tensors.down_lora_A, tensors.down_lora_B, settings.down_scaling),
        )
    ]
    (experts, hidden, intermediate), (*_, gate_up_scaling), (*_, down_scaling) = check_all(
        tensors, lora, settings.transposed
    )
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if tensor is not None:
            check_memory(name, tensor)
    tokens, topk = tensors.top_k_index.shape
    tensors = tensors._replace(
        hidden_states=tensors.hidden_states.to(torch.bfloat16), top_k_weights=tensors.top_k_weights.float()
    )
    tensors = _Tensors(*(None if t is None else t.contiguous() for t in tensors))
    dropout = _kernels.Dropout(seed=0 if seed is None else seed.item(), threshold=threshold)
    chosen = choose(tensors.top_k_index, experts, settings.stream_rows if settings.stream_device else 0)
    streamed = None
    if chosen is not None:
        streamed = Streamed(tensors, settings, (gate_up_scaling, down_scaling), dropout, chosen)
    inputs = _kernels.Inputs(
        shape=_kernels.Shape(tokens=tokens, hidden=hidden, inter=intermediate, experts=experts, topk=topk),
        settings=_kernels.Settings(
            gate=_kernels.Gate(kind=GATES.index(settings.gate), limit=settings.limit, alpha=settings.alpha),
            dropout=dropout,
            transposed=settings.transposed,
            interleaved=settings.interleaved,
            parts=settings.numa_parts,
            whole=settings.whole,
        ),
        hidden_states=tensors.hidden_states.data_ptr(),
        top_k_index=tensors.top_k_index.data_ptr(),
        top_k_weights=tensors.top_k_weights.data_ptr(),
        gate_up_proj=_weight(tensors.gate_up_proj),
        down_proj=_weight(tensors.down_proj),
        gate_up_bias=_matrix(tensors.gate_up_bias),
        down_bias=_matrix(tensors.down_bias),
        gate_up_lora=_lora(tensors.gate_up_lora_A, tensors.gate_up_lora_B, gate_up_scaling, experts),
        down_lora=_lora(tensors.down_lora_A, tensors.down_lora_B, down_scaling, experts),
        elsewhere=_address(None if streamed is None else streamed.chosen),
    )
    return _Call(inputs, tensors, streamed)


def _saved_shapes(tensors, settings):
    """Shapes of the bf16 tensors that C++ saves for backward: gate and up before the activation, and the inner values
    of both LoRA pairs. An inner value is stored as the sum of two bf16 values (csrc/layer/lora.h), hence 2 * rank."""
    slots, (experts, _, intermediate) = tensors.top_k_index.numel(), sizes(tensors.down_proj, settings.transposed)
    lora = (tensors.gate_up_lora_A, tensors.down_lora_A)
    ranks = [0 if a is None else a.shape[0] // experts for a in lora]
    return (slots, 2 * intermediate), (2 * ranks[0], slots), (2 * ranks[1], slots)


def _forward_saved_shapes(tensors, settings, save):
    """Shapes of the saved tensors that the forward op returns: empty ones if backward recomputes them."""
    return _saved_shapes(tensors, settings) if save and not settings.recompute else ((0,),) * 3


def _unflatten(arguments):
    """The registered ops' arguments as ``(_Tensors, _Settings, last argument)``."""
    count = len(_Tensors._fields)
    return _Tensors(*arguments[:count]), _Settings(*arguments[count:-1]), arguments[-1]


def _empty(shape, dtype, pin_memory=False):
    """Memory for C++ to write."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pin_memory)


def _empty_like(tensor, dtype=None):
    """Contiguous. Results are pinned if the tensors they belong to are, so that the copy back is asynchronous too."""
    return _empty(tensor.shape, dtype or tensor.dtype, tensor.is_pinned())


def _saved(tensors):
    return _kernels.Saved(**dict(zip(("gate_up", "t_gate_up", "t_down"), map(_address, tensors), strict=True)))


def _forward(*arguments):
    tensors, settings, save = _unflatten(arguments)
    call = _native_call(tensors, settings)
    output = _empty_like(tensors.hidden_states)
    saved = [_empty(shape, torch.bfloat16) for shape in _forward_saved_shapes(tensors, settings, save)]
    # The GPU's work is queued before the CPU computes its experts.
    streamed = None if call.streamed is None else call.streamed.forward()
    if streamed is None or call.streamed.leaves_rows:
        to_save = saved if save and not settings.recompute else [None] * 3
        _kernels.forward(settings.isa, operator_threads(), call.inputs, _matrix(output), _saved(to_save))
    if streamed is not None:
        call.streamed.complete([(output, streamed)])
    return output, *saved


def _backward(grad_output, *arguments):
    saved, (tensors, settings, wanted) = arguments[:3], _unflatten(arguments[3:])
    call = _native_call(tensors, settings)
    check_tensor("grad_output", grad_output, (torch.bfloat16, torch.float32), 2)
    check_shape("grad_output", grad_output, tensors.hidden_states.shape, "to match hidden_states")
    check_memory("grad_output", grad_output)
    grad_output = grad_output.to(torch.bfloat16).contiguous()
    grads = dict.fromkeys(_DIFFERENTIABLE)
    for name, want in zip(_DIFFERENTIABLE, wanted, strict=True):
        if want and name in _BASE and not settings.whole:  # each chunk of a long batch would overwrite the gradient
            raise ValueError(f"{name}: its gradient is wanted of a call that was made with whole=False")
        if want:
            grads[name] = _empty_like(getattr(tensors, name), torch.float32 if name == "top_k_weights" else None)
    names = [name for name in grads if grads[name] is not None]
    streamed = {} if call.streamed is None else call.streamed.backward(grad_output, names)
    if call.streamed is None or call.streamed.leaves_rows:
        _backward_on_cpu(call, saved, tensors, settings, grad_output, grads)
    if streamed:
        call.streamed.complete([(grads[name], grad) for name, grad in streamed.items()])
    if grads["top_k_weights"] is not None:
        grads["top_k_weights"] = grads["top_k_weights"].to(tensors.top_k_weights.dtype)
    return tuple(grad_output.new_empty(0) if grad is None else grad for grad in grads.values())


def _backward_on_cpu(call, saved, tensors, settings, grad_output, grads):
    """Write into ``grads`` the gradients of the experts that the CPU computes."""
    threads, shapes = operator_threads(), _saved_shapes(tensors, settings)
    if settings.recompute:
        saved = [_empty(shape, torch.bfloat16) for shape in shapes]
        _kernels.forward(settings.isa, threads, call.inputs, _matrix(None), _saved(saved))
    names = ("hidden_states or down_proj", "gate_up_lora", "down_lora")
    for name, tensor, shape in zip(names, saved, shapes, strict=True):
        if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous() or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: changed since forward, which saved {describe(tensor)}; needs bfloat16 {shape}")
        check_memory(name, tensor)
    of_fixed_dtype = ("top_k_weights", "gate_up_proj", "down_proj")
    grads = _kernels.Grads(**{name: (_address if name in of_fixed_dtype else _matrix)(g) for name, g in grads.items()})
    _kernels.backward(settings.isa, threads, call.inputs, _saved(saved), grad_output.data_ptr(), grads)


def _forward_fake(*arguments):
    tensors, settings, save = _unflatten(arguments)
    shapes = _forward_saved_shapes(tensors, settings, save)
    saved = (tensors.hidden_states.new_empty(shape, dtype=torch.bfloat16) for shape in shapes)
    return torch.empty_like(tensors.hidden_states, memory_format=torch.contiguous_format), *saved


def _backward_fake(grad_output, gate_up, t_gate_up, t_down, *arguments):
    tensors, _, wanted = _unflatten(arguments)
    return tuple(
        torch.empty_like(getattr(tensors, name), memory_format=torch.contiguous_format)
        if want
        else grad_output.new_empty(0)
        for name, want in zip(_DIFFERENTIABLE, wanted, strict=True)
    )


def _forward_batched(info, in_dims, *arguments):
    """The op under torch.func.vmap: one call for each element of the batch.

    ``requires_grad`` of a batched tensor is always False in vmap, so the tensors of each element are asked instead.
    """
    if not info.batch_size:
        raise ValueError("ktlib.moe_experts: got a batch of torch.func.vmap without elements, needs at least one")
    batched, settings, _ = _unflatten(arguments)
    batches = (
        itertools.repeat(t, info.batch_size) if dim is None else t.unbind(dim)
        for t, dim in zip(batched, in_dims, strict=False)
    )
    results = []
    for tensors in itertools.starmap(_Tensors, zip(*batches, strict=True)):
        whole, save = _for_backward(tensors, settings.stream_rows)
        results.append(torch.ops.ktlib.moe_experts(*tensors, *settings._replace(whole=whole), save))
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * 4


def _setup_context(ctx, inputs, output):
    tensors, settings, _ = _unflatten(inputs)
    ctx.settings = tuple(settings)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors)


def _autograd_backward(ctx, grad_output, *_):
    result = dict.fromkeys(_Tensors._fields)
    if grad_output is not None:
        check_no_tangents(["grad_output"], [grad_output])
        needs = dict(zip(_Tensors._fields, ctx.needs_input_grad, strict=False))
        wanted = [needs[name] for name in _DIFFERENTIABLE]
        grads = torch.ops.ktlib.moe_experts_backward(grad_output, *ctx.saved_tensors, *ctx.settings, wanted)
        result |= {name: grad for name, grad in zip(_DIFFERENTIABLE, grads, strict=True) if needs[name]}
    return *result.values(), *[None] * (len(ctx.settings) + 1)


def _no_second_derivative(ctx, *_):
    raise NotImplementedError("ktlib.moe_experts: second derivatives are not implemented (create_graph=True)")


_library.impl("moe_experts", functools.partial(compute_or_reuse, _forward), "CPU")
_library.impl("moe_experts_backward", _backward, "CPU")
torch.library.register_fake("ktlib::moe_experts", _forward_fake, lib=_library)
torch.library.register_fake("ktlib::moe_experts_backward", _backward_fake, lib=_library)
torch.library.register_vmap("ktlib::moe_experts", _forward_batched, lib=_library)
torch.library.register_autograd("ktlib::moe_experts", _autograd_backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("ktlib::moe_experts_backward", _no_second_derivative, lib=_library)
