"""The operator: routed experts with LoRA, forward and backward, as a pure function of the tensors of one call.

``torch.ops.ktlib.moe_experts`` is registered with schema, fake kernel and autograd; :func:`moe_experts` is the
function to call. The C++ side (csrc/) sees addresses of tensors that were checked (checks.py) and are kept alive during
the call; it stores nothing.
"""

import functools
import itertools
import os
from collections import namedtuple

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
    is_placeholder,
    sizes,
)
from ktlib.operator.gpu.streamed_experts import Streamed, choose
from ktlib.operator.host_copies import to_device, to_host
from ktlib.operator.recompute_once import once
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
    "bool transposed, bool interleaved, str isa, bool recompute, int parts, int stream_rows, str stream_device, "
    "bool whole"
)
# What Weight.pack returns of weights that are given as one; gate_up_proj and down_proj then only have the shape.
_STORED = (
    "Tensor[] gate_up_stored, str gate_up_format, int[] gate_up_numbers, "
    "Tensor[] down_stored, str down_format, int[] down_numbers"
)
_Tensors, _Stored, _Settings = (
    namedtuple(name, [argument.split()[-1] for argument in schema.split(",")])
    for name, schema in (("_Tensors", _TENSORS), ("_Stored", _STORED), ("_Settings", _SETTINGS))
)
_KINDS = (_Tensors, _Stored, _Settings)
_NAMES = tuple(name.replace("lora_", "lora lora_") for name in _Tensors._fields)  # as moe_experts' arguments
_DIFFERENTIABLE = [name for name in _Tensors._fields if name not in ("top_k_index", "dropout_seed")]
_BASE = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
_library.define(f"moe_experts({_TENSORS}, {_STORED}, {_SETTINGS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"moe_experts_backward(Tensor grad_output, Tensor saved_gate_up, Tensor saved_t_gate_up, Tensor saved_t_down, "
    f"{_TENSORS}, {_STORED}, {_SETTINGS}, bool[{len(_DIFFERENTIABLE)}] wanted) "
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

    ``E_e(x) = down_e(act(gate_e(x)) * up_e(x))``, where each projection is ``W_e + scaling * B_e A_e`` if it has LoRA,
    and has a bias if one is given.

    Args:
        hidden_states: (tokens, hidden), bf16 or fp32 (rounded to bf16 on entry).
        top_k_index: (tokens, top_k) int64 expert ids; an id may repeat within a token.
        top_k_weights: (tokens, top_k), fp32 or bf16.
        gate_up_proj: (experts, 2 * intermediate, hidden) bf16, CPU, contiguous, gate rows first; may be a memory map.
            Or a :class:`ktlib.Weight` of that shape: frozen weights in another format or in several tensors.
        down_proj: (experts, hidden, intermediate) bf16, CPU, contiguous; may be a memory map. Or a Weight.
        gate_up_lora, down_lora: ``None`` or ``(lora_A, lora_B, scaling)`` in PEFT's layout: lora_A
            (experts * rank, in) expert-major, lora_B (out, rank * experts) with the expert as the fastest index; both
            bf16 or both fp32 (rounded to bf16 for the products; gradients come in their dtype). Any rank >= 1.
        lora_dropout: probability p in [0, 1) with which each element of LoRA's input (the token for gate_up, the
            activation for down) is dropped, the others being divided by 1 - p, as PEFT does for linear layers: what the
            weights see stays whole. Each choice of an expert by a token has its own masks, one for gate and up.
        dropout_seed: what the masks are drawn from, besides p and an element's place: an int, or a 0-d int64 tensor on
            the CPU. Default: drawn from torch's default generator where p > 0, so ``torch.manual_seed`` repeats a run
            and activation checkpointing its forward. Backward uses the masks of its forward, whatever the instruction
            set, the number of threads or ``recompute``.
        gate_up_bias, down_bias: ``None`` or (experts, 2 * intermediate) and (experts, hidden), bf16 or fp32.
        gate: what becomes of gate and up: ``"silu"``, ``"gelu"`` (erf) or ``"gelu_tanh"`` of the gate, times up; or
            ``"swiglu_oai"``, ``gate * sigmoid(alpha * gate) * (up + 1)``.
        limit: ``None`` or a positive number: before that the gate is clamped to at most ``limit``, and up to
            ``[-limit, limit]`` (gradients as torch.clamp's: zero beyond; but those of NaN pass).
        alpha: of ``"swiglu_oai"`` only, default 1.702.
        transposed: the weights are stored as (experts, in, out): gate_up_proj (experts, hidden, 2 * intermediate),
            down_proj (experts, intermediate, hidden). LoRA keeps its shapes, as in PEFT.
        interleaved: the outputs of gate_up alternate, gate 0, up 0, gate 1, ...: in gate_up_proj, gate_up_bias and
            the rows of gate_up's lora_B.
        isa: instruction set, one of ``ktlib.cpu_info()["isas"]``; default: ``KTLIB_ISA`` or the fastest here.
        recompute: keep nothing but the arguments for backward, which then computes gate and up again: half a forward
            more, the same bits.
        parts: into how many runs of consecutive rows each weight matrix is split for machines with several NUMA nodes,
            see :func:`ktlib.place_experts`. Says which thread computes what, never a result.
        stream_rows: ``None``, or a number of rows: where ``hidden_states`` are on a GPU, experts on which at least so
            many choices of this batch fall are computed there, from weights that are copied to it for the call and
            again for backward (gpu/streamed_experts.py). The others are computed on the CPU as ever; without a GPU all
            are. Implies ``recompute``. Not for weights or biases that are trained. Where TF32 is allowed
            (``torch.set_float32_matmul_precision``), LoRA's products there use it: a call can't switch off for itself
            what is a setting of the whole process.

    Returns:
        (tokens, hidden) in the dtype and on the device of ``hidden_states``. Differentiable in hidden_states,
        top_k_weights, lora_A, lora_B, the weights and the biases. ``hidden_states``, the routing, biases and LoRA may
        live on another device: they are copied to the CPU, and the result and the gradients back.

    With a Weight the result and all gradients have the same bits as with its ``decoded()``. It can be neither
    ``transposed`` nor streamed (``stream_rows``).

    Memory: no copy of the weights. Resident after a step on a layer are at most ``weights * 1.05`` plus
    ``2 * tokens * (top_k * (2 * intermediate + 4 * rank) + 2 * hidden)`` bytes that backward needs, plus outputs and
    gradients, plus scratch that a process has once whatever the number of layers, of which at most 512 MiB are kept.
    With ``recompute`` the term in ``intermediate`` and ``rank`` is gone.

    Raises:
        TypeError: an argument is not a tensor (or not such a tuple), has the wrong dtype, or is not of its type.
        ValueError: wrong shape, device or layout, an expert id out of range, an unknown gate or isa, a limit that is
            not positive and finite, an alpha that is not finite or not the gate's, parts out of [1, 1024], a
            lora_dropout outside [0, 1), stream_rows below 1 or with weights or biases that require a gradient, a Weight
            with transposed or stream_rows.
        RuntimeError: ``isa`` cannot run on this machine.
        NotImplementedError: forward-mode derivatives (``torch.autograd.forward_ad``, ``torch.func.jvp``) or
            ``torch.func.grad``, ``vjp``, ``jacrev`` of the call; second derivatives, in backward. ``torch.func.vmap``
            of CPU tensors works, one element of the batch after the other.
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
    hidden_states, top_k_index, top_k_weights, *others = to_host(
        hidden_states, top_k_index, top_k_weights, gate_up_bias, down_bias, *gate_up_lora[:2], *down_lora[:2]
    )
    tensors = _Tensors(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *others, dropout_seed)
    stored = _Stored(*gate_up_stored, *down_stored)
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
        parts=parts,
        stream_rows=stream_rows or 0,
        stream_device=stream_device,
        whole=whole,
    )
    try:
        output, *_ = torch.ops.ktlib.moe_experts(*tensors, *stored, *settings, save)
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        # of ops registered with torch.library (https://github.com/pytorch/pytorch/issues/179652)
        raise NotImplementedError(
            "ktlib.moe_experts: torch.func.grad and what is made of it are not implemented; use torch.autograd.grad"
        ) from error
    return to_device(output, device)


def _unpack(name, weight, transposed, stream_rows):
    """``(tensor, stored, format, numbers)``: a weight as the registered op takes it."""
    if not isinstance(weight, Weight):
        return weight, [], "", [0]  # not empty, which torch would take for a list of tensors
    for option, value in (("transposed", transposed), ("stream_rows", stream_rows)):
        if value:
            raise ValueError(f"{option}: got {value} with a ktlib.Weight as {name}, needs none of it")
    return weight.placeholder(), *weight.pack()


def _stream_device(device):
    """The device that experts may be streamed to for hidden states on ``device``, by name; "" if there is none."""
    return str(device) if device.type == "cuda" else ""


def _for_backward(tensors, stream_rows):
    """``(whole, save)``: whether backward will compute gradients of weights or biases, and whether of anything.

    ValueError if the former, and experts are to be streamed.
    """

    def required(names):
        given = (getattr(tensors, name) for name in names)
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)

    whole = required(_BASE)
    if stream_rows and whole:
        raise ValueError(
            f"stream_rows: got {stream_rows} with expert weights or biases that require a gradient, needs None for them"
        )
    return whole, required(_DIFFERENTIABLE)


