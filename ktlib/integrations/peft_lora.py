"""The seam into PEFT: LoRA on routed experts reaches the operator as factors.

Stock PEFT adapts 3-D expert weights with ``LoraConfig(target_parameters=...)`` and its ``ParamWrapper``, which adds
``scaling * B @ A`` to the whole stack of experts at every forward and takes a dense gradient of it in backward. The
subclass here hands ``(A, B, scaling)`` to the experts function instead. Parameters, names, shapes and files are
PEFT's own: adapters saved here load in stock PEFT without ktlib, and stock adapters load here.

With factors there is a LoRA input to drop from, so ``lora_dropout`` works on experts too. Stock PEFT refuses a
configuration that asks for it there, even to load the adapter: it is saved under a name of its own.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

from ktlib.files import tensor_files
from ktlib.integrations.factor_layouts import expert_factors, refuse_other_layouts
from ktlib.integrations.lora_targets import (
    chosen_layers,
    chosen_parameters,
    language_modules,
    taken_by_peft,
    unambiguous_ends,
)
from ktlib.integrations.peft_settings import ADAPTER_FILE, CONFIG, SAVED_DROPOUT, by_end, matches, read_settings
from ktlib.integrations.transformers_experts import IMPLEMENTATION, is_experts, unserved, warn_once
from ktlib.names import bare_modules
from ktlib.operator.checks import check_probability
from ktlib.reference import lora_layout

_FACTORS_ARGUMENT = {"gate_up_proj": "gate_up_lora", "down_proj": "down_lora"}


class ParamWrapper(StockParamWrapper):  # PEFT compares the class name
    """LoRA on one parameter of an experts module (or on the weight of a Linear) without building ``W + BA``.

    Whatever it cannot factor (experts that ktlib's operator does not serve, another experts implementation, merged or
    disabled adapters) takes the stock path of its base class. That has no dropout: in training with it, it is refused;
    in training without, a warning says once if the experts implementation alone is in the way.
    """

    def __init__(self, base_layer, adapter_name, parameter_name, config, **kwargs):
        super().__init__(base_layer, adapter_name, parameter_name, _without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def update_layer(self, adapter_name, *args, config, **kwargs):
        super().update_layer(adapter_name, *args, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _set_dropout(self, adapter_name, config):
        """Where LoRA on a Linear has it, so that train() and eval() switch it."""
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = torch.nn.Dropout(config.lora_dropout)

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if (reason := self._not_factored(x)) is not None:
            if dropout := self._expert_dropout():
                raise RuntimeError(
                    f"lora_dropout: {dropout} on {self.parameter_name} needs ktlib's operator, but {reason}; without "
                    "dropout (lora_dropout=0, or model.eval()) these adapters work"
                )
            if self.training and unserved(self.get_base_layer(), x) is None:
                warn_once(
                    self.get_base_layer(),
                    f"LoRA adds a dense W + BA, because {reason}; model.set_experts_implementation({IMPLEMENTATION!r}) "
                    "trains the factors alone",
                )
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        if isinstance(self.get_base_layer(), torch.nn.Linear):
            base = result = self.base_layer(x, *args, **kwargs)
            for adapter, (lora_A, lora_B, scaling) in self._active_factors().items():
                dropped = self.lora_dropout[adapter](self._cast_input_dtype(x, lora_A.dtype))
                result = result + F.linear(F.linear(dropped, lora_A), lora_B) * scaling
            return result.to(base.dtype)
        factors, dropout = self.factors(), self._expert_dropout()
        if factors is not None:
            if kwargs.setdefault("lora_dropout", dropout) != dropout:  # the wrapper around this one has put it there
                raise ValueError(
                    f"lora_dropout: got {dropout} on {self.parameter_name} and {kwargs['lora_dropout']} on the other "
                    "weight of the same experts, needs one for both"
                )
            kwargs[_FACTORS_ARGUMENT[self.parameter_name]] = factors
        return self.base_layer(x, *args, **kwargs)

    def factors(self):
        """``(lora_A (E*r, in), lora_B (out, r*E), scaling)`` of the active adapters, or None without any.

        Several adapters are one of the summed rank. Ranks and scalings are read from the tensors and settings of this
        moment.

        Raises:
            ValueError: a factor's shape does not fit the parameter.
        """
        factors = list(self._active_factors().values())
        if len(factors) <= 1:
            return factors[0] if factors else None
        num_experts = self.get_param().shape[0]
        lora_A = [lora_layout.split_a(lora_A.float(), num_experts) for lora_A, _, _ in factors]
        lora_B = [lora_layout.split_b(lora_B.float(), num_experts) * scaling for _, lora_B, scaling in factors]
        return lora_layout.stack_a(torch.cat(lora_A, dim=1)), lora_layout.stack_b(torch.cat(lora_B, dim=2)), 1.0

    def _expert_dropout(self):
        """The probability that training drops an element with; 0.0 in evaluation, and on the weight of a Linear."""
        active = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        layers = [self.lora_dropout[adapter] for adapter in active if self.lora_dropout[adapter].training]
        dropout = max([0.0, *(layer.p for layer in layers if isinstance(layer, torch.nn.Dropout))])
        if dropout and len(active) > 1:
            raise ValueError(
                f"lora_dropout: got {dropout} with adapters {', '.join(active)} active at once, which would drop the "
                "same elements; needs one active adapter, or 0"
            )
        return dropout

    def _active_factors(self):
        factors = {}
        num_experts, out_features, in_features = self._parameter_shape()
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            lora_A, lora_B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            wanted = lora_layout.shapes(lora_A.shape[0] // num_experts, num_experts, out_features, in_features)
            if (lora_A.shape, lora_B.shape) != wanted:
                raise ValueError(
                    f"adapter {adapter!r} of {self.parameter_name}: got lora_A {tuple(lora_A.shape)} and lora_B "
                    f"{tuple(lora_B.shape)}, needed (E*r, {in_features}) and ({out_features}, r*E) with E={num_experts}"
                )
            if lora_A.dtype != lora_B.dtype or lora_A.dtype not in (torch.bfloat16, torch.float32):
                lora_A, lora_B = lora_A.float(), lora_B.float()
            factors[adapter] = lora_A, lora_B, self.scaling[adapter]
        return factors

    def _parameter_shape(self):
        """``(experts, out, in)``, however the parameter is stored."""
        shape = self.get_param().shape
        if len(shape) < 3:
            return 1, *shape
        return (shape[0], shape[2], shape[1]) if self.get_base_layer().is_transposed else shape

    def _not_factored(self, x):
        """Why the stock path has to be taken, in words; None if the factored one can."""
        base = self.get_base_layer()
        if isinstance(base, torch.nn.Linear):
            return None
        if (implementation := base.config._experts_implementation) != IMPLEMENTATION:
            return f"the experts implementation is {implementation!r}"
        return unserved(base, x)


def _without_dropout(config):
    """The same configuration as PEFT's own class for parameters accepts it."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


