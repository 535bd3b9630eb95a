"""Expert weights as parameters of a stock model that stay in the tensors of their checkpoint.

:class:`StoredWeight` has the shape and dtype that the stock experts class expects, so that transformers, PEFT and
``nn.Module`` treat it as any parameter. The operator takes the :class:`ktlib.Weight` behind it and copies nothing.

The codes of a quantised checkpoint decode to bf16, which is the dtype that is seen. Where a class holds (experts, in,
out), as gpt-oss's, and the checkpoint holds rows of outputs, the shape is that of the class.

What other code does with it:

    detach, .to() without a change, copy.deepcopy, weight[expert]    another StoredWeight of the same tensors
    any operation that reads, another dtype or device, pickling      computed from a decoded bf16 copy
    any operation that writes, also into a view                      RuntimeError that names the parameter
    a gradient of the weight, from the operator                      RuntimeError that names the parameter
"""

import functools
import itertools

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ktlib.operator.weight import Weight

_WAY_OUT = "call ktlib.stack_experts(model) first, which makes ordinary bf16 parameters, a copy in memory"
aten = torch.ops.aten


class StoredWeight(torch.Tensor):
    """A bf16 tensor on the CPU whose values are those of a :class:`ktlib.Weight`, or of a view of one; read-only.

    Args:
        source: a Weight, or another object whose ``decoded()`` returns the values.
        name: of the parameter, for messages.
        shape, stride, dtype: default: those of the Weight.
        transposed: the shape is (experts, columns, rows) of the Weight.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, source, name=None, shape=None, stride=None, dtype=torch.bfloat16, transposed=False, **others):
        if isinstance(source, torch.Tensor):  # hooks of accelerate make a parameter of the class of the one before
            raise RuntimeError(f"an expert weight stays in its checkpoint's file and cannot be offloaded; {_WAY_OUT}")
        if shape is None:
            experts, rows, columns = source.shape
            shape = (experts, columns, rows) if transposed else source.shape
        return torch.Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=dtype, device="cpu")

    def __init__(self, source, name, shape=None, stride=None, dtype=torch.bfloat16, transposed=False):
        self.source, self.parameter_name, self.transposed = source, name, transposed

    def decoded(self):
        """The values in new memory, a plain tensor without gradient."""
        values = self.source.decoded()
        if not isinstance(self.source, Weight):
            return values
        return values.transpose(1, 2).contiguous() if self.transposed else values.view(self.shape)

    def readable(self):
        """The values as a plain tensor, which may be the memory of the checkpoint's file: for reading alone."""
        if isinstance(self.source, Weight) and self.source.format == "bf16" and len(self.source.codes) == 1:
            values = self.source.codes[0].view(self.source.shape)
            return values.transpose(1, 2) if self.transposed else values.view(self.shape)
        return self.decoded()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        """``nn.Module`` assigns when it casts. This object then becomes an ordinary parameter with that value."""
        if not isinstance(value, StoredWeight):
            torch.utils.swap_tensors(self, _like(self, value.detach()))
        elif value.source is not self.source:
            raise _refusal(self, "an assignment to .data")

    def __repr__(self, **kwargs):
        return f"StoredWeight({self.parameter_name}, {tuple(self.shape)}, {self.source!r})"

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = _like(self, self.detach())
        return copied

    def __reduce_ex__(self, protocol):
        return _like(self, self.decoded()).__reduce_ex__(protocol)

    def untyped_storage(self):
        """The storage of the first tensor. Code that saves a model tells by it whether two parameters are one."""
        return self.source.codes[0].untyped_storage() if isinstance(self.source, Weight) else super().untyped_storage()

    def data_ptr(self):
        raise _refusal(self, "an address")

    def numpy(self, *, force=False):
        return self.decoded().numpy(force=force)

    def tolist(self):
        return self.decoded().tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (written := _written(op, args, kwargs)) is not None:
            if op is aten.set_.source_Tensor and _same_source(*args[:2]):
                return written
            raise _refusal(written, op.name())
        if op is aten._to_copy.default and isinstance(args[0].source, Weight) and _changes_nothing(**kwargs):
            return _view(args[0])
        if op is aten.cat.default and (joined := _joined(*args, **kwargs)) is not None:
            return joined
        if _returns_views(op) and isinstance(args[0], StoredWeight):
            narrowed = _narrowed(op, *args, **kwargs)
            return _any_view(op, args, kwargs) if narrowed is None else narrowed
        readable = functools.partial(tree_map_only, StoredWeight, StoredWeight.readable)
        return op(*readable(args), **readable(kwargs))