# ------------------------------------------------------------------------------------------------- the registered op

# A call as C++ takes it: ``held`` are the tensors whose memory ``inputs`` name (hold on to them during the call, and to
# ``streamed``, which has the list of the experts that C++ leaves out and computes them; None if there are none).
_Call = namedtuple("_Call", "inputs held streamed")


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor):
    return _kernels.Matrix(data=_address(tensor), fp32=tensor is not None and tensor.dtype == torch.float32)


def _weight(name, tensor, stored, format, numbers):
    """Expert weights as C++ takes them: a bf16 stack (experts, rows, columns), or what is stored in its place."""
    if format:
        return Weight.unpack(name, stored, format, numbers, tensor.shape).kernel_argument(name)
    if is_placeholder(tensor):
        raise ValueError(f"{name}: got strides {tensor.stride()}, needs contiguous")
    return Weight.of_stack(tensor).kernel_argument(name)


def _lora(lora_A, lora_B, scaling, experts):
    rank = 0 if lora_A is None else lora_A.shape[0] // experts
    return _kernels.Lora(A=_matrix(lora_A), B=_matrix(lora_B), rank=rank, scaling=scaling)


def _arguments(tensors, stored, settings):
    """A :class:`_Call`.

    All is checked here again, right before addresses are taken: shapes and memory may have changed since forward.
    """
    seed = check_dropout(settings.lora_dropout, tensors.dropout_seed)
    threshold = 0 if seed is None else drop_threshold(settings.lora_dropout)
    kept = 1 - threshold / 2**32
    factors = [
        None if a is None else (a, b, scaling / kept)
        for a, b, scaling in (
            (tensors.gate_up_lora_A, tensors.gate_up_lora_B, settings.gate_up_scaling),
            (tensors.down_lora_A, tensors.down_lora_B, settings.down_scaling),
        )
    ]
    (experts, hidden, intermediate), (*_, gate_up_scaling), (*_, down_scaling) = check_all(
        tensors, factors, settings.transposed
    )
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if tensor is not None:
            check_memory(name, tensor)
    tokens, topk = tensors.top_k_index.shape
    held = tensors._replace(
        hidden_states=tensors.hidden_states.to(torch.bfloat16), top_k_weights=tensors.top_k_weights.float()
    )
    held = _Tensors(*(t if t is None or is_placeholder(t) else t.contiguous() for t in held))
    dropout = _kernels.Dropout(seed=0 if seed is None else seed.item(), threshold=threshold)
    chosen = choose(held.top_k_index, experts, settings.stream_rows if settings.stream_device else 0)
    streamed = None
    if chosen is not None:
        streamed = Streamed(held, settings, (gate_up_scaling, down_scaling), dropout, chosen)
    inputs = _kernels.Inputs(
        shape=_kernels.Shape(tokens=tokens, hidden=hidden, inter=intermediate, experts=experts, topk=topk),
        settings=_kernels.Settings(
            gate=_kernels.Gate(kind=GATES.index(settings.gate), limit=settings.limit, alpha=settings.alpha),
            dropout=dropout,
            transposed=settings.transposed,
            interleaved=settings.interleaved,
            parts=settings.parts,
            whole=settings.whole,
        ),
        hidden_states=held.hidden_states.data_ptr(),
        top_k_index=held.top_k_index.data_ptr(),
        top_k_weights=held.top_k_weights.data_ptr(),
        gate_up_proj=_weight("gate_up_proj", held.gate_up_proj, *stored[:3]),
        down_proj=_weight("down_proj", held.down_proj, *stored[3:]),
        gate_up_bias=_matrix(held.gate_up_bias),
        down_bias=_matrix(held.down_bias),
        gate_up_lora=_lora(held.gate_up_lora_A, held.gate_up_lora_B, gate_up_scaling, experts),
        down_lora=_lora(held.down_lora_A, held.down_lora_B, down_scaling, experts),
        elsewhere=_address(None if streamed is None else streamed.chosen),
    )
    return _Call(inputs, held, streamed)


