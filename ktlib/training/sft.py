"""Supervised fine-tuning of a MoE model with the stock ``transformers.Trainer``: of stock PEFT adapters, or of weights.

The notebook ``05_full_sft`` calls these functions one by one. :func:`run` calls all of them:

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
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from ktlib.conversion.write import rename_for_peft
from ktlib.diagnosis.trace import NonFinite
from ktlib.diagnosis.trainer_guard import ShowProgress, StopOnNonFinite
from ktlib.files.ownership import temporary_folder
from ktlib.integrations.model_classes import model_class
from ktlib.integrations.peft_lora import adapter_dtype_kept
from ktlib.integrations.stored_formats import settings_of
from ktlib.integrations.stored_weight import is_mapped, stack_experts
from ktlib.integrations.transformers_experts import IMPLEMENTATION, is_experts, warn_once
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
    PublishCheckpoints,
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
    """``(model, tokenizer)`` of a checkpoint folder by stock ``from_pretrained``, weights in bf16.

    ktlib reads a quantised checkpoint for stock experts too: transformers alone needs further packages for most of
    them, and decodes some to other weights (ktlib/integrations/README.md). Stock experts then decode one by one.
    The model has the class that the checkpoint's config names, so that an adapter also loads on the published model.
    If this class is multimodal, :func:`prepare` trains its language model alone.
    If there is a GPU, the experts that the operator computes are pinned to the CPU, with ``stream_rows``, so that
    ``.to`` and a Trainer move all other weights only.

    Raises:
        ValueError: the tokenizer has no token that ends a response.
    """
    tokenizer = load_tokenizer(model)
    config = read_config(model)
    reader = IMPLEMENTATION if settings_of(config) else experts_implementation
    loaded = model_class(config).from_pretrained(folder_of(model), dtype=torch.bfloat16, experts_implementation=reader)
    if reader != experts_implementation:
        loaded.set_experts_implementation(experts_implementation)
    served = experts_implementation == IMPLEMENTATION and any(map(is_experts, loaded.modules()))
    if served and torch.cuda.is_available():
        pin_experts(loaded, stream_rows=stream_rows)
    return loaded, tokenizer


def prepare(model, finetuning="lora", targets="all", **lora):
    """The model to train, by :func:`add_lora`, or for ``finetuning="full"`` by :func:`train_weights`."""
    return train_weights(model, targets) if finetuning == "full" else add_lora(model, targets, **lora)


def add_lora(model, targets="all", rank=16, alpha=32.0, lora_dtype="fp32", lora_dropout=0.0, seed=0):
    """A PeftModel with new adapters (A random from ``seed``, B zero) on the chosen targets, in ``lora_dtype``.

    Routers are never adapted.

    Raises:
        ValueError: the model has no layer of a target, or PEFT could not load the adapter that it would save.
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
    """The same model with the weights of the chosen targets to be trained and all others frozen.

    Weights, gradients and moments have the model's dtype, as in stock training of a bf16 model. A bf16 weight does not
    change by a step below about 1/256 of it, so the learning rate must not be too small. Routers, norms and embeddings
    are frozen. Expert weights that are mapped from the checkpoint become ordinary parameters, in memory of their own.

    Raises:
        ValueError: the model has no layer of a target.
    """
    if is_mapped(model):
        experts = next(module for module in model.modules() if is_experts(module))
        warn_once(experts, "finetuning='full' needs ordinary parameters, so expert weights are copied into memory")
        stack_experts(model)
    chosen = {name for names in chosen_modules(model, targets).values() for name in names}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(name in chosen)
    return model


# ---- training -------------------------------------------------------------------------------------------------------