def operand(parameter):
    """An expert weight as :func:`ktlib.moe_experts` takes it: the Weight behind a StoredWeight, others as they are."""
    return parameter.source if isinstance(parameter, StoredWeight) else parameter


def matrices_of(parameter, halves):
    """Matrices whose rows are outputs, for placing their memory: ``halves`` of each expert's if one tensor holds them.

    Of a StoredWeight, the codes.
    """
    if not isinstance(parameter, StoredWeight):
        return [matrix for half in parameter.detach().chunk(halves, dim=1) for matrix in half]
    weight = parameter.source
    experts, rows, _ = weight.shape
    rows_each = rows if len(weight.codes) <= experts else rows * experts // len(weight.codes)
    matrices = [matrix for tensor in weight.codes for matrix in tensor.view(-1, rows_each, tensor.shape[-1])]
    return [half for matrix in matrices for half in (matrix.chunk(halves) if rows_each == rows else [matrix])]


def values_of(parameter):
    """The values of an expert weight in the layout in which the operator takes it, as a plain tensor for reading."""
    weight = operand(parameter)
    return weight.decoded() if isinstance(weight, Weight) else weight.detach()


def stack_experts(model):
    """Make ordinary parameters of expert weights that stay in their checkpoint, in place; returns ``model``.

    For what changes or trains these weights: full fine-tuning, merging of adapters, ``load_state_dict``. The copies
    take the memory that the experts have in bf16, also those of a quantised checkpoint. Call it before an optimizer is
    made. All else stays as it is; a model without such weights is returned unchanged.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, StoredWeight):
                setattr(module, name, _like(parameter, parameter.decoded()))
    return model


def is_mapped(model):
    """Whether expert weights of ``model`` stay in the tensors of their checkpoint."""
    return any(isinstance(parameter, StoredWeight) for parameter in model.parameters())


def quantised_format(model):
    """The format of the codes of ``model``'s experts, such as "int4"; None if they are bf16."""
    sources = (parameter.source for parameter in model.parameters() if isinstance(parameter, StoredWeight))
    return next((source.format for source in sources if source.format != "bf16"), None)


def refuse_gradients(output, *parameters):
    """``output``; if it is differentiated although one of the parameters is a StoredWeight that wants a gradient, a
    RuntimeError names that parameter."""
    wanted = [p for p in parameters if isinstance(p, StoredWeight) and p.requires_grad]
    return _WithoutGradients.apply(output, *wanted) if wanted and torch.is_grad_enabled() else output


class _WithoutGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, *parameters):
        ctx.first = parameters[0].parameter_name
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            f"{ctx.first}: requires a gradient, but stays as it is in its checkpoint; freeze it (PEFT does) with "
            f"requires_grad_(False), or to train it, {_WAY_OUT}"
        )


def _refusal(weight, operation):
    return RuntimeError(
        f"{weight.parameter_name}: {operation} needs an ordinary tensor, but this weight stays as it is in its "
        f"checkpoint; {_WAY_OUT}"
    )


def _like(weight, tensor):
    """``tensor`` as a parameter if ``weight`` is one."""
    return torch.nn.Parameter(tensor, weight.requires_grad) if isinstance(weight, torch.nn.Parameter) else tensor


def _view(weight, source=None, shape=None):
    """Another StoredWeight with the same name: of the same values, or of a part of the experts or rows."""
    if source is None:
        same = (weight.shape, weight.stride(), weight.dtype, weight.transposed)
        return StoredWeight(weight.source, weight.parameter_name, *same)
    return StoredWeight(source, weight.parameter_name, shape)


