"""The parameters of a fine-tuning run, checked against one another, the model's config and the data.

Everything here happens before a weight is read or a Jupyter kernel is started: a run that cannot work is refused within
seconds. What needs a file to be opened comes after what does not, and transformers and PEFT are imported only then.
"""

import inspect
import math
import os
import warnings
from pathlib import Path

import torch

from ktlib.files.tensor_files import read_json, weight_files
from ktlib.integrations.model_class import check_trainable, meta_model
from ktlib.integrations.transformers_experts import is_experts, unsupported
from ktlib.names import component
from ktlib.system.cpu import cpu_info
from ktlib.system.environment import device
from ktlib.system.threads import MOST
from ktlib.training.output_dir import check_output_dir
from ktlib.training.tasks import TASKS, load_data, tokenise

TARGETS = {"self_attn": "attention", "routed_experts": "experts", "shared_experts": "shared", "dense_mlp": "dense"}
PARTS = tuple(TARGETS.values())
LORA_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FINETUNING = ("lora", "full")
DEFAULT_FOLDER = str(Path(__file__).parents[2] / "runs" / "05_full_sft")  # of the notebook, where none is given
LARGEST = torch.finfo(torch.float32).max  # scales and rates become fp32 numbers


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
    targets="all",
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

    - ``model``: ``"base"`` (the embedded model), or a checkpoint folder of a causal language model with routed experts,
      with its config, weights and tokenizer
    - ``dataset``: a built-in task or a JSONL file with ``prompt`` and ``response``
    - ``rank``, ``steps``, ``batch_size``, ``grad_accumulation``: whole numbers >= 1; ``seed`` from 0 to 2**32 - 1
    - ``sequence_length``: tokens per row, from 8 to the model's positions; longer rows are left out, of training and of
      evaluation
    - ``alpha``, ``learning_rate``: numbers > 0 in the range of fp32; ``lora_dtype``: ``"fp32"`` or ``"bf16"``
    - ``lora_dropout``: the share of the inputs of all adapters that training drops, from 0 to below 1
    - ``targets``: what is trained: ``"all"``, or parts of which the model has each, joined by ``+``: attention, experts
      (routed), shared (experts), dense (MLP layers)
    - ``gradient_checkpointing``: bool; ``output_dir``: a folder that exists or can be made, that is not the model's and
      holds no model, adapter, checkpoints or results but those that ktlib wrote
    - ``isa``: None (``KTLIB_ISA``, or the best) or an instruction set of this CPU
    - ``finetuning``: ``"lora"``, or ``"full"`` for the weights of ``targets`` themselves, in bf16 (then rank, alpha and
      lora_dropout have no meaning, and lora_dropout must be 0)
    - ``torch_threads``: None (by the model's size) or a whole number >= 1: threads of stock torch on the CPU while
      training, on which its rounding depends (:mod:`ktlib.system.threads`); the operator takes all there are
    - ``stream_rows``: None or a whole number >= 1: experts with so many rows in a batch are computed on the GPU, their
      weights copied there each time (:func:`ktlib.pin_experts`); without a GPU it has no meaning

    Raises MemoryError with the numbers if the run cannot fit in the memory that is free.
    """
    given = dict(locals())

    def need(good, name, what):
        if not good:
            raise ValueError(f"{name}: got {given[name]!r}, need {what}")

    least = {"rank": 1, "steps": 1, "batch_size": 1, "grad_accumulation": 1, "sequence_length": 8, "seed": 0}
    for name, minimum in least.items():
        need(is_whole(given[name], minimum), name, f"a whole number >= {minimum}")
    need(seed < 2**32, "seed", "a whole number below 2**32")
    for name in ("torch_threads", "stream_rows"):
        most = MOST if name == "torch_threads" else 2**31 - 1
        good = given[name] is None or is_whole(given[name], 1) and given[name] <= most
        need(good, name, f"none or a whole number from 1 to {most}")
    for name in ("alpha", "learning_rate"):
        need(is_number(given[name]) and 0 < given[name] <= LARGEST, name, f"a number > 0 and at most {LARGEST:.2g}")
    need(is_number(lora_dropout) and 0 <= lora_dropout < 1, "lora_dropout", "a number from 0 to below 1")
    need(isinstance(gradient_checkpointing, bool), "gradient_checkpointing", "true or false")
    need(str(finetuning) in FINETUNING, "finetuning", f"one of {', '.join(FINETUNING)}")
    need(finetuning == "lora" or not lora_dropout, "lora_dropout", "0 with finetuning='full'")
    need(finetuning == "lora" or not stream_rows, "stream_rows", "none with finetuning='full'")
    need(str(lora_dtype) in LORA_DTYPES, "lora_dtype", f"one of {', '.join(LORA_DTYPES)}")
    target_parts(targets)
    for name in ("model", "dataset", "output_dir"):
        need(isinstance(given[name], (str, os.PathLike)) and str(given[name]), name, "a name or a path")
    check_folder(model)
    is_data = str(dataset) in TASKS or Path(dataset).is_file()
    need(is_data, "dataset", f"one of {', '.join(TASKS)} or a JSONL file")
    usable = [name for name, missing in cpu_info()["isas"].items() if not missing]
    need(isa is None or isa in usable, "isa", f"none or what runs on this CPU: {', '.join(usable)}")
    check_output_dir(output_dir, folder_of(model))
    check_model(given)
    check_data(dataset, model, sequence_length, seed)
    return given


def check_notebook(*, output_dir, **parameters):
    """:func:`check_parameters` for the parameters of notebook 05: ``output_dir`` None is the folder that it chooses."""
    return check_parameters(**parameters, output_dir=DEFAULT_FOLDER if output_dir is None else output_dir)


def is_number(value):
    """Whether a value is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value, least):
    """Whether a value is an int, and at least so large."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def other_than_default(parameters):
    """Names of the parameters that decide what is learnt and have other values than their defaults."""
    defaults = {name: one.default for name, one in inspect.signature(check_parameters).parameters.items()}
    circumstances = {"output_dir", "isa", "torch_threads", "stream_rows", "gradient_checkpointing"}
    return [name for name, value in defaults.items() if name not in circumstances and parameters[name] != value]


def folder_of(model):
    """The checkpoint folder that the parameter ``model`` stands for."""
    from ktlib.assets import BASE

    return BASE if model == "base" else Path(model)


def check_folder(model):
    """ValueError if ``model`` is neither "base" nor a folder with the config of a model, and of no adapter."""
    if model == "base":
        return
    is_model, adapter = (Path(model) / "config.json").is_file(), Path(model) / "adapter_config.json"
    if is_model and adapter.is_file():
        raise ValueError(
            f"model: got {str(model)!r}, which holds an adapter beside the model, need a folder without: transformers "
            "would load both together"
        )
    if adapter.is_file():
        of = read_json(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"model: got {str(model)!r}, which holds an adapter of {of}, need a checkpoint folder with a config.json: "
            "merge the adapter into its model (PEFT's merge_and_unload, then save_pretrained) to train on top of it"
        )
    if not is_model:
        raise ValueError(
            f"model: got {model!r}, need 'base' or a checkpoint folder with a config.json (nothing is downloaded here: "
            "`hf download NAME --local-dir FOLDER` brings a model of the hub)"
        )


def check_model(parameters):
    """What a model's config decides about a run, in the order of what it costs: no weight is read.

    ``parameters`` as :func:`check_parameters` returns them. Raises ValueError or MemoryError as it does.
    """
    model = parameters["model"]
    config = read_config(model)
    if parameters["sequence_length"] > (most := positions(config)):
        raise ValueError(
            f"sequence_length: got {parameters['sequence_length']}, need at most {most}, the max_position_embeddings "
            "of the model"
        )
    empty = meta_model_of(model, config)
    check_trainable(empty)
    name = type(empty).__name__
    experts = [module for module in empty.modules() if is_experts(module)]
    if not experts:
        raise ValueError(
            f"model: got {str(model)!r}, a {name} without routed experts that go through transformers' experts "
            "interface, need a Mixture-of-Experts model"
        )
    chosen_modules(empty, parameters["targets"])
    if reason := unsupported(experts[0]):
        what = f"{name}'s routed experts run in transformers, not in ktlib ({reason})"
        if parameters["lora_dropout"] and "experts" in target_parts(parameters["targets"]):
            raise ValueError(f"lora_dropout: got {parameters['lora_dropout']}, need 0: {what}, where it has none")
        if device() == "cuda":
            raise ValueError(f"model: got {str(model)!r}, need a model for ktlib's operator, or no GPU: {what}")
        warnings.warn(f"model: {what}", stacklevel=3)
    estimated = estimate_run(parameters, empty, timing=False)
    try:
        estimated.check()
    except MemoryError as error:
        raise MemoryError(
            f"batch_size: got {parameters['batch_size']} rows of {parameters['sequence_length']} tokens, for which the "
            f"training of {name} {error}; needs fewer, or another model"
        ) from None
    if parameters["finetuning"] == "lora":
        from peft import get_peft_model

        from ktlib.conversion.write import rename_for_peft

        with torch.device("meta"), warnings.catch_warnings():
            # PEFT asks by an old name
            warnings.filterwarnings("ignore", message=".*checkpointing", category=FutureWarning)
            lora = {name: parameters[name] for name in ("rank", "alpha", "lora_dropout")}
            rename_for_peft(get_peft_model(empty, adapter_config(empty, parameters["targets"], **lora)))
    check_weights(model)


def read_config(model):
    """The config of a checkpoint folder; ValueError in one sentence if transformers cannot read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder_of(model), trust_remote_code=False)
    except Exception as error:  # whatever what stands there makes transformers trip over
        raise ValueError(
            f"model: got {str(model)!r}, need one whose config.json transformers can read ({sentence(error)})"
        ) from error


