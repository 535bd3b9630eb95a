"""What a fine-tuning run needs, said before anything heavy starts: memory on both sides, seconds per step.

The formulas are sums of what is stored and of what is computed; they leave out what no formula knows (fragmentation,
other programs), for which :meth:`Estimate.check` keeps a margin.
"""

import math
from dataclasses import dataclass, field

import torch

from ktlib.integrations.model_class import meta_model
from ktlib.integrations.transformers_experts import is_experts
from ktlib.names import component
from ktlib.operator.gpu.streamed_experts import BLOCK_VALUES, GROUP_BYTES
from ktlib.operator.gpu.weight_source import CHUNK_BYTES, DEVICE_BUFFERS, PINNED_BUFFERS
from ktlib.system.memory import available_memory

GPU_OVERHEAD = 0.8e9  # CUDA context, libraries and their workspaces (measured on an H100 while training)
HOST_OVERHEAD = 1.5e9  # Python, torch
CUDA_ON_HOST = 1e9  # its libraries and buffers on the host (measured beside that H100)
MARGIN = 1.05
# Seconds that Python takes to queue one pass of one layer's GPU work, with adapters (16-CPU Xeon). Streamed experts
# take as long again, before weights can be sent and after they were.
QUEUEING = 9e-3
PCIE = 25e9  # bytes/s to the GPU: 16 lanes of PCIe 4.0
STREAMED = "logits, or streamed experts"  # in the place of the logits alone
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # how configs call it


@dataclass
class Estimate:
    """Bytes by purpose on the host and on the GPU, and seconds of one step by part. ``print`` shows the table."""

    host: dict = field(default_factory=dict)
    gpu: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    tokens: int = 0
    rows: float = 0.0  # of an expert in a batch, on average
    break_even: int | None = None  # rows from which on an expert is faster streamed to the GPU

    @property
    def host_bytes(self):
        return sum(self.host.values())

    @property
    def gpu_bytes(self):
        return sum(self.gpu.values())

    @property
    def tokens_per_second(self):
        return self.tokens / sum(self.seconds.values())

    def check(self, host_available=None, gpu_available=None):
        """Raise MemoryError with the numbers if the run cannot fit. Sizes in bytes; default: what is free here."""
        if host_available is None:
            host_available = available_memory()
        if self.gpu and gpu_available is None and torch.cuda.is_available():
            gpu_available = torch.cuda.mem_get_info()[0]
        for where, need, have in (("host", self.host_bytes, host_available), ("GPU", self.gpu_bytes, gpu_available)):
            if have is not None and need * MARGIN > have:
                raise MemoryError(f"needs {need * MARGIN / 1e9:.1f} GB of {where} memory, {have / 1e9:.1f} GB are free")
        return self

    def __str__(self):
        lines = []
        for where, table in (("host", self.host), ("GPU", self.gpu)):
            lines += [f"{where:<5} {what:<34} {size / 1e9:8.2f} GB" for what, size in table.items()]
            if table:
                lines.append(f"{where:<5} {'together':<34} {sum(table.values()) / 1e9:8.2f} GB")
        lines += [f"time  {what:<34} {value:8.2f} s" for what, value in self.seconds.items()]
        if self.seconds:
            lines.append(f"time  {self.tokens} tokens per step: {self.tokens_per_second:.0f} tokens/s")
        if self.break_even:
            lines.append(
                f"time  an expert with {self.break_even} rows or more is faster on the GPU (stream_rows); "
                f"here one has {self.rows:.0f} on average"
            )
        return "\n".join(lines)


