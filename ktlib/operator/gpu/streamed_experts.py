"""Routed experts computed on a GPU whose memory does not hold them: weights cross the bus for the time of a product.

An expert that many tokens chose costs a CPU time in proportion to them, and a GPU hardly more than the copy of its
weights, which is the same for one token as for a thousand. So from some number of rows on the copy is faster than the
CPU; :func:`ktlib.moe_experts` sends such experts here and computes the others itself.

Nothing is kept: weights pass through two buffers of a few experts' size, and backward lets them pass once more and
computes gate and up again. Values are rounded to bf16 where the CPU's kernels round them (csrc/layer/moe.h); sums over
tokens are taken in a fixed order, so a repeated call gives the same bits.

Each operation that Python queues costs 10 to 40 microseconds of one core, and the thread that sends weights needs the
cores too. Hence experts are computed in groups, and what several groups need alike is made for all of them at once.
"""

import contextlib
import itertools
import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from ktlib import _kernels
from ktlib.operator.gpu.transfer import download, upload
from ktlib.operator.gpu.weight_source import weights_on
from ktlib.reference import lora_layout
from ktlib.reference.gates import apply_gate, gate_backward, gate_parts, split_gate_up
from ktlib.system.threads import operator_threads

GROUP_BYTES = 2**28  # experts are computed together while their weights are not larger
BLOCK_VALUES = 2**24  # and values of the widest matrix of all their rows not more
PROJECTIONS = ("gate_up", "down")


