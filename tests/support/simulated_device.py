"""A device named "sim" for machines without a GPU: its tensors cannot be mixed with CPU tensors; the CPU computes.

Every operator on a "sim" tensor unwraps it, runs on the CPU and wraps the result; one that mixes "sim" and CPU tensors
raises, as on a GPU, but for copies and for 0-d CPU tensors.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "sim"
_INDEXING = ("aten::index", "aten::_index_put_impl_", "aten::index_put_")  # indices may be on the CPU


class SimTensor(torch.Tensor):
    """Shape, strides and dtype of the CPU tensor ``raw``, on the device "sim"."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), dtype=raw.dtype, device=torch.device(NAME, 0)
        )

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self, **kwargs):
        return f"SimTensor({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, *args, **(kwargs or {}))


def _raw(value):
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, SimTensor) and value.raw.dtype != value.dtype:
        value.raw = value.raw.to(value.dtype)  # `parameter.data = parameter.data.float()` changes the outer dtype only
    return value.raw if isinstance(value, SimTensor) else value


def _wrap(value, same):
    if not isinstance(value, torch.Tensor):
        return value
    # resolve_conj, because lazy conjugation is lost inside dispatch
    return same[id(value)] if id(value) in same else SimTensor(value.resolve_conj())


def _run(op, *args, **kwargs):
    name = op._schema.name
    if name == "aten::_copy_from":  # (source, destination)
        _raw(args[1]).copy_(_raw(args[0]))
        return args[1]
    if name == "aten::copy_":
        _raw(args[0]).copy_(_raw(args[1]))
        return args[0]
    if name == "aten::_to_copy":
        made = op(*map(_raw, args), **{key: _raw(value) for key, value in kwargs.items()})
        return made if torch.device(kwargs.get("device") or NAME).type == "cpu" else SimTensor(made)
    leaves, spec = tree_flatten((args, kwargs))
    stray = [leaf for leaf in leaves if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.dim()]
    if stray and not name.startswith(_INDEXING):
        raise RuntimeError(f"{name}: expected all tensors on {NAME}, got one on {stray[0].device}")
    raw_args, raw_kwargs = tree_unflatten([_raw(leaf) for leaf in leaves], spec)
    result = op(*raw_args, **raw_kwargs)
    same = {id(leaf.raw): leaf for leaf in leaves if isinstance(leaf, SimTensor)}  # what an in-place operator returns
    return tree_map(lambda v: _wrap(v, same), result)


class _Module(_DummyBackendModule):
    """torch.sim: the functions of a device's module that checkpointing calls."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.zeros(1)

    def set_rng_state(self, state, device=None):
        pass


def register():
    """Make the device known to torch, once per process; returns it."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        register.library = torch.library.Library("_", "IMPL")
        register.library.fallback(_run, "PrivateUse1")
    return torch.device(NAME, 0)
