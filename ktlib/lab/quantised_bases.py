"""What a quantised base costs: adapters trained on it, errors of its weights, its memory and its speed.

The notebook ``12_quantised_bases`` uses these functions.
"""

import copy
import ctypes
import gc
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ktlib.assets import BASE
from ktlib.conversion import quantise_checkpoint
from ktlib.conversion.fuse import fuse_checkpoint
from ktlib.conversion.nearest_codes import quantise, relative_error
from ktlib.estimate import estimate
from ktlib.integrations.peft_lora import factor_adapters
from ktlib.integrations.stored_weight import StoredWeight
from ktlib.integrations.transformers_experts import IMPLEMENTATION, WEIGHT_NAMES, is_experts
from ktlib.lab import bench, hybrid
from ktlib.operator.moe_experts import moe_experts
from ktlib.operator.weight import Weight
from ktlib.system.cpu import cpu_info
from ktlib.training import sft

BASES = ("bf16", "int8", "fp8", "int4", "nf4", "mxfp4")
# relative L2 error of the nearest codes of normally distributed weights (2 million, before they are rounded to bf16)
GAUSSIAN = {"int8": 0.0065, "fp8": 0.0264, "int4": 0.086, "nf4": 0.092, "mxfp4": 0.114}


def make_base(base, folder, source=BASE):
    """The folder of ``source`` with its routed experts in the format ``base``; "bf16": of ``source`` itself."""
    return source if base == "bf16" else fuse_checkpoint(source, Path(folder) / base, progress=False, quantise=base)


def train(base, rows, held_out, folder, *, steps, seed=0, learning_rate=3e-3, rank=16, torch_threads=None):
    """Train an adapter on a base and measure it there, and then on the built-in model in bf16.

    Args:
        base: its folder, as :func:`make_base` returns it.
        rows, held_out: to train on, and to measure with.
        folder: gets the adapter.

    Returns:
        A dict: ``before`` and ``loss`` (nats per response token of the held-out rows, before and after), ``exact``
        (their share with exact answers), and ``loss_on_bf16`` and ``exact_on_bf16``, with the same adapter on the bf16
        base.
    """
    model, tokenizer = sft.load_model(base)
    before = loss_of(model, tokenizer, held_out)
    model = sft.add_lora(model, rank=rank, seed=seed)
    sft.train(
        model, tokenizer, rows, folder, steps=steps, seed=seed, learning_rate=learning_rate,
        torch_threads=torch_threads, progress=False,
    )  # fmt: skip
    sft.save(model, folder)

    def measured(model):
        return loss_of(model, tokenizer, held_out), sft.exact_match(model, tokenizer, held_out, progress=False)[0]

    own = measured(model)
    on_bf16 = own
    if base != BASE:
        model = PeftModel.from_pretrained(sft.load_model()[0], folder)
        factor_adapters(model)
        on_bf16 = measured(model)
    return {
        "before": before, "loss": own[0], "exact": own[1], "loss_on_bf16": on_bf16[0], "exact_on_bf16": on_bf16[1]
    }  # fmt: skip