class Streamed:
    """The part of one call that is computed on ``settings.stream_device``.

    Experts with similar numbers of rows form a group, whose products are single batched ones: rows of the smaller ones
    are filled up with zeros.

    Args:
        tensors: the call's arguments, checked, contiguous and on the CPU; hidden_states in bf16, top_k_weights in fp32.
        settings: its settings.
        scalings: of both LoRA pairs, divided by what dropout keeps.
        dropout: ``_kernels.Dropout``.
        chosen: (experts,) bool, see :func:`choose`.
    """

    def __init__(self, tensors, settings, scalings, dropout, chosen):
        self.tensors, self.settings, self.dropout, self.chosen = tensors, settings, dropout, chosen
        self.scaling = dict(zip(PROJECTIONS, scalings, strict=True))
        self.gate = settings.gate, None if math.isinf(settings.limit) else settings.limit, settings.alpha
        self.device = torch.device(settings.stream_device)
        _kernels.select_isa(settings.isa)  # wrong names are errors also where nothing is left for the CPU
        ids = tensors.top_k_index.flatten().int().numpy()  # a copy: memory numpy has seen can no longer be resized
        counts = np.bincount(ids, minlength=len(chosen))
        self.ids, self.groups = ids, _groups(counts, chosen.numpy(), *self._limits())
        self.experts = np.concatenate(self.groups)
        self.leaves_rows = bool(counts[self.experts].sum() < self._slots)

    def forward(self):
        """What the chosen experts add to the output: (tokens, hidden) fp32 on the device, perhaps not computed yet."""
        with self._ready():
            output = self._zeros(self.tensors.hidden_states.shape)
            for group in self._on_device():
                for block in group.blocks:
                    gate_up, _ = self._project(group, block, "gate_up", block.x)
                    h = apply_gate(*split_gate_up(gate_up, self.settings.interleaved), *self.gate).bfloat16()
                    y, _ = self._project(group, block, "down", h)
                    _add(output, block, y, block.slot_weights)
            return output

    def backward(self, grad_output, wanted):
        """What the chosen experts add to the gradients named in ``wanted``: fp32, in their shapes, on the device."""
        with self._ready():
            grad_output = self._with_zeros(grad_output)
            grads = {name: self._zeros(self._grad_shape(name)) for name in wanted}
            for group in self._on_device():
                for block in group.blocks:
                    self._backward_of(group, block, grad_output[block.of_token], grads)
            return {name: self._as_given(name, grad) for name, grad in grads.items()}

    def complete(self, results):
        """Add to each of ``[(result, what the device has computed of it), ...]``; it holds the CPU's part, if any."""
        with self._ready():
            if self.leaves_rows:
                results = [(result, upload(result, self.device).float() + streamed) for result, streamed in results]
            download([(streamed, result) for result, streamed in results])

    # --------------------------------------------------------------------- one block of rows, (experts, rows, features)

    def _backward_of(self, group, block, dy, grads):
        gate_up, t = self._project(group, block, "gate_up", block.x)
        _clear(block, gate_up)
        gate, up = split_gate_up(gate_up, self.settings.interleaved)
        parts = gate_parts(gate, up, *self.gate)
        h = torch.mul(parts.act, parts.factor, out=self._rounded(gate.shape))
        dh, term = _product(dy, self._matrix(group, "down").mT), None
        if "down" in group.lora:
            inner = self._inner("down", dy, group.lora["down"].B)
            term = self._add_lora(dh, group, block, "down", inner)
        if "top_k_weights" in grads:  # they come last: the experts' outputs are not needed for their gradient
            d_weights = (dh * h).sum(2)
            if term is not None:  # of all of it: what is dropped of h is 0, which hides no NaN of lora_A
                d_weights += (term * self._kept(block, "down", h)).sum(2)
            if group.biases["down"] is not None:
                d_weights += (dy * group.biases["down"][:, None]).sum(2)
            grads["top_k_weights"][block.padded] = d_weights
        if term is not None:
            dh += self._kept(block, "down", term)
        _clear(block, dh)
        if "down" in group.lora:
            self._lora_grads(group, "down", self._kept(block, "down", h), inner, dy, grads, weights=block.weights)
        d_gate_up = self._rounded(gate_up.shape)
        halves = split_gate_up(d_gate_up, self.settings.interleaved)
        gate_backward(dh.mul_(block.weights), gate, up, parts, self.gate[1], halves)
        del gate_up, gate, up, parts, h, dh, halves  # large, as is what follows
        if "gate_up" in group.lora:
            inner = self._inner("gate_up", d_gate_up, group.lora["gate_up"].B)
            self._lora_grads(group, "gate_up", self._kept(block, "gate_up", block.x), inner, d_gate_up, grads, t=t)
        if "hidden_states" in grads:
            dx = _product(d_gate_up, self._matrix(group, "gate_up").mT)
            if "gate_up" in group.lora:
                term = self._add_lora(dx, group, block, "gate_up", inner)
                if term is not None:
                    dx += self._kept(block, "gate_up", term)
            _add(grads["hidden_states"], block, dx)

    def _project(self, group, block, projection, x):
        """One projection of the rows ``x`` with LoRA and bias, fp32; and LoRA's inner values, if there is LoRA."""
        result, t = _product(x, self._matrix(group, projection)), None
        if projection in group.lora:
            lora = group.lora[projection]
            t = self._inner(projection, self._kept(block, projection, x), lora.A.mT)
            result.baddbmm_(t, lora.B.float().mT)
        if group.biases[projection] is not None:
            result += group.biases[projection][:, None]
        return result, t

    def _add_lora(self, d_x, group, block, projection, inner):
        """Add to ``d_x`` what comes through one LoRA pair; ``inner`` has passed B. With dropout only return it."""
        lora_A = group.lora[projection].A.float()
        if projection in block.masks:
            return torch.bmm(inner, lora_A)
        d_x.baddbmm_(inner, lora_A)
        return None

    def _lora_grads(self, group, projection, x, inner, d_out, grads, t=None, weights=None):
        """Gradients of one pair: A's from its input ``x`` and ``inner``, B's from ``d_out`` and ``t`` or ``x``."""

        def weighted(rows):
            return rows.float() if weights is None else rows * weights

        if (name := f"{projection}_lora_A") in grads:
            grads[name][group.span].baddbmm_(weighted(inner).mT, x.float())
        if (name := f"{projection}_lora_B") in grads:
            t = self._inner(projection, x, group.lora[projection].A.mT) if t is None else t
            grads[name][group.span].baddbmm_(weighted(d_out).mT, t)

    def _inner(self, projection, rows, matrix):
        """Inner values of a LoRA pair, scaled: not a factor of the product with the other matrix, where 0 hides NaN."""
        return _product(rows, matrix).mul_(self.scaling[projection])

    def _matrix(self, group, projection):
        """(experts, in, out), a view."""
        weight = group.weights[projection]
        return weight if self.settings.transposed else weight.mT

    def _kept(self, block, projection, x):
        """What dropout keeps of the input of a LoRA pair, or of the input's gradient."""
        return torch.where(block.masks[projection], x, 0.0) if projection in block.masks else x

    # -------------------------------------------------------------------------------------------------- what it needs

    @property
    def _slots(self):
        return self.tensors.top_k_index.numel()

    def _limits(self):
        """Experts in one group, and rows of all of them."""
        t = self.tensors
        one = t.gate_up_proj[0].nbytes + t.down_proj[0].nbytes
        return max(1, GROUP_BYTES // one), max(1, BLOCK_VALUES // max(t.gate_up_proj.shape[1:]))

    @contextlib.contextmanager
    def _ready(self):
        """Whatever surrounds the call (autocast, another current device) does not matter within.

        But TF32, which the process allows or not: products of fp32 matrices may use it. (To switch it off and on again
        would reach the products of other threads, and two that do so at once may leave it off.)
        """
        guard = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with guard, torch.autocast(self.device.type, enabled=False), torch.no_grad():
            yield

    def _on_device(self):
        """The groups, one after the other, with all that they need on the device; made while weights are sent."""
        t = self.tensors
        with weights_on((t.gate_up_proj, t.down_proj), [g.tolist() for g in self.groups], self.device) as streamed:
            rows = _rows_of(self.ids, t.top_k_index.shape[1], len(self.chosen), self.groups, self._limits()[1])
            every = [one for of_group in rows for one in of_group]
            index = self._index(every)
            lora = {p: self._lora(p, index.experts) for p in PROJECTIONS if getattr(t, f"{p}_lora_A") is not None}
            biases = [b if b is None else upload(b, self.device).float() for b in (t.gate_up_bias, t.down_bias)]
            biases = {p: b if b is None else b[index.experts] for p, b in zip(PROJECTIONS, biases, strict=True)}
            blocks = self._blocks(every, index, lora)
            first = 0
            for matrices, experts, of_group in zip(streamed, self.groups, rows, strict=True):
                span = slice(first, first + len(experts))
                first = span.stop
                yield SimpleNamespace(
                    span=span,
                    weights=dict(zip(PROJECTIONS, matrices, strict=True)),
                    lora={p: _Lora(*(matrix[span] for matrix in pair)) for p, pair in lora.items()},
                    biases={p: b if b is None else b[span] for p, b in biases.items()},
                    blocks=itertools.islice(blocks, len(of_group)),
                )

    def _index(self, blocks):
        """All index arrays on the device, by one copy: the groups' experts, and for each field of _Rows its arrays."""
        fields = {n: np.concatenate([getattr(rows, n).ravel() for rows in blocks]) for n in _Rows._fields}
        fields["experts"] = self.experts
        there = upload(torch.from_numpy(np.concatenate(list(fields.values()))), self.device)
        parts = there.split([len(array) for array in fields.values()])
        return SimpleNamespace(**dict(zip(fields, parts, strict=True)))

    def _blocks(self, blocks, index, lora):
        """All blocks of rows, in the order of the groups, each made when it is asked for."""
        t = self.tensors
        hidden_states, routing = self._with_zeros(t.hidden_states), self._with_zeros(t.top_k_weights.view(-1, 1))

        def by_block(whole, name):
            return whole.split([getattr(rows, name).size for rows in blocks])

        of_token = torch.div(index.padded, t.top_k_index.shape[1], rounding_mode="trunc")
        fields = {
            "padded": by_block(index.padded, "padded"),
            "of_token": by_block(of_token, "padded"),
            "weights": by_block(routing[index.padded], "padded"),
            "filled": by_block((index.padded == self._slots)[:, None], "padded"),
            "slot_weights": by_block(routing[index.slots].view(-1), "slots"),
            "places": by_block(index.places, "places"),
            "tokens": by_block(index.tokens, "tokens"),
            "starts": by_block(index.starts, "starts"),
        }

        def made(rows, values):
            block, shape = SimpleNamespace(**dict(zip(fields, values, strict=True))), rows.padded.shape
            block.padded, block.of_token = block.padded.view(shape), block.of_token.view(shape)
            block.weights = block.weights.view(*shape, 1)
            block.filled = block.filled.view(*shape, 1) if len(rows.slots) < rows.padded.size else None
            block.x = hidden_states[block.of_token]
            block.masks = {p: self._mask(p, rows.padded) for p in lora} if self.dropout.threshold else {}
            return block

        return itertools.starmap(made, zip(blocks, zip(*fields.values(), strict=True), strict=True))

    def _mask(self, projection, padded):
        features = getattr(self.tensors, f"{projection}_lora_A").shape[1]
        slots = torch.from_numpy(padded.ravel())
        pinned = self.device.type == "cuda"
        bits = torch.empty((len(slots), features), dtype=torch.int16, device="cpu", pin_memory=pinned)
        _kernels.keep_masks(
            self.settings.isa, operator_threads(), bits.data_ptr(), self.dropout, PROJECTIONS.index(projection),
            slots.data_ptr(), *bits.shape,
        )  # fmt: skip
        return bits.to(self.device, non_blocking=True).bool().view(*padded.shape, features)

    def _lora(self, projection, experts):
        """lora_A (chosen experts, rank, in) and lora_B (chosen experts, out, rank), bf16, on the device."""
        lora_A, lora_B = (
            upload(getattr(self.tensors, f"{projection}_lora_{matrix}"), self.device).bfloat16() for matrix in "AB"
        )
        count = len(self.tensors.gate_up_proj)
        by_expert = lora_layout.split_b(lora_B, count)
        return lora_layout.split_a(lora_A, count)[experts], by_expert[experts].contiguous()

    def _grad_shape(self, name):
        """Of what one call computes; :meth:`_as_given` makes the shape of the argument of it."""
        given, experts = getattr(self.tensors, name), len(self.tensors.gate_up_proj)
        chosen = len(self.experts)
        if name == "top_k_weights":
            return (self._slots + 1,)
        if name.endswith("lora_A"):
            return chosen, *lora_layout.split_a(given, experts).shape[1:]
        return (chosen, *lora_layout.split_b(given, experts).shape[1:]) if name.endswith("lora_B") else given.shape

    def _as_given(self, name, grad):
        given = getattr(self.tensors, name)
        if name == "top_k_weights":
            return grad[:-1].view(given.shape)
        if "lora" not in name:
            return grad
        by_expert = self._zeros((len(self.tensors.gate_up_proj), *grad.shape[1:]))
        by_expert.index_copy_(0, torch.from_numpy(self.experts).to(self.device), grad)
        return lora_layout.stack_a(by_expert) if name.endswith("lora_A") else lora_layout.stack_b(by_expert)

    def _zeros(self, shape):
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _rounded(self, shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device)

    def _with_zeros(self, rows):
        """The rows on the device, and one more of zeros, which fills up the experts of a group."""
        result = torch.empty((len(rows) + 1, rows.shape[1]), dtype=rows.dtype, device=self.device)
        result[:-1] = upload(rows, self.device)
        result[-1] = 0
        return result


_Lora = namedtuple("_Lora", "A B")

# Rows of a group's experts, as index arrays on the host. padded: (experts, width) slots, their number where a row is
# filled up; slots: the real ones, ascending; places: where these lie among the rows; tokens: theirs, each once; starts:
# where each token's begin in places.
_Rows = namedtuple("_Rows", "padded slots places tokens starts")


def choose(top_k_index, experts, rows):
    """Experts that at least ``rows`` choices fall on, (experts,) bool; None if there are none.

    Also None if an id is out of range: the kernels say which.
    """
    ids = top_k_index.flatten()
    if rows == 0 or not len(ids) or ids.min() < 0 or ids.max() >= experts:
        return None
    chosen = torch.bincount(ids, minlength=experts) >= rows
    return chosen if chosen.any() else None


def _groups(counts, chosen, most_experts, most_rows):
    """The chosen experts by number of rows, as groups within both limits: arrays of ids.

    An expert with more than ``most_rows`` is a group of its own.
    """
    experts = np.flatnonzero(chosen)
    experts = experts[np.argsort(-counts[experts], kind="stable")]
    groups = []
    while len(experts):
        size = min(most_experts, max(1, most_rows // counts[experts[0]]))
        groups.append(experts[:size])
        experts = experts[size:]
    return groups


def _rows_of(ids, top_k, experts, groups, most_rows):
    """For each group the _Rows of its blocks, several where an expert has more than ``most_rows``.

    ``ids`` are the experts of all slots, ``experts`` how many there are.
    """
    # numpy sorts integers of 16 bits by their digits, ten times as fast as longer ones
    order = np.argsort(ids.astype(np.uint16) if experts <= 2**16 else ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(experts + 1))
    found = []
    for group in groups:
        slots = [order[starts[expert] : starts[expert + 1]] for expert in group]
        firsts = range(0, len(slots[0]), most_rows)
        found.append([_rows([some[first : first + most_rows] for some in slots], len(ids), top_k) for first in firsts])
    return found


def _rows(slots, total, top_k):
    """The _Rows of some experts with these slots, of ``total`` ones, the longest first."""
    padded = np.full((len(slots), len(slots[0])), total)
    for row, some in zip(padded, slots, strict=True):
        row[: len(some)] = some
    places = np.flatnonzero(padded < total)
    ascending = places[np.argsort(padded.ravel()[places])]
    slots = padded.ravel()[ascending]
    tokens = slots // top_k
    starts = np.flatnonzero(np.diff(tokens, prepend=-1))
    return _Rows(padded, slots, ascending, tokens[starts], starts)


def _add(sums, block, rows, weights=None):
    """Add the rows of a block, perhaps times weights of its slots, to those of their tokens, in a fixed order."""
    rows = rows.flatten(0, 1)
    of_tokens = F.embedding_bag(block.places, rows, block.starts, mode="sum", per_sample_weights=weights)
    sums.index_add_(0, block.tokens, of_tokens)


def _clear(block, rows):
    """Zeros in the rows that fill up, of which infinite weights or biases make something else."""
    if block.filled is not None:
        rows.masked_fill_(block.filled, 0.0)


def _product(a, b):
    """The fp32 product of two batches of bf16 matrices."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())
