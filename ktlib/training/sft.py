"""Supervised fine-tuning of a MoE model with the stock ``transformers.Trainer``: stock PEFT adapters, or the weights.

The notebook ``05_full_sft`` uses the pieces one by one; ``run`` chains them for sweeps and ablations:

    check_parameters -> estimate_run -> load_model -> prepare -> train -> save -> exact_match
"""

import contextlib
import inspect
import os
import resource
import time
from pathlib import Path

import torch
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from ktlib.conversion.write import rename_for_peft
from ktlib.diagnosis.trace import NonFinite
from ktlib.diagnosis.trainer_guard import ShowProgress, StopOnNonFinite
from ktlib.files.ownership import temporary_folder
from ktlib.integrations.model_class import model_class
from ktlib.integrations.peft_lora import adapter_dtype_kept
from ktlib.integrations.transformers_experts import IMPLEMENTATION, is_experts
from ktlib.operator.recompute_once import CHECKPOINTING
from ktlib.placement.data_parallel import use_one_gpu
from ktlib.placement.pin import pin_experts
from ktlib.system.cpu import cpu_info
from ktlib.system.environment import device, without_cuda
from ktlib.system.threads import default_threads, stock_threads
from ktlib.training.chat import prompt_ids
from ktlib.training.output_dir import refuse_foreign
from ktlib.training.parameters import (
    LORA_DTYPES,
    adapter_config,
    check_parameters,
    chosen_modules,
    estimate_run,
    folder_of,
    load_tokenizer,
    positions,
    read_config,
)
from ktlib.training.resume import (
    CHECKPOINTS,
    KeepWhole,
    check_space,
    locked,
    place,
    run_identity,
    source_of,
    start_or_resume,
    writing,
)
from ktlib.training.tasks import collator, encode, load_data, tokenise

# ---- model ----------------------------------------------------------------------------------------------------------


def load_model(model="base", experts_implementation=IMPLEMENTATION, stream_rows=None):
    """``(model, tokenizer)`` of a checkpoint folder, weights in bf16; stock ``from_pretrained``.

    The model is of the class that the checkpoint's config names, a multimodal one if it is that: an adapter then loads
    on what is published. :func:`prepare` trains its language model alone.
    Where there is a GPU, the experts of the operator are pinned to the CPU, with ``stream_rows``, so that ``.to`` and a
    Trainer move all but them. Raises ValueError if the tokenizer has no token that ends a response.
    """
    tokenizer = load_tokenizer(model)
    kind = model_class(read_config(model))
    loaded = kind.from_pretrained(folder_of(model), dtype=torch.bfloat16, experts_implementation=experts_implementation)
    served = experts_implementation == IMPLEMENTATION and any(map(is_experts, loaded.modules()))
    if served and torch.cuda.is_available():
        pin_experts(loaded, stream_rows=stream_rows)
    return loaded, tokenizer


def prepare(model, finetuning="lora", targets="all", **lora):
    """The model with what is to be trained: :func:`add_lora`, or for ``finetuning="full"`` :func:`train_weights`."""
    return train_weights(model, targets) if finetuning == "full" else add_lora(model, targets, **lora)


def add_lora(model, targets="all", rank=16, alpha=32.0, lora_dtype="fp32", lora_dropout=0.0, seed=0):
    """A PeftModel with fresh adapters (A random from ``seed``, B zero) on the chosen parts, in ``lora_dtype``.

    Routers are never adapted. Raises ValueError if the model has none of the layers that a part names, or if PEFT
    cannot read back what it saves of them.
    """
    config = adapter_config(model, targets, rank, alpha, lora_dropout)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    rename_for_peft(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(LORA_DTYPES[lora_dtype])
    return adapted


def train_weights(model, targets="all"):
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
    ``torch_threads`` of them, by default ``ktlib.system.threads.default_threads``; the operator on as many as there
    are.

    A checkpoint is written to ``output_dir/checkpoints`` every ``save_every`` steps and after the last, and
    ``save`` removes the folder. So one that is there belongs to an interrupted run, and is resumed from if
    model, adapters, data, parameters and instruction set are the same (ValueError otherwise, and if the folder holds
    what :func:`check_parameters` refuses). OSError if nothing can be written there.

    A value that is not finite ends the run with :class:`ktlib.diagnosis.trace.NonFinite` before it reaches what is
    trained: the report is ``output_dir/nonfinite.txt``, the adapter or model as it was ``output_dir/last_good``, and
    the checkpoints stay.

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
    with (
        writing(output_dir),
        locked(output_dir),
        temporary_folder(output_dir) as temporary,
        dtype_kept,
        contextlib.closing(guard),
        stock_threads(torch_threads),
    ):
        refuse_foreign(output_dir, source_of(model))
        check_space(output_dir, model)
        resume, first_step = start_or_resume(checkpoints, identity | {"isa": cpu_info()["isa"]}) or (None, 0)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=collator(tokenizer),
            callbacks=[KeepWhole(temporary), *shown, guard, *callbacks],
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
    """Greedy answers (list of str) to user prompts, in batches padded on the left, with KV cache.

    An answer ends at the tokenizer's end token, which training teaches, or at one of the model's own.
    """
    answers, was_training = [], model.training
    ends = model.generation_config.eos_token_id  # one, some or None
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
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
            eos_token_id=sorted(ends),
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

    Checkpoints of the training that made it are removed there. Raises ValueError if the folder holds a model or an
    adapter that ktlib did not save there, or the model that was trained.
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
    if progress and p["model"] != "base":
        print(estimate_run(p), flush=True)
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
    saved = save(model, p["output_dir"], tokenizer if p["finetuning"] == "full" else None)
    after, answers_after = exact_match(model, tokenizer, test_rows, **evaluation)
    return result | {
        "before": before,
        "after": after,
        "answers_before": answers_before,
        "answers_after": answers_after,
        "test": test_rows,
        "saved": saved,
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
