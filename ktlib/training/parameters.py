"""The parameters of a fine-tuning run, checked against one another, the model's config and the data.

All checks happen before a weight is read or a Jupyter kernel is started, so a run that cannot work is refused within
seconds. Checks that open no file come first. The functions of the other checks import transformers and PEFT themselves,
because these imports alone take seconds.
"""

import math
import os
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from ktlib.files.tensor_files import read_json, weight_files
from ktlib.integrations.model_classes import check_trainable, meta_model
from ktlib.integrations.transformers_experts import is_experts, unsupported
from ktlib.names import component
from ktlib.system.cpu import cpu_info
from ktlib.system.environment import device
from ktlib.system.threads import MAX_THREADS
from ktlib.training.output_dir import check_output_dir
from ktlib.training.tasks import TASKS, check_dataset, load_data, tokenise

TARGET_OF = {"self_attn": "attention", "routed_experts": "experts", "shared_experts": "shared", "dense_mlp": "dense"}
TARGETS = tuple(TARGET_OF.values())  # the names of components in the parameter targets
LORA_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FINETUNING = ("lora", "full")
DEFAULT_FOLDER = str(Path(__file__).parents[2] / "runs" / "05_full_sft")  # output_dir of notebook 05 if none is given
LARGEST = torch.finfo(torch.float32).max  # alpha and learning_rate become fp32 numbers


def target_names(targets):
    """``("attention", "experts")`` for ``"attention+experts"``; all of TARGETS for ``"all"``.

    Raises:
        ValueError: a name that is not in TARGETS, or a name that is given twice.
    """
    names = TARGETS if targets == "all" else tuple(str(targets).split("+"))
    if not set(names) <= set(TARGETS) or len(set(names)) < len(names):
        raise ValueError(f"targets: got {targets!r}, need 'all' or some of {', '.join(TARGETS)} joined by '+'")
    return names


# Each check is a function of one value. It returns None for a right value, else a text that says what is needed.


def _needs(text, is_right):
    return lambda value: None if is_right(value) else text


