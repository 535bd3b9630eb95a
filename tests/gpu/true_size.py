"""Measure a hybrid run of DeepSeek-V2-Lite's size on this machine; writes one JSON file, updated after every part.

    python tests/gpu/true_size.py --out result.json                     # a GPU and 64 GB of memory: 7 to 10 minutes
    python tests/gpu/true_size.py --out result.json --tiny              # a check on any machine, in a minute
    python tests/gpu/true_size.py --compact result.json --out notebooks/recorded/hybrid_true_size.json [--also ...]

The last command writes the smaller file that notebook 08 reads: without paths and tracebacks, with fewer spans.

The parts of the measurement, in this order, are the functions in ``PARTS``. The file records a part that fails, or that
the time budget excludes, and the next part runs.
"""

import argparse
import collections
import contextlib
import copy
import datetime
import functools
import gc
import json
import math
import os
import shutil
import statistics
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as `ktlib sft` does, and before torch starts
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

import ktlib
from ktlib import _kernels
from ktlib.diagnosis.audit import audit
from ktlib.estimate import estimate
from ktlib.files import ownership
from ktlib.integrations.transformers_experts import is_experts
from ktlib.lab import hybrid, synthetic
from ktlib.operator.gpu.weight_source import weights_on
from ktlib.placement.pin import placement
from ktlib.runs import versions
from ktlib.system import speed
from ktlib.system.memory import available_memory


def main():
    options = parser().parse_args()
    if options.tiny:
        vars(options).update(tokens=512, length=64, response=32, layers=3, reduced_layers=2)
    ownership.refuse_foreign([options.out], "--out", options.out)
    if options.compact:
        source = json.loads(options.compact.read_text())
        source.setdefault("recorded", {"date": str(datetime.date.fromtimestamp(options.compact.stat().st_mtime))})
        others = [json.loads(path.read_text()) for path in options.also]
        ownership.write_text(options.out, json.dumps(compact(source, others)) + "\n", "--out", replace=True)
        return 0
    began = time.perf_counter()
    result = {"recorded": {"date": str(datetime.date.today())}}
    result |= {"options": {k: str(v) for k, v in vars(options).items()}, "machine": machine(options), "parts": {}}
    state = {"options": options, "device": torch.device(options.device), "began": began, "result": result}
    for part in (part for part in PARTS if not options.parts or part.__name__ in options.parts.split(",")):
        start = time.perf_counter()
        try:
            if start - began > options.budget:
                found = {"skipped": f"the budget of {options.budget} s is used up"}
            elif part in ON_A_GPU and state["device"].type != "cuda":
                found = {"skipped": "needs a GPU"}
            else:
                found = part(state)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        found = result["parts"][part.__name__] = found | {"part_seconds": time.perf_counter() - start}
        ownership.write_text(options.out, json.dumps(result, indent=1), "--out", replace=True)
        brief = {k: v for k, v in found.items() if not isinstance(v, (list, dict))}
        print(f"[{time.perf_counter() - began:5.0f} s] {part.__name__}: {json.dumps(brief)[:1500]}", flush=True)
    return int(any("error" in part for part in result["parts"].values()))


def parser():
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = command.add_argument
    add("--out", type=Path, default=Path("true_size.json"))
    add("--tiny", action="store_true", help="a small model, to check that everything runs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of everything but the experts")
    add("--tokens", type=int, default=4096, help="per step")
    add("--length", type=int, default=512, help="tokens per row")
    add("--response", type=int, default=128, help="tokens per row with a loss")
    add("--rank", type=int, default=8)
    add("--steps", type=int, default=20)
    add("--streamed-steps", type=int, default=20)
    add("--stream-rows", type=int, default=1, help="stream experts with at least so many rows")
    add("--learning-rate", type=float, default=5e-4)
    add("--layers", type=int, default=27)
    add("--reduced-layers", type=int, default=4)
    add("--checkpoint", type=Path, help="folder to write the checkpoint to and load it from; default: a temporary one")
    add("--in-memory", action="store_true", help="make the weights in memory; write no checkpoint")
    add("--disk-rate", type=float, default=0.5e9, help="bytes/s; on a slower disk no checkpoint is written")
    add("--host-memory", type=float, help="GB that can be used; default: the available memory")
    add("--budget", type=float, default=400, help="seconds after which no part is begun")
    add("--parts", help="names of parts, with commas; the first two are required")
    add("--compact", type=Path, help="measure nothing: write this result, smaller, to --out")
    add("--also", type=Path, nargs="*", default=[], help="with --compact: runs whose speeds and peaks are added")
    return command


