"""Checkpoints that are quantised already, as sources: their weights in bf16, and their experts' codes bit for bit."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ktlib.conversion.nearest_codes import Quantised
from ktlib.integrations.stored_formats import Header, StoredMatrix, logical_tensors
from ktlib.names import first_of
from ktlib.operator.weight import Weight


class StoredCodes(NamedTuple):
    """A :class:`~ktlib.files.tensor_files.Stored` whose ``load()`` decodes a weight to bf16, and the codes themselves.

    ``shape`` is that of the weight in the model's class, which may hold experts as (experts, inputs, outputs).
    """

    shape: tuple
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    matrix: StoredMatrix
    scale_dtype: torch.dtype
    weight: Callable[[], Weight]

    @property
    def nbytes(self):
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def without_settings(config):
    """A config.json's contents without the ``quantization_config`` of the model and of its parts."""
    return {
        name: without_settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != "quantization_config"
    }


def decoded_tensors(tensors, settings, model, layout):
    """``{name: Stored}`` of a checkpoint's tensors, where weights that it holds as codes are :class:`StoredCodes`.

    Raises:
        ValueError: of ``settings`` or a tensor: what cannot be read.
    """
    headers = {name: Header.of(tensor) for name, tensor in tensors.items()}
    matrices = logical_tensors(headers, settings)
    members = {member for matrix in matrices.values() for member in matrix.members}
    result = {name: tensor for name, tensor in tensors.items() if name not in members}
    for name, matrix in matrices.items():
        weight = functools.partial(matrix.weight, lambda member: tensors[member].load())
        place = layout.located(name)
        is_flipped = place in layout.experts and model.get_submodule(place.rpartition(".")[0]).is_transposed
        *experts, rows, columns = matrix.shape
        shape = (*experts, columns, rows) if is_flipped else matrix.shape

        def load(weight=weight, shape=matrix.shape, is_flipped=is_flipped):
            decoded = weight().decoded().view(shape)
            return decoded.mT if is_flipped else decoded

        scale_dtype = tensors[matrix.tensors[1]].dtype
        if scale_dtype == torch.uint8:
            scale_dtype = torch.float8_e8m0fnu
        result[name] = StoredCodes(shape, torch.bfloat16, load, matrix, scale_dtype, weight)
    return result


def common_format(parts):
    """``(format, group)`` for all codes of ``{fused weight: [[Stored of each projection] of each expert]}``.

    The group divides all groups of the source. Where a group of the source was larger its scale is repeated, so that no
    value changes.

    Raises:
        ValueError: weights that are not quantised, or not all in one format; they are named.
    """
    if plain := [name for name, experts in parts.items() if not _are_codes(experts)]:
        raise ValueError(
            f"quantise: got 'keep', but the source has no codes of {first_of(plain)}; needs a format to quantise to"
        )
    matrices = {name: [one.matrix for expert in experts for one in expert] for name, experts in parts.items()}
    formats = {matrix.format: name for name, found in matrices.items() for matrix in found}
    if len(formats) > 1:
        examples = ", ".join(f"{format} ({name})" for format, name in formats.items())
        raise ValueError(f"quantise: got 'keep', but the source's experts are in {examples}; needs one format of all")
    bounds = [set(), set()]
    for name, found in matrices.items():
        for matrix in found:
            for dim, (size, group) in enumerate(zip(matrix.shape[-2:], matrix.group, strict=True)):
                if group < size:
                    bounds[dim].add(group)
                if dim == 0 and len(parts[name][0]) > 1:  # gates end where ups begin
                    bounds[dim].add(size)
    largest = [max(matrix.group[dim] for found in matrices.values() for matrix in found) for dim in (0, 1)]
    group = tuple(math.gcd(*bound) if bound else whole for bound, whole in zip(bounds, largest, strict=True))
    return *formats, group


def _are_codes(experts):
    return all(isinstance(one, StoredCodes) for expert in experts for one in expert)


def scales_and_zeros(name, experts):
    """``(dtype of the scales, whether there are zeros)`` of the codes of a fused weight; ``experts`` as above."""
    dtypes = {one.scale_dtype for expert in experts for one in expert}
    if len(dtypes) > 1:
        raise ValueError(f"quantise: got 'keep', but {name} has scales of several dtypes: {sorted(map(str, dtypes))}")
    return dtypes.pop(), any(len(one.matrix.tensors) > 2 for expert in experts for one in expert)


def joined(weights, group):
    """The rows of Weights of one expert each as one, in groups that divide theirs: :class:`Quantised`.

    Zeros are 0 where a Weight has none.
    """
    codes = [part.view(-1, part.shape[-1]) for weight in weights for part in weight.codes]
    scales = [_regrouped(weight.scales[0], weight, group) for weight in weights]
    zeros = [_regrouped(*weight.zeros, weight, group) if weight.zeros else None for weight in weights]
    zeros = [
        torch.zeros(like.shape, dtype=torch.int8) if z is None else z for z, like in zip(zeros, scales, strict=True)
    ]
    return Quantised(torch.cat(codes), torch.cat(scales), torch.cat(zeros), group)


def _regrouped(values, weight, group):
    """One value per group of a Weight of one expert, as one per smaller ``group``."""
    sizes = weight.shape[1:]
    counts = [-(-size // old) for size, old in zip(sizes, weight.group, strict=True)]
    rows, columns = (
        torch.arange(-(-size // new)) * new // old for size, old, new in zip(sizes, weight.group, group, strict=True)
    )
    bits = values.view(torch.uint8) if values.itemsize == 1 else values  # torch selects no rows of 8-bit floats
    return bits.view(counts)[rows][:, columns]