def _is_int_or_float(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _whole(least):
    return _needs(f"a whole number >= {least}", lambda value: _is_whole(value, least))


def _none_or_whole(most):
    return _needs(
        f"none or a whole number from 1 to {most}",
        lambda value: value is None or _is_whole(value, 1) and value <= most,
    )


def _one_of(options):
    return _needs(f"one of {', '.join(options)}", lambda value: str(value) in options)


_POSITIVE = _needs(
    f"a number > 0 and at most {LARGEST:.2g}", lambda value: _is_int_or_float(value) and 0 < value <= LARGEST
)
_SHARE = _needs("a number from 0 to below 1", lambda value: _is_int_or_float(value) and 0 <= value < 1)
_SWITCH = _needs("true or false", lambda value: isinstance(value, bool))
_PATH = _needs("a name or a path", lambda value: isinstance(value, (str, os.PathLike)) and bool(str(value)))
_SEED = _needs("a whole number below 2**32", lambda value: value < 2**32)


def _targets(value):
    target_names(value)  # raises its own ValueError


def _isa(value):
    usable = [name for name, missing in cpu_info()["isas"].items() if not missing]
    return None if value is None or value in usable else f"none or what runs on this CPU: {', '.join(usable)}"


def _parameter(default, help_text, *checks):
    return field(default=default, metadata={"help": help_text, "checks": checks})


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The parameters of a run, each with its type, default, meaning and the checks of its value alone.

    The cell tagged ``parameters`` of notebook 05 has the same names, types and defaults, except for ``output_dir``,
    which the notebook chooses. ``ktlib sft --help`` lists the parameters from here.

    Raises:
        ValueError: a value that is wrong by itself; the message names the parameter, the value and what is needed.
    """

    model: str = _parameter(
        "base",
        "base trains the built-in model; a path trains the model in this checkpoint folder, which needs routed experts "
        "and a tokenizer.",
        _PATH,
    )
    dataset: str = _parameter("dates", "The rows are those of a built-in task, or of a JSONL file.", _PATH)
    rank: int = _parameter(16, "The LoRA matrices have this rank.", _whole(1))
    alpha: float = _parameter(32.0, "LoRA's scaling is alpha / rank.", _POSITIVE)
    targets: str = _parameter(
        "all",
        f"all trains every component that the model has of {', '.join(TARGETS)}; names joined by + train only these.",
        _targets,
    )
    lora_dtype: str = _parameter("fp32", "The LoRA matrices are stored in fp32 or bf16.", _one_of(LORA_DTYPES))
    lora_dropout: float = _parameter(
        0.0, "Training sets this share of the inputs of all adapters to zero at random.", _SHARE
    )
    steps: int = _parameter(500, "Training makes this many optimizer steps.", _whole(1))
    batch_size: int = _parameter(16, "One forward pass takes this many rows.", _whole(1))
    grad_accumulation: int = _parameter(1, "One optimizer step takes this many forward passes.", _whole(1))
    sequence_length: int = _parameter(128, "Rows with more tokens than this are left out.", _whole(8))
    learning_rate: float = _parameter(
        3e-3, "The learning rate is highest after the warm-up, and then has this value.", _POSITIVE
    )
    seed: int = _parameter(
        0, "The seed decides the split of the data, the adapters' first values and the order of rows.", _whole(0), _SEED
    )
    gradient_checkpointing: bool = _parameter(
        False, "Backward computes activations again instead of reading saved ones, which takes less memory.", _SWITCH
    )
    output_dir: str = _parameter(
        "runs/sft", "This folder gets the adapter, and holds checkpoints while the run lasts.", _PATH
    )
    isa: str | None = _parameter(
        None,
        "The experts' kernels use this instruction set; none means KTLIB_ISA if it is set, else the fastest.",
        _isa,
    )
    finetuning: str = _parameter(
        "lora",
        "lora trains adapters; full trains the weights of the targets themselves, in bf16, and then rank and alpha "
        "mean nothing.",
        _one_of(FINETUNING),
    )
    torch_threads: int | None = _parameter(
        None,
        "Stock torch works on this many threads, and rounds differently on another number; none means a number that "
        "depends on the model's size.",
        _none_or_whole(MAX_THREADS),
    )
    stream_rows: int | None = _parameter(
        None,
        "If there is a GPU, it computes every expert that gets at least this many rows of a batch; none computes all "
        "experts on the CPU.",
        _none_or_whole(2**31 - 1),
    )

    def __post_init__(self):
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            for check in parameter.metadata["checks"]:
                if (needed := check(value)) is not None:
                    raise ValueError(f"{parameter.name}: got {value!r}, need {needed}")


def check_parameters(**parameters):
    """The :class:`Parameters` of a run as a dict, all values checked before anything slow happens.

    Raises:
        ValueError: a value is wrong by itself, or does not fit the other parameters, the machine, the model's config,
            its tokenizer or the data; or ``output_dir`` is not a folder and cannot be made, or holds a model, an
            adapter, checkpoints or results that ktlib did not write. The message names the parameter, the value and
            what is needed.
        MemoryError: the run cannot fit in the free memory; the message gives the numbers.
    """
    checked = Parameters(**parameters)
    given = asdict(checked)

    def need(is_right, name, needed):
        if not is_right:
            raise ValueError(f"{name}: got {given[name]!r}, need {needed}")

    need(checked.finetuning == "lora" or not checked.lora_dropout, "lora_dropout", "0 with finetuning='full'")
    need(checked.finetuning == "lora" or not checked.stream_rows, "stream_rows", "none with finetuning='full'")
    check_folder(checked.model)
    check_dataset(checked.dataset)
    check_output_dir(checked.output_dir, folder_of(checked.model))
    check_model(given)
    check_data(checked.dataset, checked.model, checked.sequence_length, checked.seed)
    return given


def check_notebook(*, output_dir, **parameters):
    """:func:`check_parameters` for the parameters of notebook 05, where ``output_dir`` None means DEFAULT_FOLDER."""
    return check_parameters(**parameters, output_dir=DEFAULT_FOLDER if output_dir is None else output_dir)


def other_than_default(parameters):
    """Names of the parameters that decide what is learnt and differ from their defaults in the dict ``parameters``."""
    circumstances = {"output_dir", "isa", "torch_threads", "stream_rows", "gradient_checkpointing"}
    defaults = {field.name: field.default for field in fields(Parameters) if field.name not in circumstances}
    return [name for name, default in defaults.items() if parameters[name] != default]


def folder_of(model):
    """The checkpoint folder that the parameter ``model`` stands for."""
    from ktlib.assets import BASE

    return BASE if model == "base" else Path(model)


def check_folder(model):
    """ValueError if ``model`` is neither "base" nor a folder that holds a model's config and no adapter."""
    if model == "base":
        return
    is_model, adapter = (Path(model) / "config.json").is_file(), Path(model) / "adapter_config.json"
    if is_model and adapter.is_file():
        raise ValueError(
            f"model: got {str(model)!r}, which holds an adapter beside the model, need a folder without: transformers "
            "would load both together"
        )
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"model: got {str(model)!r}, which holds an adapter of {base}, need a checkpoint folder with a "
            f"config.json: `ktlib merge {model} OUT --base DIR` merges it into its model, to train on top of it"
        )
    if not is_model:
        raise ValueError(
            f"model: got {model!r}, need 'base' or a checkpoint folder with a config.json (nothing is downloaded here: "
            "`hf download NAME --local-dir FOLDER` brings a model of the hub)"
        )


