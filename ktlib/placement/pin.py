"""Keeps routed experts on the CPU, whatever moves the rest of the model.

``.to``, ``.cuda``, Trainer, accelerate and PEFT all move and cast modules through the method ``nn.Module._apply``.
:func:`pin_experts` replaces the class of each module that owns routed experts by a subclass whose ``_apply`` changes
the dtype of the experts and of their adapters, but not their device. The class of the owner is replaced and not that of
the experts, so that adapters which PEFT later puts around the experts are covered too.
"""

import functools

import torch

from ktlib.integrations.stored_weight import is_mapped, quantised_format, stack_experts
from ktlib.integrations.transformers_experts import IMPLEMENTATION, is_experts, unserved, warn_once
from ktlib.names import component
from ktlib.operator.checks import check_stream_rows
from ktlib.placement.data_parallel import DdpIgnores, check_trainers

CPU = torch.device("cpu")
STOCK = ("eager", "grouped_mm", "batched_mm")


def pin_experts(model, lora_device="cpu", stream_rows=None):
    """Keep the routed experts of ``model`` on the CPU from now on; all other modules move as usual. Returns ``model``.

    ``.to("cuda")``, ``.cuda()``, ``transformers.Trainer``, accelerate and PEFT then move everything but the experts.
    Casts to another dtype apply to the experts too. The model can be pinned before or after adapters are added, and
    before or after it is moved: experts that are on a GPU return to the CPU. Call the function again to change
    ``lora_device`` or ``stream_rows``.

    Pin the model before a ``transformers.Trainer`` is made, or in its ``model_init``. The Trainer then trains on the
    first visible GPU, with a warning if several are visible, and refuses FSDP and DeepSpeed on GPUs. In processes of
    ``torchrun`` or ``accelerate launch``, DistributedDataParallel takes a pinned model only if all of it is on the CPU;
    see :func:`share_experts`.

    Args:
        model: a transformers model, with or without PEFT adapters.
        lora_device: the device of the routed experts' adapters, "cpu" or another ("cuda"). Adapters that exist move at
            once. Adapters that are added later move when the model next moves or, at the latest, in its next forward.
        stream_rows: as in :func:`ktlib.moe_experts`. Experts with at least this many rows in a batch are computed on
            the GPU of the inputs; their weights stay on the CPU and are copied to the GPU for each call. None: the CPU
            computes all experts. :func:`ktlib.estimate.break_even_rows` returns the number of rows from which on
            streaming is faster for one expert. If most experts of a usual batch have more rows than that, a small
            ``stream_rows`` is best, since the CPU takes several milliseconds even for a few rows. Expert weights that
            are mapped with one tensor per expert are stacked in memory, and the log says so; a checkpoint written by
            `ktlib fuse` needs no such copy.

    Raises:
        TypeError: stream_rows is not an int.
        ValueError: no submodule of the model is a routed experts module (the model itself may be one); stream_rows is
            below 1, or the experts are those of a quantised checkpoint.
        RuntimeError: in a later forward with inputs on another device, if the operator cannot compute these experts.
    """
    check_stream_rows(stream_rows)
    lora_device = torch.device(lora_device)
    owners = _owners(model)
    if not owners:
        raise ValueError(f"model: {type(model).__name__} has no submodule with routed experts")
    if stream_rows is not None and (format := quantised_format(model)) is not None:
        raise ValueError(
            f"stream_rows: got {stream_rows} for a model whose experts are {format} codes, which are not sent to a "
            "GPU; needs None, or bf16 experts (ktlib.stack_experts(model) makes them, a copy in memory)"
        )
    if stream_rows is not None and is_mapped(model):
        warn_once(
            next(module for module in model.modules() if is_experts(module)),
            "stream_rows needs fused experts, so they are stacked in memory; `ktlib fuse` writes such a checkpoint",
        )
        stack_experts(model)
    for owner, slots in owners.items():
        if not isinstance(owner, _Owner):
            owner.__class__ = _pinned_class(type(owner))
            owner.register_forward_pre_hook(_before_forward)
        owner._pinned_slots, owner._pinned_lora_device = slots, lora_device
        for slot in slots:
            _move(owner._modules[slot], _identity, lora_device)
            _bare(owner._modules[slot]).ktlib_stream_rows = stream_rows
    vars(model).setdefault("_ddp_params_and_buffers_to_ignore", DdpIgnores(model))
    if torch.cuda.device_count() > 0:
        check_trainers(is_pinned)
    return model


def share_experts(model):
    """Let all CPU processes of a machine share one copy of the frozen routed experts of ``model``; returns ``model``.

    For data parallel training on CPUs (``accelerate launch``, ``torchrun``) from a checkpoint whose files every process
    maps (in bf16, fused or with one tensor per expert). Call it last, on the model that is given to the Trainer or to
    DistributedDataParallel. It pins the experts, and tells DistributedDataParallel not to broadcast them when it
    starts: a broadcast would give each process its own copy. Adapters and all other parameters are synchronised as
    usual.

    Raises:
        ValueError: as :func:`pin_experts`.
    """
    pin_experts(model)
    frozen = []
    for name, module in model.named_modules():
        if is_experts(module):
            weights = module.named_parameters(recurse=False)
            frozen += [f"{name}.{weight}" for weight, value in weights if not value.requires_grad]
    model._ddp_params_and_buffers_to_ignore = DdpIgnores(model, frozen)
    return model