def estimate(
    model,
    *,
    finetuning="lora",
    rank=8,
    tokens=4096,
    sequence_length=512,
    logits_per_row=None,
    targets=("self_attn", "shared_experts", "dense_mlp", "routed_experts"),
    lora_bytes=4,
    gpu=True,
    lora_device="cpu",
    checkpointing=True,
    cpu_rate=None,
    bandwidth=None,
    gpu_rate=200e12,
    timing=True,
    stream_rows=None,
    bus=None,
):
    """An :class:`Estimate` of one step of ``tokens`` tokens with AdamW: LoRA on bf16 weights, or those weights.

    Args:
        model: a transformers config, or a model without adapters (the meta device will do); with routed experts or not.
        finetuning: "lora", or "full": the bf16 weights of ``targets`` are trained, with gradient and moments in bf16.
        rank, targets, lora_bytes: rank, components with adapters, bytes of an adapter's element (fp32: 4).
        sequence_length, logits_per_row: tokens per row, and how many of them get logits (default: all).
        gpu: all but the routed experts on a GPU; False: everything on the host.
        lora_device: where the adapters of routed experts live.
        checkpointing: layer inputs are kept and the rest recomputed, except the routed experts.
        cpu_rate, bandwidth: FLOP/s of bf16 products and bytes/s of memory; default: measured here, in a second.
        gpu_rate: FLOP/s that the GPU reaches on this model.
        timing: False leaves out the seconds, and the measuring.
        stream_rows: of :func:`ktlib.pin_experts`. The formulas take tokens as evenly spread over the experts: all of
            them are streamed, or none.
        bus: bytes/s from the host's pinned memory to the GPU; default: measured if there is a GPU, else that of PCIe 4.

    Host memory = expert weights + 16 bytes per fp32 adapter element there (weight, gradient, two moments; full: 6 bytes
    per trained weight) + for each MoE layer and token: top_k * (2 * intermediate) bf16 of the experts' inner values,
    and hidden states in and out; with a GPU, the buffers of one layer's copies. (If one mapped file holds experts and
    other weights, pages of what went to the GPU stay until something needs the memory; ktlib writes no such files.)
    Time of the experts = the larger of arithmetic (4 FLOP per active weight and token, forward and backward; full: 6)
    and of reading every expert twice.
    Streamed experts keep nothing but hidden states, and take the larger of two copies of all their weights to the GPU
    (:func:`stream_rate`) and of arithmetic there (6 FLOP per active weight and token: forward is computed twice), and
    what it takes to queue that. The rest takes the larger of arithmetic and, on a GPU, of queueing it, which does not
    depend on the number of tokens.

    Raises:
        ValueError: another ``finetuning``, or a full one with ``stream_rows``.
    """
    if stream_rows and finetuning == "full":
        raise ValueError(
            f"stream_rows: got {stream_rows} with finetuning='full', needs None: these weights are trained"
        )
    if finetuning not in ("lora", "full"):
        raise ValueError(f"finetuning: got {finetuning!r}, needs 'lora' or 'full'")
    model = model if isinstance(model, torch.nn.Module) else meta_model(model)
    config = model.config.get_text_config()
    weights, chosen, lora = _count(model, rank, targets)
    trained = "adapters, gradients, moments" if finetuning == "lora" else "gradients, moments"
    if finetuning == "full":  # nothing beside the weights but their gradient and two moments, all bf16
        rank, lora, lora_bytes = 0, chosen, 2
    top_k = next((getattr(config, name) for name in TOP_K if getattr(config, name, None)), 0)
    experts = [module for module in model.modules() if is_experts(module)]
    moe_layers = len(experts)
    hidden, inner = config.hidden_size, 0
    if experts:  # their input is not the model's hidden states in every family
        hidden, inner = experts[0].down_proj.shape[1:][:: -1 if experts[0].is_transposed else 1]
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    state = (4 if finetuning == "lora" else 3) * lora_bytes  # an adapter's weight, gradient, two moments
    rows = -(-tokens // sequence_length)
    logits = rows * (logits_per_row or sequence_length)

    routed = weights.pop("routed_experts", 0)
    rest = sum(weights.values())
    routed_lora = lora.pop("routed_experts", 0)
    rest_lora = sum(lora.values())
    count = len(experts[0].down_proj) if experts else 1
    streamed = bool(gpu and stream_rows and tokens * top_k >= stream_rows * count)
    saved = moe_layers * (
        saved_bytes(tokens, 0, hidden, 0, 0) if streamed else saved_bytes(tokens, top_k, hidden, inner, rank)
    )
    per_layer = tokens * hidden * (2 if checkpointing else 60)
    one_layer = tokens * hidden * 60 if checkpointing else 0
    host = {"expert weights": 2 * routed, "experts' saved activations": saved, "program": HOST_OVERHEAD}
    other = {
        "other weights": 2 * rest,
        f"other {trained}": state * rest_lora,
        "activations": layers * per_layer + one_layer,
        "logits and their gradient": logits * vocabulary * (2 + 3 * 4),
    }
    (host if lora_device == "cpu" or not gpu else other)[f"expert {trained}"] = state * routed_lora
    device = other | {"program": GPU_OVERHEAD} if gpu else {}
    if gpu:
        host["program"] += CUDA_ON_HOST
        host["pinned buffers of copies"] = staging_bytes(tokens, top_k, hidden) if experts else 0
        if streamed:
            streams = streaming_bytes(tokens, top_k, hidden, inner, count)
            device[STREAMED] = max(device.pop("logits and their gradient"), streams)  # not at the same time
            host["pinned buffers of copies"] += PINNED_BUFFERS * CHUNK_BYTES
    else:
        host |= other

    if not timing:
        return Estimate(host, device, tokens=tokens)
    from ktlib import _kernels
    from ktlib.system import speed

    if cpu_rate is None or bandwidth is None:
        cpu_rate = cpu_rate or speed.matmul_rate()
        bandwidth = bandwidth or _kernels.read_rate(torch.get_num_threads(), 2**28)
    active = moe_layers * top_k * (3 * hidden * inner + 2 * rank * (3 * hidden + 4 * inner))
    passes = 4 + (2 if checkpointing else 0)
    embedding = config.vocab_size * config.hidden_size
    on_cpu = max((4 if rank else 6) * active * tokens / cpu_rate, 2 * 2 * routed / bandwidth)
    bus = bus or (speed.bus_rates()["h2d"] if gpu and torch.cuda.is_available() else PCIE)
    on_gpu = max(6 * active * tokens / gpu_rate, 2 * 2 * routed / stream_rate(bus, bandwidth))
    on_gpu += 2 * moe_layers * QUEUEING
    rest_flops = passes * (rest - 2 * embedding) * tokens + 4 * embedding * logits
    queueing = QUEUEING * layers * (3 if checkpointing else 2)
    seconds = {
        "routed experts": on_gpu if streamed else on_cpu,
        "the rest": max(rest_flops / (gpu_rate if gpu else cpu_rate), queueing if gpu else 0),
        "optimizer": (routed_lora * 28 * lora_bytes / 4) / bandwidth,
    }
    if gpu:
        seconds["copies"] = moe_layers * 4 * tokens * hidden * 2 / 12e9
    break_even = break_even_rows(cpu_rate, bus, bandwidth) if gpu and routed and finetuning == "lora" else None
    return Estimate(host, device, seconds, tokens, tokens * top_k / count, break_even)


def streaming_bytes(tokens, top_k, hidden, intermediate, experts):
    """Bytes of a GPU's memory for the streamed experts of one layer, in backward: two buffers of weights, the output's
    gradient and that of hidden_states, and of one block of rows about seven matrices as wide as its widest in fp32."""
    one, widest = 6 * hidden * intermediate, max(2 * intermediate, hidden)
    group = min(experts, max(1, GROUP_BYTES // one)) * one
    block = max(widest, min(BLOCK_VALUES, tokens * top_k * widest))
    return DEVICE_BUFFERS * group + 6 * tokens * hidden + 28 * block


def stream_rate(bus, bandwidth):
    """Bytes/s at which weights reach the GPU through pinned buffers, which a cache holds: each byte is read from the
    host's memory, at ``bandwidth``, and sent over the bus, at ``bus``, at the same time; four fifths of the slower of
    the two (16-CPU Xeon with an H100, 94 and 55 GB/s: 43)."""
    return 0.8 * min(bus, bandwidth)


def break_even_rows(cpu_rate, bus, bandwidth):
    """From how many rows of a batch on an expert is faster on the GPU, its weights copied there, than on the CPU.

    Both passes take the CPU 4 FLOP per weight and row, at ``cpu_rate`` FLOP/s of bf16 products, and they copy 4 bytes
    per weight, at :func:`stream_rate`. So it is the quotient of the two rates, for one more expert beside others.
    """
    return math.ceil(cpu_rate / stream_rate(bus, bandwidth))


def saved_bytes(tokens, top_k, hidden, intermediate, rank):
    """Bytes that one layer's experts keep from forward for backward: for each token ``hidden_states`` in and out, and
    for each of its experts gate and up and the inner values of LoRA (to 16 bits of mantissa, so twice), all in bf16."""
    return 2 * tokens * (top_k * (2 * intermediate + 4 * rank) + 2 * hidden)


def staging_bytes(tokens, top_k, hidden):
    """Bytes of pinned memory that one layer's copies take beside what is kept: gradients of the output and the hidden
    states in bf16, of the routing weights in fp32, each rounded up to a power of two by torch's allocator."""
    parts = (2 * tokens * hidden, 2 * tokens * hidden, 4 * tokens * top_k)
    return sum(1 << (part - 1).bit_length() for part in parts if part)


def _count(model, rank, targets):
    """By component, the numbers of all parameters, of those of ``targets`` in the language model, and of LoRA
    parameters of ``rank`` on these."""
    from ktlib.integrations.lora_targets import language_modules

    weights, chosen, lora, language = {}, {}, {}, language_modules(model)
    for name, parameter in model.named_parameters():
        part = component(name)
        weights[part] = weights.get(part, 0) + parameter.numel()
        if part in targets and name.rpartition(".")[0] in language:
            chosen[part] = chosen.get(part, 0) + parameter.numel()
            if parameter.dim() > 1:
                count = parameter.shape[0] if parameter.dim() == 3 else 1
                lora[part] = lora.get(part, 0) + count * rank * sum(parameter.shape[-2:])
    return weights, chosen, lora
