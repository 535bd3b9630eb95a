"""Estimates a fine-tuning run before it starts: memory on the host and on the GPU, seconds per step.

The formulas add up the bytes of all tensors and the operations of all products. They leave out fragmentation and other
programs, for which :meth:`Estimate.check` has a margin.
"""

import math
from dataclasses import dataclass, field

import torch

from ktlib.files import tensor_files
from ktlib.integrations.expert_names import ExpertLayout, ExpertProjection
from ktlib.integrations.model_classes import meta_model
from ktlib.integrations.stored_formats import Header, check_served, expected_bytes, logical_tensors, settings_of
from ktlib.integrations.stored_weight import StoredWeight
from ktlib.integrations.transformers_experts import WEIGHT_NAMES, is_experts, unsupported
from ktlib.names import component
from ktlib.operator.gpu.streamed_experts import BLOCK_VALUES, GROUP_BYTES
from ktlib.operator.gpu.weight_source import CHUNK_BYTES, DEVICE_BUFFERS, PINNED_BUFFERS
from ktlib.system.memory import available_memory

GPU_OVERHEAD = 0.8e9  # bytes: CUDA context, libraries and their workspaces (measured on an H100 while training)
HOST_OVERHEAD = 1.5e9  # bytes: Python, torch
CUDA_ON_HOST = 1e9  # bytes: CUDA's libraries and buffers on the host (measured on the host of that H100)
MARGIN = 1.05
# Seconds that Python takes to queue one pass of one layer's GPU work, with adapters (16-CPU Xeon). Streamed experts
# take as long again, while no weights are sent.
QUEUEING = 9e-3
PCIE = 25e9  # bytes/s to the GPU: 16 lanes of PCIe 4.0
LOGITS = "logits and their gradient"
STREAMED = "logits, or streamed experts"  # the purpose that replaces LOGITS if experts are streamed
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # its names in configs