def meta_model_of(model, config):
    """The model of a config without memory for its weights; ValueError in one sentence if there is none."""
    try:
        return meta_model(config)
    except Exception as error:  # sizes that do not fit one another end in exceptions of many kinds
        raise ValueError(
            f"model: got {str(model)!r}, need the config of a causal language model ({sentence(error)})"
        ) from error


def sentence(error):
    """The first sentence of what an exception says, on one line."""
    text = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {text:.200}"


def check_weights(model):
    """ValueError if a checkpoint folder lacks weights, or a file of them is damaged. Only their headers are read."""
    from safetensors import SafetensorError, safe_open

    folder = folder_of(model)
    if any(folder.glob("pytorch_model*.bin*")) and not any(folder.glob("*.safetensors*")):
        return
    try:
        files = weight_files(folder)
    except FileNotFoundError as error:
        raise ValueError(f"model: got {str(model)!r}, need a checkpoint folder with all its weights: {error}") from None
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"model: {file} is damaged or was not downloaded whole ({error})") from error


def load_tokenizer(model="base"):
    """The tokenizer of a checkpoint folder or of the built-in model, with a token to pad with.

    Raises ValueError if it cannot be read, or has no token that ends a response.
    """
    from transformers import AutoTokenizer

    path = folder_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of as many kinds as there are tokenizers
        raise ValueError(
            f"model: got {str(model)!r}, need a folder with a tokenizer, too ({sentence(error)})"
        ) from error
    known = set(tokenizer("a", add_special_tokens=False)["input_ids"])
    if known <= set(tokenizer.all_special_ids):  # some classes of transformers are empty if no file is there
        raise ValueError(f"model: got {str(model)!r}, need a folder with a tokenizer, too: the one there knows no text")
    if tokenizer.eos_token is None:
        raise ValueError(f"model: the tokenizer in {path} has no eos_token, needs one to end every response with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_data(dataset, model, sequence_length, seed=0):
    """ValueError for the first row of ``dataset`` that cannot be used, or if no row fits, to train on or held out."""
    tokenizer = load_tokenizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out is said where the rows are used
        for rows in load_data(dataset, seed):
            tokenise(tokenizer, rows[:200] if str(dataset) in TASKS else rows, sequence_length)


def chosen_modules(model, targets):
    """``{part: names of its linear layers or experts modules}`` for the parts that ``targets`` names, in the language
    model."""
    from ktlib.integrations.lora_targets import language_modules

    found, language = {part: [] for part in PARTS}, language_modules(model)
    for name, module in model.named_modules():
        if name not in language:
            continue
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


def adapter_config(model, targets="all", rank=16, alpha=32.0, lora_dropout=0.0):
    """The LoraConfig that adapts the chosen parts of a model. Raises ValueError if the model lacks one."""
    from ktlib.integrations.lora_targets import linear_layers
    from ktlib.integrations.peft_lora import lora_config

    chosen, linears = chosen_modules(model, targets), linear_layers(model, dict(model.named_modules()))
    return lora_config(
        model,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=lora_dropout,
        target_modules=[
            name for part, names in chosen.items() if part != "experts" for name in names if name in linears
        ],
        target_parameters=None if chosen.get("experts") else [],
    )


def estimate_run(parameters, model=None, timing=None):
    """The :class:`ktlib.estimate.Estimate` of a run; ``parameters`` as checked above. Reads the model's config only.

    ``print`` shows it, its ``check()`` raises MemoryError with the numbers if the run cannot fit in what is free here.
    The built-in model takes no time worth measuring this machine for: its estimate is of memory only, as with
    ``timing=False``. ``model``: the model on the meta device, if it is there already.
    """
    from ktlib.estimate import estimate

    if model is None:
        model = meta_model_of(parameters["model"], read_config(parameters["model"]))
    is_base = parameters["model"] == "base"
    names = {part: label for label, part in TARGETS.items()}
    return estimate(
        model,
        finetuning=parameters["finetuning"],
        rank=parameters["rank"],
        lora_bytes=LORA_DTYPES[parameters["lora_dtype"]].itemsize,
        targets=tuple(names[part] for part in target_parts(parameters["targets"])),
        tokens=parameters["batch_size"] * parameters["sequence_length"],
        sequence_length=parameters["sequence_length"],
        checkpointing=parameters["gradient_checkpointing"],
        gpu=device() == "cuda",
        timing=not is_base if timing is None else timing,
        stream_rows=parameters["stream_rows"],
    )


def positions(config):
    """How many tokens a row can have by a model's config; infinity if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
