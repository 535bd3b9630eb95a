"""Times of one MoE layer, forward and backward with LoRA: ktlib per instruction set, and other installed packages.

The command is ``python -m ktlib.lab.bench``. All rows of one call use the same process, threads and routing.
"""

import argparse
import contextlib
import io
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from ktlib import _kernels
from ktlib.files.ownership import refuse_foreign, write_text
from ktlib.lab.validation import stock_module
from ktlib.operator.moe_experts import moe_experts
from ktlib.reference import lora_layout
from ktlib.system.cpu import cpu_info

# experts, top_k, hidden, intermediate
SHAPES = {
    "deepseek_v2_lite": (64, 6, 2048, 1408),
    "deepseek_v3": (256, 8, 7168, 2048),
    "qwen3_30b_a3b": (128, 8, 2048, 768),
    "mixtral_8x7b": (8, 2, 4096, 14336),
    "tiny": (8, 2, 256, 192),
}
PEERS = ("grouped_mm + PEFT", "grouped_mm, no LoRA", "kt-kernel")


def layer_weights(experts, hidden, intermediate, seed=0):
    """``(gate_up_proj, down_proj)`` of one layer, bf16, of standard deviation 0.02; each expert has its own seed."""
    shapes = ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate))
    gate_up_proj, down_proj = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)

    def fill(index):
        generator = torch.Generator().manual_seed(seed + index)
        for weights in (gate_up_proj, down_proj):
            weights[index].normal_(std=0.02, generator=generator)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # normal_ itself uses one thread
        list(pool.map(fill, range(experts)))
    return gate_up_proj, down_proj


def layer_lora(experts, hidden, intermediate, rank, seed=0):
    """``(gate_up_lora, down_lora)``: each ``(lora_A, lora_B, scaling)``, trainable bf16 matrices and scaling 2."""
    generator = torch.Generator().manual_seed(seed)
    triples = []
    for inner, out in ((hidden, 2 * intermediate), (intermediate, hidden)):
        shape_A, shape_B = lora_layout.shapes(rank, experts, out, inner)
        lora_A = torch.randn(shape_A, generator=generator) / inner**0.5
        lora_B = torch.randn(shape_B, generator=generator) * 0.02
        triples.append((lora_A.bfloat16().requires_grad_(), lora_B.bfloat16().requires_grad_(), 2.0))
    return triples


