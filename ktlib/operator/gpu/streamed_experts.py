"""Routed experts computed on a GPU whose memory does not hold them: their weights are sent there for each product.

The time that a CPU needs for an expert grows with the number of tokens that chose it. A GPU needs hardly more than the
time to copy the expert's weights, which is the same for one token as for a thousand. So beyond some number of tokens
the copy is faster than the CPU; :func:`ktlib.moe_experts` streams such experts and computes the others on the CPU.

Nothing stays on the GPU: weights pass through two buffers of a few experts' size. In backward they are sent once more,
and gate and up are computed again. Values are rounded to bf16 where the CPU's kernels round them (csrc/layer/moe.h).
Sums over tokens are taken in a fixed order, so a repeated call gives the same bits.

Each operation that Python queues costs 10 to 40 microseconds of one core, and the thread that sends weights needs the
cores too. Hence experts are computed in groups, and tensors that all groups need are made for all of them at once.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ktlib import _kernels
from ktlib.operator.gpu.transfer import download, upload
from ktlib.operator.gpu.weight_source import weights_on
from ktlib.reference import lora_layout
from ktlib.reference.gates import apply_gate, gate_backward, gate_terms, split_gate_up
from ktlib.system.threads import operator_threads

GROUP_BYTES = 2**28  # at most so many bytes of weights in a group of experts (but at least one expert)
BLOCK_VALUES = 2**24  # at most so many values in a block of rows with as many columns as the widest weight matrix
PROJECTIONS = ("gate_up", "down")


class Streamed:
    """The chosen experts of one call, computed on ``settings.stream_device``.

    Experts with similar numbers of rows form a group. One batched product computes a block of rows of all experts of a
    group: rows of zeros pad the smaller experts.

    Args:
        tensors: the call's arguments, checked, contiguous and on the CPU; hidden_states in bf16, top_k_weights in fp32.
        settings: the call's settings.
        scalings: of the LoRA pairs of gate_up and down, already divided by the share of elements that dropout keeps.
        dropout: ``_kernels.Dropout``.
        chosen: (experts,) bool, see :func:`choose`.
    """

    def __init__(self, tensors, settings, scalings, dropout, chosen):
        self.tensors, self.settings, self.dropout, self.chosen = tensors, settings, dropout, chosen
        self.scaling = dict(zip(PROJECTIONS, scalings, strict=True))
        self.gate = settings.gate, None if math.isinf(settings.limit) else settings.limit, settings.alpha
        self.device = torch.device(settings.stream_device)
        _kernels.select_isa(settings.isa)  # raises for a wrong name, even if no expert is left for the CPU
        self.ids = tensors.top_k_index.flatten().int().numpy()  # a copy: torch can't resize memory that numpy has seen
        self.num_slots = len(self.ids)
        counts = np.bincount(self.ids, minlength=len(chosen))
        expert_bytes = tensors.gate_up_proj[0].nbytes + tensors.down_proj[0].nbytes
        self.max_rows = max(1, BLOCK_VALUES // max(tensors.gate_up_proj.shape[1:]))
        self.groups = _groups(counts, chosen.numpy(), max(1, GROUP_BYTES // expert_bytes), self.max_rows)
        self.experts = np.concatenate(self.groups)
        self.leaves_rows = bool(counts[self.experts].sum() < self.num_slots)  # whether the CPU has experts to compute

    def forward(self):
        """The chosen experts' contribution to the output: (tokens, hidden) fp32 on the device, possibly only queued."""
        with self._on_stream_device():
            output = self._zeros(self.tensors.hidden_states.shape)
            for group in self._send_groups():
                for block in group.blocks:
                    gate_up, _ = self._project(group, block, "gate_up", block.x)
                    h = apply_gate(*split_gate_up(gate_up, self.settings.interleaved), *self.gate).bfloat16()
                    y, _ = self._project(group, block, "down", h)
                    _add_to_tokens(output, block, y, block.slot_weights)
            return output

    def backward(self, grad_output, wanted):
        """The chosen experts' contribution to the gradients that ``wanted`` names: fp32, on the device."""
        with self._on_stream_device():
            grad_output = self._with_zero_row(grad_output)
            grads = {name: self._zeros(self._grad_shape(name)) for name in wanted}
            for group in self._send_groups():
                for block in group.blocks:
                    self._backward_block(group, block, grad_output[block.row_tokens], grads)
            return {name: self._in_argument_shape(name, grad) for name, grad in grads.items()}

    def complete(self, results):
        """Complete each CPU tensor of ``[(CPU tensor, contribution on the device), ...]`` by the contribution.

        The CPU tensor holds the contribution of the experts that the CPU computed, and no values if there were none.
        """
        with self._on_stream_device():
            if self.leaves_rows:
                results = [(result, upload(result, self.device).float() + streamed) for result, streamed in results]
            download([(streamed, result) for result, streamed in results])

    # --------------------------------------------------------------------- one block of rows, (experts, rows, features)

    def _backward_block(self, group, block, dy, grads):
        gate_up, t = self._project(group, block, "gate_up", block.x)
        _zero_padding(block, gate_up)
        gate, up = split_gate_up(gate_up, self.settings.interleaved)
        terms = gate_terms(gate, up, *self.gate)
        h = torch.mul(terms.act, terms.factor, out=self._empty_bf16(gate.shape))
        dh, lora_dh = _product(dy, self._matrix(group, "down").mT), None
        if "down" in group.lora:
            inner = self._inner("down", dy, group.lora["down"].B)
            lora_dh = self._add_lora(dh, group, block, "down", inner)
        if "top_k_weights" in grads:  # dy times the experts' output is also dh times h, without computing that output
            d_weights = (dh * h).sum(2)
            if lora_dh is not None:  # the mask is on h alone: 0 * NaN is NaN, so a NaN of lora_A reaches the gradient
                d_weights += (lora_dh * self._masked(block, "down", h)).sum(2)
            if group.biases["down"] is not None:
                d_weights += (dy * group.biases["down"][:, None]).sum(2)
            grads["top_k_weights"][block.padded] = d_weights
        if lora_dh is not None:
            dh += self._masked(block, "down", lora_dh)
        _zero_padding(block, dh)
        if "down" in group.lora:
            self._lora_grads(group, "down", self._masked(block, "down", h), inner, dy, grads, block.row_weights)
        d_gate_up = self._empty_bf16(gate_up.shape)
        halves = split_gate_up(d_gate_up, self.settings.interleaved)
        gate_backward(dh.mul_(block.row_weights), gate, up, terms, self.gate[1], halves)
        del gate_up, gate, up, terms, h, dh, lora_dh, halves  # they are large, and so are the tensors that follow
        if "gate_up" in group.lora:
            inner = self._inner("gate_up", d_gate_up, group.lora["gate_up"].B)
            self._lora_grads(group, "gate_up", self._masked(block, "gate_up", block.x), inner, d_gate_up, grads, t=t)
        if "hidden_states" in grads:
            dx = _product(d_gate_up, self._matrix(group, "gate_up").mT)
            if "gate_up" in group.lora:
                lora_dx = self._add_lora(dx, group, block, "gate_up", inner)
                if lora_dx is not None:
                    dx += self._masked(block, "gate_up", lora_dx)
            _add_to_tokens(grads["hidden_states"], block, dx)

    def _project(self, group, block, projection, x):
        """One projection of the rows ``x`` with LoRA and bias, in fp32; and LoRA's inner values, None without LoRA."""
        result, t = _product(x, self._matrix(group, projection)), None
        if projection in group.lora:
            lora = group.lora[projection]
            t = self._inner(projection, self._masked(block, projection, x), lora.A.mT)
            result.baddbmm_(t, lora.B.float().mT)
        if group.biases[projection] is not None:
            result += group.biases[projection][:, None]
        return result, t

    def _add_lora(self, dx, group, block, projection, inner):
        """Add to ``dx`` the gradient that passes through a LoRA pair; ``inner`` is the gradient before lora_A.

        With dropout the gradient is not added but returned, since the mask is still to be applied to it.
        """
        lora_A = group.lora[projection].A.float()
        if projection in block.masks:
            return torch.bmm(inner, lora_A)
        dx.baddbmm_(inner, lora_A)
        return None

    def _lora_grads(self, group, projection, x, inner, d_out, grads, row_weights=None, t=None):
        """Add a pair's gradients: lora_A's from the input ``x`` and ``inner``, lora_B's from ``d_out`` and ``t``.

        ``t`` is computed from ``x`` if it is not given. ``inner`` and ``d_out`` are multiplied by ``row_weights``.
        """

        def weighted(rows):
            return rows.float() if row_weights is None else rows * row_weights

        if (name := f"{projection}_lora_A") in grads:
            grads[name][group.span].baddbmm_(weighted(inner).mT, x.float())
        if (name := f"{projection}_lora_B") in grads:
            t = self._inner(projection, x, group.lora[projection].A.mT) if t is None else t
            grads[name][group.span].baddbmm_(weighted(d_out).mT, t)

    def _inner(self, projection, rows, matrix):
        """``rows @ matrix`` times LoRA's scaling: the inner values of a pair, in forward or in backward.

        The scaling is not left to the next product as its factor, since a factor of 0 would hide NaN.
        """
        return _product(rows, matrix).mul_(self.scaling[projection])

    def _matrix(self, group, projection):
        """A group's weights of one projection, (experts, in, out), a view."""
        weight = group.weights[projection]
        return weight if self.settings.transposed else weight.mT

    def _masked(self, block, projection, x):
        """The input of a LoRA pair, or the gradient of this input, with zeros where dropout drops."""
        return torch.where(block.masks[projection], x, 0.0) if projection in block.masks else x

    # ------------------------------------------------------------------------------------------- tensors on the device

    @contextlib.contextmanager
    def _on_stream_device(self):
        """Shield the computation from the caller's autocast, current device and grad mode.

        The caller's setting of TF32 stays: products of fp32 matrices may use it. It belongs to the whole process, so
        switching it off here would affect products of other threads, and two calls at once might leave it off.
        """
        guard = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with guard, torch.autocast(self.device.type, enabled=False), torch.no_grad():
            yield

    def _send_groups(self):
        """Yield each :class:`_Group` when its weights arrive. All other tensors are made while weights are sent."""
        t = self.tensors
        with weights_on((t.gate_up_proj, t.down_proj), [g.tolist() for g in self.groups], self.device) as weights:
            rows = _rows_of_groups(self.ids, t.top_k_index.shape[1], len(self.chosen), self.groups, self.max_rows)
            rows_of_blocks = list(itertools.chain.from_iterable(rows))
            index = self._index(rows_of_blocks)
            lora = {p: self._lora(p, index.experts) for p in PROJECTIONS if getattr(t, f"{p}_lora_A") is not None}
            biases = [b if b is None else upload(b, self.device).float() for b in (t.gate_up_bias, t.down_bias)]
            biases = {p: b if b is None else b[index.experts] for p, b in zip(PROJECTIONS, biases, strict=True)}
            blocks = self._blocks(rows_of_blocks, index, lora)
            first = 0
            for matrices, experts, group_rows in zip(weights, self.groups, rows, strict=True):
                span = slice(first, first + len(experts))
                first = span.stop
                yield _Group(
                    span=span,
                    weights=dict(zip(PROJECTIONS, matrices, strict=True)),
                    lora={p: _Lora(*(matrix[span] for matrix in pair)) for p, pair in lora.items()},
                    biases={p: b if b is None else b[span] for p, b in biases.items()},
                    blocks=itertools.islice(blocks, len(group_rows)),
                )

    def _index(self, rows_of_blocks):
        """The :class:`_DeviceIndex` of all blocks, sent to the device by one copy."""
        fields = [np.concatenate([array.ravel() for array in arrays]) for arrays in zip(*rows_of_blocks, strict=True)]
        fields.append(self.experts)
        on_device = upload(torch.from_numpy(np.concatenate(fields)), self.device)
        return _DeviceIndex(*on_device.split([len(array) for array in fields]))

    def _blocks(self, rows_of_blocks, index, lora):
        """An iterator of all blocks, in the order of the groups. Each block is made when it is asked for."""
        t = self.tensors
        hidden_states, routing = self._with_zero_row(t.hidden_states), self._with_zero_row(t.top_k_weights.view(-1, 1))
        row_tokens = torch.div(index.padded, t.top_k_index.shape[1], rounding_mode="trunc")

        def by_block(values, field):
            return values.split([getattr(rows, field).size for rows in rows_of_blocks])

        def block(rows, padded, row_tokens, row_weights, is_padding, slot_weights, positions, tokens, starts):
            shape = rows.padded.shape
            row_tokens = row_tokens.view(shape)
            return _Block(
                padded=padded.view(shape),
                row_tokens=row_tokens,
                row_weights=row_weights.view(*shape, 1),
                is_padding=is_padding.view(*shape, 1) if len(rows.slots) < rows.padded.size else None,
                slot_weights=slot_weights,
                positions=positions,
                tokens=tokens,
                starts=starts,
                x=hidden_states[row_tokens],
                masks={p: self._mask(p, rows.padded) for p in lora} if self.dropout.threshold else {},
            )

        return map(
            block,
            rows_of_blocks,
            by_block(index.padded, "padded"),
            by_block(row_tokens, "padded"),
            by_block(routing[index.padded], "padded"),
            by_block((index.padded == self.num_slots)[:, None], "padded"),
            by_block(routing[index.slots].view(-1), "slots"),
            by_block(index.positions, "positions"),
            by_block(index.tokens, "tokens"),
            by_block(index.starts, "starts"),
        )

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
        return _Lora(lora_layout.split_a(lora_A, count)[experts], by_expert[experts].contiguous())

    def _grad_shape(self, name):
        """Shape of a gradient while it is summed up; :meth:`_in_argument_shape` gives it the argument's shape.

        It has the chosen experts of a LoRA matrix only. That of top_k_weights has one more element, which padding
        rows overwrite.
        """
        argument, experts = getattr(self.tensors, name), len(self.tensors.gate_up_proj)
        chosen = len(self.experts)
        if name == "top_k_weights":
            return (self.num_slots + 1,)
        if name.endswith("lora_A"):
            return chosen, *lora_layout.split_a(argument, experts).shape[1:]
        if name.endswith("lora_B"):
            return chosen, *lora_layout.split_b(argument, experts).shape[1:]
        return argument.shape

    def _in_argument_shape(self, name, grad):
        if name == "top_k_weights":
            return grad[:-1].view(self.tensors.top_k_weights.shape)
        if "lora" not in name:
            return grad
        by_expert = self._zeros((len(self.tensors.gate_up_proj), *grad.shape[1:]))
        by_expert.index_copy_(0, torch.from_numpy(self.experts).to(self.device), grad)
        return lora_layout.stack_a(by_expert) if name.endswith("lora_A") else lora_layout.stack_b(by_expert)

    def _zeros(self, shape):
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _empty_bf16(self, shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device)

    def _with_zero_row(self, rows):
        """The rows on the device, and behind them a row of zeros, which padding rows are copies of."""
        result = torch.empty((len(rows) + 1, rows.shape[1]), dtype=rows.dtype, device=self.device)
        result[:-1] = upload(rows, self.device)
        result[-1] = 0
        return result


