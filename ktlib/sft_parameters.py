"""The parameters of a fine-tuning run, checked against one another and against the model's config.

Everything here happens before a weight is read: a run that cannot work is refused within seconds.
"""

import math
import os
from pathlib import Path

import torch
from transformers import AutoConfig

from ktlib.base_model import BASE
from ktlib.components import component
from ktlib.cpu import cpu_info
from ktlib.environment import device
from ktlib.estimate import estimate
from ktlib.experts import is_experts
from ktlib.tasks import TASKS

TARGETS = {"self_attn": "attention", "routed_experts": "experts", "shared_experts": "shared", "dense_mlp": "dense"}
PARTS = tuple(TARGETS.values())
LORA_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FINETUNING = ("lora", "full")


def target_parts(targets):
    """``"attention+experts"`` -> ``("attention", "experts")``; ``"all"`` means every part. ValueError otherwise."""
    parts = PARTS if targets == "all" else tuple(str(targets).split("+"))
    if not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
        raise ValueError(f"targets: got {targets!r}, need 'all' or some of {', '.join(PARTS)} joined by '+'")
    return parts


def check_parameters(
    model="base",
    dataset="dates",
    rank=16,
    alpha=32.0,
    targets="attention+experts+shared",
    lora_dtype="fp32",
    lora_dropout=0.0,
    steps=500,
    batch_size=16,
    grad_accumulation=1,
    sequence_length=128,
    learning_rate=3e-3,
    seed=0,
    gradient_checkpointing=False,
    output_dir="runs/sft",
    isa=None,
    finetuning="lora",
    torch_threads=None,
    stream_rows=None,
):
    """Check every parameter of a run before anything heavy happens; returns them as a dict.

    Raises ValueError naming the parameter, the value that came and what is needed:

    - ``model``: ``"base"`` (the embedded model), or a checkpoint folder with a ``config.json``
    - ``dataset``: a built-in task or a JSONL file with ``prompt`` and ``response``
    - ``rank``, ``steps``, ``batch_size``, ``grad_accumulation``: whole numbers >= 1; ``seed`` from 0 to 2**32 - 1
    - ``sequence_length``: tokens per row, >= 8; longer rows are left out, of training and of evaluation
    - ``alpha``, ``learning_rate``: finite numbers > 0; ``lora_dtype``: ``"fp32"`` or ``"bf16"``
    - ``lora_dropout``: the share of the inputs of all adapters that training drops, from 0 to below 1
    - ``targets``: ``"all"`` or parts joined by ``+``: attention, experts (routed), shared (experts), dense (MLP layers)
    - ``gradient_checkpointing``: bool; ``output_dir``: a folder that exists or can be made
    - ``isa``: None (``KTLIB_ISA``, or the best) or an instruction set of this CPU
    - ``finetuning``: ``"lora"``, or ``"full"`` for the weights of ``targets`` themselves, in bf16 (then rank, alpha and
      lora_dtype have no meaning, and lora_dropout must be 0)
    - ``torch_threads``: None (by the model's size) or a whole number >= 1: threads of stock torch on the CPU while
      training, on which its rounding depends (:mod:`ktlib.threads`); the operator takes all there are
    - ``stream_rows``: None or a whole number >= 1: experts with so many rows in a batch are computed on the GPU, their
      weights copied there each time (:func:`ktlib.pin_experts`); without a GPU it has no meaning
    """
    given = dict(locals())

    def need(good, name, what):
        if not good:
            raise ValueError(f"{name}: got {given[name]!r}, need {what}")

    least = {"rank": 1, "steps": 1, "batch_size": 1, "grad_accumulation": 1, "sequence_length": 8, "seed": 0}
    for name, minimum in least.items():
        whole = isinstance(given[name], int) and not isinstance(given[name], bool)
        need(whole and given[name] >= minimum, name, f"a whole number >= {minimum}")
    need(seed < 2**32, "seed", "a whole number below 2**32")
    for name in ("torch_threads", "stream_rows"):
        whole = isinstance(given[name], int) and not isinstance(given[name], bool) and given[name] >= 1
        need(given[name] is None or whole, name, "none or a whole number >= 1")
    for name in ("alpha", "learning_rate", "lora_dropout"):
        numeric = isinstance(given[name], (int, float)) and not isinstance(given[name], bool)
        in_range = numeric and (0 <= given[name] < 1 if name == "lora_dropout" else 0 < given[name] < float("inf"))
        need(in_range, name, "a number from 0 to below 1" if name == "lora_dropout" else "a finite number > 0")
    need(isinstance(gradient_checkpointing, bool), "gradient_checkpointing", "true or false")
    need(str(finetuning) in FINETUNING, "finetuning", f"one of {', '.join(FINETUNING)}")
    need(finetuning == "lora" or not lora_dropout, "lora_dropout", "0 with finetuning='full'")
    need(finetuning == "lora" or not stream_rows, "stream_rows", "none with finetuning='full'")
    need(str(lora_dtype) in LORA_DTYPES, "lora_dtype", f"one of {', '.join(LORA_DTYPES)}")
    target_parts(targets)
    for name in ("model", "dataset", "output_dir"):
        need(isinstance(given[name], (str, os.PathLike)) and str(given[name]), name, "a name or a path")
    is_model = model == "base" or (Path(model) / "config.json").is_file()
    hint = "nothing is downloaded here: `hf download NAME --local-dir FOLDER` brings a model of the hub"
    need(is_model, "model", f"'base' or a checkpoint folder with a config.json ({hint})")
    is_data = str(dataset) in TASKS or Path(dataset).is_file()
    need(is_data, "dataset", f"one of {', '.join(TASKS)} or a JSONL file")
    need(not Path(output_dir).exists() or Path(output_dir).is_dir(), "output_dir", "a folder, not a file")
    above = next(path for path in (Path(output_dir), *Path(output_dir).absolute().parents) if path.exists())
    need(
        os.access(above, os.W_OK | os.X_OK, effective_ids=True),
        "output_dir",
        f"one that can be written to: {above} cannot",
    )
    usable = [name for name, missing in cpu_info()["isas"].items() if not missing]
    need(isa is None or isa in usable, "isa", f"none or what runs on this CPU: {', '.join(usable)}")
    return given