@torch.no_grad()
def loss_of(model, tokenizer, rows):
    """Nats per response token of all rows, in one batch."""
    was_training = model.training
    batch = sft.collator(tokenizer)(sft.encode(tokenizer, rows, 128))
    loss = model.eval()(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss.item()
    model.train(was_training)
    return loss


def table(rows, bits):
    """A Markdown table of what :func:`train` returned, one line for each base with the numbers of all seeds.

    Args:
        rows: dicts with ``base`` and the results, in the order of seeds.
        bits: ``{base: bits of a weight}``, which gives the order of the bases.
    """
    columns = {"loss": 4, "exact": 3, "loss_on_bf16": 4, "exact_on_bf16": 3}
    lines = [
        "| base | bits a weight | loss | exact match | the adapters on bf16: loss | exact match |",
        "|---|---|---|---|---|---|",
    ]
    for base, size in bits.items():
        of_base = [row for row in rows if row["base"] == base]
        cells = [", ".join(f"{row[name]:.{digits}f}" for row in of_base) for name, digits in columns.items()]
        lines.append(" | ".join([f"| {base}", f"{size:.2f}", *cells]) + " |")
    return "\n".join(lines)


# ---- errors ---------------------------------------------------------------------------------------------------------


def in_format(weights, base):
    """Each bf16 stack of ``weights`` in the format ``base``: a :class:`ktlib.Weight`, or itself for "bf16"."""
    if base == "bf16":
        return list(weights)
    format, group = quantise_checkpoint.FORMATS[base]
    made = [quantise(stack, format, group=group) for stack in weights]
    return [Weight(format, one.codes, one.scales, group=group) for one in made]


def errors(experts=4, hidden=1024, intermediate=512, tokens=256, seed=0):
    """``{base: (of the weights, of the layer's output)}``: relative L2 errors of normally distributed weights.

    The inputs are normally distributed, too, and each token has one expert, so that no error averages out.
    """
    weights = bench.layer_weights(experts, hidden, intermediate, seed)
    generator = torch.Generator().manual_seed(seed + experts)  # the weights of the experts have the seeds below
    inputs = torch.randn(tokens, hidden, generator=generator).bfloat16(), torch.arange(tokens)[:, None] % experts
    inputs = *inputs, torch.ones(tokens, 1)
    exact = moe_experts(*inputs, *weights)
    result = {}
    for base in GAUSSIAN:
        coded = in_format(weights, base)
        decoded = torch.cat([weight.decoded().flatten() for weight in coded])
        of_weights = relative_error(torch.cat([stack.flatten() for stack in weights]), decoded)
        result[base] = of_weights, relative_error(exact, moe_experts(*inputs, *coded))
    return result


# ---- memory ---------------------------------------------------------------------------------------------------------


def expert_bytes(config, base):
    """Bytes of all routed experts of a model with this config: of codes and scales, or of bf16 weights."""
    config = copy.deepcopy(config)
    if base != "bf16":
        config.quantization_config = quantise_checkpoint.settings(*quantise_checkpoint.FORMATS[base])
    return estimate(config, gpu=False, timing=False).host["expert weights"]


def expert_weights(model):
    """The weights of all routed experts: StoredWeights, and parameters."""
    return [getattr(module, name) for module in model.modules() if is_experts(module) for name in WEIGHT_NAMES]


def stored_bytes(model):
    """Bytes of the routed experts of a loaded model, as :func:`expert_bytes` computes them."""
    return sum(_nbytes(p) for p in expert_weights(model))


def _nbytes(weight):
    return weight.source.nbytes if isinstance(weight, StoredWeight) else weight.nbytes


def memory_added(folders):
    """``{name: dict}`` for checkpoint folders ``{name: folder}``, each measured in a process of its own.

    The process has loaded the model, taken a step and dropped the model once before. So memory that is kept for later
    use (imported modules, threads, the operator's scratch) is not counted.

    The dict has ``experts`` (bytes of codes and scales, or of bf16 weights), and how many bytes ``anonymous`` and
    ``mapped`` memory grew by when the model was loaded and took a step with adapters of rank 1. ``with_copies`` is the
    growth of anonymous memory after all experts have been copied to bf16 tensors. That shows what the measurement would
    find if loading or the step copied them.

    Raises:
        RuntimeError: a process failed, with its errors; or the system does not tell anonymous memory.
    """

    def measured(folder):
        code = f"from ktlib.lab import quantised_bases; quantised_bases.print_memory_added({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(len(folders)) as pool:
        return dict(zip(folders, pool.map(measured, folders.values()), strict=True))


def print_memory_added(folder):
    """Print the dict of :func:`memory_added` for one folder as JSON, measured in this process."""
    stepped(folder)
    before = memory_in_use()
    if "RssAnon" not in before:
        raise RuntimeError("this system does not tell anonymous memory (/proc/self/status)")
    model = stepped(folder)
    after = memory_in_use()
    weights = expert_weights(model)
    copies = [p.source.decoded() if isinstance(p, StoredWeight) else p.detach().clone() for p in weights]
    with_copies = memory_in_use()
    assert all(copy.isfinite().all() for copy in copies)
    result = {
        "experts": sum(map(_nbytes, weights)),
        "in_bf16": sum(copy.nbytes for copy in copies),
        "anonymous": after["RssAnon"] - before["RssAnon"],
        "mapped": after["RssFile"] - before["RssFile"],
        "with_copies": with_copies["RssAnon"] - before["RssAnon"],
    }
    print(json.dumps(result))


def memory_in_use():
    """:func:`ktlib.lab.hybrid.memory` after freed memory went back to the system, where the C library can do that."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return hybrid.memory()


def stepped(folder):
    """A model that was loaded from ``folder`` and has taken one step on 64 tokens, with adapters of rank 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation=IMPLEMENTATION)
    model = hybrid.adapt(model, rank=1)
    batch = hybrid.collate(hybrid.token_rows(model.config, 2, 32, 16))
    trained = [p for p in model.parameters() if p.requires_grad]
    hybrid.one_step(model, batch, torch.optim.AdamW(trained), trained, model.device)
    return model


# ---- speed ----------------------------------------------------------------------------------------------------------


def seconds(bases, token_counts, shape=(16, 4, 1024, 704), rank=8, repeat=5, budget=1.0):
    """``{base: [seconds of a step]}`` of one layer, forward and backward with LoRA, for each number of tokens.

    Args:
        shape: (experts, experts of a token, hidden size, intermediate size).
        repeat, budget: as for :func:`ktlib.lab.bench.time_steps`.
    """
    experts, top_k, hidden, intermediate = shape
    weights = bench.layer_weights(experts, hidden, intermediate)
    lora = bench.layer_lora(experts, hidden, intermediate, rank)
    coded = {base: in_format(weights, base) for base in bases}
    result = {base: [] for base in bases}
    for tokens in token_counts:
        index, routing = bench.routing(tokens, experts, top_k)
        x, gradient = (torch.randn(tokens, hidden).bfloat16() for _ in range(2))
        inputs = x.requires_grad_(), index, routing.requires_grad_(), gradient
        for base in bases:  # one after the other, so that what else the machine does reaches all alike
            result[base].append(sum(bench.ours(cpu_info()["isa"], inputs, coded[base], lora, repeat, budget)))
    return result