class _Lora(NamedTuple):
    A: torch.Tensor  # (experts, rank, in)
    B: torch.Tensor  # (experts, out, rank)


class _Rows(NamedTuple):
    """The rows of one block, as index arrays on the host.

    A row belongs to a slot ``token * top_k + j``, the j-th choice of a token, which is the row's expert. Experts with
    fewer slots than the first one have padding rows.
    """

    padded: np.ndarray  # (experts, width): slots; the number of all slots marks a padding row
    slots: np.ndarray  # slots of the block without padding, ascending
    positions: np.ndarray  # of each of ``slots``: its index in the flattened ``padded``
    tokens: np.ndarray  # tokens of these slots, each once, ascending
    starts: np.ndarray  # of each of ``tokens``: where its slots begin in ``slots`` and ``positions``


class _DeviceIndex(NamedTuple):
    """The flattened arrays of all blocks' _Rows, one behind the other, on the device; and the chosen experts."""

    padded: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor
    experts: torch.Tensor  # ids, in the order of the groups


class _Block(NamedTuple):
    """The rows of one block, on the device."""

    padded: torch.Tensor  # (experts, width), as in _Rows
    row_tokens: torch.Tensor  # (experts, width); the number of all tokens in a padding row
    row_weights: torch.Tensor  # (experts, width, 1): top_k_weights, 0 in a padding row
    is_padding: torch.Tensor | None  # (experts, width, 1) bool; None if there is no padding row
    slot_weights: torch.Tensor  # top_k_weights of the slots that ``positions`` holds
    positions: torch.Tensor  # as in _Rows, like ``tokens`` and ``starts``
    tokens: torch.Tensor
    starts: torch.Tensor
    x: torch.Tensor  # (experts, width, hidden) bf16
    masks: dict  # projection -> (experts, width, features) bool, what dropout keeps; empty without dropout


