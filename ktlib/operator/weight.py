"""Expert weights in the format that a checkpoint has, where they lie."""

import math

import torch

from ktlib import _kernels
from ktlib.operator.checks import check_kind, check_memory, describe
from ktlib.reference.formats import CODEBOOKS, FORMATS, SCALE_DTYPES
from ktlib.system.threads import operator_threads

_CODE_DTYPES = {
    "bf16": (torch.bfloat16,),
    "e4m3": (torch.float8_e4m3fn, torch.uint8),
    "int8": (torch.int8,),
    **dict.fromkeys(CODEBOOKS, (torch.uint8,)),
}
_WITH_ZEROS = ("int8", "int4")


class Weight:
    """One projection of all experts, (experts, rows, columns), as tensors of a checkpoint: codes, scales, zeros.

    A weight is ``bf16(scale * (value(code) - zero))``, rounded to nearest even from the fp32 product
    (:func:`ktlib.reference.formats.decode`). :func:`ktlib.moe_experts` takes it in place of a bf16 tensor, and returns
    the same bits as for :meth:`decoded`. The tensors may be memory maps at any address; nothing is copied.

    Args:
        format: ``"bf16"``, ``"e4m3"``, ``"int8"``, or with 4 bits ``"int4"``, ``"nf4"``, ``"e2m1"``.
        codes: a tensor or a list of tensors on the CPU, contiguous: the rows of all experts one after the other, cut
            into tensors of equally many rows: all experts stacked; one for each; or each expert's gate and up apart.
            bf16: bfloat16; e4m3: float8_e4m3fn or uint8; int8: int8; all (..., columns). 4 bits: uint8
            (..., ceil(columns / 2)), the code of the even column in the low half of a byte; code c of int4 means c - 8.
        scales: as many tensors, fp32, bf16, fp16 or float8_e8m0fnu (or uint8 with its bits), each
            (..., ceil(rows / group_rows), ceil(columns / group_columns)); the rows of an expert, or of the tensor if
            that has fewer. None for bf16.
        zeros: None, or as many int8 tensors of the scales' shapes (int8 and int4 only).
        group: ``(group_rows, group_columns)``, how many rows and columns share a scale. None for bf16.
        shape: (experts, rows, columns). Default: of ``codes``, if it is one 3-d tensor, or one 2-d tensor an expert.

    Raises:
        TypeError, ValueError: an argument is not of that kind; it is named.
    """

    def __init__(self, format, codes, scales=None, zeros=None, *, group=None, shape=None):
        if not isinstance(format, str) or format not in FORMATS:
            raise ValueError(f"format: got {format!r}, needs one of {', '.join(map(repr, FORMATS))}")
        self.format = format
        self.codes = _tensors("codes", codes, _CODE_DTYPES[format])
        self.shape = torch.Size(_check_shape(shape, self.codes, self.is_4_bit))
        self.group = None if format == "bf16" else _check_group(group, self.shape[2], self.is_4_bit)
        _check_cut(self.codes, self.shape, self._row_width)
        self.scales, self.zeros = [], []
        if format == "bf16":
            for name, value in (("scales", scales), ("zeros", zeros), ("group", group)):
                if value is not None:
                    raise ValueError(f"{name}: got {_kind(value)} with format 'bf16', needs None")
            return
        self.scales = _tensors("scales", scales, (*SCALE_DTYPES, torch.uint8))
        if zeros is not None:
            if format not in _WITH_ZEROS:
                raise ValueError(f"zeros: got {_kind(zeros)} with format {format!r}, needs None")
            self.zeros = _tensors("zeros", zeros, (torch.int8,))
        for name, tensors in (("scales", self.scales), ("zeros", self.zeros if zeros is not None else None)):
            if tensors is not None:
                self._check_grouped(name, tensors)

    @property
    def is_4_bit(self):
        return self.format in CODEBOOKS

    @property
    def nbytes(self):
        """Bytes of codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in (*self.codes, *self.scales, *self.zeros))

    def decoded(self):
        """The weights themselves, (experts, rows, columns) bf16, in new memory."""
        result = torch.empty(self.shape, dtype=torch.bfloat16, device="cpu")
        rows = self.shape[0] * self.shape[1]
        _kernels.decode("", operator_threads(), result.data_ptr(), self.kernel_argument("weight"), rows)
        return result

    @classmethod
    def of_experts(cls, weights):
        """The experts of several Weights as one; these have the same format, group, rows, columns and dtypes."""
        matrices = [weight._matrix(number) for weight in weights for number in range(weight._matrices)]
        return weights[0]._of(matrices, sum(weight.shape[0] for weight in weights), weights[0].shape[1])

    @classmethod
    def of_rows(cls, weights):
        """The Weight whose experts have the rows of that expert of each of ``weights``, such as of gates and of ups.

        None if formats, groups, dtypes or sizes differ, or if a Weight holds several tensors for an expert.
        """
        first = weights[0]
        experts, rows, _ = first.shape
        if any(weight._kind != first._kind or weight._matrices != experts for weight in weights):
            return None
        matrices = [weight._matrix(number) for number in range(experts) for weight in weights]
        return first._of(matrices, experts, rows * len(weights))

    def narrow(self, dim, start, length):
        """Some experts (``dim`` 0), or the same rows of each expert (``dim`` 1): a Weight in the same memory.

        None if the tensors cannot be cut there, or if nothing would be left.
        """
        experts, rows, _ = self.shape
        each = self._matrices // experts
        height = rows // each
        if length < 1 or dim not in (0, 1):
            return None
        if dim == 0:
            return self._of([self._matrix(i) for i in range(start * each, (start + length) * each)], length, rows)
        if each > 1:
            if start % height or length % height:
                return None
            first, last = start // height, (start + length) // height
            numbers = [expert * each + i for expert in range(experts) for i in range(first, last)]
            return self._of([self._matrix(i) for i in numbers], experts, length)
        step = self.group[0] if self.group else 1
        if start % step or (length % step and start + length < rows):
            return None
        groups = slice(start // step, -(-(start + length) // step))
        cut = [
            (codes[start : start + length], *(g[groups] for g in others))
            for codes, *others in map(self._matrix, range(experts))
        ]
        return self._of(cut, experts, length)

    @classmethod
    def of_stack(cls, stack):
        """The Weight of a bf16 tensor (experts, rows, columns) that checks.py has checked."""
        return cls._unchecked("bf16", [stack], [], [], None, stack.shape)

    def placeholder(self):
        """A tensor of the shape, with one element of memory, for functions that look at shape and dtype alone."""
        return torch.empty(1, dtype=torch.bfloat16, device="cpu").as_strided(self.shape, (0, 0, 0))

    def pack(self):
        """``(tensors, format, numbers)``, as a registered op can take it. The opposite of :meth:`unpack`."""
        return [*self.codes, *self.scales, *self.zeros], self.format, [len(self.codes), *(self.group or ())]

    @classmethod
    def unpack(cls, name, tensors, format, numbers, shape):
        """The Weight that was packed. What C++ relies on is checked again: tensors may have changed meanwhile."""
        count, *group = numbers
        if format not in FORMATS or count < 1 or shape[0] * shape[1] % count or len(group) != 2 * (format != "bf16"):
            raise ValueError(
                f"{name}: got format {format!r} with numbers {list(numbers)}, needs what Weight.pack returns"
            )
        codes, scales, zeros = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
        lengths = (count, 0, 0) if format == "bf16" else (count, count, len(zeros) and count)
        if (len(codes), len(scales), len(zeros)) != lengths or len(tensors) != sum(lengths):
            raise ValueError(
                f"{name}: got {len(tensors)} tensors for {count} of codes, needs as many scales (and zeros)"
            )
        return cls._unchecked(format, codes, scales, zeros, tuple(group) or None, torch.Size(shape))

    @classmethod
    def _unchecked(cls, format, codes, scales, zeros, group, shape):
        weight = cls.__new__(cls)
        weight.format, weight.codes, weight.scales, weight.zeros = format, codes, scales, zeros
        weight.group, weight.shape = group, shape
        return weight

    def kernel_argument(self, name):
        """The weight as C++ takes it: addresses, valid while the tensors live. ValueError if memory was freed."""
        experts, rows, columns = self.shape
        group_rows, group_columns = self.group or (1, columns)
        tensor_rows = experts * rows // len(self.codes)
        matrix_rows = min(rows, tensor_rows)
        groups = tensor_rows // matrix_rows * -(-matrix_rows // group_rows) * -(-columns // group_columns)
        return _kernels.Weight(
            format=FORMATS.index(self.format),
            tensors=_addresses(name, self.codes, tensor_rows * self._row_width),
            tensor_rows=tensor_rows,
            rows=rows,
            columns=columns,
            scales=_addresses(name, self.scales, groups),
            zeros=_addresses(name, self.zeros, groups),
            scale_type=_scale_type(self.scales[0]) if self.scales else 0,
            group_rows=group_rows,
            group_columns=group_columns,
        )

    def __repr__(self):
        cut = "stacked" if len(self.codes) == 1 else f"{len(self.codes)} tensors"
        group = "" if self.group is None else f", group={self.group}"
        return f"Weight({self.format!r}, shape={tuple(self.shape)}, {cut}{group})"

    @property
    def _matrices(self):
        """How many matrices the tensors hold: one for each expert, or its gate and its up apart."""
        tensor_rows = self.shape[0] * self.shape[1] // len(self.codes)
        return self.shape[0] * self.shape[1] // min(self.shape[1], tensor_rows)

    def _matrix(self, number):
        """Codes, scales and zeros of a matrix, as far as there are any."""
        experts, rows, columns = self.shape
        rows = rows * experts // self._matrices
        group_rows, group_columns = self.group or (1, 1)
        groups = (-(-rows // group_rows), -(-columns // group_columns))
        tensor, place = divmod(number, self._matrices // len(self.codes))
        shapes = ((self.codes, (rows, self._row_width)), (self.scales, groups), (self.zeros, groups))
        return tuple(tensors[tensor].view(-1, *shape)[place] for tensors, shape in shapes if tensors)

    def _of(self, matrices, experts, rows):
        """A Weight of this format with one tensor a matrix."""
        tensors = [list(kind) for kind in zip(*matrices, strict=True)]
        tensors += [[]] * (3 - len(tensors))
        return self._unchecked(self.format, *tensors, self.group, torch.Size((experts, rows, self.shape[2])))

    @property
    def _kind(self):
        """What is equal in Weights that can become one."""
        dtypes = [tensors[0].dtype for tensors in (self.codes, self.scales, self.zeros) if tensors]
        return self.format, self.group, self.shape, dtypes

    @property
    def _row_width(self):
        return -(-self.shape[2] // 2) if self.is_4_bit else self.shape[2]

    def _check_grouped(self, name, tensors):
        if len(tensors) != len(self.codes):
            raise ValueError(f"{name}: got {len(tensors)} tensors, needs {len(self.codes)}, one for each of codes")
        if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
            raise TypeError(f"{name}: got tensors of several dtypes, needs one")
        experts, rows, columns = self.shape
        tensor_rows = experts * rows // len(self.codes)
        matrix_rows = min(rows, tensor_rows)
        needs = (tensor_rows // matrix_rows, -(-matrix_rows // self.group[0]), -(-columns // self.group[1]))
        for tensor in tensors:
            if [n for n in tensor.shape if n != 1] != [n for n in needs if n != 1]:
                raise ValueError(
                    f"{name}: got shape {tuple(tensor.shape)}, needs {needs[1:] if needs[0] == 1 else needs} for "
                    f"{matrix_rows} rows and {columns} columns in groups of {self.group}"
                )


def _addresses(name, tensors, elements):
    """The addresses of tensors, each of which still has memory for so many elements; ValueError if one has not."""
    for tensor in tensors:
        end = (tensor.storage_offset() + elements) * tensor.itemsize
        if tensor.dtype != tensors[0].dtype or end > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name}: got {describe(tensor)}, but its memory was freed or is too small: needs {elements}"
            )
    return [tensor.data_ptr() for tensor in tensors]


def _kind(value):
    return describe(value) if isinstance(value, torch.Tensor) else type(value).__name__


def _scale_type(scales):
    return SCALE_DTYPES.index(torch.float8_e8m0fnu if scales.dtype == torch.uint8 else scales.dtype)


def _tensors(name, value, dtypes):
    """A list of tensors that C++ can read."""
    needs = f"a tensor or a list of tensors of {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    tensors = [value] if isinstance(value, torch.Tensor) else value
    if not isinstance(tensors, list | tuple) or not tensors:
        raise TypeError(f"{name}: got {'no tensors' if value == [] else _kind(value)}, needs {needs}")
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes:
            raise TypeError(f"{name}: got {_kind(tensor)}, needs {needs}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name}: got {_kind(tensor)}, needs dense contiguous tensors on the CPU")
        if tensor.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires a gradient, needs frozen ones")
        check_memory(name, tensor)
    return list(tensors)


def _check_shape(shape, codes, is_4_bit):
    """``(experts, rows, columns)``, from the codes where it is None."""
    if shape is None:
        first = codes[0]
        if first.dim() != (3 if len(codes) == 1 else 2):
            raise ValueError(
                f"shape: got None with {len(codes)} tensors {tuple(first.shape)}, needs (experts, rows, columns)"
            )
        experts = first.shape[0] if first.dim() == 3 else len(codes)
        shape = (experts, first.shape[-2], first.shape[-1] * (2 if is_4_bit else 1))
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise TypeError(f"shape: got {shape!r}, needs (experts, rows, columns)")
    for size in shape:
        check_kind("shape", size, int, "three ints")
        if not 1 <= size < 2**27:
            raise ValueError(f"shape: got {tuple(shape)}, needs each at least 1 and below {2**27}")
    return tuple(shape)


def _check_group(group, columns, is_4_bit):
    if not isinstance(group, tuple | list) or len(group) != 2:
        raise TypeError(f"group: got {group!r}, needs (group_rows, group_columns)")
    for size in group:
        check_kind("group", size, int, "two ints")
    if min(group) < 1:
        raise ValueError(f"group: got {tuple(group)}, needs at least 1 of each")
    if is_4_bit and group[1] % 2 and group[1] < columns:
        raise ValueError(f"group: got {group[1]} columns with two codes in a byte, needs an even number")
    return tuple(min(size, 2**27) for size in group)


def _check_cut(codes, shape, width):
    experts, rows, _ = shape
    tensor_rows = math.prod(codes[0].shape[:-1])
    whole = tensor_rows > 0 and (tensor_rows % rows == 0 or rows % tensor_rows == 0)
    for tensor in codes:
        if tensor.dim() < 2 or tensor.shape[-1] != width or tensor.shape[:-1] != codes[0].shape[:-1] or not whole:
            raise ValueError(
                f"codes: got shape {tuple(tensor.shape)}, needs (..., {width}) with equally many rows in each tensor: "
                f"of whole experts of {rows} rows, or of equal parts of one"
            )
    if len(codes) * tensor_rows != experts * rows:
        raise ValueError(
            f"codes: got {len(codes)} tensors of {tensor_rows} rows, needs {experts} experts of {rows} rows in all"
        )