def is_pinned(model):
    """Whether :func:`pin_experts` was called on ``model`` or on a model in it."""
    return any(isinstance(module, _Owner) for module in model.modules())


def placement(model):
    """``{(component, device, dtype): bytes}`` of all parameters and buffers; adapters are components of their own."""
    table = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        label = f"{component(name)} LoRA" if ".lora_" in name else component(name)
        key = (label, str(tensor.device), str(tensor.dtype).removeprefix("torch."))
        table[key] = table.get(key, 0) + tensor.numel() * tensor.element_size()
    return table


class _Owner:
    """The mixin that makes a class one of modules that own pinned experts.

    ``_pinned_slots`` are the names of the children that are experts, with or without adapters around them, and
    ``_pinned_lora_device`` is the device of those adapters.
    """

    def _apply(self, fn, recurse=True):
        if recurse:
            for name, child in self.named_children():
                if name in self._pinned_slots:
                    _move(child, fn, self._pinned_lora_device)
                else:
                    child._apply(fn)
        return super()._apply(fn, recurse=False)

    def __reduce_ex__(self, protocol):  # pickle cannot find a generated class by its name
        return _restore, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _pinned_class(owner_class):
    """A subclass of the mixin and ``owner_class`` that has the name of ``owner_class``, which PEFT and Trainer read."""
    bases = (_Owner, owner_class)
    namespace = {"__module__": owner_class.__module__, "__qualname__": owner_class.__qualname__}
    return type(owner_class.__name__, bases, namespace)


def _restore(owner_class):
    """An empty instance of the pinned class, to be filled by pickle or ``copy.deepcopy``."""
    pinned_class = _pinned_class(owner_class)
    return pinned_class.__new__(pinned_class)


def _owners(model):
    """``{module: names of its children that are routed experts, with or without adapters around them}``."""
    owners = {}
    for parent in model.modules():
        if hasattr(parent, "base_layer"):
            continue
        slots = tuple(name for name, child in parent.named_children() if is_experts(_bare(child)))
        if slots:
            owners[parent] = slots
    return owners


def _bare(module):
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _identity(tensor):
    return tensor


def _move(child, fn, lora_device):
    """``child._apply(fn)`` that leaves experts on the CPU and their adapters on ``lora_device``."""
    for name, module in child.named_modules():
        device = lora_device if ".lora_" in f".{name}" else CPU
        torch.nn.Module._apply(module, functools.partial(_stay, fn, device), recurse=False)


def _stay(fn, device, tensor):
    """``fn(tensor)``, where ``fn`` moves or casts a tensor, but with the result on ``device``."""
    probe = fn(torch.empty(0, dtype=tensor.dtype))  # its dtype and device are those that `fn` asks for
    if tensor.is_meta and not probe.is_meta:
        fn(torch.empty(0, dtype=tensor.dtype, device="meta"))  # raises unless `fn` is that of to_empty, as torch does
        return torch.empty_like(tensor, dtype=probe.dtype, device=device)
    if probe.device == tensor.device and device.type == tensor.device.type:
        return tensor if _only_copies(fn, tensor.dtype) else fn(tensor)
    return tensor.to(device, probe.dtype)


def _only_copies(fn, dtype):
    """Whether ``fn`` returns an unchanged copy of a CPU tensor, as ``.to("cpu:0")`` does.

    The Trainer calls ``.to`` like this in each of several CPU processes. Copies would not be shared by the processes.
    """
    probe = torch.ones(1, dtype=dtype)
    result = fn(probe)
    unchanged = result.dtype == dtype and result.device == CPU and bool(result.eq(1).all())
    return unchanged and result.data_ptr() != probe.data_ptr()


def _before_forward(owner, args):
    """Move adapters that were added since the last move; RuntimeError if the experts cannot be computed on the CPU."""
    device = owner._pinned_lora_device
    for slot in owner._pinned_slots:
        child = owner._modules[slot]
        for name, parameter in child.named_parameters():
            if ".lora_" in f".{name}" and parameter.device.type != device.type:
                _move(child, _identity, device)
                break
        experts = _bare(child)
        if not args or not isinstance(args[0], torch.Tensor) or args[0].device.type == "cpu":
            continue
        implementation = experts.config._experts_implementation
        if implementation in STOCK:
            raise RuntimeError(
                f"{type(experts).__name__}: pinned to the CPU with inputs on {args[0].device}, which transformers' "
                f"{implementation!r} experts cannot compute; needs experts_implementation={IMPLEMENTATION!r}"
            )
        reason = unserved(experts, args[0]) if implementation == IMPLEMENTATION else None
        if reason is not None and not hasattr(child, "base_layer"):
            raise RuntimeError(f"{type(experts).__name__}: pinned to the CPU, but ktlib cannot compute it: {reason}")