class _Group(NamedTuple):
    """A group of experts on the device. The dictionaries have the names of PROJECTIONS as keys."""

    span: slice  # where the group's experts are among the chosen ones
    weights: dict
    lora: dict  # of projections with LoRA: _Lora
    biases: dict  # None for a projection without bias
    blocks: Iterator[_Block]


def choose(top_k_index, experts, rows):
    """Experts that at least ``rows`` choices fall on, (experts,) bool; None if there are none.

    Also None if an id is out of range: the kernels raise the error that names it.
    """
    ids = top_k_index.flatten()
    if rows == 0 or not len(ids) or ids.min() < 0 or ids.max() >= experts:
        return None
    chosen = torch.bincount(ids, minlength=experts) >= rows
    return chosen if chosen.any() else None


def _groups(counts, chosen, max_experts, max_rows):
    """Groups of the chosen experts, as arrays of ids, by descending number of rows.

    A group has at most ``max_experts`` experts, and at most ``max_rows`` rows unless it is a single expert.
    """
    experts = np.flatnonzero(chosen)
    experts = experts[np.argsort(-counts[experts], kind="stable")]
    groups = []
    while len(experts):
        size = min(max_experts, max(1, max_rows // counts[experts[0]]))
        groups.append(experts[:size])
        experts = experts[size:]
    return groups


def _rows_of_groups(ids, top_k, experts, groups, max_rows):
    """For each group the _Rows of its blocks: several blocks if an expert has more than ``max_rows`` rows.

    ``ids`` are the experts of all slots, ``experts`` is the number of experts.
    """
    # numpy sorts integers of 16 bits by radix sort, ten times as fast as wider ones
    order = np.argsort(ids.astype(np.uint16) if experts <= 2**16 else ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(experts + 1))
    rows = []
    for group in groups:
        slots = [order[starts[expert] : starts[expert + 1]] for expert in group]
        firsts = range(0, len(slots[0]), max_rows)
        rows.append([_rows([s[first : first + max_rows] for s in slots], len(ids), top_k) for first in firsts])
    return rows


def _rows(slots_by_expert, num_slots, top_k):
    """The _Rows of a block of experts with these slots; the first expert must have the most."""
    padded = np.full((len(slots_by_expert), len(slots_by_expert[0])), num_slots)
    for row, slots in zip(padded, slots_by_expert, strict=True):
        row[: len(slots)] = slots
    positions = np.flatnonzero(padded < num_slots)
    positions = positions[np.argsort(padded.ravel()[positions])]
    slots = padded.ravel()[positions]
    tokens = slots // top_k
    starts = np.flatnonzero(np.diff(tokens, prepend=-1))
    return _Rows(padded, slots, positions, tokens[starts], starts)


def _add_to_tokens(sums, block, rows, weights=None):
    """Add the block's rows, times the slots' ``weights`` if given, to the sums of their tokens, in a fixed order."""
    rows = rows.flatten(0, 1)
    sums_of_tokens = F.embedding_bag(block.positions, rows, block.starts, mode="sum", per_sample_weights=weights)
    sums.index_add_(0, block.tokens, sums_of_tokens)


def _zero_padding(block, rows):
    """Set padding rows to zero: biases, or infinite weights times zero, have put other values there."""
    if block.is_padding is not None:
        rows.masked_fill_(block.is_padding, 0.0)


def _product(a, b):
    """The fp32 product of two batches of bf16 matrices."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())