def restore_weights(model, checkpoint):
    """Load all weights of the checkpoint of a full fine-tuning into ``model``.

    The stock Trainer (transformers 5) saves one tensor per expert, as the hub has them. As it resumes, it ignores these
    tensors, because the model has no parameters of these names, and it would train the experts of the base model.
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
    """Train the parameters that require gradients, in place, with a stock Trainer.

    The optimizer is AdamW, with a cosine schedule, 5 % warm-up (none for a single step) and gradients clipped at 1.

    On the CPU the result does not depend on the machine's number of threads. Rounding in stock torch depends on its
    number of threads, so it gets ``torch_threads``, by default ``ktlib.system.threads.default_threads``. The operator,
    whose results do not depend on it, uses all threads.

    A checkpoint is written to ``output_dir/checkpoints`` every ``save_every`` steps and after the last step. As
    :func:`save` removes them, checkpoints that exist at the start belong to an interrupted run, which is resumed.

    A value that is not finite ends the run before it changes a trained parameter. The report is then in
    ``output_dir/nonfinite.txt``, the last good adapter or model in ``output_dir/last_good``, and checkpoints stay.

    ``progress`` is True for a bar, ``"lines"`` for ten printed lines, False for silence.

    Returns:
        A dict: ``log`` (one dict per step: step, loss in nats per response token, learning_rate, grad_norm),
        ``tokens_per_second`` (of prompts and responses, without padding), ``seconds``, ``peak_rss_mib``,
        ``resumed_from`` (step), ``identity`` (of :func:`ktlib.training.resume.run_identity`).

    Raises:
        ValueError: the interrupted run had another model, data, parameters or instruction set; or the folder holds
            files that :func:`check_parameters` refuses.
        OSError: the folder cannot be written to.
        ktlib.diagnosis.trace.NonFinite: a value was not finite.
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
        warmup_steps=min(steps - 1, max(1, steps // 20)),  # the first step of a warm-up has a learning rate of 0
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
        disable_tqdm=True,  # the Trainer's bar prints every log entry; ShowProgress replaces it
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
        if resume and progress == "lines":
            print(f"resuming from the checkpoint of step {first_step} of {steps}", flush=True)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=collator(tokenizer),
            callbacks=[PublishCheckpoints(temporary), *shown, guard, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if resume and not is_peft:
            restore_weights(model, resume)
        if first_step == steps:  # all steps are done, but a resumed Trainer would make one more
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
    share_of_steps = (steps - first_step) / steps
    return {
        "log": log,
        "seconds": seconds,
        "tokens_per_second": state.num_input_tokens_seen * share_of_steps / seconds,
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
    """Greedy answers (list of str) to user prompts, generated in batches padded on the left, with KV cache.

    An answer ends at the tokenizer's end token, which training teaches, or at an end token of the model's own.
    """
    answers, was_training = [], model.training
    end_ids = model.generation_config.eos_token_id  # an int, a list or None
    end_ids = {tokenizer.eos_token_id, *(end_ids if isinstance(end_ids, list) else [end_ids])} - {None}
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
            eos_token_id=sorted(end_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    model.train(was_training)
    return answers


def exact_match(model, tokenizer, rows, batch_size=100, progress=True, sequence_length=None):
    """``(accuracy, answers)``: the share of rows whose greedy answer equals the response but for outer blanks.

    Rows longer than ``sequence_length`` tokens (default: the positions of the model) are left out with a warning: the
    share does not count them, and their answer is None. ValueError if no row is short enough.
    """
    pairs = tokenise(tokenizer, rows, sequence_length or positions(model.config))
    asked = [row for row, pair in zip(rows, pairs, strict=True) if pair]
    longest = max(len(response) for _, response in filter(None, pairs))  # tokens, with the end token
    answers = generate(model, tokenizer, [row["prompt"] for row in asked], longest + 3, batch_size, progress)
    hits = [answer.strip() == row["response"].strip() for answer, row in zip(answers, asked, strict=True)]
    remaining = iter(answers)
    return sum(hits) / len(hits), [next(remaining) if pair else None for pair in pairs]


def save(model, folder, tokenizer=None):
    """Save an adapter in PEFT's format, or a model and its tokenizer, in ``folder``, whole or not at all.

    The run's checkpoints in ``folder`` are removed.

    Raises:
        ValueError: the folder holds a model or an adapter that ktlib did not write, or the model that was trained.
    """
    with writing(folder), locked(folder) as folder:
        place(model, folder, tokenizer)
    return folder


def run(progress=True, **parameters):
    """A whole fine-tuning with the parameters of :func:`check_parameters`; adapter or model go to ``output_dir``.

    For every model but the built-in one the estimate of memory and time is printed first.

    Returns:
        The dict of :func:`train` with ``before`` and ``after`` (exact match on held-out prompts), ``answers_before``
        and ``answers_after`` (as :func:`exact_match` returns them), ``test`` (rows) and ``saved`` (path).

    Raises:
        ValueError, MemoryError: as :func:`check_parameters`, before the model is loaded.
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


_isa = {}  # "chosen": the value that use_isa gave to KTLIB_ISA last; "given": the user's own value


def use_isa(isa):
    """Run the operator on instruction set ``isa`` in this process from now on.

    None means the user's choice in ``KTLIB_ISA``, and the fastest instruction set without such a choice.
    """
    current = os.environ.get("KTLIB_ISA", "")
    if current != _isa.get("chosen"):  # the user has changed the variable since the last call
        _isa["given"] = current
    _isa["chosen"] = os.environ["KTLIB_ISA"] = isa or _isa["given"]
