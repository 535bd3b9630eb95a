"""Gate functions ``h = act(gate) * factor(up)`` of the outputs of gate_up_proj, forward and backward, in plain torch.

:func:`apply_gate` is the definition (see :func:`ktlib.moe_experts` for the formulas). :func:`gate_terms` and
:func:`gate_backward` are its derivative, for a GPU.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

GATES = ("silu", "gelu", "gelu_tanh", "swiglu_oai")  # in the order of csrc/kernels/kernels.h, enum Activation
ALPHA = 1.702  # default of "swiglu_oai"
# For GELU by tanh: sigmoid(2 * y) is 0.5 * (1 + tanh(y)), hence sqrt(8 / pi) in the place of the usual sqrt(2 / pi).
_TANH = math.sqrt(8 / math.pi), 0.044715
_LARGE = 2.0**100  # here a sigmoid has long been 0 or 1


def split_gate_up(gate_up, interleaved, dim=-1):
    """Views of gate and up in the outputs of gate_up_proj along ``dim``: the two halves, or alternating ones."""
    if interleaved:
        return gate_up.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
    return gate_up.chunk(2, dim)


def clamp_gate(gate, up, limit):
    """Gate clamped to at most ``limit``, and up to [-limit, limit]; both unchanged if ``limit`` is None."""
    if limit is not None:  # not torch.clamp, whose gradient at a NaN is 0 and would hide the NaN
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return gate, up


def apply_gate(gate_proj, up_proj, gate="silu", limit=None, alpha=None):
    """``h`` of the values of gate and up, elementwise, in their dtype; ValueError for an unknown gate.

    Both GELUs are written without the sum 1 + erf or 1 + tanh, which loses the lower tail even in float64.
    """
    g, u = clamp_gate(gate_proj, up_proj, limit)
    if gate == "silu":
        act = F.silu(g)
    elif gate == "gelu":
        act = g * torch.special.erfc(-g / math.sqrt(2)) / 2
    elif gate == "gelu_tanh":
        act = g * torch.sigmoid(_TANH[0] * (g + _TANH[1] * g**3))
    elif gate == "swiglu_oai":
        act = g * torch.sigmoid((ALPHA if alpha is None else alpha) * g)
    else:
        raise ValueError(f"gate: got {gate!r}, the reference knows {', '.join(map(repr, GATES))}")
    return act * _factor(u, gate)


def _factor(up, gate):
    return up + 1 if gate == "swiglu_oai" else up


class GateTerms(NamedTuple):
    act: torch.Tensor
    slope: torch.Tensor  # derivative of act by the gate
    factor: torch.Tensor  # h is act * factor


def gate_terms(gate_proj, up_proj, gate, limit, alpha):
    """The :class:`GateTerms` of ``apply_gate`` with the same arguments, in their dtype."""
    g, u = clamp_gate(gate_proj, up_proj, limit)
    return GateTerms(*_act_and_slope(g, gate, alpha), _factor(u, gate))


def gate_backward(dh, gate_proj, up_proj, terms, limit, results):
    """Write the gradients of gate and up into ``results``; ``dh`` is the gradient of ``terms.act * terms.factor``."""
    d_gate, d_up = results
    torch.mul(dh * terms.factor, terms.slope, out=d_gate)
    torch.mul(dh, terms.act, out=d_up)
    if limit is not None:
        d_gate.masked_fill_(gate_proj > limit, 0.0)
        d_up.masked_fill_(up_proj.abs() > limit, 0.0)


def _act_and_slope(g, gate, alpha):
    if gate == "gelu":
        cdf = torch.special.erfc(-g / math.sqrt(2)) / 2
        return g * cdf, cdf + g * torch.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    if gate == "gelu_tanh":
        sigmoid = torch.sigmoid(_TANH[0] * (g + _TANH[1] * g**3))
        d_sigmoid = sigmoid * (1 - sigmoid)  # where this is 0, the derivative of the sigmoid's argument may be infinite
        chain = g * d_sigmoid * (_TANH[0] * (1 + 3 * _TANH[1] * g**2))
        return g * sigmoid, sigmoid + torch.where(d_sigmoid == 0, 0.0, chain)
    scale = alpha if gate == "swiglu_oai" else 1.0
    bounded = g.clamp(-_LARGE, _LARGE)  # with an infinite g, infinity times 0 would be NaN
    sigmoid = torch.sigmoid(bounded * scale if gate == "swiglu_oai" else bounded)
    return g * sigmoid, torch.addcmul(sigmoid, bounded * sigmoid, 1 - sigmoid, value=scale)
