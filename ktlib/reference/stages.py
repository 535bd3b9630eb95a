"""The stages of the routed experts in plain torch at float64: at which stage a value first leaves the finite range.

:func:`ktlib.reference.moe_experts` computes the layer's output alone. This module also returns each intermediate value,
expert by expert. It is slow: it serves to find the cause of a NaN, or to measure how far a layer is from overflow.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ktlib.reference.gates import split_gate_up
from ktlib.reference.layer import expert_lora, expert_weight, project

FORWARD = ("input", "routing weight", "gate", "up", "activation", "down", "output")
BACKWARD = (
    "gradient of output", "gradient of down", "gradient of routing weight", "gradient of activation",
    "gradient of gate", "gradient of up", "gradient of input",
)  # fmt: skip
_OPERANDS = {"gate": "gate_up", "up": "gate_up", "down": "down"}


@dataclass
class Place:
    """The first non-finite value of a layer: its stage, expert, token, and in ``reason`` the operand that caused it."""

    stage: str
    expert: int | None
    token: int
    slot: int | None
    reason: str
    values: torch.Tensor  # (width,) float64: all values of this stage, expert and token


def stages(layer, expert, apply_gate, grad_output=None):
    """``(token, slot, {stage: values})`` of the n rows of one expert: token and slot (n,), values (n, width) float64.

    Args:
        layer: arguments of ``moe_experts`` as a dict; those with a default may be missing.
        expert: the expert's id.
        apply_gate: function of the (n, 2 * intermediate) gate and up values, such as ``experts._apply_gate``.
        grad_output: (tokens, hidden) or None; if given, the stages of backward follow those of forward.

    LoRA's inner products are rounded to fp32, their type in the kernels, so that they overflow here as they do there.
    """
    token, slot = torch.where(layer["top_k_index"] == expert)
    interleaved = layer.get("interleaved", False)
    with torch.enable_grad():
        x = layer["hidden_states"][token].detach().double().requires_grad_()
        weight = layer["top_k_weights"][token, slot, None].detach().double().requires_grad_()
        gate_up = _project(x, layer, "gate_up", expert)
        activation = apply_gate(gate_up)
        down = _project(activation, layer, "down", expert)
        output = down * weight
    gate, up = split_gate_up(gate_up.detach(), interleaved)
    values = {"input": x, "routing weight": weight, "gate": gate, "up": up, "activation": activation, "down": down}
    values["output"] = output
    if grad_output is not None:
        values["gradient of output"] = grad_output[token].double()
        inputs = {"down": down, "routing weight": weight, "activation": activation, "gate_up": gate_up, "input": x}
        gradients = torch.autograd.grad(output, list(inputs.values()), values["gradient of output"])
        gradients = {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
        halves = split_gate_up(gradients.pop("gradient of gate_up"), interleaved)
        values |= gradients | dict(zip(("gradient of gate", "gradient of up"), halves, strict=True))
    return token, slot, {name: value.detach() for name, value in values.items()}


def _project(x, layer, name, expert):
    weight, lora, bias = (layer.get(f"{name}_{argument}") for argument in ("proj", "lora", "bias"))
    y = project(x, expert, weight, lora, bias, layer.get("transposed", False))
    if lora is not None:
        a, b = expert_lora(lora, expert, len(weight))
        inner = F.linear(x.detach(), a.detach().double())
        # The difference that rounding to fp32 makes: tiny, or Inf and NaN where the inner product exceeds fp32's range.
        y = y + lora[2] * F.linear(inner.float().double() - inner, b.detach().double())
    return y


def finite(values):
    """Which float64 values are finite in bf16, whose range is nearly that of fp32."""
    return values.to(torch.bfloat16).isfinite()


def ranges(layer, apply_gate, grad_output=None):
    """``{stage: largest |value|}`` over all experts and tokens of a layer, in float64."""
    largest = {}
    for expert in layer["top_k_index"].unique().tolist():
        for stage, values in stages(layer, expert, apply_gate, grad_output)[2].items():
            largest[stage] = max(largest.get(stage, 0.0), values.abs().max().item())
    return largest


def locate(layer, apply_gate, grad_output=None):
    """The first :class:`Place` whose value is not finite, or None if the whole layer is finite in float64.

    First by stage, then by token. With ``grad_output`` only the stages of backward are searched.
    """
    order = FORWARD if grad_output is None else BACKWARD
    first = None
    for expert in layer["top_k_index"].unique().tolist():
        token, slot, values = stages(layer, expert, apply_gate, grad_output)
        for rank, stage in enumerate(order):
            bad = ~finite(values[stage]).all(dim=-1)
            if bad.any():
                row = int(bad.nonzero()[0])
                key = (rank, int(token[row]), expert)
                if first is None or key < first[0]:
                    first = key, Place(stage, expert, int(token[row]), int(slot[row]), "", values[stage][row])
                break
    if first is None:
        return _sum_over_experts(layer, apply_gate) if grad_output is None else None
    place = first[1]
    place.reason = _blame(layer, place)
    return place


def _sum_over_experts(layer, apply_gate):
    output = torch.zeros(layer["hidden_states"].shape, dtype=torch.float64, device=layer["hidden_states"].device)
    for expert in layer["top_k_index"].unique().tolist():
        token, _, values = stages(layer, expert, apply_gate)
        output.index_add_(0, token, values["output"])
    bad = ~finite(output).all(dim=-1)
    if not bad.any():
        return None
    token = int(bad.nonzero()[0])
    return Place("output", None, token, None, "the sum over experts overflows bf16", output[token])


def _blame(layer, place):
    if place.stage in ("input", "routing weight", "gradient of output"):
        return "it came in like this"
    name = _OPERANDS.get(place.stage)
    lora = layer.get(f"{name}_lora")
    if name is not None:
        weight = expert_weight(layer[f"{name}_proj"], place.expert, layer.get("transposed", False))
        operands = {"proj": weight.detach()}
        if layer.get(f"{name}_bias") is not None:
            operands["bias"] = layer[f"{name}_bias"][place.expert].detach()
        for operand, values in operands.items():
            if name == "gate_up":
                values = split_gate_up(values, layer.get("interleaved", False), dim=0)[place.stage == "up"]
            if not values.isfinite().all():
                return f"{name}_{operand}[{place.expert}] of the base model holds {_count(values)}"
        factors = () if lora is None else expert_lora(lora, place.expert, len(layer[f"{name}_proj"]))
        for letter, matrix in zip("AB", factors, strict=False):
            if not matrix.isfinite().all():
                return f"{name} lora_{letter} of the expert holds {_count(matrix)}"
    return "finite operands whose result leaves the range of bf16"


def _count(tensor):
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return " and ".join(f"{n} {kind}" for n, kind in ((nan, "NaN"), (inf, "Inf")) if n)