@dataclass
class Estimate:
    """Bytes by purpose on the host and on the GPU, and seconds of one step by purpose. ``print`` shows the table."""

    host: dict = field(default_factory=dict)
    gpu: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    tokens: int = 0
    rows: float = 0.0  # average number of an expert's rows in a batch
    break_even: int | None = None  # an expert with at least this many rows is faster streamed to the GPU

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
        """MemoryError with the numbers if the run cannot fit in so many bytes; default: the free bytes here."""
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
            lines += [f"{where:<5} {purpose:<34} {size / 1e9:8.2f} GB" for purpose, size in table.items()]
            if table:
                lines.append(f"{where:<5} {'together':<34} {sum(table.values()) / 1e9:8.2f} GB")
        lines += [f"time  {purpose:<34} {value:8.2f} s" for purpose, value in self.seconds.items()]
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
    folder=None,
):
    """An :class:`Estimate` of one step of ``tokens`` tokens with AdamW: LoRA on frozen weights, or bf16 weights.

    Args:
        model: a transformers config, or a model without adapters (on the meta device, if you like), with routed experts
            or without.
        finetuning: "lora", or "full": the bf16 weights of ``targets`` are trained, with gradient and moments in bf16.
        rank, targets, lora_bytes: LoRA's rank, the components with adapters, bytes of an adapter's element (fp32: 4).
        sequence_length, logits_per_row: tokens of a row, and how many of them get logits (default: all).
        gpu: whether a GPU computes all but the routed experts; False: the host computes everything.
        lora_device: the device of the routed experts' adapters.
        checkpointing: whether backward computes activations again from layer inputs, except for routed experts.
        cpu_rate, bandwidth: FLOP/s of bf16 products and bytes/s of memory; default: measured here, in a second.
        gpu_rate: FLOP/s that the GPU reaches on this model.
        timing: False leaves out the seconds, and the measuring.
        stream_rows: of :func:`ktlib.pin_experts`. The formulas assume that tokens are spread evenly over the experts,
            so that all of them are streamed, or none.
        bus: bytes/s from the host's pinned memory to the GPU; default: measured if there is a GPU, else that of PCIe 4.
        folder: the model's checkpoint. If it is quantised, headers of its files tell the bytes of the experts' codes;
            default: ``quantization_config`` tells them.

    Experts of a quantised checkpoint that ktlib computes stay codes, scales and zeros with LoRA. Full fine-tuning, of
    whichever targets, decodes them to bf16. All other weights are decoded when they are loaded.

    Host memory is the sum of expert weights; 16 bytes for each element of an fp32 adapter on the host (weight,
    gradient, two moments; full: 6 bytes for each trained weight); for each MoE layer and token, in bf16, the experts'
    inner values (top_k * 2 * intermediate) and hidden states in and out; and with a GPU, the buffers of one layer's
    copies. If one mapped file holds experts and other weights, pages of weights that went to the GPU stay in memory
    until another program needs it. ktlib writes no such files.

    The experts' time is the larger of arithmetic (4 FLOP per active weight and token, forward and backward; full: 6)
    and of reading every expert twice. Streamed experts save hidden states only. Their time is the larger of copying all
    their weights to the GPU twice (:func:`stream_rate`) and of arithmetic there (6 FLOP per active weight and token,
    because forward is computed twice), plus the time to queue this work. The time of all other layers is the larger of
    arithmetic and, on a GPU, of queueing, which does not depend on the number of tokens.

    Raises:
        ValueError: another ``finetuning``; ``stream_rows`` with a full one, or with a GPU and a quantised checkpoint;
            or ktlib does not keep experts in the format that ``quantization_config`` or a tensor in ``folder`` has.
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
    if finetuning == "full":  # besides the weights themselves, their gradient and two moments, all bf16
        rank, lora, lora_bytes = 0, chosen, 2
    top_k = next((getattr(config, name) for name in TOP_K if getattr(config, name, None)), 0)
    experts = [module for module in model.modules() if is_experts(module)]
    moe_layers = len(experts)
    hidden, inner = config.hidden_size, 0
    if experts:  # in some families their input is not as wide as the model's hidden states
        hidden, inner = experts[0].down_proj.shape[1:][:: -1 if experts[0].is_transposed else 1]
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    state = (4 if finetuning == "lora" else 3) * lora_bytes  # bytes: gradient, two moments, and an adapter's weight
    rows = -(-tokens // sequence_length)
    logits = rows * (logits_per_row or sequence_length)

    routed = weights.pop("routed_experts", 0)
    try:
        by_codes = _saved_by_codes(model, folder)
    except ValueError as error:
        raise ValueError(f"model: got experts in a format that ktlib does not keep: {error}") from None
    if gpu and stream_rows and by_codes:
        raise ValueError(f"stream_rows: got {stream_rows} with experts that are codes, needs None or bf16 experts")
    expert_bytes = 2 * routed - (by_codes if finetuning == "lora" else 0)
    other_weights = sum(weights.values())
    routed_lora = lora.pop("routed_experts", 0)
    other_lora = sum(lora.values())
    count = len(experts[0].down_proj) if experts else 1
    streamed = bool(gpu and stream_rows and tokens * top_k >= stream_rows * count)
    saved = moe_layers * (
        saved_bytes(tokens, 0, hidden, 0, 0) if streamed else saved_bytes(tokens, top_k, hidden, inner, rank)
    )
    per_layer = tokens * hidden * (2 if checkpointing else 60)
    one_layer = tokens * hidden * 60 if checkpointing else 0
    host = {"expert weights": expert_bytes, "experts' saved activations": saved, "program": HOST_OVERHEAD}
    other = {
        "other weights": 2 * other_weights,
        f"other {trained}": state * other_lora,
        "activations": layers * per_layer + one_layer,
        LOGITS: logits * vocabulary * (2 + 3 * 4),
    }
    (host if lora_device == "cpu" or not gpu else other)[f"expert {trained}"] = state * routed_lora
    device = other | {"program": GPU_OVERHEAD} if gpu else {}
    if gpu:
        host["program"] += CUDA_ON_HOST
        host["pinned buffers of copies"] = staging_bytes(tokens, top_k, hidden) if experts else 0
        if streamed:
            streams = streaming_bytes(tokens, top_k, hidden, inner, count)
            device[STREAMED] = max(device.pop(LOGITS), streams)  # they do not exist at the same time
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
    on_cpu = max((4 if rank else 6) * active * tokens / cpu_rate, 2 * expert_bytes / bandwidth)
    bus = bus or (speed.bus_rates()["h2d"] if gpu and torch.cuda.is_available() else PCIE)
    on_gpu = max(6 * active * tokens / gpu_rate, 2 * 2 * routed / stream_rate(bus, bandwidth))
    on_gpu += 2 * moe_layers * QUEUEING
    other_flops = passes * (other_weights - 2 * embedding) * tokens + 4 * embedding * logits
    queueing = QUEUEING * layers * (3 if checkpointing else 2)
    seconds = {
        "routed experts": on_gpu if streamed else on_cpu,
        "the rest": max(other_flops / (gpu_rate if gpu else cpu_rate), queueing if gpu else 0),
        "optimizer": (routed_lora * 28 * lora_bytes / 4) / bandwidth,
    }
    if gpu:
        seconds["copies"] = moe_layers * 4 * tokens * hidden * 2 / 12e9
    break_even = break_even_rows(cpu_rate, bus, bandwidth) if gpu and routed and finetuning == "lora" else None
    return Estimate(host, device, seconds, tokens, tokens * top_k / count, break_even)


def streaming_bytes(tokens, top_k, hidden, intermediate, experts):
    """Bytes of GPU memory for one layer's streamed experts in backward.

    They are two buffers of weights, the gradients of the output and of ``hidden_states``, and for one block of rows
    about seven fp32 matrices of the largest width that occurs.
    """
    expert_bytes, widest = 6 * hidden * intermediate, max(2 * intermediate, hidden)
    group = min(experts, max(1, GROUP_BYTES // expert_bytes)) * expert_bytes
    block = max(widest, min(BLOCK_VALUES, tokens * top_k * widest))
    return DEVICE_BUFFERS * group + 6 * tokens * hidden + 28 * block


def stream_rate(bus, bandwidth):
    """Bytes/s at which weights reach the GPU through pinned buffers, given ``bandwidth`` and ``bus`` in bytes/s.

    Reading from the host's memory, at ``bandwidth``, and sending from the buffers, which are in the CPU's cache, at
    ``bus``, overlap. The rate is four fifths of the slower (16-CPU Xeon with an H100, 94 and 55 GB/s: 43 GB/s).
    """
    return 0.8 * min(bus, bandwidth)


def break_even_rows(cpu_rate, bus, bandwidth):
    """The number of rows from which on an expert streamed to the GPU is faster than on the CPU.

    For forward and backward the CPU computes 4 FLOP per weight and row, at ``cpu_rate`` FLOP/s of bf16 products.
    Streaming copies 4 bytes per weight, at :func:`stream_rate`. So the number is the quotient of the two rates.
    """
    return math.ceil(cpu_rate / stream_rate(bus, bandwidth))


def saved_bytes(tokens, top_k, hidden, intermediate, rank):
    """Bytes that one layer's experts save in forward for backward, all in bf16: for each token ``hidden_states`` in and
    out, and for each of its experts gate, up and LoRA's inner values (as two bf16 numbers, for 16 bits of mantissa)."""
    return 2 * tokens * (top_k * (2 * intermediate + 4 * rank) + 2 * hidden)