def config_of(options, layers=None):
    make = synthetic.deepseek_v2_small if options.tiny else synthetic.deepseek_v2_lite
    return make(num_hidden_layers=layers or options.layers)


def machine(options):
    facts = versions.facts() | {"isas": ktlib.cpu_info()["isas"], "threads": torch.get_num_threads()}
    facts |= {"memory_available": available_memory(), "cuda": torch.version.cuda}
    facts |= {"bf16_rate": speed.matmul_rate(), "bandwidth": _kernels.read_rate(torch.get_num_threads(), 2**30)}
    if options.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts |= {f"{name}_bytes_per_second": rate for name, rate in speed.bus_rates().items()}
    print(json.dumps(facts, indent=1), flush=True)
    return facts


def compact(result, others=(), resolution=2e-4):
    """The result to record: with the command that made it, without paths and tracebacks.

    Spans of a timeline that are less than ``resolution`` seconds apart are merged, but not for the shares beside them.
    ``others`` are results of other machines, of which the speeds and peaks of the first two runs are added.
    """
    result = copy.deepcopy(result)
    parts, options = result["parts"], result.pop("options")
    defaults = {action.dest: action.default for action in parser()._actions}
    told = options.keys() - {"out", "checkpoint", "compact", "also", "device"}
    given = {k: v for k, v in options.items() if k in told and v != str(defaults.get(k))}
    flags = [f"--{k.replace('_', '-')}" + ("" if v == "True" else f" {v}") for k, v in given.items()]
    result["recorded"]["command"] = " ".join(["python tests/gpu/true_size.py --out result.json", *flags])
    for part in parts.values():
        part.pop("traceback", None)
    for line in (part for part in parts.values() if "spans" in part):
        line["resolution"] = resolution
        line["spans"] = {
            track: [[round(start, 4), round(end, 4)] for start, end in hybrid.merged(spans, resolution)]
            for track, spans in line["spans"].items()
        }
    rates, peaks = ("bf16_rate", "bandwidth"), ("tokens_per_second", "host_peak", "gpu_used_with_context")
    result["others"] = [
        {name: other["machine"][name] for name in rates}
        | {name: {peak: other["parts"][name][peak] for peak in peaks} for name in ("run_main", "streamed")}
        for other in others
    ]
    parts.get("audit_adapter", {}).pop("table", None)  # its first line is a path, and "tensors" has its counts
    return result


# ------------------------------------------------------------------------------------------------------------- parts


def weights(state):
    """The model, from a checkpoint that is written and loaded, or made in memory; the estimate of the run."""
    options, config = state["options"], config_of(state["options"])
    guess = estimate(
        config, rank=options.rank, tokens=options.tokens, sequence_length=options.length,
        logits_per_row=options.response + 1, gpu=options.device != "cpu",
        cpu_rate=state["result"]["machine"]["bf16_rate"], bandwidth=state["result"]["machine"]["bandwidth"],
    )  # fmt: skip
    print(guess, flush=True)
    estimated = ("host", "gpu", "seconds", "tokens_per_second")
    state["result"]["estimate"] = {name: getattr(guess, name) for name in estimated}
    state["host_memory"] = options.host_memory * 1e9 if options.host_memory else available_memory()
    guess.check(state["host_memory"])
    found = {}
    hybrid.reset_memory()
    folder = options.checkpoint or Path(tempfile.mkdtemp(prefix="ktlib-checkpoint-"))
    state["folder"], state["temporary"] = folder, options.checkpoint is None
    if not options.in_memory:
        found["disk_bytes_per_second"] = disk_rate(folder, 2**24 if options.tiny else 2**30)
        options.in_memory = found["disk_bytes_per_second"] < options.disk_rate
    start = time.perf_counter()
    if options.in_memory:
        state["model"] = synthetic.random_model(config)
        found |= {"from": "made in memory", "seconds": time.perf_counter() - start, **hybrid.memory()}
    else:
        synthetic.write_checkpoint(config, folder)
        found |= {"from": "checkpoint", "write_seconds": time.perf_counter() - start, "write": hybrid.memory()}
        found["checkpoint_bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        hybrid.reset_memory()
        start = time.perf_counter()
        state["model"] = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation="ktlib"
        )
        found |= {"load_seconds": time.perf_counter() - start, **hybrid.memory()}
    found["parameters"] = sum(p.numel() for p in state["model"].parameters())
    found["expert_bytes"] = sum(p.nbytes for n, p in state["model"].named_parameters() if ".experts." in n)
    return found


