"""The seam into transformers: ``experts_implementation="ktlib"``.

transformers 5 stores the routed experts of a layer as two 3-D parameters and dispatches their forward through
``transformers.integrations.moe.ExpertsInterface``. The integration is one function registered in that interface; no
module is replaced or wrapped. The function serves every model family whose experts have

    gate_up_proj (E, 2I, H) and down_proj (E, H, I) in bf16, or both transposed; biases or none;
    gate rows before up rows, or alternating with them; a gate that the operator has (found by its values)

A stock implementation computes all other experts, and logs one line per model and reason.
"""

import functools
import logging
import math
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from ktlib.integrations.stored_weight import StoredWeight, operand, refuse_gradients
from ktlib.operator.moe_experts import moe_experts
from ktlib.reference import gates

IMPLEMENTATION = "ktlib"
INTERFACE = "transformers.integrations.moe"
WEIGHT_NAMES = ("gate_up_proj", "down_proj")
BIAS_NAMES = ("gate_up_proj_bias", "down_proj_bias")


def is_experts(module):
    """True for a module whose forward goes through transformers' experts interface, whatever the family."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def experts_forward(
    self, hidden_states, top_k_index, top_k_weights, gate_up_lora=None, down_lora=None, lora_dropout=0.0
):
    """The registered function; ``self`` is the stock experts module.

    Args:
        hidden_states: (tokens, hidden), bf16 or fp32.
        top_k_index: (tokens, k), integers.
        top_k_weights: (tokens, k), floating point.
        gate_up_lora, down_lora: ``(lora_A (E*r, in), lora_B (out, r*E), scaling)`` in PEFT's layout, or None.
            :class:`ktlib.integrations.peft_lora.ParamWrapper` passes them as keyword arguments, so that modules hold no
            state of a call.
        lora_dropout: the dropout probability on the inputs of both LoRA pairs, as in :func:`ktlib.moe_experts`.

    Returns:
        (tokens, hidden) in hidden_states' dtype and on its device.

    Raises:
        RuntimeError: LoRA factors are given, which must not be ignored, and the operator does not serve the experts.
    """
    reason = unserved(self, hidden_states)
    if reason is not None:
        if gate_up_lora is not None or down_lora is not None:
            raise RuntimeError(f"LoRA factors given to {type(self).__name__}, which ktlib does not serve: {reason}")
        name, forward = stock_forward(self)
        warn_once(self, f"using transformers' {name} experts instead of ktlib: {reason}")
        return forward(self, hidden_states, top_k_index, top_k_weights)
    if top_k_weights.dtype not in (torch.bfloat16, torch.float32):
        top_k_weights = top_k_weights.float()
    output = moe_experts(
        hidden_states,
        top_k_index.long(),
        top_k_weights,
        operand(self.gate_up_proj),
        operand(self.down_proj),
        gate_up_lora,
        down_lora,
        lora_dropout=lora_dropout,
        **layout(self),
        **gate_of(self),
        parts=getattr(self, "ktlib_parts", 1),
        stream_rows=getattr(self, "ktlib_stream_rows", None),
    )
    return refuse_gradients(output, self.gate_up_proj, self.down_proj)


def layout(experts):
    """How a stock experts module stores its parameters, as keyword arguments of the operator: biases and flags.

    The rows of a StoredWeight are outputs, whatever the class.
    """
    biases = [getattr(experts, name) if experts.has_bias else None for name in BIAS_NAMES]
    return {
        "gate_up_bias": biases[0],
        "down_bias": biases[1],
        "transposed": experts.is_transposed and not isinstance(_stored(experts, WEIGHT_NAMES[0]), StoredWeight),
        "interleaved": not getattr(experts, "is_concatenated", True),
    }


def unsupported(experts):
    """Why the operator can never compute experts of this class and config, in words; None if it can."""
    if (reason := other_form(experts)) is not None:
        return reason
    return f"its gate is none of {', '.join(gates.GATES)}" if gate_of(experts) is None else None


def other_form(experts):
    """Why the operator does not have the structure of these experts, in words; None if only gate or weights matter."""
    if not experts.has_gate:
        return "its experts have no gate"
    if getattr(experts, "has_post_expert_norm", False):
        return "its experts end in a norm"
    return None


def unserved(experts, hidden_states):
    """Why the operator cannot compute this call, in words; None if it can."""
    if (reason := other_form(experts)) is not None:
        return reason
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are distributed over processes"
    for name in WEIGHT_NAMES:
        weight = _stored(experts, name)
        if weight.dtype != torch.bfloat16:
            return (
                f"{name} is {weight.dtype}, the operator takes torch.bfloat16: load the model with dtype='bfloat16' "
                "(for TRL to do it: model_init_kwargs={'dtype': 'bfloat16'})"
            )
        if weight.device.type != "cpu":
            return f"{name} is on {weight.device}, the operator takes CPU weights"
        if not isinstance(weight, StoredWeight) and not weight.is_contiguous():
            return f"{name} is not contiguous"
    if experts.is_transposed and len({isinstance(_stored(experts, name), StoredWeight) for name in WEIGHT_NAMES}) > 1:
        return "one of its weights stays as it is in the checkpoint and the other does not, in another layout"
    for name in BIAS_NAMES if experts.has_bias else ():
        if getattr(experts, name).dtype not in (torch.bfloat16, torch.float32):
            return f"{name} is {getattr(experts, name).dtype}, the operator takes torch.bfloat16 or torch.float32"
    if hidden_states.dtype not in (torch.bfloat16, torch.float32):
        return f"hidden_states are {hidden_states.dtype}, the operator takes torch.bfloat16 or torch.float32"
    if (reason := unsupported(experts)) is not None:
        return reason
    if hasattr(experts, "parametrizations"):
        return "stock PEFT adapters build its dense W + BA; ktlib.factor_adapters(model) switches to the factored path"
    return None


def _stored(experts, name):
    """The stored weight. While stock PEFT parametrizes a weight, its attribute is W + BA, computed at each access."""
    parametrized = getattr(experts, "parametrizations", {})
    return parametrized[name].original if name in parametrized else getattr(experts, name)


def _unparametrized_class(experts):
    """The class of an experts module, without the subclass that torch makes each time it parametrizes the module."""
    return type(experts).__base__ if hasattr(experts, "parametrizations") else type(experts)


def stock_forward(experts):
    """``("grouped_mm" | "eager", function)``: the fastest stock implementation that can run these experts."""
    # torch.nn.functional.grouped_mm needs rows of a multiple of 16 bytes, in forward and in backward.
    weights = [w for w in experts.parameters() if w.dim() == 3]
    if all(size * w.element_size() % 16 == 0 for w in weights for size in w.shape[1:]):
        return "grouped_mm", sys.modules[INTERFACE].ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return "eager", type(experts).forward.__wrapped__


def gate_of(experts):
    """The gate of experts as keyword arguments of the operator, found by calling ``experts._apply_gate``.

    None if the operator has no such gate. The result is cached by gate function, activation and their plain settings,
    so that a replaced activation is noticed in the next forward.
    """
    gate = _known_gate(experts)
    return None if gate is None else dict(zip(("gate", "limit", "alpha"), gate, strict=True))


def _known_gate(experts):
    key = _gate_key(experts)
    if key not in _gates:
        # The first call may happen under torch.export, FakeTensorMode, torch.jit.trace, vmap or autocast. These apply
        # only to the thread that entered them, so the probe runs in another thread: with real tensors, and untraced.
        with ThreadPoolExecutor(1) as thread:
            _gates[key] = thread.submit(_probe_gate, experts).result()
    return _gates[key]


_gates = {}


@functools.cache
def keep_out_of_graphs():
    """Tell torch.compile not to trace the functions that find the gate and that log.

    From torch 2.13 on, a compiled graph contains the gate as a constant (a tuple, since a dict cannot be one), and
    messages are logged while the graph is compiled. Older versions of torch cannot take the result of a function of a
    module as a constant; they split the graph at each of these functions. Both decorators import torch's compiler,
    which transformers imports too, but ``import ktlib`` should not.
    """
    global _known_gate, _log_once
    new_torch = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    keep_out = torch.compiler.assume_constant_result if new_torch else torch.compiler.disable
    _known_gate, _log_once = keep_out(_known_gate), keep_out(_log_once)


def _activations(experts):
    return [module for name, module in experts.named_children() if name != "parametrizations"]


def _gate_key(experts):
    """All that the gate can depend on: functions and plain settings of the experts module and of its activation."""
    children = _activations(experts)
    settings = [
        (name, value)
        for module in (experts, *children)
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) or (callable(value) and not name.endswith("forward"))
    ]
    return _unparametrized_class(experts), type(experts)._apply_gate, *map(type, children), *settings


@torch.no_grad()
def _probe_gate(experts):
    """``(gate, limit, alpha)`` of the operator that compute the same as the module's gate; None if there are none.

    As limit and alpha, the numbers among the module's attributes, such as its ``limit``, are tried: these are exact. An
    activation with tensors gives None whatever their values are, since they may be trained.
    """
    if any(child.state_dict() for child in _activations(experts)):
        return None
    values = torch.linspace(-20, 20, 401, device="cpu", dtype=torch.float64)
    powers = 2.0 ** torch.arange(21, device="cpu", dtype=torch.float64)  # larger than every limit
    values = torch.cat([values, powers, -powers])
    gate, up = values.repeat(3), torch.cat([values.roll(1), values.flip(0), values])
    width = _stored(experts, "down_proj").shape[1 if experts.is_transposed else 2]
    rows = torch.arange(-(-gate.numel() // width) * width, device="cpu").reshape(-1, width) % gate.numel()
    gate, up = gate[rows], up[rows]
    interleaved = layout(experts)["interleaved"]
    got = experts._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2) if interleaved else torch.cat([gate, up], -1))
    numbers = {float(v) for v in vars(experts).values() if type(v) in (int, float) and 0 < v < math.inf}
    for name in gates.GATES:
        for limit in (None, *numbers):
            for alpha in (None, *numbers) if name == "swiglu_oai" else (None,):
                want = gates.apply_gate(gate, up, name, limit, alpha)
                if got.shape == want.shape and torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5):
                    return name, limit, alpha
    return None


def warn_once(experts, message):
    """Log a warning about an experts module, once for all modules of its class in a model.

    The logger is "ktlib", which by default prints one line to stderr. Python's ``warnings`` would show the message once
    per process, however many models there are, and not at all in scripts that ignore warnings.
    """
    _log_once(experts.config, f"{_unparametrized_class(experts).__name__}: {message}")


def _log_once(config, message):
    if (id(config), message) not in _logged:
        _logged[id(config), message] = config
        logging.getLogger("ktlib").warning("ktlib: %s", message)


_logged = weakref.WeakValueDictionary()  # an entry is deleted with the config, whose id may then be another's