def _written(op, args, kwargs):
    """The first StoredWeight that the op would write to, or None."""
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(given):
                if isinstance(tensor, StoredWeight):
                    return tensor
    return None


def _same_source(first, second):
    return all(isinstance(t, StoredWeight) for t in (first, second)) and first.source is second.source


def _changes_nothing(dtype=None, device=None, layout=None, memory_format=None, pin_memory=None, **_):
    """Of ``_to_copy``: a weight that cannot be written to needs no copy. ``cpu:0`` is the CPU too."""
    on_cpu = device is None or torch.device(device).type == "cpu"
    kept = memory_format in (None, torch.preserve_format, torch.contiguous_format)
    return on_cpu and kept and not pin_memory and dtype in (None, torch.bfloat16)


def _returns_views(op):
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


class _Replayed:
    """A view of a StoredWeight, made from its values when they are read."""

    def __init__(self, op, args, kwargs, number):
        self.op, self.args, self.kwargs, self.number = op, args, kwargs, number

    def decoded(self):
        result = self.op(self.args[0].readable(), *self.args[1:], **self.kwargs)
        return result if self.number is None else result[self.number]


def _any_view(op, args, kwargs):
    """The views that an op returns, as StoredWeights. If they were copies, writes into them would be lost."""
    weight = args[0]
    if op in (aten.detach.default, aten.alias.default):
        return _view(weight)
    like = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
    result = op(like, *args[1:], **kwargs)

    def view(number, meta):
        replayed = _Replayed(op, args, kwargs, number)
        return StoredWeight(replayed, weight.parameter_name, meta.shape, meta.stride(), meta.dtype)

    return view(None, result) if isinstance(result, torch.Tensor) else list(itertools.starmap(view, enumerate(result)))


def _narrowed(op, weight, *args, **kwargs):
    """What ops return that select experts or rows, as views of fewer tensors of the checkpoint; None for all others."""
    source = weight.source
    if kwargs or not isinstance(source, Weight) or weight.dim() != 3 or weight.transposed:
        return None
    if op is aten.select.int and args[0] in (0, -3):
        one = source.narrow(0, args[1] % weight.shape[0], 1)
        return one and _view(weight, one, one.shape[1:])
    if op is aten.unbind.int and (not args or args[0] in (0, -3)):
        return [weight[expert] for expert in range(weight.shape[0])]
    if op is aten.squeeze.dim and args[0] in (0, -3) and weight.shape[0] == 1:
        return _view(weight, source, weight.shape[1:])
    if op not in (aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor):
        return None
    if op is aten.slice.Tensor:
        dim, start, end, step = (*args, *(0, None, None, 1)[len(args) :])
        start, end, _ = slice(start, end).indices(weight.shape[dim])
        found = source.narrow(dim % 3, start, end - start) if step == 1 else None
        return found and _view(weight, found)
    dim = args[1] % 3 if len(args) > 1 else 0
    size, whole = args[0], weight.shape[dim]
    sizes = size if isinstance(size, list | tuple) else [min(size, whole - at) for at in range(0, whole, size)]
    ends = list(itertools.accumulate(sizes))
    found = [source.narrow(dim, end - size, size) for end, size in zip(ends, sizes, strict=True)]
    return None if None in found else [_view(weight, part) for part in found]


def _joined(tensors, dim=0):
    """Of ``torch.cat`` of gates and ups along the rows, a StoredWeight of the tensors of both; None for all else."""
    whole = all(isinstance(t, StoredWeight) and t.dim() == 3 and isinstance(t.source, Weight) for t in tensors)
    if dim not in (1, -2) or not whole or any(t.transposed or t.shape != t.source.shape for t in tensors):
        return None
    weight = Weight.of_rows([tensor.source for tensor in tensors])
    return weight and StoredWeight(weight, tensors[0].parameter_name)
