"""The registered ops behind :func:`ktlib.moe_experts`: schema, kernel on the CPU, fake kernel, vmap and autograd.

``torch.ops.ktlib.moe_experts`` has one tensor for each weight; ``moe_experts_stored``, for weights that are a
:class:`ktlib.Weight`, has lists of tensors besides. The C++ side (csrc/) gets the addresses of checked tensors, to
which Python holds references during the call. It stores nothing.
"""

import functools
import itertools
from collections import namedtuple
from typing import NamedTuple

import torch

from ktlib import _kernels
from ktlib.operator.checks import (
    GATES,
    check_all,
    check_dropout,
    check_memory,
    check_no_tangents,
    check_shape,
    check_tensor,
    describe,
    is_placeholder,
    sizes,
)
from ktlib.operator.gpu.streamed_experts import Streamed, choose
from ktlib.operator.recompute_once import compute_or_reuse
from ktlib.operator.weight import Weight
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
# What Weight.pack returns of each weight that is given as one; gate_up_proj and down_proj then only have the shape.
_STORED = (
    "Tensor[] gate_up_stored, str gate_up_format, int[] gate_up_numbers, "
    "Tensor[] down_stored, str down_format, int[] down_numbers"
)
Tensors, Stored, Settings = (
    namedtuple(name, [argument.split()[-1] for argument in schema.split(",")])
    for name, schema in (("Tensors", _TENSORS), ("Stored", _STORED), ("Settings", _SETTINGS))
)
NOTHING_STORED = Stored([], "", [0], [], "", [0])  # [0]: torch takes an empty list for one of tensors
NAMES = tuple(name.replace("lora_", "lora lora_") for name in Tensors._fields)  # as error messages name them
DIFFERENTIABLE = [name for name in Tensors._fields if name not in ("top_k_index", "dropout_seed")]
_BASE = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")  # tensors of the base model
for _suffix, _schema in (("", f"{_TENSORS}, {_SETTINGS}"), ("_stored", f"{_TENSORS}, {_STORED}, {_SETTINGS}")):
    _library.define(f"moe_experts{_suffix}({_schema}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
    _library.define(
        f"moe_experts_backward{_suffix}(Tensor grad_output, Tensor saved_gate_up, Tensor saved_t_gate_up, "
        f"Tensor saved_t_down, {_schema}, bool[{len(DIFFERENTIABLE)}] wanted) "
        f"-> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
    )


def call_op(name, tensors, stored, settings, last):
    """The registered op ``name``, or with weights that are stored otherwise its twin; ``last`` is its last argument."""
    if stored == NOTHING_STORED:
        return getattr(torch.ops.ktlib, name)(*tensors, *settings, last)
    return getattr(torch.ops.ktlib, f"{name}_stored")(*tensors, *stored, *settings, last)


def for_backward(tensors, stream_rows):
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
    return whole, required(DIFFERENTIABLE)


class _Call(NamedTuple):
    """One call as C++ takes it; it must be alive until C++ returns, since ``inputs`` hold addresses of its tensors."""

    inputs: _kernels.Inputs
    tensors: Tensors
    streamed: Streamed | None  # computes the chosen experts, which C++ leaves out; None if there are none


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor):
    return _kernels.Matrix(data=_address(tensor), fp32=tensor is not None and tensor.dtype == torch.float32)


def _weight(name, tensor, stored, format, numbers):
    """The C++ description of expert weights: a bf16 stack (experts, rows, columns), or what is stored in its place."""
    if format:
        return Weight.unpack(name, stored, format, numbers, tensor.shape).kernel_argument(name)
    if is_placeholder(tensor):
        raise ValueError(f"{name}: got strides {tensor.stride()}, needs contiguous")
    return Weight.of_stack(tensor).kernel_argument(name)


def _lora(lora_A, lora_B, scaling, experts):
    rank = 0 if lora_A is None else lora_A.shape[0] // experts
    return _kernels.Lora(A=_matrix(lora_A), B=_matrix(lora_B), rank=rank, scaling=scaling)


def _native_call(tensors, stored, settings):
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
    for name, tensor in zip(NAMES, tensors, strict=True):
        if tensor is not None:
            check_memory(name, tensor)
    tokens, topk = tensors.top_k_index.shape
    tensors = tensors._replace(
        hidden_states=tensors.hidden_states.to(torch.bfloat16), top_k_weights=tensors.top_k_weights.float()
    )
    tensors = Tensors(*(t if t is None or is_placeholder(t) else t.contiguous() for t in tensors))
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
            numa_parts=settings.numa_parts,
            whole=settings.whole,
        ),
        hidden_states=tensors.hidden_states.data_ptr(),
        top_k_index=tensors.top_k_index.data_ptr(),
        top_k_weights=tensors.top_k_weights.data_ptr(),
        gate_up_proj=_weight("gate_up_proj", tensors.gate_up_proj, *stored[:3]),
        down_proj=_weight("down_proj", tensors.down_proj, *stored[3:]),
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
    """The registered ops' arguments as ``(Tensors, Stored, Settings, last argument)``."""
    remaining, has_stored = iter(arguments), len(arguments) > len(Tensors._fields) + len(Settings._fields) + 1
    tensors = Tensors(*itertools.islice(remaining, len(Tensors._fields)))
    stored = Stored(*itertools.islice(remaining, len(Stored._fields))) if has_stored else NOTHING_STORED
    *settings, last = remaining
    return tensors, stored, Settings(*settings), last


