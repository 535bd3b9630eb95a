"""Supervised fine-tuning of a MoE model with the stock ``transformers.Trainer``: stock PEFT adapters, or the weights.

The notebook ``05_full_sft`` uses the pieces one by one; ``run`` chains them for sweeps and ablations:

    check_parameters -> estimate_run -> load_model -> prepare -> train -> exact_match -> save
"""

import contextlib
import inspect
import math
import os
import resource
import time
from pathlib import Path

import torch
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from ktlib.base_model import BASE
from ktlib.callback import ShowProgress, StopOnNonFinite
from ktlib.checkpoints import (
    CHECKPOINTS,
    KeepWhole,
    check_space,
    locked,
    place,
    run_identity,
    start_or_resume,
    writing,
)
from ktlib.components import component
from ktlib.cpu import cpu_info
from ktlib.data_parallel import use_one_gpu
from ktlib.environment import unusable_cuda, without_cuda
from ktlib.estimate import estimate
from ktlib.experts import IMPLEMENTATION, is_experts
from ktlib.keeping import CHECKPOINTING
from ktlib.lora import adapter_dtype_kept, lora_config
from ktlib.placement import pin_experts
from ktlib.tasks import TASKS, collator, encode, load_data, prompt_ids, tokenise
from ktlib.threads import default_threads, stock_threads
from ktlib.trace import NonFinite

TARGETS = {"self_attn": "attention", "routed_experts": "experts", "shared_experts": "shared", "dense_mlp": "dense"}
PARTS = tuple(TARGETS.values())
LORA_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FINETUNING = ("lora", "full")


# ---- parameters -----------------------------------------------------------------------------------------------------


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


# ---- model ----------------------------------------------------------------------------------------------------------


def load_model(model="base", experts_implementation=IMPLEMENTATION, stream_rows=None):
    """``(model, tokenizer)`` of a checkpoint folder, weights in bf16; stock ``from_pretrained``.

    Where there is a GPU, the experts of the operator are pinned to the CPU, with ``stream_rows``, so that ``.to`` and a
    Trainer move all but them. Raises ValueError if the tokenizer has no token that ends a response.
    """
    path = BASE if model == "base" else model
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token is None:
        raise ValueError(f"model: the tokenizer in {path} has no eos_token, needs one to end every response with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, experts_implementation=experts_implementation
    )
    served = experts_implementation == IMPLEMENTATION and any(map(is_experts, loaded.modules()))
    if served and torch.cuda.is_available():
        pin_experts(loaded, stream_rows=stream_rows)
    return loaded, tokenizer


def device():
    """Where all of a model but the routed experts is trained: "cuda" if there is a GPU that can be used, or "cpu"."""
    return "cuda" if torch.cuda.is_available() and not unusable_cuda() else "cpu"


def prepare(model, finetuning="lora", targets="attention+experts+shared", **lora):
    """The model with what is to be trained: :func:`add_lora`, or for ``finetuning="full"`` :func:`train_weights`."""
    return train_weights(model, targets) if finetuning == "full" else add_lora(model, targets, **lora)


def add_lora(
    model, targets="attention+experts+shared", rank=16, alpha=32.0, lora_dtype="fp32", lora_dropout=0.0, seed=0
):
    """A PeftModel with fresh adapters (A random from ``seed``, B zero) on the chosen parts, in ``lora_dtype``.

    Routers are never adapted. Raises ValueError if the model has none of the layers that a part names.
    """
    chosen = chosen_modules(model, targets)
    config = lora_config(
        model,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=lora_dropout,
        target_modules=[name for part, names in chosen.items() if part != "experts" for name in names],
        target_parameters=None if chosen.get("experts") else [],
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(LORA_DTYPES[lora_dtype])
    return adapted


def train_weights(model, targets="attention+experts+shared"):
    """The model itself with the weights of the chosen parts to be trained and all others frozen.

    Weights, gradients and moments stay in the model's dtype, as in stock training of a bf16 model: steps below about
    1/256 of a weight round away, so the learning rate must not be too small. Routers, norms and embeddings are frozen.
    Raises ValueError as :func:`add_lora`.
    """
    chosen = {name for names in chosen_modules(model, targets).values() for name in names}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(name in chosen)
    return model


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


# ---- training -------------------------------------------------------------------------------------------------------


def restore_weights(model, checkpoint):
    """Load the weights that a Trainer saved of a whole model in ``checkpoint`` into ``model``.

    The stock Trainer (transformers 5) writes experts one by one, as the hub has them, and when it resumes passes over
    names that the model does not have: it would go on with the experts of the base model.
    """
    model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())