@dataclasses.dataclass
class LoraConfigWithDropout(LoraConfig):
    """A LoraConfig with ``lora_dropout`` on expert parameters too. Its file is one that stock PEFT loads."""

    def to_dict(self):
        return super().to_dict() | {"lora_dropout": 0.0, SAVED_DROPOUT: self.lora_dropout}


def load_lora_config(folder):
    """The LoraConfig of the adapter in ``folder``, for going on with its training::

        config = ktlib.load_lora_config(folder)
        model = PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)

    Stock PEFT reads the same file without the dropout of expert adapters, and says with a warning that it ignores
    ``ktlib_lora_dropout``: for everything but further training that makes no difference. Expert adapters take the
    factored path, as with :func:`lora_config`.

    Raises:
        FileNotFoundError: no ``adapter_config.json`` there.
        ValueError: that file is damaged, or not the configuration of a LoRA adapter; the weights beside it are not, or
            not certainly, in the layout that PEFT has now for expert parameters (see
            :mod:`ktlib.integrations.factor_layouts`).
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"folder: {file} is not there")
    settings = read_settings(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"folder: peft_type of the adapter in {folder} is {settings.get('peft_type')!r}, needs 'LORA'")
    if (weights := Path(folder) / ADAPTER_FILE).is_file():
        refuse_other_layouts(settings, expert_factors(tensor_files.read(weights), settings), file)
    dropout = settings.pop(SAVED_DROPOUT, None)
    config = LoraConfig.from_peft_type(**settings)
    if dropout is not None:
        check_probability(SAVED_DROPOUT, dropout)
        config.__class__, config.lora_dropout = LoraConfigWithDropout, dropout
    config._register_custom_module({torch.nn.Module: _wrap})
    return config


def _can_factor(base_layer, parameter_name):
    if is_experts(base_layer):
        return parameter_name in _FACTORS_ARGUMENT
    return type(base_layer) is torch.nn.Linear and parameter_name == "weight"


def _wrap(target, adapter_name, config, parameter_name=None, **kwargs):
    """PEFT asks this before its own dispatchers; None leaves the target to them."""
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not _can_factor(base_layer, parameter_name):
        return None
    return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)


def factor_adapters(model):
    """Switch adapters that stock PEFT put on expert parameters of ``model`` to the factored path, in place.

    For adapters loaded with ``PeftModel.from_pretrained`` or made from a plain LoraConfig. Values, names and training
    state stay as they are. Returns the number of wrappers switched.

    Raises:
        ValueError: what PEFT keeps of an adapter's file says that its tensors are not, or not certainly, in the layout
            that PEFT has now for expert parameters (see :mod:`ktlib.integrations.factor_layouts`); nothing is switched.
    """
    wrappers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is StockParamWrapper and _can_factor(module.get_base_layer(), module.parameter_name)
    }
    for adapter, config in getattr(model, "peft_config", {}).items():
        shapes = {
            f"{name}.{wrapper.parameter_name}": tuple(
                of[adapter].weight.shape for of in (wrapper.lora_A, wrapper.lora_B)
            )
            for name, wrapper in wrappers.items()
            if wrapper.num_experts > 1 and adapter in wrapper.lora_A
        }
        refuse_other_layouts(config.to_dict(), shapes, f"adapter {adapter}")
    for module in wrappers.values():
        module.__class__ = ParamWrapper
    for config in getattr(model, "peft_config", {}).values():
        config._register_custom_module({torch.nn.Module: _wrap})
    return len(wrappers)


def lora_config(model, r=8, lora_alpha=16, target_modules=None, target_parameters=None, **kwargs):
    """A stock ``LoraConfig`` for a Mixture-of-Experts model whose expert adapters take the factored path.

    Args:
        model: the transformers model to adapt (with or without adapters).
        r, lora_alpha: rank per expert and per linear layer, and alpha, as in LoraConfig.
        target_modules: layers to adapt: names or ends of names, a regular expression for whole names, "all-linear"
            (all linear layers of the language model but the output head and the routers), or [] for none. Default:
            attention, shared experts and dense MLPs of the language model. Towers for images, video and audio are
            left alone unless they are named: an end of a name that the language model has means its layers alone.
        target_parameters: parameters to adapt: a list of names or ends of names. Default: the weights of all routed
            experts of the language model. [] for none.
        **kwargs: any other argument of LoraConfig. ``task_type`` defaults to "CAUSAL_LM" for such models.
            ``exclude_modules`` is for routed experts too, by the name of the module or of the parameter.
            ``lora_dropout`` is for all adapters, those of routed experts included, which stock PEFT cannot do: the
            saved configuration calls it ``ktlib_lora_dropout``, see :func:`load_lora_config`.

    The targets come out spelled as PEFT needs them, as ends of names that nothing else in the model has. PEFT takes
    ``gate_proj``, ``up_proj`` and ``down_proj`` in ``target_modules`` of most MoE models for names of the routed
    experts, even for ``shared_experts.gate_proj``, and leaves the shared experts alone. Such layers are listed in
    ``target_parameters`` by their weight, which stock PEFT adapts and stores the same way.

    Warns:
        UserWarning: transformers' own implementation will compute the experts although ktlib's was asked for, and why.

    Raises:
        TypeError, ValueError: an option that expert parameters cannot have, a lora_dropout that is no probability below
            1, a lora_alpha that is no finite number, no routed experts or some that compute themselves, or a target
            that is not in the model or that PEFT cannot adapt, with its type.
    """
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: got {lora_alpha!r}, needs a finite number")
    if isinstance(target_parameters, str):
        raise TypeError(f"target_parameters: got {target_parameters!r}, needs a list of names")
    modules, language = dict(bare_modules(model)), language_modules(model)
    excluded = kwargs.get("exclude_modules")
    parameters = chosen_parameters(model, modules, language, target_parameters, excluded)
    _warn_of_unserved(modules, parameters)
    chosen, names_of_experts = chosen_layers(model, modules, language, target_modules)
    if target_parameters is None or target_parameters:  # which says it already
        names_of_experts = []
    chosen = [name for name in chosen if not matches(name, excluded)]
    layer_names = unambiguous_ends(chosen, modules)
    taken = taken_by_peft(model, layer_names)
    by_parameter = [f"{end}.weight" for end in taken]

    if parameters or by_parameter:
        _refuse_what_parameters_cannot_have(kwargs)
        for pattern in ("rank_pattern", "alpha_pattern"):
            # a pattern for one of these layers has to name its weight
            for key in list(kwargs.get(pattern) or {}):
                if any(matches(name, rf"(.*\.)?({key})") for name in chosen if matches(name, taken)):
                    kwargs[pattern] = {**kwargs[pattern], rf"{key}\.weight": kwargs[pattern][key]}
    check_probability("lora_dropout", kwargs.get("lora_dropout", 0.0))
    with_dropout = kwargs.get("lora_dropout") and (parameters or by_parameter)
    if type(model).__name__.endswith("ForCausalLM"):
        kwargs.setdefault("task_type", "CAUSAL_LM")
    config = (LoraConfigWithDropout if with_dropout else LoraConfig)(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=sorted(layer_names - taken) + names_of_experts,
        target_parameters=[*parameters, *sorted(by_parameter)],
        **kwargs,
    )
    config._register_custom_module({torch.nn.Module: _wrap})
    return config


def _warn_of_unserved(modules, parameters):
    """Say at once if transformers' own implementation will compute experts that are to have adapters, and why.

    Experts that are not on the CPU are passed over: they may be pinned there before they run.
    """
    adapted = by_end(f"{name}.{own}" for name, m in modules.items() for own, _ in m.named_parameters(recurse=False))
    owners = dict.fromkeys(name.rpartition(".")[0] for end in parameters for name in adapted[end])
    reasons = set()
    for experts in (modules[name] for name in owners if is_experts(modules[name])):
        on_cpu = all(parameter.device.type == "cpu" for parameter in experts.parameters())
        if on_cpu and experts.config._experts_implementation == IMPLEMENTATION:
            reasons.add((type(experts).__name__, unserved(experts, torch.empty(0, dtype=torch.bfloat16))))
    for kind, reason in sorted((kind, reason) for kind, reason in reasons if reason is not None):
        warnings.warn(
            f"{kind}: transformers' own implementation will compute these experts, with adapters as a dense W + BA, "
            f"because {reason}",
            stacklevel=3,
        )


def _refuse_what_parameters_cannot_have(kwargs):
    reasons = {
        "use_dora": "PEFT has no DoRA for parameters",
        "lora_bias": "expert adapters have no bias",
        "fan_in_fan_out": "expert weights say themselves whether they are transposed",
        "layers_to_transform": "PEFT does not apply it to target_parameters; list target_parameters of those layers",
    }
    for option, reason in reasons.items():
        if kwargs.get(option):
            raise ValueError(f"{option}: got {kwargs[option]!r}, not possible with LoRA on expert parameters: {reason}")
    if kwargs.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights: got {kwargs['init_lora_weights']!r}, expert parameters need True, False or 'gaussian'"
        )


@contextlib.contextmanager
def adapter_dtype_kept(model):
    """Let a Trainer that resumes load bf16 adapters as bf16: PEFT's ``load_adapter`` makes them fp32 by default."""
    model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)
    try:
        yield
    finally:
        del model.load_adapter