def check_model(parameters):
    """The checks of a run that need the model's config, the quickest first. No weight is read.

    ``parameters`` are those that :func:`check_parameters` returns, and the errors are those that it raises.
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
        cause = f"{name}'s routed experts run in transformers, not in ktlib ({reason})"
        if parameters["lora_dropout"] and "experts" in target_names(parameters["targets"]):
            raise ValueError(
                f"lora_dropout: got {parameters['lora_dropout']}, need 0: {cause}, whose adapters have no dropout there"
            )
        if device() == "cuda":
            raise ValueError(f"model: got {str(model)!r}, need a model for ktlib's operator, or no GPU: {cause}")
        warnings.warn(f"model: {cause}", stacklevel=3)
    estimated = estimate_run(parameters, empty, timing=False)
    try:
        estimated.check()
    except MemoryError as error:
        raise MemoryError(
            f"batch_size: got {parameters['batch_size']} rows of {parameters['sequence_length']} tokens, for which the "
            f"training of {name} {error}; needs fewer, or another model"
        ) from None
    if parameters["finetuning"] == "lora":
        from ktlib.conversion.write import adapted_in_silence, rename_for_peft

        with torch.device("meta"):
            lora = {name: parameters[name] for name in ("rank", "alpha", "lora_dropout")}
            rename_for_peft(adapted_in_silence(empty, adapter_config(empty, parameters["targets"], **lora)))
    check_weights(model)


def read_config(model):
    """The transformers config in a checkpoint folder; ValueError in one sentence if it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder_of(model), trust_remote_code=False)
    except Exception as error:  # a damaged config raises errors of many types
        raise ValueError(
            f"model: got {str(model)!r}, need one whose config.json transformers can read ({sentence(error)})"
        ) from error


def meta_model_of(model, config):
    """The model of a config on the meta device; ValueError in one sentence if it cannot be built."""
    try:
        return meta_model(config)
    except Exception as error:  # sizes that contradict one another raise errors of many types
        raise ValueError(
            f"model: got {str(model)!r}, need the config of a causal language model ({sentence(error)})"
        ) from error


def sentence(error):
    """The type of an exception and the first sentence of its message, on one line."""
    text = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {text:.200}"