def train(
    model,
    tokenizer,
    rows,
    output_dir,
    *,
    steps=500,
    batch_size=16,
    grad_accumulation=1,
    sequence_length=128,
    learning_rate=3e-3,
    seed=0,
    gradient_checkpointing=False,
    torch_threads=None,
    save_every=100,
    progress=True,
    callbacks=(),
):
    """Fine-tune what requires gradients, in place, with a stock Trainer.

    AdamW, a cosine schedule with 5 % warm-up (none for a single step), gradients clipped at 1.

    On the CPU the result is the same for any number of threads: stock torch, whose rounding depends on it, works on
    ``torch_threads`` of them, by default ``ktlib.threads.default_threads``; the operator on as many as there are.

    A checkpoint is written to ``output_dir/checkpoints`` every ``save_every`` steps and after the last, and
    ``save`` removes the folder. So one that is there belongs to an interrupted run, and is resumed from if
    model, adapters, data, parameters and instruction set are the same (ValueError otherwise). OSError if nothing can be
    written there.

    A value that is not finite ends the run with :class:`ktlib.trace.NonFinite` before it reaches what is trained:
    the report is ``output_dir/nonfinite.txt``, the adapter or model as it was ``output_dir/last_good``, and the
    checkpoints stay.

    ``progress`` is True for a bar, ``"lines"`` for ten printed lines, False for silence.

    Returns a dict: ``log`` (one dict per step: step, loss in nats per response token, learning_rate, grad_norm),
    ``tokens_per_second`` (prompts and responses, without padding), ``seconds``, ``peak_rss_mib``, ``resumed_from``
    (step), ``identity`` (of ``checkpoints.run_identity``).
    """
    examples = encode(tokenizer, rows, sequence_length, progress is True)
    torch_threads = torch_threads or default_threads(model.config)
    identity = run_identity(
        model,
        examples,
        steps=steps,
        batch_size=batch_size,
        grad_accumulation=grad_accumulation,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        seed=seed,
        torch_threads=torch_threads,
        stream_rows=next((m.ktlib_stream_rows for m in model.modules() if hasattr(m, "ktlib_stream_rows")), None),
    )
    checkpoints = Path(output_dir) / CHECKPOINTS
    names = inspect.signature(TrainingArguments).parameters  # transformers 5.23 renamed it, 6 drops the old name
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    on_cpu = without_cuda()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=grad_accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(steps - 1, max(1, steps // 20)),  # its first step has a learning rate of 0
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        **{checkpointing: gradient_checkpointing, f"{checkpointing}_kwargs": CHECKPOINTING},
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        save_steps=save_every,
        remove_unused_columns=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=torch.cuda.is_available() and not on_cpu,
        report_to="none",
        disable_tqdm=True,  # its bar prints every log entry; ours is added below
    )
    use_one_gpu(arguments, "a step has batch_size rows on any machine")
    shown = [ShowProgress(lines=progress == "lines")] if progress else []
    began = time.perf_counter()
    guard = StopOnNonFinite(folder=output_dir)
    is_peft = hasattr(model, "peft_config")
    dtype_kept = adapter_dtype_kept(model) if is_peft else contextlib.nullcontext()
    with writing(output_dir), locked(output_dir), dtype_kept, contextlib.closing(guard), stock_threads(torch_threads):
        check_space(output_dir, model)
        resume, first_step = start_or_resume(checkpoints, identity | {"isa": cpu_info()["isa"]}) or (None, 0)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=collator(tokenizer),
            callbacks=[KeepWhole(), *shown, guard, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if resume and not is_peft:
            restore_weights(model, resume)
        if first_step == steps:  # a Trainer would make one step more
            if is_peft:
                model.load_adapter(resume, model.active_adapter, is_trainable=True)
            state = TrainerState.load_from_json(resume / "trainer_state.json")
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            state = trainer.state
    seconds = time.perf_counter() - began
    if guard.finding is not None:
        raise NonFinite(guard.finding)
    log = [entry for entry in state.log_history if "loss" in entry]
    share = (steps - first_step) / steps
    return {
        "log": log,
        "seconds": seconds,
        "tokens_per_second": state.num_input_tokens_seen * share / seconds,
        "peak_rss_mib": peak_rss_mib(),
        "resumed_from": first_step,
        "identity": identity,
    }


def peak_rss_mib():
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- evaluation and saving ------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens=32, batch_size=100, progress=True):
    """Greedy answers (list of str) to user prompts, in batches padded on the left, with KV cache."""
    answers, was_training = [], model.training
    device = next(model.parameters()).device
    model.eval()
    for start in tqdm(range(0, len(prompts), batch_size), desc="generating", leave=False, disable=not progress):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        longest = max(map(len, ids))
        input_ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    model.train(was_training)
    return answers


def exact_match(model, tokenizer, rows, batch_size=100, progress=True, sequence_length=None):
    """``(accuracy, answers)``: the share of rows whose greedy answer equals the response, outer blanks aside.

    Rows longer than ``sequence_length`` tokens (default: the positions of the model) are left out with a warning: they
    do not count, and their answer is None. ValueError if none is short enough.
    """
    pairs = tokenise(tokenizer, rows, sequence_length or positions(model.config))
    kept = [row for row, pair in zip(rows, pairs, strict=True) if pair]
    longest = max(len(response) for _, response in filter(None, pairs))  # with its end token
    answers = generate(model, tokenizer, [row["prompt"] for row in kept], longest + 3, batch_size, progress)
    hits = [answer.strip() == row["response"].strip() for answer, row in zip(answers, kept, strict=True)]
    remaining = iter(answers)
    return sum(hits) / len(hits), [next(remaining) if pair else None for pair in pairs]


def save(model, folder, tokenizer=None):
    """Save an adapter in PEFT's format, or a model and its tokenizer, in ``folder``, whole or not at all.

    Checkpoints of the training that made it are removed there.
    """
    with writing(folder), locked(folder) as folder:
        place(model, folder, tokenizer)
    return folder


def run(progress=True, **parameters):
    """One whole fine-tuning with the parameters of ``check_parameters``; adapter or model go to ``output_dir``.

    Returns the dict of ``train`` with ``before`` and ``after`` (exact match on held-out prompts), ``answers_before``,
    ``answers_after`` (as :func:`exact_match`), ``test`` (rows) and ``saved`` (path). For all but the built-in model the
    estimate of memory and time is printed. Raises MemoryError before the model is loaded if it cannot fit.
    """
    p = check_parameters(**parameters)
    estimated = estimate_run(p)
    if progress and p["model"] != "base":
        print(estimated, flush=True)
    estimated.check()
    train_rows, test_rows = load_data(p["dataset"], p["seed"])
    use_isa(p["isa"])
    model, tokenizer = load_model(p["model"], stream_rows=p["stream_rows"])
    model.to(device())
    evaluation = {"progress": progress, "sequence_length": p["sequence_length"]}
    before, answers_before = exact_match(model, tokenizer, test_rows, **evaluation)
    lora = {name: p[name] for name in ("rank", "alpha", "lora_dtype", "lora_dropout", "seed")}
    model = prepare(model, p["finetuning"], p["targets"], **lora)
    accepted = set(p) & set(inspect.signature(train).parameters) - {"model", "output_dir"}
    options = {key: p[key] for key in accepted}
    result = train(model, tokenizer, train_rows, p["output_dir"], progress=progress, **options)
    after, answers_after = exact_match(model, tokenizer, test_rows, **evaluation)
    return result | {
        "before": before,
        "after": after,
        "answers_before": answers_before,
        "answers_after": answers_after,
        "test": test_rows,
        "saved": save(model, p["output_dir"], tokenizer if p["finetuning"] == "full" else None),
    }


_isa = {}  # what use_isa chose last, and what KTLIB_ISA was before


def use_isa(isa):
    """Run the operator on instruction set ``isa`` in this process from now on.

    None is the user's choice, ``KTLIB_ISA`` as it was before the first call, or the best without it.
    """
    now = os.environ.get("KTLIB_ISA", "")
    if now != _isa.get("chosen"):  # set by someone else since
        _isa["given"] = now
    _isa["chosen"] = os.environ["KTLIB_ISA"] = isa or _isa["given"]