def _empty(shape, dtype, pin_memory=False):
    """Memory for C++ to write."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pin_memory)


def _empty_like(tensor, dtype=None):
    """Contiguous. Results are pinned if the tensors they belong to are, so that the copy back is asynchronous too."""
    return _empty(tensor.shape, dtype or tensor.dtype, tensor.is_pinned())


def _saved(tensors):
    return _kernels.Saved(**dict(zip(("gate_up", "t_gate_up", "t_down"), map(_address, tensors), strict=True)))


def _forward(*arguments):
    tensors, stored, settings, save = _unflatten(arguments)
    call = _native_call(tensors, stored, settings)
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
    saved, (tensors, stored, settings, wanted) = arguments[:3], _unflatten(arguments[3:])
    call = _native_call(tensors, stored, settings)
    check_tensor("grad_output", grad_output, (torch.bfloat16, torch.float32), 2)
    check_shape("grad_output", grad_output, tensors.hidden_states.shape, "to match hidden_states")
    check_memory("grad_output", grad_output)
    grad_output = grad_output.to(torch.bfloat16).contiguous()
    grads = dict.fromkeys(DIFFERENTIABLE)
    for name, want in zip(DIFFERENTIABLE, wanted, strict=True):
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
    tensors, _, settings, save = _unflatten(arguments)
    shapes = _forward_saved_shapes(tensors, settings, save)
    saved = (tensors.hidden_states.new_empty(shape, dtype=torch.bfloat16) for shape in shapes)
    return torch.empty_like(tensors.hidden_states, memory_format=torch.contiguous_format), *saved


def _backward_fake(grad_output, gate_up, t_gate_up, t_down, *arguments):
    tensors, _, _, wanted = _unflatten(arguments)
    return tuple(
        torch.empty_like(getattr(tensors, name), memory_format=torch.contiguous_format)
        if want
        else grad_output.new_empty(0)
        for name, want in zip(DIFFERENTIABLE, wanted, strict=True)
    )


def _forward_batched(info, in_dims, *arguments):
    """The op under torch.func.vmap: one call for each element of the batch.

    ``requires_grad`` of a batched tensor is always False in vmap, so the tensors of each element are asked instead.
    """
    if not info.batch_size:
        raise ValueError("ktlib.moe_experts: got a batch of torch.func.vmap without elements, needs at least one")
    batches = (
        value.unbind(dim) if isinstance(dim, int) else itertools.repeat(value, info.batch_size)
        for value, dim in zip(arguments, in_dims, strict=True)
    )
    results = []
    for element in zip(*batches, strict=True):
        tensors, stored, settings, _ = _unflatten(element)
        whole, save = for_backward(tensors, settings.stream_rows)
        results.append(call_op("moe_experts", tensors, stored, settings._replace(whole=whole), save))
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * 4


def _setup_context(ctx, inputs, output):
    tensors, stored, settings, _ = _unflatten(inputs)
    ctx.settings = settings
    # The numbers of tensors in place of the tensors, which torch saves.
    ctx.stored = stored._replace(gate_up_stored=len(stored.gate_up_stored), down_stored=len(stored.down_stored))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors, *stored.gate_up_stored, *stored.down_stored)


def _autograd_backward(ctx, grad_output, *_):
    result = dict.fromkeys(Tensors._fields)
    counts = ctx.stored.gate_up_stored, ctx.stored.down_stored
    if grad_output is not None:
        check_no_tangents(["grad_output"], [grad_output])
        needs = dict(zip(Tensors._fields, ctx.needs_input_grad, strict=False))
        wanted = [needs[name] for name in DIFFERENTIABLE]
        saved = iter(ctx.saved_tensors)
        lengths = (3, len(Tensors._fields), *counts)
        from_forward, tensors, *lists = (list(itertools.islice(saved, length)) for length in lengths)
        stored = ctx.stored._replace(gate_up_stored=lists[0], down_stored=lists[1])
        arguments = [grad_output, *from_forward, *tensors]
        grads = call_op("moe_experts_backward", arguments, stored, ctx.settings, wanted)
        result |= {name: grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if needs[name]}
    if ctx.stored == NOTHING_STORED._replace(gate_up_stored=0, down_stored=0):
        stored = ()
    else:
        stored = Stored([None] * counts[0], None, None, [None] * counts[1], None, None)
    return *result.values(), *stored, *[None] * (len(ctx.settings) + 1)


def _no_second_derivative(ctx, *_):
    raise NotImplementedError("ktlib.moe_experts: second derivatives are not implemented (create_graph=True)")


for _suffix in ("", "_stored"):
    _forward_op, _backward_op = f"moe_experts{_suffix}", f"moe_experts_backward{_suffix}"
    _library.impl(_forward_op, functools.partial(compute_or_reuse, _forward), "CPU")
    _library.impl(_backward_op, _backward, "CPU")
    torch.library.register_fake(f"ktlib::{_forward_op}", _forward_fake, lib=_library)
    torch.library.register_fake(f"ktlib::{_backward_op}", _backward_fake, lib=_library)
    torch.library.register_vmap(f"ktlib::{_forward_op}", _forward_batched, lib=_library)
    torch.library.register_autograd(
        f"ktlib::{_forward_op}", _autograd_backward, setup_context=_setup_context, lib=_library
    )
    torch.library.register_autograd(f"ktlib::{_backward_op}", _no_second_derivative, lib=_library)
