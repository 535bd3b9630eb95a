"""Failures of the system that ktlib replaces, each in a stand-in that is as small as the failure allows.

The notebook ``07_failure_museum`` shows how each stand-in fails, and what ktlib does in its place. Nothing else uses
this module. Functions that may crash are run with :func:`child`, in a process of their own.
"""

import ctypes
import importlib.util
import mmap
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ktlib import reference
from ktlib.diagnosis.trace import trace_nonfinite
from ktlib.integrations.transformers_experts import is_experts
from ktlib.lab.validation import random_layer
from ktlib.operator.moe_experts import moe_experts

ROOT = Path(__file__).resolve().parents[2]


# ---- processes that may crash ---------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a child process ended: ``signal`` ("SIGSEGV" or ""), ``code``, and what it printed."""

    signal: str
    code: int
    out: str
    err: str


def child(function, *arguments, timeout=60):
    """Run ``function`` of this module in a child process; returns an :class:`Outcome` even if the process crashes."""
    code = f"from ktlib.lab import museum; museum.{function}(*{arguments!r})"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True, timeout=timeout
    )
    name = signal.Signals(-done.returncode).name if done.returncode < 0 else ""
    return Outcome(name, done.returncode, done.stdout.strip(), done.stderr.strip())


# ---- 006: a cache that forward pushes to and backward pops from ------------------------------------------------------