def chosen_modules(model, targets):
    """``{part: names of its linear layers or experts modules}`` for the parts that ``targets`` names."""
    found = {part: [] for part in PARTS}
    for name, module in model.named_modules():
        part = TARGETS.get(component(name))
        if isinstance(module, torch.nn.Linear) and part:
            found[part].append(name)
        elif is_experts(module):
            found["experts"].append(name)
    parts = target_parts(targets)
    if targets != "all" and (missing := [part for part in parts if not found[part]]):
        has = ", ".join(part for part in found if found[part])
        raise ValueError(f"targets: got {targets!r}, but {type(model).__name__} has no {missing[0]}; it has {has}")
    return {part: found[part] for part in parts}


def estimate_run(parameters):
    """The :class:`ktlib.estimate.Estimate` of a run; ``parameters`` as checked above. Reads the model's config only.

    ``print`` shows it, its ``check()`` raises MemoryError with the numbers if the run cannot fit in what is free here.
    The built-in model takes no time worth measuring this machine for: its estimate is of memory only.
    Raises ValueError if ``sequence_length`` exceeds the positions that the model was made for.
    """
    is_base = parameters["model"] == "base"
    config = AutoConfig.from_pretrained(BASE if is_base else parameters["model"])
    if parameters["sequence_length"] > (most := positions(config)):
        raise ValueError(
            f"sequence_length: got {parameters['sequence_length']}, need at most {most}, the max_position_embeddings "
            "of the model"
        )
    names = {part: label for label, part in TARGETS.items()}
    return estimate(
        config,
        finetuning=parameters["finetuning"],
        rank=parameters["rank"],
        lora_bytes=LORA_DTYPES[parameters["lora_dtype"]].itemsize,
        targets=tuple(names[part] for part in target_parts(parameters["targets"])),
        tokens=parameters["batch_size"] * parameters["sequence_length"],
        sequence_length=parameters["sequence_length"],
        checkpointing=parameters["gradient_checkpointing"],
        gpu=device() == "cuda",
        timing=not is_base,
        stream_rows=parameters["stream_rows"],
    )


def positions(config):
    """How many tokens a row can have by a model's config; infinity if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