def routing(tokens, experts, top_k, skew=0.0, seed=0):
    """``(top_k_index, top_k_weights)`` of even random routing, but a share ``skew`` of the tokens chooses expert 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    logits[: int(tokens * skew), 0] = 100.0
    weights, index = logits.softmax(-1).topk(top_k)
    return index, (weights / weights.sum(-1, keepdim=True)).float()


def weight_traffic(index, hidden, intermediate):
    """Bytes of bf16 weights that a step must read: those of all chosen experts, in forward and again in backward."""
    return 2 * index.unique().numel() * 3 * hidden * intermediate * 2


def time_steps(forward, backward, repeat, budget):
    """Median seconds ``(forward, backward)`` of ``repeat`` steps after a warm-up, or fewer after ``budget`` seconds."""
    forward_seconds, backward_seconds = [], []
    backward(forward())  # the first backward of a process imports modules, which takes seconds on slow disks
    begin = time.perf_counter()
    for _ in range(repeat):
        start = time.perf_counter()
        output = forward()
        middle = time.perf_counter()
        backward(output)
        end = time.perf_counter()
        forward_seconds.append(middle - start)
        backward_seconds.append(end - middle)
        if end - begin > budget:
            break
    return statistics.median(forward_seconds), statistics.median(backward_seconds)


def ours(isa, inputs, weights, lora, repeat, budget):
    """Seconds ``(forward, backward)`` of ``moe_experts``; ``lora`` is ``(None, None)`` for none."""
    hidden_states, index, top_k_weights, gradient = inputs

    def forward():
        return moe_experts(hidden_states, index, top_k_weights, *weights, *lora, isa=isa)

    return time_steps(forward, lambda output: output.backward(gradient), repeat, budget)


def stock(inputs, weights, rank, repeat, budget):
    """Seconds ``(forward, backward)`` of transformers' grouped_mm experts, with PEFT's adapters if ``rank`` > 0."""
    from peft import LoraConfig, get_peft_model

    hidden_states, index, top_k_weights, gradient = inputs

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = stock_module(weights[1], "grouped_mm")
            for name, weight in zip(("gate_up_proj", "down_proj"), weights, strict=True):
                setattr(self.experts, name, torch.nn.Parameter(weight, requires_grad=False))

        def forward(self, *arguments):
            return self.experts(*arguments)

    model = Layer()
    if rank:
        names = ["experts.gate_up_proj", "experts.down_proj"]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=names)
        with contextlib.redirect_stderr(io.StringIO()):
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    top_k_weights = top_k_weights.detach().bfloat16().requires_grad_()
    return time_steps(
        lambda: model(hidden_states, index, top_k_weights), lambda output: output.backward(gradient), repeat, budget
    )


class KtKernel:
    """kt-kernel's bf16 fine-tuning layer; ImportError if the package is not installed."""

    def __init__(self, weights, lora, top_k, max_tokens):
        from kt_kernel import KTMoEWrapper

        experts, hidden, intermediate = weights[1].shape
        rank = lora[0][0].shape[0] // experts
        gate, up = (half.contiguous() for half in weights[0].chunk(2, dim=1))
        shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        matrices = {}
        for name, (out, inner) in shapes.items():
            matrices[f"{name}_lora_a"] = (torch.randn(experts, rank, inner) / inner**0.5).bfloat16()
            matrices[f"{name}_lora_b"] = (torch.randn(experts, out, rank) * 0.02).bfloat16()
        self.grads = {f"grad_{name}": torch.zeros_like(matrix) for name, matrix in matrices.items()}
        self.tensors = (gate, up, weights[1], matrices)
        self.layer = KTMoEWrapper(
            layer_idx=0, num_experts=experts, num_experts_per_tok=top_k, hidden_size=hidden,
            moe_intermediate_size=intermediate, num_gpu_experts=0, cpuinfer_threads=torch.get_num_threads(),
            threadpool_count=1, weight_path="", chunked_prefill_size=max_tokens, mode="sft", gpu_experts_mask=None,
            method="AMXBF16_SFT", lora_rank=rank, lora_alpha=2.0 * rank, max_cache_depth=1,
        )  # fmt: skip
        self.layer.load_weights_from_tensors(gate, up, weights[1], torch.arange(experts))
        self.layer.init_lora_weights(**matrices, **self.grads)
        self.layer.update_lora_weights()

    def time(self, inputs, repeat, budget):
        hidden_states, index, top_k_weights, gradient = (t.detach() for t in inputs)
        return time_steps(
            lambda: self.layer.forward(hidden_states, index, top_k_weights, save_for_backward=True),
            lambda output: self.layer.backward(gradient), repeat, budget,
        )  # fmt: skip


def kt_variant():
    """Name of the instruction set that kt-kernel chose, or None if it is not installed."""
    try:
        import kt_kernel
    except ImportError:
        return None
    return getattr(kt_kernel, "__cpu_variant__", "unknown")