class CachingExperts:
    """Routed experts that save the tensors for backward in a stack of their own, outside autograd.

    Args:
        layer: arguments of ``moe_experts`` without hidden_states.
        depth: how many forwards can be saved in the stack.
    """

    def __init__(self, layer, depth):
        self.layer, self.depth, self.stack = layer, depth, []

    def __call__(self, hidden_states):
        return _Cached.apply(hidden_states, self)


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, experts):
        if len(experts.stack) == experts.depth:
            raise RuntimeError(f"forward cache stack overflow: depth {experts.depth}")
        experts.stack.append(hidden_states.detach().clone())
        ctx.experts = experts
        return reference.moe_experts(hidden_states, **experts.layer).to(hidden_states.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        hidden_states = ctx.experts.stack.pop().requires_grad_()
        with torch.enable_grad():
            output = reference.moe_experts(hidden_states, **ctx.experts.layer)
        return torch.autograd.grad(output, hidden_states, grad_output.to(output.dtype))[0], None


# ---- 007a: a config that loses its derived fields -------------------------------------------------------------------


class GeneralConfig(ctypes.Structure):
    """The base struct, which the inner layers of the old C++ code received."""

    _fields_ = [("experts", ctypes.c_int), ("hidden", ctypes.c_int), ("intermediate", ctypes.c_int)]


class SFTConfig(GeneralConfig):
    """The derived struct, which Python filled in: the base's fields, then the rank, by default 16."""

    _fields_ = [("lora_rank", ctypes.c_int)]

    def __init__(self, *arguments, lora_rank=16):
        super().__init__(*arguments, lora_rank=lora_rank)


def sliced(config):
    """C++ ``GeneralConfig base = config;`` and later ``SFTConfig(base)``, which copy the base's bytes only."""
    base = GeneralConfig.from_buffer_copy(bytes(config)[: ctypes.sizeof(GeneralConfig)])
    return SFTConfig(base.experts, base.hidden, base.intermediate)


# ---- 007b: an address that this processor cannot reach --------------------------------------------------------------


def write_to_device_address(experts=64, hidden=2048, rank=8):
    """Zero a buffer "on the GPU" from the CPU: its addresses are reserved, as a driver does it, but have no memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    length = experts * hidden * rank
    address = libc.mmap(None, ctypes.c_size_t(2 * length), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    index = length - 1
    print(f"max_valid_idx={length}, index {index} is in range: {0 <= index < length}", flush=True)
    ctypes.memset(address, 0, 2 * length)


def read_null():
    """Read the emptied weight of a layer from its address, as a kernel does; the address is 0."""
    address = torch.empty(0, dtype=torch.bfloat16).data_ptr()
    print(f"address {address}", flush=True)
    print(ctypes.c_uint16.from_address(address).value)


# ---- 007b, 007c: a device that is not the CPU -----------------------------------------------------------------------


def on_another_device():
    """Print what torch and ktlib do with tensors on a second device: a GPU if there is one, else a simulated device."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else _simulated_device()
    layer = random_layer("trained", tokens=12, experts=8, top_k=2, hidden=64, intermediate=32, rank=8)
    parameter = torch.nn.Parameter(layer["down_lora"][0].to(device))
    try:
        parameter.grad = torch.zeros(parameter.shape, dtype=parameter.dtype)
    except RuntimeError as error:
        print(f"by hand: {str(error).split('.')[0].replace(device.type, 'other')}")
    try:
        moe_experts(**layer | {"down_proj": layer["down_proj"].to(device)})
    except ValueError as error:
        print(f"ValueError: {str(error).replace(str(device), 'other')}")
    on_device, on_cpu = _output_and_gradients(layer, device), _output_and_gradients(layer, torch.device("cpu"))
    live = sum(tensor.device.type == device.type for tensor in on_device)
    equal = sum(torch.equal(tensor.cpu(), other) for tensor, other in zip(on_device, on_cpu, strict=True))
    print(f"ktlib: {live} of {len(on_device)} results live where they belong,")
    print(f"       {equal} equal those of the CPU")


def _output_and_gradients(layer, device):
    experts = {"gate_up_proj": layer["gate_up_proj"], "down_proj": layer["down_proj"]}
    others = {name: layer[name].to(device) for name in ("hidden_states", "top_k_index", "top_k_weights")}
    leaves = {
        name: [torch.nn.Parameter(m.to(device)) for m in layer[name][:2]] for name in ("gate_up_lora", "down_lora")
    }
    factors = {name: (*pair, layer[name][2]) for name, pair in leaves.items()}
    output = moe_experts(**experts, **others, **factors)
    output.sum().backward()
    return output, *(leaf.grad for pair in leaves.values() for leaf in pair)


def _simulated_device():
    """A device that refuses to mix with the CPU, as a GPU does. Its code is among the tests, so this needs a clone."""
    spec = importlib.util.spec_from_file_location(
        "simulated_device", ROOT / "tests" / "support" / "simulated_device.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.register()


# ---- 009: a wrapper that contains the module it replaces ------------------------------------------------------------


class WrapperOfOriginal(torch.nn.Module):
    """Has the router and shared experts of an MoE layer, and the layer itself with emptied expert weights.

    Args:
        moe: a transformers MoE layer with ``gate`` and ``shared_experts``.
        experts: how many linear layers per projection stand for the experts that transformers 4 had.
        routed: the value that the kernel returns for every element of the routed output.
        rank: rank of the routed experts' LoRA, whose bf16 matrices are parameters of the wrapper; 0 for none.
        with_original: whether the wrapper contains the original layer.
    """

    def __init__(self, moe, experts=8, routed=0.0, rank=0, with_original=True):
        super().__init__()
        self.gate, self.shared_experts, self.routed = moe.gate, moe.shared_experts, routed
        if with_original:
            self.original_moe = moe
            hidden, width = moe.shared_experts.gate_proj.in_features, moe.experts.down_proj.shape[-1]
            moe.experts = torch.nn.ModuleList(emptied_mlp(hidden, width) for _ in range(experts))
        if rank:
            count, hidden, width = moe.experts.down_proj.shape
            sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
            for name, (inner, outer) in sizes.items():
                for letter, shape in (("a", (count, rank, inner)), ("b", (count, outer, rank))):
                    value = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
                    self.register_parameter(f"{name}_lora_{letter}", value)

    def forward(self, hidden_states):
        return self.shared_experts(hidden_states) + self.routed


def emptied_mlp(hidden, width):
    """An MLP with gate_proj, up_proj and down_proj, whose weights are ``torch.empty(0)``."""
    mlp = torch.nn.Module()
    for name, (inner, outer) in {
        "gate_proj": (hidden, width),
        "up_proj": (hidden, width),
        "down_proj": (width, hidden),
    }.items():
        mlp.add_module(name, torch.nn.Linear(inner, outer, bias=False, device="meta"))
        mlp.get_submodule(name).weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    return mlp


def lite_config(layers=27):
    """Config with DeepSeek-V2-Lite's structure (27 layers, the first dense, shared experts) and tiny widths."""
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        vocab_size=96, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=layers,
        first_k_dense_replace=1, num_attention_heads=1, num_key_value_heads=1, n_routed_experts=4, n_shared_experts=2,
        num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        norm_topk_prob=False,
    )  # fmt: skip


# ---- 010b: suspects, each installed in an otherwise right kernel ----------------------------------------------------


class Block(NamedTuple):
    """A freed block of a :class:`Heap`, in bytes."""

    offset: int
    size: int


class Heap:
    """Host memory that is reused: an allocation gets a freed block of its size, if there is one."""

    def __init__(self, tensors):
        """Make a heap as large as all ``tensors`` together, so that later allocations must reuse freed blocks."""
        self.memory, self.used, self.free_blocks = bytearray(sum(tensor.nbytes for tensor in tensors)), 0, []
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def place(self, tensor):
        """A copy of ``tensor`` in this memory."""
        size = tensor.nbytes
        block = next((block for block in self.free_blocks if block.size == size), None)
        if block is None:
            block = Block(self.used, size)
            self.used += size
        else:
            self.free_blocks.remove(block)
        return (
            torch.frombuffer(self.memory, dtype=tensor.dtype, offset=block.offset, count=tensor.numel())
            .reshape(tensor.shape)
            .copy_(tensor)
        )

    def free(self, tensor):
        self.free_blocks.append(Block(tensor.data_ptr() - self.base, tensor.nbytes))


def read_bf16(address, shape):
    """A copy of the memory at ``address``, read as a bf16 tensor of ``shape``, whatever the memory holds now."""
    count = torch.Size(shape).numel()
    return (
        torch.frombuffer((ctypes.c_char * (2 * count)).from_address(address), dtype=torch.bfloat16)
        .reshape(shape)
        .clone()
    )


class OldKernel:
    """The experts of one layer, computed by ktlib's operator, but with one fault of the old design.

    ``fault`` is None, "reinterpreted" (the bytes of parameters are read as bf16, whatever their dtype), "stale"
    (parameters are read from the addresses that :meth:`remember` stored), or "uninitialised" (the output is added to a
    buffer that was not cleared).
    """

    def __init__(self, module, fault, heap):
        self.module, self.fault, self.heap, self.addresses = module, fault, heap, {}

    def remember(self, name, lora_A, lora_B):
        self.addresses[name] = [(t.data_ptr(), tuple(t.shape)) for t in (lora_A, lora_B)]

    def __call__(self, hidden_states, top_k_index, top_k_weights, gate_up_lora=None, down_lora=None, lora_dropout=0.0):
        factors = [self._read("gate_up", gate_up_lora), self._read("down", down_lora)]
        weights = self.module.gate_up_proj, self.module.down_proj
        output = moe_experts(hidden_states, top_k_index, top_k_weights, *weights, *factors, lora_dropout=lora_dropout)
        if self.fault == "uninitialised":
            output = output + read_bf16(self.heap.base, output.shape)
        return output

    def has_stale_addresses(self, model):
        """Whether the kernel reads other addresses than those of the parameters."""
        factors = {name: _factors(wrapper) for name, wrapper in _wrappers_of(model, self.module)}
        current = {name: [(t.data_ptr(), tuple(t.shape)) for t in pair] for name, pair in factors.items()}
        return self.fault == "stale" and self.addresses != current

    def _read(self, name, lora):
        if self.fault == "reinterpreted":
            return (*(read_bf16(t.data_ptr(), t.shape) for t in lora[:2]), lora[2])
        if self.fault == "stale":
            return (*(read_bf16(*address_and_shape) for address_and_shape in self.addresses[name]), lora[2])
        return lora


SUSPECTS = {
    "scale of A": "A is 1000 times larger than PEFT draws it",
    "bf16 overflow": "activations or products exceed the range of bf16",
    "upcast, read as bf16": "an adapter born in bf16 is upcast, its fp32 bytes are read as bf16",
    "fp32, read as bf16": "the same, of an adapter born in fp32",
    "stale host pointer": "the kernel kept addresses from before the model moved",
    "uninitialised buffer": "the kernel adds to memory that it did not clear",
    "zero-size base weights": "the kernel reads the emptied expert weights",
}
OBSERVATIONS = {
    "first": "NaN in the first forward, with B = 0",
    "layer 1": "the first MoE layer is the first to have it",
    "routed": "the shared experts of that layer are clean",
    "no cure": "keeping the expert adapters in bf16 does not help",
    "clean": "the routed adapters themselves are finite",
    "pointer": "the kernel's address is not the parameter's",
}


def observe(suspect, load, input_ids):
    """Run a model with one suspect; returns ``{observation: bool}``, or ``{}`` if the model raises an error.

    Args:
        suspect: a key of :data:`SUSPECTS`.
        load: function of "fp32" or "bf16", which returns a model with fresh adapters (B = 0) in that dtype.
        input_ids: (rows, columns), the input of the forward.
    """
    seen = _run(suspect, load("fp32"), input_ids)
    if seen is None:
        return {}
    cured = _run(suspect, load("bf16"), input_ids)
    return {**seen, "no cure": seen["first"] and cured["first"]}


def _run(suspect, model, input_ids):
    heap = Heap([matrix for wrapper in _wrappers(model) for matrix in _factors(wrapper)])
    for wrapper in _wrappers(model):
        lora_A, lora_B = _factors(wrapper)
        if suspect == "scale of A":
            lora_A.data.mul_(1000)
        if suspect == "fp32, read as bf16" and lora_A.dtype == torch.float32:
            torch.nn.init.kaiming_uniform_(lora_A, a=5**0.5)
        for matrix in (lora_A, lora_B):
            matrix.data = heap.place(matrix.data)
    fault = {"upcast, read as bf16": "reinterpreted", "fp32, read as bf16": "reinterpreted"}
    fault |= {"stale host pointer": "stale", "uninitialised buffer": "uninitialised"}
    kernels = []
    for module in model.modules():  # loading: the kernels store the addresses of the adapters
        if is_experts(module):
            if suspect == "zero-size base weights":
                module.down_proj.data = torch.empty(0, dtype=torch.bfloat16)
            kernels.append(OldKernel(module, fault.get(suspect), heap))
            module.forward = kernels[-1]
    for kernel in kernels:
        for name, wrapper in _wrappers_of(model, kernel.module):
            kernel.remember(name, *_factors(wrapper))
    for wrapper in _wrappers(model):  # the model moves to the GPU, and its host memory is freed
        for matrix in _factors(wrapper):
            old = matrix.data
            matrix.data = old.clone()
            heap.free(old)
    generator = torch.Generator().manual_seed(0)
    for _, size in list(heap.free_blocks):
        heap.place(torch.randn(size // 4, generator=generator))
    try:
        with torch.no_grad(), trace_nonfinite(model, stop=False) as trace:
            model(input_ids)
    except ValueError:
        return None
    first = trace.first
    first_module = first.module if first else ""
    return {
        "first": first is not None,
        "layer 1": ".layers.1." in f".{first_module}" and first_module.endswith("mlp.experts"),
        "routed": first is not None and not any("layers.1.mlp.shared" in name for name in trace.contaminated),
        "clean": all(bool(matrix.isfinite().all()) for w in _wrappers(model) for matrix in _factors(w)),
        "pointer": any(kernel.has_stale_addresses(model) for kernel in kernels),
    }


def _wrappers(model):
    return [m for m in model.modules() if hasattr(m, "parameter_name") and is_experts(m.get_base_layer())]


def _wrappers_of(model, experts):
    names = {"gate_up_proj": "gate_up", "down_proj": "down"}
    return [(names[w.parameter_name], w) for w in _wrappers(model) if w.get_base_layer() is experts]


def _factors(wrapper):
    return wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
