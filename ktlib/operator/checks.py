"""Checks of the operator's arguments. They raise errors that name the wrong argument, before C++ reads any memory."""

import math

import torch
from torch.autograd import forward_ad

from ktlib.reference import lora_layout
from ktlib.reference.gates import ALPHA, GATES

_FP32_MAX = torch.finfo(torch.float32).max  # C++ stores limit, alpha and scaling as fp32
# Sizes must be below this: C++ has them as int, and computes offsets of up to 16 times a size (csrc/kernels/kernels.h).
_SIZE_BOUND = 2**27


def check_all(tensors, lora, transposed):
    """Types, devices and shapes of all tensors, of which ``lora`` are the pairs of gate_up and down.

    Returns ``(experts, hidden, intermediate)`` and each pair as ``(lora_A or None, lora_B or None, scaling)``.
    """
    sizes = check_inputs(*tensors[:5], transposed)
    experts, hidden, intermediate = sizes
    check_bias("gate_up_bias", tensors[5], (experts, 2 * intermediate), "(experts, 2 * intermediate)")
    check_bias("down_bias", tensors[6], (experts, hidden), "(experts, hidden)")
    return (
        sizes,
        check_lora("gate_up_lora", lora[0], experts, hidden, 2 * intermediate),
        check_lora("down_lora", lora[1], experts, intermediate, hidden),
    )


def check_kind(name, value, types, needs):
    """TypeError unless ``value`` has one of the types. A bool is not accepted as an int."""
    if not isinstance(value, types) or isinstance(value, bool) and types is not bool:
        raise TypeError(f"{name}: got {type(value).__name__}, needs {needs}")


def check_parts(parts):
    check_kind("parts", parts, int, "an int")
    if not 1 <= parts <= 1024:  # as many NUMA nodes as Linux can have
        raise ValueError(f"parts: got {parts}, needs at least 1 and at most 1024")


def check_stream_rows(stream_rows):
    check_kind("stream_rows", stream_rows, int | None, "None or an int")
    if stream_rows is not None and stream_rows < 1:
        raise ValueError(f"stream_rows: got {stream_rows}, needs None or at least 1")


def check_flags(**flags):
    for name, value in flags.items():
        check_kind(name, value, bool, "a bool")


def check_isa(isa):
    """Only the type: C++ raises the error for an unknown or unavailable instruction set."""
    check_kind("isa", isa, str | None, "None or a name")


def check_no_tangents(names, tensors):
    """NotImplementedError for forward-mode derivatives, since torch drops tangents of a registered op silently."""
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and _has_tangent(tensor):
            raise NotImplementedError(
                f"{name}: got a tensor with a tangent: forward-mode derivatives are not implemented"
            )


def _has_tangent(tensor):
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # raised for a batched tensor of torch.func.vmap inside torch.func.jvp
        return True


def describe(value):
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"


def check_tensor(name, value, dtypes, ndim):
    needs = f"a {ndim}-d tensor of {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        raise TypeError(f"{name}: got {describe(value)}, needs {needs}")
    if value.dim() != ndim:
        raise ValueError(f"{name}: got {describe(value)}, needs {needs}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: got a tensor of layout {value.layout}, needs a dense (strided) one")
    if value.is_meta:
        raise ValueError(f"{name}: got a tensor on meta, needs one with values, expert weights on the CPU")


def check_memory(name, tensor):
    """ValueError if the tensor's storage was shrunk (``untyped_storage().resize_``), before or after forward."""
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() and (last + 1) * tensor.itemsize > stored:
        raise ValueError(f"{name}: got {describe(tensor)}, but its memory was freed: {stored} bytes are left of it")


def is_placeholder(tensor):
    """Whether a tensor has no values but the shape of a :class:`ktlib.Weight` that is given beside it."""
    return tensor.dim() == 3 and tensor.stride() == (0, 0, 0) and not tensor.is_contiguous()


def check_shape(name, value, shape, meaning):
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, needs {tuple(shape)} {meaning}")


def sizes(down_proj, transposed):
    """``(experts, hidden, intermediate)``."""
    experts, first, second = down_proj.shape
    return (experts, second, first) if transposed else (experts, first, second)


