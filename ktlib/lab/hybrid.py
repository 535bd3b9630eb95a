"""Hybrid training, run and measured: routed experts on the CPU, everything else on a GPU (or all on the CPU).

The notebooks ``08_hybrid_training`` and ``11_hybrid_step`` and the measurement at true size use these functions. They
combine stock tools: PEFT's adapters, torch's AdamW and activation checkpointing, and torch's profiler for the timeline.
"""

import resource
import time

import torch
from peft import LoraConfig, get_peft_model

from ktlib.integrations.peft_lora import lora_config
from ktlib.operator.recompute_once import CHECKPOINTING
from ktlib.placement.pin import pin_experts

FORWARD, BACKWARD = "experts forward", "experts backward"
TO_HOST, TO_DEVICE = "copies to the CPU", "copies to the GPU"
GPU, OPTIMIZER = "GPU", "optimizer"
TRACKS = (FORWARD, BACKWARD, TO_HOST, TO_DEVICE, GPU, OPTIMIZER)
_OPERATORS = {"ktlib::moe_experts": FORWARD, "ktlib::moe_experts_backward": BACKWARD}


def checkpoint_all_but_experts(model):
    """Turn on transformers' gradient checkpointing for all but the routed experts, whose forward results are saved.

    GPU memory holds only the inputs of the layers then, and the slow experts are not computed again in backward.
    """
    if hasattr(model, "activation_checkpointing_enable"):  # the name of the method from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=CHECKPOINTING)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    return model


def adapt(model, device="cpu", lora_device="cpu", rank=8, alpha=16, seed=0, stock=False, pinned=True, stream_rows=None):
    """Pin the experts, add adapters to attention and all experts and MLPs, and move the model to ``device``.

    With ``stock=True``, PEFT alone computes the same adapters, for routed experts as the dense ``W + BA``. Their values
    depend on ``seed`` only. Returns the PeftModel in training mode.
    """
    config = lora_config(model, r=rank, lora_alpha=alpha)
    if stock:
        names = ("r", "lora_alpha", "target_modules", "target_parameters", "task_type")
        config = LoraConfig(**{name: getattr(config, name) for name in names})
    if pinned:
        pin_experts(model, lora_device, stream_rows)
    torch.manual_seed(seed)
    model.config.use_cache = False
    return get_peft_model(model, config).to(device).train()


def token_rows(config, rows, length, response, seed=0):
    """Random rows that a model can learn to predict: ids of 512 tokens with frequencies 1, 1/2, 1/3 ...

    Returns a list of dicts, a dataset for a Trainer: ``input_ids`` (length,), ``labels`` (response + 1,) of the last
    positions, and ``logits_to_keep``, so that no logits are computed for the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.randperm(config.vocab_size, generator=generator)[: min(512, config.vocab_size)]
    frequencies = 1 / torch.arange(1, len(vocabulary) + 1)
    ids = vocabulary[torch.multinomial(frequencies, rows * length, replacement=True, generator=generator)]
    ids = ids.view(rows, length)
    return [{"input_ids": row, "labels": row[-response - 1 :], "logits_to_keep": response + 1} for row in ids]


def collate(rows):
    """A batch of rows of :func:`token_rows`, as keyword arguments of the model."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch | {"logits_to_keep": rows[0]["logits_to_keep"]}


def batches(rows, size):
    """Endless generator of batches of ``size`` rows, in order, again and again."""
    while True:
        for start in range(0, len(rows) - size + 1, size):
            yield collate(rows[start : start + size])


def train_steps(model, stream, steps, learning_rate=1e-3, deadline=None):
    """Train with AdamW and clipping at 1; returns a dict per step: loss, seconds, grad_norm.

    Training stops early if the next step would end after ``deadline`` (in seconds of time.perf_counter), assuming that
    it takes as long as the last step.
    """
    device = next(p.device for n, p in model.named_parameters() if "embed_tokens" in n)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0, fused=True)
    log = []
    for _ in range(steps):
        start = time.perf_counter()
        loss, norm = one_step(model, next(stream), optimizer, trainable, device)
        log.append({"loss": loss, "seconds": time.perf_counter() - start, "grad_norm": norm})
        if deadline is not None and time.perf_counter() + log[-1]["seconds"] > deadline:
            break
    return log


def one_step(model, batch, optimizer, trainable, device):
    """Forward, backward, clipping, update; returns ``(loss, gradient norm)`` as floats, so it waits for the GPU."""
    batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
    loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def timeline(step):
    """Run ``step()`` under torch's profiler; returns ``{"seconds", "spans": {track: [[start, end], ...]}}``.

    The tracks are :data:`TRACKS`. Spans are sorted, in seconds from the start of the step, and merged where they almost
    touch. Those of the track "GPU" are kernels. The profiler makes the step a few percent slower, and on a GPU all
    later steps too (https://github.com/pytorch/pytorch/issues/144455).
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("ktlib step"):
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
    events = profile.events()
    begin = next(event.time_range.start for event in events if event.name == "ktlib step")
    spans = {track: [] for track in TRACKS}
    for event in events:
        track = _track(event)
        if track:
            start, end = event.time_range.start - begin, event.time_range.end - begin  # microseconds
            spans[track].append([round(start / 1e6, 6), round(end / 1e6, 6)])
    return {"seconds": seconds, "spans": {track: merged(track_spans) for track, track_spans in spans.items()}}


def shares(line):
    """Seconds of each track of a :func:`timeline`, and of "other": the time in which no track was active."""
    table = {track: sum(end - start for start, end in spans) for track, spans in line["spans"].items()}
    busy = merged([list(span) for spans in line["spans"].values() for span in spans], gap=0)
    return table | {"other": line["seconds"] - sum(end - start for start, end in busy)}


def _track(event):
    if event.device_type == torch.autograd.DeviceType.CUDA:
        if event.name.startswith("Memcpy"):
            return TO_HOST if "DtoH" in event.name else TO_DEVICE if "HtoD" in event.name else GPU
        # the profiler repeats record_function's ranges as events of the GPU, but they are no kernels
        is_range = event.name == "ktlib step" or event.name.startswith(("Optimizer.", "ProfilerStep"))
        return None if is_range or event.name in _OPERATORS else GPU
    if event.name.startswith("Optimizer.step"):
        return OPTIMIZER
    return _OPERATORS.get(event.name)


def merged(spans, gap=20e-6):
    """``[[start, end], ...]``, sorted; spans that are at most ``gap`` seconds apart become one."""
    result = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1] + gap:
            result[-1][1] = max(result[-1][1], end)
        else:
            result.append([start, end])
    return result


def memory():
    """Bytes of memory: ``host_peak``, the kernel's counts of resident memory now, and the GPU's peaks.

    Peaks are those since the last :func:`reset_memory`.
    """
    status = {}
    with open("/proc/self/status") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"):
                status[name] = int(value.split()[0]) * 1024
    result = {"host_peak": status.get("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}
    result |= {name: status[name] for name in ("VmRSS", "RssAnon", "RssFile", "RssShmem") if name in status}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        result |= {
            "gpu_peak_allocated": torch.cuda.max_memory_allocated(),
            "gpu_peak_reserved": torch.cuda.max_memory_reserved(),
            "gpu_used_with_context": total - free,
        }
        pinned = getattr(torch.cuda, "host_memory_stats", dict)()
        result |= {"pinned_peak": pinned["allocated_bytes.peak"]} if "allocated_bytes.peak" in pinned else {}
    return result


def reset_memory():
    """Reset the peaks of :func:`memory`; that of the host stays where the kernel does not allow its reset."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
