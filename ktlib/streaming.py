"""Routed experts computed on a GPU whose memory does not hold them: weights cross the bus for the time of a product.

An expert that many tokens chose costs a CPU time in proportion to them, and a GPU hardly more than the copy of its
weights, which is the same for one token as for a thousand. So from some number of rows on the copy is faster than the
CPU; :func:`ktlib.moe_experts` sends such experts here and computes the others itself.

Nothing is kept: weights pass through two buffers of a few experts' size, and backward lets them pass once more and
computes gate and up again. Values are rounded to bf16 where the CPU's kernels round them (csrc/moe.h); sums over tokens
are taken in a fixed order, so a repeated call gives the same bits.
"""

import contextlib
import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch

from ktlib import _kernels, reference
from ktlib.threads import operator_threads
from ktlib.weight_stream import download, upload, weights_on

GROUP_BYTES = 2**27  # experts are computed together while their weights are not larger
BLOCK = 2048  # rows of one expert that are computed together
PROJECTIONS = ("gate_up", "down")


class Streamed:
    """The part of one call that is computed on ``settings.stream_device``.

    Experts with similar numbers of rows form a group, whose products are single batched ones: rows of the smaller ones
    are filled up with zeros.

    Args:
        tensors: the call's arguments, checked, contiguous and on the CPU; hidden_states in bf16, top_k_weights in fp32.
        settings: its settings.
        scalings: of both LoRA pairs, divided by what dropout keeps.
        dropout: (seed, threshold) as the kernels take them.
        chosen: (experts,) bool, see :func:`choose`.
    """

    def __init__(self, tensors, settings, scalings, dropout, chosen):
        self.tensors, self.settings, self.dropout, self.chosen = tensors, settings, dropout, chosen
        self.scaling = dict(zip(PROJECTIONS, scalings, strict=True))
        self.gate = settings.gate, None if math.isinf(settings.limit) else settings.limit, settings.alpha
        self.device = torch.device(settings.stream_device)
        _kernels.select_isa(settings.isa)  # wrong names are errors also where nothing is left for the CPU
        self.groups = _groups(tensors.top_k_index, chosen.numpy(), self._limit())
        self.leaves_rows = sum(len(block.slots) for _, blocks in self.groups for block in blocks) < self._slots

    def forward(self):
        """What the chosen experts add to the output: (tokens, hidden) fp32 on the device, perhaps not computed yet."""
        with self._ready():
            output = self._zeros(self.tensors.hidden_states.shape)
            for group in self._on_device():
                for block in group.blocks:
                    h = self._activate(self._project(group, block, "gate_up", block.x))
                    y = self._project(group, block, "down", h)
                    self._add(output, block, y.mul_(block.weights))
            return output

    def backward(self, grad_output, wanted):
        """What the chosen experts add to the gradients named in ``wanted``: fp32, in their shapes, on the device."""
        with self._ready():
            grad_output = self._with_zeros(grad_output)
            grads = {name: self._zeros(self._grad_shape(name)) for name in wanted}
            for group in self._on_device():
                for block in group.blocks:
                    self._backward_of(group, block, grad_output[block.tokens], grads)
            return {name: self._as_given(name, grad) for name, grad in grads.items()}

    def complete(self, results):
        """Add to each of ``[(result, what the device has computed of it), ...]``; it holds the CPU's part, if any."""
        with self._ready():
            if self.leaves_rows:
                results = [(result, upload(result, self.device).float() + streamed) for result, streamed in results]
            download([(streamed, result) for result, streamed in results])

    # --------------------------------------------------------------------- one block of rows, (experts, rows, features)

    def _backward_of(self, group, block, dy, grads):
        gate_up = self._project(group, block, "gate_up", block.x)
        h = self._activate(gate_up)
        dh = _product(dy, self._matrix(group, block, "down").mT)
        d_weights = (dh * h).sum(2)
        if group.biases["down"] is not None:
            d_weights += (dy * group.biases["down"][: block.experts, None]).sum(2)
        if "down" in group.lora:
            # the routing weight comes last: the expert's output is not needed for its gradient
            lora_A, lora_B = self._pair(group, block, "down")
            inner = _product(dy, lora_B).mul_(self.scaling["down"])
            term = torch.bmm(inner, lora_A.float())
            d_weights += (term * self._kept(block, "down", h)).sum(2)
            dh += self._kept(block, "down", term)
            self._lora_grads(group, block, "down", h, inner.mul_(block.weights), dy, grads, block.weights)
        if "top_k_weights" in grads:
            grads["top_k_weights"].view(-1)[block.slots] = d_weights.flatten()[block.places]
        d_gate_up = self._join(*gate_backward(dh.mul_(block.weights), *self._split(gate_up), *self.gate)).bfloat16()
        if "gate_up" in group.lora:
            lora_A, lora_B = self._pair(group, block, "gate_up")
            inner = _product(d_gate_up, lora_B).mul_(self.scaling["gate_up"])
            self._lora_grads(group, block, "gate_up", block.x, inner, d_gate_up, grads)
        if "hidden_states" in grads:
            dx = _product(d_gate_up, self._matrix(group, block, "gate_up").mT)
            if "gate_up" in group.lora:
                dx += self._kept(block, "gate_up", torch.bmm(inner, lora_A.float()))
            self._add(grads["hidden_states"], block, dx)

    def _lora_grads(self, group, block, projection, x, inner, d_out, grads, weights=1.0):
        """Gradients of one pair: A's from ``inner``, what reaches it from behind; B's from its output's gradient."""
        experts = group.index[: block.experts]
        x = self._kept(block, projection, x)
        if (name := f"{projection}_lora_A") in grads:
            inner, inputs = self._real(block, inner), self._real(block, x.float())
            grads[name].index_add_(0, experts, torch.bmm(inner.mT, inputs))
        if (name := f"{projection}_lora_B") in grads:
            t = _product(x, self._pair(group, block, projection)[0].mT).mul_(self.scaling[projection]).mul_(weights)
            d_out, t = self._real(block, d_out.float()), self._real(block, t)
            grads[name].index_add_(0, experts, torch.bmm(d_out.mT, t))

    def _real(self, block, rows):
        """Without what infinite weights have made of the rows that fill up."""
        return rows if block.real is None else torch.where(block.real, rows, 0.0)

    def _project(self, group, block, projection, x):
        """One projection of the rows ``x`` with LoRA and bias, fp32."""
        result = _product(x, self._matrix(group, block, projection))
        if projection in group.lora:
            lora_A, lora_B = self._pair(group, block, projection)
            t = _product(self._kept(block, projection, x), lora_A.mT).mul_(self.scaling[projection])
            result.baddbmm_(t, lora_B.float().mT)
        if group.biases[projection] is not None:
            result += group.biases[projection][: block.experts, None]
        return result

    def _matrix(self, group, block, projection):
        """(experts, in, out), a view."""
        weight = group.weights[PROJECTIONS.index(projection)][: block.experts]
        return weight if self.settings.transposed else weight.mT

    def _pair(self, group, block, projection):
        return [matrix[: block.experts] for matrix in group.lora[projection]]

    def _kept(self, block, projection, x):
        """What dropout keeps of the input of a LoRA pair, or of the input's gradient."""
        return torch.where(block.masks[projection], x, 0.0) if projection in block.masks else x

    def _split(self, gate_up):
        return (gate_up[..., 0::2], gate_up[..., 1::2]) if self.settings.interleaved else gate_up.chunk(2, dim=-1)

    def _join(self, gate, up):
        return torch.stack([gate, up], -1).flatten(-2) if self.settings.interleaved else torch.cat([gate, up], -1)

    def _activate(self, gate_up):
        return reference.apply_gate(*self._split(gate_up), *self.gate).bfloat16()

    def _add(self, sums, block, rows):
        rows, tokens = rows.flatten(0, 1)[block.places], block.slots // self._top_k
        if sums.is_cuda:  # of both, the one that adds in a fixed order there
            sums.index_put_((tokens,), rows, accumulate=True)
        else:
            sums.index_add_(0, tokens, rows)

    # -------------------------------------------------------------------------------------------------- what it needs

    @property
    def _slots(self):
        return self.tensors.top_k_index.numel()

    @property
    def _top_k(self):
        return self.tensors.top_k_index.shape[1]

    def _limit(self):
        """Experts in one group."""
        one = sum(weight[0].nbytes for weight in (self.tensors.gate_up_proj, self.tensors.down_proj))
        return max(1, GROUP_BYTES // one)

    @contextlib.contextmanager
    def _ready(self):
        """Whatever surrounds the call (autocast, another current device) does not matter within."""
        guard = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with guard, torch.autocast(self.device.type, enabled=False), torch.no_grad():
            yield

    def _on_device(self):
        """The groups, one after the other, with all that they need on the device."""
        t = self.tensors
        weights, groups = (t.gate_up_proj, t.down_proj), [experts.tolist() for experts, _ in self.groups]
        with weights_on(weights, groups, self.device) as streamed:
            hidden_states = self._with_zeros(t.hidden_states)
            routing = self._with_zeros(t.top_k_weights.view(-1, 1))
            biases = [b if b is None else upload(b, self.device).float() for b in (t.gate_up_bias, t.down_bias)]
            lora = {p: self._lora(p) for p in PROJECTIONS if getattr(t, f"{p}_lora_A") is not None}
            index = self._index()
            for matrices, (_, blocks) in zip(streamed, self.groups, strict=True):
                group = SimpleNamespace(weights=matrices, index=next(index))
                group.lora = {p: [matrix[group.index] for matrix in pair] for p, pair in lora.items()}
                group.biases = {p: b if b is None else b[group.index] for p, b in zip(PROJECTIONS, biases, strict=True)}
                group.blocks = (self._block(rows, index, hidden_states, routing, lora) for rows in blocks)
                yield group

    def _block(self, rows, index, hidden_states, routing, lora):
        slots, places, padded = (next(index) for _ in rows)
        tokens = torch.div(padded, self._top_k, rounding_mode="floor")
        block = SimpleNamespace(slots=slots, places=places, tokens=tokens, experts=len(padded))
        block.x, block.weights = hidden_states[tokens], routing[padded]
        block.real = (padded < self._slots)[..., None] if len(rows.slots) < rows.padded.size else None
        block.masks = {p: self._mask(p, rows.padded) for p in lora} if self.dropout[1] else {}
        return block

    def _index(self):
        """All index arrays on the device, in the order of their use, by one copy."""
        arrays = []
        for experts, blocks in self.groups:
            arrays += [experts, *(array for rows in blocks for array in rows)]
        there = upload(torch.from_numpy(np.concatenate([array.ravel() for array in arrays])), self.device)
        for array, part in zip(arrays, there.split([array.size for array in arrays]), strict=True):
            yield part.view(array.shape)

    def _mask(self, projection, padded):
        features = getattr(self.tensors, f"{projection}_lora_A").shape[1]
        slots = torch.from_numpy(padded.ravel())
        bits = torch.empty((len(slots), features), dtype=torch.int16, pin_memory=self.device.type == "cuda")
        _kernels.keep_masks(
            self.settings.isa, operator_threads(), bits.data_ptr(), self.dropout, PROJECTIONS.index(projection),
            slots.data_ptr(), *bits.shape,
        )  # fmt: skip
        return bits.to(self.device, non_blocking=True).bool().view(*padded.shape, features)

    def _lora(self, projection):
        """lora_A (experts, rank, in) and lora_B (experts, out, rank), bf16, on the device."""
        lora_A, lora_B = (
            upload(getattr(self.tensors, f"{projection}_lora_{matrix}"), self.device).bfloat16() for matrix in "AB"
        )
        experts = len(self.tensors.gate_up_proj)
        by_expert = lora_B.view(len(lora_B), -1, experts).permute(2, 0, 1).contiguous()
        return lora_A.view(experts, -1, lora_A.shape[1]), by_expert

    def _grad_shape(self, name):
        given, experts = getattr(self.tensors, name), len(self.tensors.gate_up_proj)
        if name.endswith("lora_A"):
            return experts, len(given) // experts, given.shape[1]
        return (experts, len(given), given.shape[1] // experts) if name.endswith("lora_B") else given.shape

    def _as_given(self, name, grad):
        if name.endswith("lora_A"):
            return grad.flatten(0, 1)
        return grad.permute(1, 2, 0).flatten(1) if name.endswith("lora_B") else grad

    def _zeros(self, shape):
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _with_zeros(self, rows):
        """The rows on the device, and one more of zeros, which fills up the experts of a group."""
        result = torch.empty((len(rows) + 1, rows.shape[1]), dtype=rows.dtype, device=self.device)
        result[:-1] = upload(rows, self.device)
        result[-1] = 0
        return result


# Rows of a group's experts, on the host: their slots; where these lie among (experts, width) rows; the slots of all of
# those rows, the number of slots for one that fills up.
_Rows = namedtuple("_Rows", "slots places padded")


def choose(top_k_index, experts, rows):
    """Experts that at least ``rows`` choices fall on, (experts,) bool; None if there are none.

    Also None if an id is out of range: the kernels say which.
    """
    ids = top_k_index.flatten()
    if rows == 0 or not len(ids) or ids.min() < 0 or ids.max() >= experts:
        return None
    chosen = torch.bincount(ids, minlength=experts) >= rows
    return chosen if chosen.any() else None


def _groups(top_k_index, chosen, limit):
    """``[(experts, [_Rows, ...]), ...]``: the chosen experts by number of rows, at most ``limit`` in a group."""
    ids = top_k_index.flatten().int().numpy()  # a copy: memory that numpy has seen can no longer be resized
    # numpy sorts integers of 16 bits by their digits, ten times as fast as longer ones
    order = np.argsort(ids.astype(np.uint16) if len(chosen) <= 2**16 else ids, kind="stable")
    counts = np.bincount(ids, minlength=len(chosen))
    ends = np.cumsum(counts)
    experts = np.flatnonzero(chosen)
    experts = experts[np.argsort(-counts[experts], kind="stable")]
    groups = []
    for group in np.split(experts, range(limit, len(experts), limit)):
        slots = [order[ends[expert] - counts[expert] : ends[expert]] for expert in group]
        blocks = []
        for first in range(0, len(slots[0]), BLOCK):
            pieces = [some[first : first + BLOCK] for some in slots if len(some) > first]
            padded = np.full((len(pieces), len(pieces[0])), len(ids))
            for row, piece in zip(padded, pieces, strict=True):
                row[: len(piece)] = piece
            blocks.append(_Rows(np.concatenate(pieces), np.flatnonzero(padded < len(ids)), padded))
        groups.append((group, blocks))
    return groups


def _product(a, b):
    """The fp32 product of two batches of bf16 matrices."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def gate_backward(dh, gate, up, kind, limit, alpha):
    """Gradients of gate and up from that of ``h = reference.apply_gate(gate, up, ...)``; fp32, elementwise."""
    g, u = reference.clamp_gate(gate, up, limit)
    act, slope = _act(g, kind, alpha)
    d_gate, d_up = dh * (u + 1 if kind == "swiglu_oai" else u) * slope, dh * act
    if limit is not None:
        d_gate, d_up = torch.where(gate > limit, 0.0, d_gate), torch.where(up.abs() > limit, 0.0, d_up)
    return d_gate, d_up


def _act(gate, kind, alpha):
    """The activation of a gate, and its derivative."""
    if kind == "gelu":
        share = torch.special.erfc(-gate / math.sqrt(2)) / 2
        return gate * share, share + gate * torch.exp(-gate * gate / 2) / math.sqrt(2 * math.pi)
    if kind == "gelu_tanh":
        z, dz, factor = gate + 0.044715 * gate**3, 1 + 3 * 0.044715 * gate**2, math.sqrt(8 / math.pi)
    else:
        z, dz, factor = gate, 1.0, alpha if kind == "swiglu_oai" else 1.0
    share = torch.sigmoid(factor * z)
    bend = share * (1 - share)  # where it has vanished, z may be infinite
    return gate * share, share + torch.where(bend == 0, 0.0, gate * bend * factor * dz)