def staging_bytes(tokens, top_k, hidden):
    """Bytes of pinned memory for one layer's copies, in addition to :func:`saved_bytes`: gradients of the output and of
    hidden states in bf16, of routing weights in fp32, each rounded up to a power of two by torch's allocator."""
    sizes = (2 * tokens * hidden, 2 * tokens * hidden, 4 * tokens * top_k)
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def _saved_by_codes(model, folder=None):
    """How many bytes fewer than in bf16 the expert weights of a model take, because they stay codes of a checkpoint."""
    weights = {
        f"{name}.{leaf}": (module, parameter)
        for name, module in model.named_modules()
        if is_experts(module) and unsupported(module) is None
        for leaf, parameter in module.named_parameters(recurse=False)
        if leaf in WEIGHT_NAMES
    }
    saved = sum(2 * p.numel() - p.source.nbytes for _, p in weights.values() if isinstance(p, StoredWeight))
    settings = settings_of(model.config)
    if settings is None or not all(parameter.is_meta for _, parameter in weights.values()):
        return saved  # a model that is loaded says itself what its weights are
    if folder is not None and (matrices := _matrices_in_files(folder, settings)) is not None:
        located = ExpertLayout(model).located
        for name, matrix in matrices.items():
            place = located(name)
            module, _ = weights.get(getattr(place, "parameter", place), (None, None))
            # a class that holds (experts, in, out) takes codes only if they are stacked with outputs as rows
            if module and (len(matrix.shape) == 3 and matrix.rows_are_outputs or not module.is_transposed):
                saved += 2 * math.prod(matrix.shape) - matrix.nbytes
        return saved
    layout = ExpertLayout(model)
    for weight, (module, parameter) in weights.items():
        experts, rows, columns = parameter.shape
        shape = (experts, columns, rows) if module.is_transposed else (experts, rows, columns)
        projections = layout.projections(weight) or ("",)
        name = layout.projection_in_files(ExpertProjection(weight, projections[-1], 0)) if projections[0] else weight
        size = expected_bytes(shape, settings, name.removesuffix(".weight"), len(projections))
        saved += 2 * parameter.numel() - size
    return saved


def _matrices_in_files(folder, settings):
    """The weights that a checkpoint's files hold as codes, by name; None if there are no files."""
    check_served(settings)
    try:
        tensors = tensor_files.read(*tensor_files.weight_files(folder))
    except FileNotFoundError:
        return None
    return logical_tensors({name: Header.of(tensor) for name, tensor in tensors.items()}, settings)


def _count(model, rank, targets):
    """Three dicts of numbers of parameters by component: of all, of ``targets`` in the language model, and of LoRA
    adapters of ``rank`` on the latter."""
    from ktlib.integrations.lora_targets import language_modules

    weights, chosen, lora, language = {}, {}, {}, language_modules(model)
    for name, parameter in model.named_parameters():
        label = component(name)
        weights[label] = weights.get(label, 0) + parameter.numel()
        if label in targets and name.rpartition(".")[0] in language:
            chosen[label] = chosen.get(label, 0) + parameter.numel()
            if parameter.dim() > 1:
                count = parameter.shape[0] if parameter.dim() == 3 else 1
                lora[label] = lora.get(label, 0) + count * rank * sum(parameter.shape[-2:])
    return weights, chosen, lora