def check_weights(model):
    """ValueError if weights are missing in a checkpoint folder or a weight file is damaged. Only headers are read."""
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
    """The tokenizer of a checkpoint folder or of the built-in model; its end token pads if it has no padding token.

    Raises:
        ValueError: the tokenizer cannot be read, or has no end token.
    """
    from transformers import AutoTokenizer

    path = folder_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each tokenizer class raises errors of its own
        raise ValueError(
            f"model: got {str(model)!r}, need a folder with a tokenizer, too ({sentence(error)})"
        ) from error
    known = set(tokenizer("a", add_special_tokens=False)["input_ids"])
    if known <= set(tokenizer.all_special_ids):  # some tokenizer classes load without a file, with an empty vocabulary
        raise ValueError(
            f"model: got {str(model)!r}, need a folder with a tokenizer, too: the tokenizer in it has no words"
        )
    if tokenizer.eos_token is None:
        raise ValueError(f"model: the tokenizer in {path} has no eos_token, needs one to end every response with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_data(dataset, model, sequence_length, seed=0):
    """ValueError if a row of ``dataset`` cannot be used, or if no training row or no test row is short enough."""
    tokenizer = load_tokenizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training and evaluation warn of rows that are left out
        for rows in load_data(dataset, seed):
            tokenise(tokenizer, rows[:200] if str(dataset) in TASKS else rows, sequence_length)


def chosen_modules(model, targets):
    """``{target: names of its linear layers or experts modules}`` in the language model, for the chosen targets.

    Raises:
        ValueError: the model has no module of a target that ``targets`` names.
    """
    from ktlib.integrations.lora_targets import language_modules

    found, language = {target: [] for target in TARGETS}, language_modules(model)
    for name, module in model.named_modules():
        if name not in language:
            continue
        target = TARGET_OF.get(component(name))
        if isinstance(module, torch.nn.Linear) and target:
            found[target].append(name)
        elif is_experts(module):
            found["experts"].append(name)
    chosen = target_names(targets)
    if targets != "all" and (missing := [target for target in chosen if not found[target]]):
        present = ", ".join(target for target in found if found[target])
        raise ValueError(f"targets: got {targets!r}, but {type(model).__name__} has no {missing[0]}; it has {present}")
    return {target: found[target] for target in chosen}


def adapter_config(model, targets="all", rank=16, alpha=32.0, lora_dropout=0.0):
    """The LoraConfig that adapts the chosen targets of a model. Raises ValueError if the model lacks one of them."""
    from ktlib.integrations.lora_targets import linear_layers
    from ktlib.integrations.peft_lora import lora_config

    chosen, linears = chosen_modules(model, targets), linear_layers(model, dict(model.named_modules()))
    return lora_config(
        model,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=lora_dropout,
        target_modules=[
            name for target, names in chosen.items() if target != "experts" for name in names if name in linears
        ],
        target_parameters=None if chosen.get("experts") else [],
    )


def estimate_run(parameters, model=None, timing=None):
    """The :class:`ktlib.estimate.Estimate` of a run from its checked parameters and the model's config.

    Args:
        parameters: as :func:`check_parameters` returns them.
        model: the model on the meta device, if the caller has it already.
        timing: whether to estimate seconds, too, which measures this machine for about a second. Default: for every
            model but the built-in one.
    """
    from ktlib.estimate import estimate

    if model is None:
        model = meta_model_of(parameters["model"], read_config(parameters["model"]))
    components = {target: component for component, target in TARGET_OF.items()}
    return estimate(
        model,
        finetuning=parameters["finetuning"],
        rank=parameters["rank"],
        lora_bytes=LORA_DTYPES[parameters["lora_dtype"]].itemsize,
        targets=tuple(components[target] for target in target_names(parameters["targets"])),
        tokens=parameters["batch_size"] * parameters["sequence_length"],
        sequence_length=parameters["sequence_length"],
        checkpointing=parameters["gradient_checkpointing"],
        gpu=device() == "cuda",
        timing=parameters["model"] != "base" if timing is None else timing,
        stream_rows=parameters["stream_rows"],
        folder=folder_of(parameters["model"]),
    )


def positions(config):
    """The largest number of tokens in a row that a model's config allows; infinity if it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
