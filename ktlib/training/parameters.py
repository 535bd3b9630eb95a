"""The parameters of a fine-tuning run, checked against one another, the model's config and the data.

Everything here happens before a weight is read or a Jupyter kernel is started: a run that cannot work is refused within
seconds. What needs a file to be opened comes after what does not, and transformers and PEFT are imported only then.
"""

import math
import os
import warnings
from dataclasses import asdict, dataclass, field, fields
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


def is_number(value):
    """Whether a value is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value, least):
    """Whether a value is an int, and at least so large."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# Checks of one value: each returns a function from the value to what is needed instead, None if the value is right.


def _needs(what, is_right):
    return lambda value: None if is_right(value) else what


def _whole(least):
    return _needs(f"a whole number >= {least}", lambda value: is_whole(value, least))


def _none_or_whole(most):
    return _needs(
        f"none or a whole number from 1 to {most}", lambda value: value is None or is_whole(value, 1) and value <= most
    )


def _one_of(options):
    return _needs(f"one of {', '.join(options)}", lambda value: str(value) in options)


_POSITIVE = _needs(f"a number > 0 and at most {LARGEST:.2g}", lambda value: is_number(value) and 0 < value <= LARGEST)
_SHARE = _needs("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1)
_SWITCH = _needs("true or false", lambda value: isinstance(value, bool))
_PATH = _needs("a name or a path", lambda value: isinstance(value, (str, os.PathLike)) and bool(str(value)))
_SEED = _needs("a whole number below 2**32", lambda value: value < 2**32)


def _targets(value):
    return target_parts(value) and None


def _isa(value):
    usable = [name for name, missing in cpu_info()["isas"].items() if not missing]
    return None if value is None or value in usable else f"none or what runs on this CPU: {', '.join(usable)}"


def _parameter(default, help_text, *checks):
    return field(default=default, metadata={"help": help_text, "checks": checks})


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The parameters of a run: type, default, what each is for, and what is needed of its value alone.

    The cell tagged ``parameters`` of notebook 05 has the same names, types and defaults (but for ``output_dir``, which
    the notebook chooses), and ``ktlib sft --help`` lists them from here.

    Raises:
        ValueError: a value that is wrong by itself; the message names the parameter, the value and what is needed.
    """

    model: str = _parameter(
        "base", "base (the built-in model), or the folder of a checkpoint with routed experts and a tokenizer", _PATH
    )
    dataset: str = _parameter("dates", "a built-in task, or a JSONL file with prompt and response", _PATH)
    rank: int = _parameter(16, "of the LoRA matrices", _whole(1))
    alpha: float = _parameter(32.0, "LoRA's scaling is alpha / rank", _POSITIVE)
    targets: str = _parameter(
        "all", f"what is trained: all that the model has, or some of {', '.join(PARTS)} joined by +", _targets
    )
    lora_dtype: str = _parameter("fp32", "of the LoRA matrices: fp32 or bf16", _one_of(LORA_DTYPES))
    lora_dropout: float = _parameter(0.0, "the share of all adapters' inputs that training drops", _SHARE)
    steps: int = _parameter(500, "of the optimizer", _whole(1))
    batch_size: int = _parameter(16, "rows in a forward pass", _whole(1))
    grad_accumulation: int = _parameter(1, "forward passes in a step", _whole(1))
    sequence_length: int = _parameter(128, "tokens of a row at most; longer rows are left out", _whole(8))
    learning_rate: float = _parameter(3e-3, "at its highest, after the warm-up", _POSITIVE)
    seed: int = _parameter(0, "the same seed gives the same adapter", _whole(0), _SEED)
    gradient_checkpointing: bool = _parameter(False, "compute activations again in backward, for less memory", _SWITCH)
    output_dir: str = _parameter("runs/sft", "gets the adapter, and checkpoints while the run lasts", _PATH)
    isa: str | None = _parameter(None, "the instruction set of the experts; none: KTLIB_ISA, or the fastest", _isa)
    finetuning: str = _parameter(
        "lora", "lora, or full: the weights of the targets themselves, in bf16", _one_of(FINETUNING)
    )
    torch_threads: int | None = _parameter(
        None, "threads of stock torch, which its rounding depends on; none: by the model's size", _none_or_whole(MOST)
    )
    stream_rows: int | None = _parameter(
        None,
        "experts with so many rows in a batch are computed on the GPU; none: on the CPU",
        _none_or_whole(2**31 - 1),
    )

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            for check in one.metadata["checks"]:
                if (needed := check(value)) is not None:
                    raise ValueError(f"{one.name}: got {value!r}, need {needed}")


def check_parameters(**parameters):
    """:class:`Parameters` of a run as a dict, checked before anything heavy happens.

    Raises:
        ValueError: a value that is wrong by itself, or does not fit the others, the machine, the model's config, its
            tokenizer or the data; or ``output_dir`` is not a folder that exists or can be made, or it holds a model,
            an adapter, checkpoints or results that ktlib did not write. The message names the parameter, the value
            and what is needed.
        MemoryError: the run cannot fit in the memory that is free; with the numbers.
    """
    checked = Parameters(**parameters)
    given = asdict(checked)

    def need(good, name, what):
        if not good:
            raise ValueError(f"{name}: got {given[name]!r}, need {what}")

    need(checked.finetuning == "lora" or not checked.lora_dropout, "lora_dropout", "0 with finetuning='full'")
    need(checked.finetuning == "lora" or not checked.stream_rows, "stream_rows", "none with finetuning='full'")
    check_folder(checked.model)
    is_data = str(checked.dataset) in TASKS or Path(checked.dataset).is_file()
    need(is_data, "dataset", f"one of {', '.join(TASKS)} or a JSONL file")
    check_output_dir(checked.output_dir, folder_of(checked.model))
    check_model(given)
    check_data(checked.dataset, checked.model, checked.sequence_length, checked.seed)
    return given


def check_notebook(*, output_dir, **parameters):
    """:func:`check_parameters` for the parameters of notebook 05: ``output_dir`` None is the folder that it chooses."""
    return check_parameters(**parameters, output_dir=DEFAULT_FOLDER if output_dir is None else output_dir)


def other_than_default(parameters):
    """Names of the parameters that decide what is learnt and have other values than their defaults."""
    defaults = {one.name: one.default for one in fields(Parameters)}
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
