"""What becomes of the outputs of gate_up: ``h = act(gate) * factor(up)``, forward and backward, in plain torch.

:func:`apply_gate` is the definition (see :func:`ktlib.moe_experts` for the formulas). :func:`gate_parts` and
:func:`gate_backward` are its derivative, for a GPU.
"""

import math
from collections import namedtuple

import torch
import torch.nn.functional as F

GATES = ("silu", "gelu", "gelu_tanh", "swiglu_oai")  # in the order of csrc/kernels/kernels.h, enum Activation
ALPHA = 1.702  # of "swiglu_oai" unless the call says otherwise
_TANH = math.sqrt(8 / math.pi), 0.044715  # 0.5 * (1 + tanh(y)) is sigmoid(2 * y), hence 8 in the place of 2
_LARGE = 2.0**100


def split_gate_up(gate_up, interleaved, dim=-1):
    """Views of gate and up in the outputs of gate_up along ``dim``: one after the other, or alternating."""
    if interleaved:
        return gate_up.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
    return gate_up.chunk(2, dim)


def clamp_gate(gate, up, limit):
    """Gate and up within ``limit``, if there is one."""
    if limit is not None:  # not torch.clamp: at a NaN its gradient is 0, which would hide it
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return gate, up


def apply_gate(gate_proj, up_proj, gate="silu", limit=None, alpha=None):
    """``h`` of these values of gate and up, elementwise, in their dtype; ValueError for an unknown gate.

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


Parts = namedtuple("Parts", "act slope factor")  # h is act * factor; slope is the derivative of act by the gate


def gate_parts(gate_proj, up_proj, gate, limit, alpha):
    """The :class:`Parts` of ``apply_gate`` with the same arguments, in their dtype."""
    g, u = clamp_gate(gate_proj, up_proj, limit)
    return Parts(*_act_and_slope(g, gate, alpha), _factor(u, gate))


def gate_backward(dh, gate_proj, up_proj, parts, limit, results):
    """Write the gradients of gate and up into ``results``, from that of ``h = parts.act * parts.factor``."""
    d_gate, d_up = results
    torch.mul(dh * parts.factor, parts.slope, out=d_gate)
    torch.mul(dh, parts.act, out=d_up)
    if limit is not None:
        d_gate.masked_fill_(gate_proj > limit, 0.0)
        d_up.masked_fill_(up_proj.abs() > limit, 0.0)


def _act_and_slope(g, gate, alpha):
    if gate == "gelu":
        share = torch.special.erfc(-g / math.sqrt(2)) / 2
        return g * share, share + g * torch.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    if gate == "gelu_tanh":
        share = torch.sigmoid(_TANH[0] * (g + _TANH[1] * g**3))
        bend = share * (1 - share)  # where it has vanished, the derivative of what the sigmoid is of may be infinite
        inner = g * bend * (_TANH[0] * (1 + 3 * _TANH[1] * g**2))
        return g * share, share + torch.where(bend == 0, 0.0, inner)
    factor = alpha if gate == "swiglu_oai" else 1.0
    within = g.clamp(-_LARGE, _LARGE)  # the sigmoid is 0 or 1 long before, and infinity times 0 would be NaN
    share = torch.sigmoid(within * factor if gate == "swiglu_oai" else within)
    return g * share, torch.addcmul(share, within * share, 1 - share, value=factor)