def disk_rate(folder, size):
    """Bytes per second that the disk writes, including fsync."""
    folder.mkdir(parents=True, exist_ok=True)
    with ownership.temporary_folder(folder) as temporary:
        start = time.perf_counter()
        with open(temporary / "probe", "wb") as file:
            file.writelines([bytes(2**24)] * (size // 2**24))
            file.flush()
            os.fsync(file.fileno())
        return size / (time.perf_counter() - start)


class Clock(TrainerCallback):
    """Wall time of each step of a Trainer."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def run_main(state):
    """A run of a stock Trainer with experts and their adapters on the CPU."""
    options, device = state["options"], state["device"]
    start = time.perf_counter()
    hybrid.reset_memory()
    model = state["model"] = hybrid.adapt(state["model"], device, rank=options.rank)
    hybrid.checkpoint_all_but_experts(model)
    found = {"adapt_seconds": time.perf_counter() - start, "placement": [[*k, v] for k, v in placement(model).items()]}
    rows = 4 * options.tokens // options.length
    state["rows"] = hybrid.token_rows(model.config, rows, options.length, options.response)
    state["stream"] = hybrid.batches(state["rows"], options.tokens // options.length)
    return found | trainer_run(state, options.steps)


def trainer_run(state, steps):
    """``steps`` of a stock Trainer: losses, times, peaks of memory."""
    options, device, model, clock = state["options"], state["device"], state["model"], Clock()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=options.learning_rate, weight_decay=0.0,
        per_device_train_batch_size=options.tokens // options.length, lr_scheduler_type="constant_with_warmup",
        warmup_steps=2, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, use_cpu=device.type == "cpu", seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=state["rows"], data_collator=hybrid.collate, callbacks=[clock])
    hybrid.reset_memory()
    trainer.train()
    losses = values(trainer.state.log_history, "loss")
    steady = clock.seconds[2:] or clock.seconds
    found = {
        "optimizer": str(arguments.optim), "losses": losses, "seconds": clock.seconds,
        "grad_norms": values(trainer.state.log_history, "grad_norm"),
        "tokens_per_second": options.tokens * len(steady) / sum(steady), "tokens_per_step": options.tokens,
        **hybrid.memory(), "finite": all(map(math.isfinite, losses)), "loss_fell_by": losses[0] - losses[-1],
    }  # fmt: skip
    trainer.optimizer = None
    del trainer
    model.zero_grad(set_to_none=True)
    gc.collect()
    return found


def values(log, name):
    return [entry[name] for entry in log if name in entry]


def step_timeline(state):
    """One step under the profiler, and the time that overlapping the shared experts could save."""
    found = profiled_step(state)
    if state["device"].type == "cuda":
        found["shared_experts_seconds"] = shared_experts_seconds(state["model"], state["options"].tokens)
    return found


def first_layer(model, tokens):
    """Experts of the first MoE layer; random hidden_states, top_k_index and top_k_weights for them."""
    experts = next(module for module in model.modules() if is_experts(module))
    count, hidden, _ = experts.down_proj.shape
    top_k = model.config.num_experts_per_tok
    index = torch.rand(tokens, count).topk(top_k).indices
    return experts, (torch.randn(tokens, hidden).bfloat16(), index, torch.full((tokens, top_k), 1 / top_k))


def shared_experts_seconds(model, tokens):
    """GPU seconds of a step's shared experts: forward, recomputation, backward. Overlap could save no more."""
    modules = [m for n, m in model.named_modules() if n.endswith("shared_experts")]
    x = torch.randn(1, tokens, model.config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        with torch.no_grad():
            modules[0](x)
        modules[0](x).sum().backward()
        torch.cuda.synchronize()

    seconds = speed.best_seconds(step)
    model.zero_grad(set_to_none=True)
    return seconds * len(modules)


@contextlib.contextmanager
def streaming(state):
    """A context in which experts are streamed to the GPU."""
    ktlib.pin_experts(state["model"], stream_rows=state["options"].stream_rows)
    try:
        yield
    finally:
        ktlib.pin_experts(state["model"])


def streamed(state):
    """Continue the Trainer's run with experts streamed to the GPU; also the time of one layer."""
    options, model = state["options"], state["model"]
    with streaming(state):
        found = {"stream_rows": options.stream_rows, **trainer_run(state, options.streamed_steps)}
    return found | {"layer_seconds": layer_seconds(model, None, 1), "weights_bytes_per_second": arrival_rate(model)}


def streamed_timeline(state):
    """One step with streamed experts under the profiler."""
    with streaming(state):
        return profiled_step(state)


def profiled_step(state):
    """The :func:`ktlib.lab.hybrid.timeline` of one step after a warm-up step, and the shares of its tracks."""
    model, device = state["model"], state["device"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=state["options"].learning_rate, fused=True)
    hybrid.one_step(model, next(state["stream"]), optimizer, parameters, device)
    line = hybrid.timeline(lambda: hybrid.one_step(model, next(state["stream"]), optimizer, parameters, device))
    return {"step_seconds": line["seconds"], "shares": hybrid.shares(line), "spans": line["spans"]}


def layer_seconds(model, *stream_rows):
    """Seconds of one layer's experts, forward and backward without LoRA: ``[[tokens, *one per stream_rows], ...]``."""
    table = []
    for tokens in (64, 256, 1024, 4096):
        experts, inputs = first_layer(model, tokens)
        x, *routing = (tensor.cuda() for tensor in inputs)
        x.requires_grad_()

        def step(stream_rows, inputs=(x, *routing, experts.gate_up_proj, experts.down_proj)):
            torch.autograd.grad(ktlib.moe_experts(*inputs, stream_rows=stream_rows).sum(), inputs[0])
            torch.cuda.synchronize()

        table.append([tokens, *(speed.best_seconds(functools.partial(step, rows)) for rows in stream_rows)])
    return table


def arrival_rate(model):
    """Bytes per second at which the weights of one layer's experts reach the GPU while nothing is computed."""
    experts, _ = first_layer(model, 1)
    weights = [experts.gate_up_proj, experts.down_proj]
    groups = torch.arange(len(weights[0])).chunk(4)

    def send():
        with weights_on(weights, [group.tolist() for group in groups], torch.device("cuda")) as arriving:
            collections.deque(arriving, maxlen=0)
        torch.cuda.synchronize()

    return sum(w.nbytes for w in weights) / speed.best_seconds(send)


def all_logits(state):
    """Memory and times of two steps in which every token has a loss."""
    options, model = state["options"], state["model"]
    rows = hybrid.token_rows(model.config, options.tokens // options.length, options.length, options.length - 1)
    hybrid.reset_memory()
    log = hybrid.train_steps(model, hybrid.batches(rows, len(rows)), 2, learning_rate=options.learning_rate)
    return {"seconds": values(log, "seconds"), **hybrid.memory()}


def adapters_on_gpu(state):
    """Expert adapters on the GPU: the loss of one batch before and after moving them, and the time of four steps."""
    options, model = state["options"], state["model"]
    batch = {k: v.to("cuda") if hasattr(v, "to") else v for k, v in next(state["stream"]).items()}

    def loss():
        with torch.no_grad():
            return model(**batch).loss.item()

    found = {"loss_cpu": loss()}
    ktlib.pin_experts(model, "cuda")
    found["loss_cuda"] = loss()
    hybrid.reset_memory()
    log = hybrid.train_steps(model, state["stream"], 4, learning_rate=1e-4)
    found |= {"log": log, **hybrid.memory(), "tokens_per_second": options.tokens / min(values(log, "seconds"))}
    ktlib.pin_experts(model, "cpu")
    return found


def audit_adapter(state):
    folder = Path(tempfile.mkdtemp())
    state["model"].save_pretrained(folder)
    report = audit(folder, state["model"].get_base_model().config)
    print(report, flush=True)
    size = sum(path.stat().st_size for path in folder.glob("*"))
    shutil.rmtree(folder)
    counts = {row.component: row.tensors for row in report.rows}
    return {"clean": report.clean, "problems": report.problems, "tensors": counts, "table": str(report), "bytes": size}


def stock_experts(state):
    """The same step with routed experts through stock PEFT and transformers' grouped_mm on the CPU."""
    options, model = state["options"], state["model"]
    base = model.get_base_model()

    def grouped_mm_on_cpu(self, hidden_states, top_k_index, top_k_weights):
        on_cpu = (t.to("cpu") for t in (hidden_states, top_k_index, top_k_weights))
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, *on_cpu).to(hidden_states.device)

    ExpertsInterface.register("grouped_mm_on_cpu", grouped_mm_on_cpu)
    base.set_experts_implementation("grouped_mm_on_cpu")
    hybrid.reset_memory()
    experts = state["result"]["parts"]["weights"]["expert_bytes"]
    recompute = state["host_memory"] < 2.5 * experts + 10e9  # W + BA of all layers would not fit
    if recompute:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    try:
        log = hybrid.train_steps(model, state["stream"], 2, learning_rate=1e-4, deadline=time.perf_counter() + 70)
    finally:
        base.set_experts_implementation("ktlib")
    rate = options.tokens / min(values(log, "seconds"))
    return {"log": log, "tokens_per_second": rate, "checkpointing": recompute, **hybrid.memory()}


REFERENCE = "stock in fp32"


def reduced(state):
    """Loss curves of a model with few layers and equal seeds: stock on the GPU, hybrid, and all on the CPU.

    The first curve, stock in fp32, has hardly any rounding; the other curves differ from it by their rounding.
    """
    options = state["options"]
    state.pop("model", None)
    if state["temporary"]:
        shutil.rmtree(state["folder"], ignore_errors=True)
    gc.collect()
    config = config_of(options, options.reduced_layers)
    rows = hybrid.token_rows(config, 4 * options.tokens // options.length, options.length, options.response)
    stock = {"stock": True, "pinned": False}
    variants = {
        REFERENCE: (state["device"].type, stock, 12),
        "stock, all on the GPU": ("cuda", stock, 12),
        "hybrid, expert adapters on the CPU": ("cuda", {}, 12),
        "hybrid, expert adapters on the GPU": ("cuda", {"lora_device": "cuda"}, 12),
        "hybrid, experts streamed to the GPU": ("cuda", {"stream_rows": options.stream_rows}, 12),
        "ktlib, all on the CPU": ("cpu", {}, 4),
        "stock, all on the CPU": ("cpu", stock, 2),
    }
    found = {"layers": options.reduced_layers, "curves": {}}
    for name, (device, adapting, steps) in variants.items():
        if device == "cuda" and state["device"].type != "cuda":
            continue
        if time.perf_counter() > state["began"] + options.budget + 20:
            found["curves"][name] = {"skipped": "the budget is used up"}
            continue
        print(f"  {name}", flush=True)
        model = synthetic.random_model(config, progress=False)
        if adapting.get("stock"):  # on a GPU grouped_mm supports only bf16
            model.set_experts_implementation("eager" if name == REFERENCE else "grouped_mm")
        model = hybrid.adapt(model, device, rank=options.rank, **adapting)
        if name == REFERENCE:
            model.float()
        stream = hybrid.batches(rows, options.tokens // options.length)
        log = hybrid.train_steps(model, stream, steps, learning_rate=options.learning_rate)
        found["curves"][name] = {
            "losses": values(log, "loss"), "grad_norms": values(log, "grad_norm"),
            "tokens_per_second": options.tokens / statistics.median(values(log[1:] or log, "seconds")),
        }  # fmt: skip
        del model
        gc.collect()
    curves = {name: curve["losses"] for name, curve in found["curves"].items() if "losses" in curve}
    first = next(iter(curves.values()))
    found["largest_difference"] = {
        name: max(abs(a - b) for a, b in zip(losses, first, strict=False)) for name, losses in curves.items()
    }
    print(json.dumps(found["largest_difference"], indent=1), flush=True)
    return found


PARTS = (  # profiled parts come late, since launches stay slower afterwards: github.com/pytorch/pytorch/issues/144455
    weights, run_main, streamed, all_logits, adapters_on_gpu, step_timeline, streamed_timeline, audit_adapter,
    stock_experts, reduced,
)  # fmt: skip
ON_A_GPU = (streamed, all_logits, adapters_on_gpu, streamed_timeline)


if __name__ == "__main__":
    raise SystemExit(main())