def _saved_shapes(tensors, settings):
    """Shapes of what backward needs: gate and up before the activation, the inner values of both LoRA pairs (twice:
    csrc/layer/lora.h keeps them as sums of two bf16)."""
    slots, (experts, _, intermediate) = tensors.top_k_index.numel(), sizes(tensors.down_proj, settings.transposed)
    lora = (tensors.gate_up_lora_A, tensors.down_lora_A)
    ranks = [0 if a is None else a.shape[0] // experts for a in lora]
    return (slots, 2 * intermediate), (2 * ranks[0], slots), (2 * ranks[1], slots)


def _split(arguments):
    """The registered ops' arguments as ``(_Tensors, _Stored, _Settings, the one after them)``."""
    arguments = iter(arguments)
    tensors, stored, settings = (kind(*itertools.islice(arguments, len(kind._fields))) for kind in _KINDS)
    return tensors, stored, settings, next(arguments)


def _empty(shape, dtype, pin_memory=False):
    """Memory for C++ to write."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pin_memory)


def _empty_like(tensor, dtype=None):
    """Contiguous; in pinned memory if ``tensor`` is, because what becomes of the one becomes of the other."""
    return _empty(tensor.shape, dtype or tensor.dtype, tensor.is_pinned())


def _saved(tensors):
    return _kernels.Saved(**dict(zip(("gate_up", "t_gate_up", "t_down"), map(_address, tensors), strict=True)))


def _kept_shapes(tensors, settings, save):
    return _saved_shapes(tensors, settings) if save and not settings.recompute else ((0,),) * 3


def _forward(*arguments):
    tensors, stored, settings, save = _split(arguments)
    call = _arguments(tensors, stored, settings)
    output = _empty_like(tensors.hidden_states)
    saved = [_empty(shape, torch.bfloat16) for shape in _kept_shapes(tensors, settings, save)]
    # queued before the CPU's share is computed
    streamed = None if call.streamed is None else call.streamed.forward()
    if streamed is None or call.streamed.leaves_rows:
        to_save = saved if save and not settings.recompute else [None] * 3
        _kernels.forward(settings.isa, operator_threads(), call.inputs, _matrix(output), _saved(to_save))
    if streamed is not None:
        call.streamed.complete([(output, streamed)])
    return output, *saved


def _backward(grad_output, *arguments):
    saved, (tensors, stored, settings, wanted) = arguments[:3], _split(arguments[3:])
    call = _arguments(tensors, stored, settings)
    check_tensor("grad_output", grad_output, (torch.bfloat16, torch.float32), 2)
    check_shape("grad_output", grad_output, tensors.hidden_states.shape, "to match hidden_states")
    check_memory("grad_output", grad_output)
    grad_output = grad_output.to(torch.bfloat16).contiguous()
    grads = dict.fromkeys(_DIFFERENTIABLE)
    for name, want in zip(_DIFFERENTIABLE, wanted, strict=True):
        if want and name in _BASE and not settings.whole:  # each part of a long batch would overwrite those before
            raise ValueError(f"{name}: its gradient is wanted of a call that was made with whole=False")
        if want:
            grads[name] = _empty_like(getattr(tensors, name), torch.float32 if name == "top_k_weights" else None)
    names = [name for name in grads if grads[name] is not None]
    streamed = {} if call.streamed is None else call.streamed.backward(grad_output, names)
    if call.streamed is None or call.streamed.leaves_rows:
        _backward_here(call, saved, tensors, settings, grad_output, grads)
    if streamed:
        call.streamed.complete([(grads[name], grad) for name, grad in streamed.items()])
    if grads["top_k_weights"] is not None:
        grads["top_k_weights"] = grads["top_k_weights"].to(tensors.top_k_weights.dtype)
    return tuple(grad_output.new_empty(0) if grad is None else grad for grad in grads.values())


def _backward_here(call, saved, tensors, settings, grad_output, grads):
    """Write what the CPU has to compute of the gradients, in place."""
    threads, shapes = operator_threads(), _saved_shapes(tensors, settings)
    if settings.recompute:
        saved = [_empty(shape, torch.bfloat16) for shape in shapes]
        _kernels.forward(settings.isa, threads, call.inputs, _matrix(None), _saved(saved))
    names = ("hidden_states or down_proj", "gate_up_lora", "down_lora")
    for name, tensor, shape in zip(names, saved, shapes, strict=True):
        if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous() or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: changed since forward, which saved {describe(tensor)}; needs bfloat16 {shape}")
        check_memory(name, tensor)
    one_dtype = ("top_k_weights", "gate_up_proj", "down_proj")
    to = {name: _address(grad) if name in one_dtype else _matrix(grad) for name, grad in grads.items()}
    _kernels.backward(settings.isa, threads, call.inputs, _saved(saved), grad_output.data_ptr(), _kernels.Grads(**to))


def _forward_fake(*arguments):
    tensors, _, settings, save = _split(arguments)
    shapes = _kept_shapes(tensors, settings, save)
    saved = (tensors.hidden_states.new_empty(shape, dtype=torch.bfloat16) for shape in shapes)
    return torch.empty_like(tensors.hidden_states, memory_format=torch.contiguous_format), *saved


def _backward_fake(grad_output, gate_up, t_gate_up, t_down, *arguments):
    tensors, _, _, wanted = _split(arguments)
    return tuple(
        torch.empty_like(getattr(tensors, name), memory_format=torch.contiguous_format)
        if want
        else grad_output.new_empty(0)
        for name, want in zip(_DIFFERENTIABLE, wanted, strict=True)
    )


def _elements(info, in_dims, arguments):
    """The arguments of each element of a batch of torch.func.vmap."""
    if not info.batch_size:
        raise ValueError("ktlib.moe_experts: got a batch of torch.func.vmap without elements, needs at least one")
    batches = (
        value.unbind(dim) if isinstance(dim, int) else itertools.repeat(value, info.batch_size)
        for value, dim in zip(arguments, in_dims, strict=True)
    )
    return zip(*batches, strict=True)


def _stack(results):
    """The results of all elements, and the dimension of the batch in each."""
    results = tuple(map(torch.stack, zip(*results, strict=True)))
    return results, (0,) * len(results)


def _forward_batched(info, in_dims, *arguments):
    """One element after the other.

    A tensor with a batch says that it requires no gradient, whatever is the case: only its elements know.
    """
    results = []
    for element in _elements(info, in_dims, arguments):
        tensors, stored, settings, _ = _split(element)
        whole, save = _for_backward(tensors, settings.stream_rows)
        results.append(torch.ops.ktlib.moe_experts(*tensors, *stored, *settings._replace(whole=whole), save))
    return _stack(results)


def _backward_batched(info, in_dims, *arguments):
    return _stack([torch.ops.ktlib.moe_experts_backward(*element) for element in _elements(info, in_dims, arguments)])


def _setup_context(ctx, inputs, output):
    tensors, stored, settings, _ = _split(inputs)
    ctx.settings = tuple(settings)
    # the number of tensors in the place of tensors
    ctx.stored = stored._replace(gate_up_stored=len(stored.gate_up_stored), down_stored=len(stored.down_stored))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors, *stored.gate_up_stored, *stored.down_stored)


def _autograd_backward(ctx, grad_output, *_):
    result = dict.fromkeys(_Tensors._fields)
    if grad_output is not None:
        check_no_tangents(["grad_output"], [grad_output])
        needs = dict(zip(_Tensors._fields, ctx.needs_input_grad, strict=False))
        wanted = [needs[name] for name in _DIFFERENTIABLE]
        saved = iter(ctx.saved_tensors)
        tensors = list(itertools.islice(saved, 3 + len(_Tensors._fields)))
        stored = [list(itertools.islice(saved, value)) if isinstance(value, int) else value for value in ctx.stored]
        grads = torch.ops.ktlib.moe_experts_backward(grad_output, *tensors, *stored, *ctx.settings, wanted)
        result |= {name: grad for name, grad in zip(_DIFFERENTIABLE, grads, strict=True) if needs[name]}
    stored = [[None] * value if isinstance(value, int) else None for value in ctx.stored]
    return *result.values(), *stored, *[None] * (len(ctx.settings) + 1)


def _no_second_derivative(ctx, *_):
    raise NotImplementedError("ktlib.moe_experts: second derivatives are not implemented (create_graph=True)")


_library.impl("moe_experts", functools.partial(once, _forward), "CPU")
_library.impl("moe_experts_backward", _backward, "CPU")
torch.library.register_fake("ktlib::moe_experts", _forward_fake, lib=_library)
torch.library.register_fake("ktlib::moe_experts_backward", _backward_fake, lib=_library)
torch.library.register_vmap("ktlib::moe_experts", _forward_batched, lib=_library)
torch.library.register_vmap("ktlib::moe_experts_backward", _backward_batched, lib=_library)
torch.library.register_autograd("ktlib::moe_experts", _autograd_backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("ktlib::moe_experts_backward", _no_second_derivative, lib=_library)
