"""Routed experts stay on the CPU, whatever moves the rest of the model.

``nn.Module`` moves and casts through one method, ``_apply``, which ``.to``, ``.cuda``, Trainer, accelerate and PEFT all
end in. :func:`pin_experts` gives each module that owns routed experts a subclass of its own class in which ``_apply``
passes dtypes on to the experts and their adapters, but not devices. It is the owner that is subclassed and not the
experts, so that adapters which PEFT puts around the experts later are covered by it too.
"""

import functools

import torch

from ktlib.integrations.transformers_experts import IMPLEMENTATION, is_experts, unserved
from ktlib.names import component
from ktlib.operator.checks import check_stream_rows
from ktlib.placement.data_parallel import DdpIgnores, check_trainers

CPU = torch.device("cpu")
STOCK = ("eager", "grouped_mm", "batched_mm")


def pin_experts(model, lora_device="cpu", stream_rows=None):
    """Keep the routed experts of ``model`` on the CPU from now on; everything else moves as always. Returns ``model``.

    ``.to("cuda")``, ``.cuda()``, ``transformers.Trainer``, accelerate and PEFT then move all but the experts; casts of
    the dtype reach them. Pin before or after adapters are added, before or after moving (experts on a GPU come back).
    Pinning again with another ``lora_device`` moves the adapters, with another ``stream_rows`` changes that.

    A ``transformers.Trainer`` with a pinned model, given or made by its ``model_init``, trains on the first visible GPU
    and says so if there are more. It refuses FSDP and DeepSpeed on GPUs. So pin before the Trainer is made. In
    processes of ``torchrun`` or ``accelerate launch``, DistributedDataParallel takes the model on the CPU only, see
    :func:`share_experts`.

    Args:
        model: a transformers model, with or without PEFT adapters.
        lora_device: where adapters of routed experts live, "cpu" or another device ("cuda"). They go there at once or,
            if they are added later, at the next move of the model and at the latest in its next forward.
        stream_rows: as in :func:`ktlib.moe_experts`: experts with at least so many rows in a batch are computed on the
            GPU that the rest of the model is on, from weights that stay on the CPU and are copied there each time.
            None: the CPU computes all. :func:`ktlib.estimate.break_even_rows` says from how many on that is faster for
            one expert. Where most experts of the usual batch have more, a small number is best: the CPU takes several
            milliseconds for whatever is left to it.

    Raises:
        TypeError: stream_rows is not an int.
        ValueError: the model has no routed experts, or is itself what holds their weights; stream_rows is below 1.
        RuntimeError: in a later forward on another device, if the operator cannot compute these experts.
    """
    check_stream_rows(stream_rows)
    lora_device = torch.device(lora_device)
    owners = _owners(model)
    if not owners:
        raise ValueError(f"model: {type(model).__name__} has no submodule with routed experts")
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
    """Keep the frozen routed experts of ``model`` in memory once for all CPU processes of a machine; returns ``model``.

    For data parallel training on CPUs (``accelerate launch``, ``torchrun``) from a checkpoint with fused experts, which
    every process maps. Call it last, on the model that goes to the Trainer or to DistributedDataParallel: besides
    pinning the experts, it tells DistributedDataParallel not to broadcast them at its start, which would copy them.
    Adapters and everything else are synchronised as always.

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
    """Whether routed experts of ``model`` were pinned to the CPU."""
    return any(isinstance(module, _Owner) for module in model.modules())


def placement(model):
    """``{(component, device, dtype): bytes}`` of all parameters and buffers: what lies where."""
    table = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        label = f"{component(name)} LoRA" if ".lora_" in name else component(name)
        key = (label, str(tensor.device), str(tensor.dtype).removeprefix("torch."))
        table[key] = table.get(key, 0) + tensor.numel() * tensor.element_size()
    return table


class _Owner:
    """Mixin in front of the class of a module that owns pinned experts."""

    def _apply(self, fn, recurse=True):
        if recurse:
            for name, child in self.named_children():
                if name in self._pinned_slots:
                    _move(child, fn, self._pinned_lora_device)
                else:
                    child._apply(fn)
        return super()._apply(fn, recurse=False)

    def __reduce_ex__(self, protocol):  # a generated class cannot be found by name
        return _restore, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _pinned_class(owner_class):
    """A subclass of ``owner_class`` with the mixin in front, and with the same name: PEFT and Trainer look at names."""
    bases = (_Owner, owner_class)
    namespace = {"__module__": owner_class.__module__, "__qualname__": owner_class.__qualname__}
    return type(owner_class.__name__, bases, namespace)


def _restore(owner_class):
    made = _pinned_class(owner_class)
    return made.__new__(made)


def _owners(model):
    """``{module: names of the children that are routed experts, under adapters or not}``."""
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
    """What ``fn`` does to ``tensor``, but on ``device``."""
    probe = fn(torch.empty(0, dtype=tensor.dtype))
    if tensor.is_meta and not probe.is_meta:
        fn(torch.empty(0, dtype=tensor.dtype, device="meta"))  # only to_empty can do this; .to raises
        return torch.empty_like(tensor, dtype=probe.dtype, device=device)
    if probe.device == tensor.device and device.type == tensor.device.type:
        return tensor if _only_copies(fn, tensor.dtype) else fn(tensor)
    return tensor.to(device, probe.dtype)


def _only_copies(fn, dtype):
    """Whether ``fn`` gives CPU tensors back unchanged, but copied, as ``.to("cpu:0")`` does.

    The Trainer says that in each of several CPU processes. A copy would end their sharing of mapped weights.
    """
    one = torch.ones(1, dtype=dtype)
    result = fn(one)
    same = result.dtype == dtype and result.device == CPU and bool(result.eq(1).all())
    return same and result.data_ptr() != one.data_ptr()


def _before_forward(owner, args):
    """Adapters that were added since the last move go to their place; what cannot work says so."""
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