def check_inputs(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, transposed):
    """Check all tensors but biases and LoRA; return ``(experts, hidden, intermediate)`` of the weights."""
    floats = (torch.bfloat16, torch.float32)
    check_tensor("hidden_states", hidden_states, floats, 2)
    check_tensor("top_k_index", top_k_index, (torch.int64,), 2)
    check_tensor("top_k_weights", top_k_weights, floats, 2)
    check_tensor("gate_up_proj", gate_up_proj, (torch.bfloat16,), 3)
    check_tensor("down_proj", down_proj, (torch.bfloat16,), 3)
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weight.device.type != "cpu":
            raise ValueError(f"{name}: got a tensor on {weight.device}, needs expert weights on the CPU")
        if max(weight.shape) >= _SIZE_BOUND:
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}, needs each dimension below {_SIZE_BOUND}")
        if not weight.is_contiguous() and not is_placeholder(weight):
            raise ValueError(f"{name}: got strides {weight.stride()} for shape {tuple(weight.shape)}, needs contiguous")
        if 0 in weight.shape:
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}, needs at least one of each dimension")
    experts, hidden, intermediate = sizes(down_proj, transposed)
    if transposed:
        check_shape("gate_up_proj", gate_up_proj, (experts, hidden, 2 * intermediate), "to match down_proj transposed")
    else:
        check_shape("gate_up_proj", gate_up_proj, (experts, 2 * intermediate, hidden), "to match down_proj")
    tokens = hidden_states.shape[0]
    check_shape("hidden_states", hidden_states, (tokens, hidden), "to match down_proj")
    check_shape("top_k_index", top_k_index, (tokens, top_k_index.shape[1]), "to match hidden_states")
    check_shape("top_k_weights", top_k_weights, top_k_index.shape, "to match top_k_index")
    if top_k_index.shape[1] == 0:
        raise ValueError("top_k_index: got top_k = 0, needs at least 1")
    if tokens * top_k_index.shape[1] >= _SIZE_BOUND:
        raise ValueError(
            f"hidden_states: got {tokens} tokens with top_k {top_k_index.shape[1]}, needs below {_SIZE_BOUND} slots"
        )
    return experts, hidden, intermediate


def check_bias(name, bias, shape, meaning):
    if bias is not None:
        check_tensor(name, bias, (torch.bfloat16, torch.float32), 2)
        check_shape(name, bias, shape, meaning)


def check_gate(gate, limit, alpha):
    """``(limit, alpha)`` as the registered op takes them; a limit of infinity means that there is none."""
    if not isinstance(gate, str) or gate not in GATES:
        raise ValueError(f"gate: got {gate!r}, needs one of {', '.join(map(repr, GATES))}")
    for name, value in (("limit", limit), ("alpha", alpha)):
        check_kind(name, value, int | float | None, "None or a number")
        if value is not None and not abs(value) <= _FP32_MAX:  # true for NaN too
            raise ValueError(f"{name}: got {value}, needs None or a finite number in the range of fp32")
    if limit is not None and limit <= 0:
        raise ValueError(f"limit: got {limit}, needs None or a positive number")
    if alpha is not None and gate != "swiglu_oai":
        raise ValueError(f"alpha: got {alpha} with gate {gate!r}, needs None: only 'swiglu_oai' has it")
    return (math.inf if limit is None else float(limit)), (ALPHA if alpha is None else float(alpha))


def check_probability(name, value):
    check_kind(name, value, int | float, "a number")
    if not 0 <= value < 1:  # true for NaN too
        raise ValueError(f"{name}: got {value}, needs a probability, at least 0 and below 1")


def check_dropout(lora_dropout, dropout_seed):
    """The seed as the registered op takes it: a 0-d tensor, or None without dropout."""
    check_probability("lora_dropout", lora_dropout)
    if isinstance(dropout_seed, torch.Tensor):
        check_tensor("dropout_seed", dropout_seed, (torch.int64,), 0)
        if dropout_seed.device.type != "cpu":
            raise ValueError(f"dropout_seed: got a tensor on {dropout_seed.device}, needs one on the CPU")
    elif dropout_seed is not None:
        check_kind("dropout_seed", dropout_seed, int, "None, an int or a 0-d tensor")
        if not -(2**63) <= dropout_seed < 2**63:
            raise ValueError(f"dropout_seed: got {dropout_seed}, needs an int of 64 bits")
        dropout_seed = torch.tensor(dropout_seed, dtype=torch.int64, device="cpu")
    if lora_dropout == 0:
        return None
    return torch.randint(2**63 - 1, (), device="cpu") if dropout_seed is None else dropout_seed


def check_lora(name, lora, experts, in_features, out_features):
    """``(lora_A, lora_B, scaling)``; both matrices are None, and scaling is 1, if ``lora`` is None."""
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        raise TypeError(f"{name}: got {type(lora).__name__}, needs None or (lora_A, lora_B, scaling)")
    lora_A, lora_B, scaling = lora
    floats = (torch.bfloat16, torch.float32)
    check_tensor(f"{name} lora_A", lora_A, floats, 2)
    check_tensor(f"{name} lora_B", lora_B, floats, 2)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"{name}: got lora_A {lora_A.dtype} and lora_B {lora_B.dtype}, needs the same dtype")
    rank = lora_A.shape[0] // experts
    if rank == 0 or lora_A.shape[0] != rank * experts:
        raise ValueError(f"{name} lora_A: got {lora_A.shape[0]} rows, needs rank * {experts} (experts), rank >= 1")
    if lora_A.shape[0] >= _SIZE_BOUND:
        raise ValueError(f"{name} lora_A: got {lora_A.shape[0]} rows, needs below {_SIZE_BOUND}")
    shape_A, shape_B = lora_layout.shapes(rank, experts, out_features, in_features)
    check_shape(f"{name} lora_A", lora_A, shape_A, "(experts * rank, in)")
    check_shape(f"{name} lora_B", lora_B, shape_B, "(out, rank * experts)")
    if not isinstance(scaling, int | float):
        raise TypeError(f"{name} scaling: got {type(scaling).__name__}, needs a float")
    if not abs(scaling) <= _FP32_MAX:  # true for NaN too
        raise ValueError(f"{name} scaling: got {scaling}, needs a finite number in the range of fp32")
    return lora_A, lora_B, float(scaling)