def bench(
    shape="deepseek_v2_lite", tokens=(512, 2048), isas=None, peers=PEERS, rank=8, skew=0.0, repeat=7, budget=20.0
):
    """Measure a layer, print a row per measurement, and return the rows as a list of dicts.

    The keys of a row are name, tokens, forward_ms, backward_ms, tokens_per_s, and gflops, which counts the operations
    of the experts' weights but not those of LoRA.

    Args:
        shape: a name in ``SHAPES``, or (experts, top_k, hidden, intermediate).
        isas: instruction sets to measure; default: the fastest that runs here.
        peers: names in ``PEERS``; kt-kernel is left out if it is not installed.
        skew: share of the tokens that choose expert 0.
        repeat: steps per row.
        budget: seconds per row, after which no further step begins.
    """
    experts, top_k, hidden, intermediate = SHAPES[shape] if isinstance(shape, str) else shape
    weights = layer_weights(experts, hidden, intermediate)
    lora = layer_lora(experts, hidden, intermediate, rank)
    rows = []

    def add(name, count, seconds):
        forward, backward = seconds
        operations = 2 * 6 * count * top_k * hidden * intermediate
        row = {
            "name": name, "tokens": count, "forward_ms": forward * 1e3, "backward_ms": backward * 1e3,
            "tokens_per_s": count / (forward + backward), "gflops": operations / (forward + backward) / 1e9,
        }  # fmt: skip
        rows.append(row)
        print("{name:28s} {tokens:6d} tokens  {forward_ms:8.1f} + {backward_ms:8.1f} ms  {tokens_per_s:8.0f} tokens/s"
              "  {gflops:7.0f} GFLOP/s".format(**row), flush=True)  # fmt: skip

    kt = KtKernel(weights, lora, top_k, max(tokens)) if "kt-kernel" in peers and kt_variant() else None
    for count in tokens:
        generator = torch.Generator().manual_seed(count)
        index, top_k_weights = routing(count, experts, top_k, skew)
        hidden_states = torch.randn(count, hidden, generator=generator).bfloat16().requires_grad_()
        gradient = torch.randn(count, hidden, generator=generator).bfloat16()
        inputs = (hidden_states, index, top_k_weights.requires_grad_(), gradient)
        for isa in isas or [cpu_info()["isa"]]:
            add(f"ktlib {isa}", count, ours(isa, inputs, weights, lora, repeat, budget))
            if "grouped_mm, no LoRA" in peers:
                add(f"ktlib {isa}, no LoRA", count, ours(isa, inputs, weights, (None, None), repeat, budget))
        if kt:
            add(f"kt-kernel {kt_variant()}", count, kt.time(inputs, repeat, budget))
        for name, peer_rank in (("grouped_mm + PEFT", rank), ("grouped_mm, no LoRA", 0)):
            if name in peers:
                add(name, count, stock(inputs, weights, peer_rank, max(1, repeat // 2), budget))
    return rows


def ceilings(isas=None, megabytes=2048):
    """``{isa: peak FLOP/s from registers, "read": bytes/s from memory}`` on torch's number of threads."""
    threads = torch.get_num_threads()
    isas = isas or [name for name, missing in cpu_info()["isas"].items() if not missing]
    rates = {isa: _kernels.peak_rate(isa, threads) for isa in isas}
    return {isa: rate for isa, rate in rates.items() if rate} | {"read": _kernels.read_rate(threads, megabytes << 20)}


def main():
    parser = argparse.ArgumentParser(prog="python -m ktlib.lab.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["deepseek_v2_lite"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--isas", nargs="+", default=None)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--skew", type=float, default=0.0, help="share of tokens that choose expert 0")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per row")
    parser.add_argument("--json", help="write the rows and facts about the machine to this file")
    arguments = parser.parse_args()
    if arguments.json:
        refuse_foreign([arguments.json], "--json", arguments.json)
    result = {"machine": cpu_info(), "torch": torch.__version__, "rank": arguments.rank, "skew": arguments.skew}
    result["ceilings"] = ceilings()
    print({name: f"{rate / 1e9:.1f} G/s" for name, rate in result["ceilings"].items()}, flush=True)
    result["shapes"] = {}
    for shape in arguments.shape:
        print(shape, SHAPES[shape], flush=True)
        result["shapes"][shape] = bench(
            shape, arguments.tokens, arguments.isas, arguments.peers, arguments.rank, arguments.skew,
            arguments.repeat, arguments.budget,
        )  # fmt: skip
    if arguments.json:
        write_text(arguments.json, json.dumps(result, indent=1), "--json", replace=True)


if __name__ == "__main__":
    main()
