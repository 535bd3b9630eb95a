"""The seam into PEFT: LoRA on routed experts reaches the operator as factors.

Stock PEFT adapts 3-D expert weights with ``LoraConfig(target_parameters=...)`` and its ``ParamWrapper``, which adds
``scaling * B @ A`` to the whole stack of experts in every forward, and computes a dense gradient of the sum in
backward. The subclass in this file passes ``(A, B, scaling)`` to the experts function instead. Parameters, names,
shapes and files stay PEFT's: adapters saved with ktlib load in stock PEFT without ktlib, and the other way round.

The operator multiplies the input by A, so that ``lora_dropout`` can drop elements of that input. Stock PEFT has no
such input and refuses configurations with dropout on expert parameters, even to load the adapter. Therefore files hold
the dropout as ``ktlib_lora_dropout``.
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

    The stock path, that of the base class, computes experts that ktlib's operator does not serve, experts with another
    experts implementation, and merged or disabled adapters. The stock path has no dropout, so that training with
    dropout is refused there. Training without dropout logs one warning if only the experts implementation keeps the
    operator from computing the experts.
    """

    def __init__(self, base_layer, adapter_name, parameter_name, config, **kwargs):
        super().__init__(base_layer, adapter_name, parameter_name, _without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def update_layer(self, adapter_name, *args, config, **kwargs):
        super().update_layer(adapter_name, *args, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _set_dropout(self, adapter_name, config):
        """Put the dropout where LoRA on a Linear has it, so that train() and eval() switch it on and off."""
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
            if kwargs.setdefault("lora_dropout", dropout) != dropout:  # the other weight's wrapper may have set it
                raise ValueError(
                    f"lora_dropout: got {dropout} on {self.parameter_name} and {kwargs['lora_dropout']} on the other "
                    "weight of the same experts, needs one for both"
                )
            kwargs[_FACTORS_ARGUMENT[self.parameter_name]] = factors
        return self.base_layer(x, *args, **kwargs)

    def factors(self):
        """``(lora_A (E*r, in), lora_B (out, r*E), scaling)`` of the active adapters, or None if none is active.

        Several active adapters are returned as one whose rank r is the sum of their ranks. All is read anew in each
        call, so that changed ranks and scalings take effect.

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
        """The active adapters' dropout probability; 0.0 in evaluation mode."""
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
        """``{adapter: (lora_A, lora_B, scaling)}``, both matrices bf16 or both fp32, as the operator needs them."""
        factors = {}
        num_experts, out_features, in_features = self._parameter_shape()
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            lora_A, lora_B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            needed = lora_layout.shapes(lora_A.shape[0] // num_experts, num_experts, out_features, in_features)
            if (lora_A.shape, lora_B.shape) != needed:
                raise ValueError(
                    f"adapter {adapter!r} of {self.parameter_name}: got lora_A {tuple(lora_A.shape)} and lora_B "
                    f"{tuple(lora_B.shape)}, needed (E*r, {in_features}) and ({out_features}, r*E) with E={num_experts}"
                )
            if lora_A.dtype != lora_B.dtype or lora_A.dtype not in (torch.bfloat16, torch.float32):
                lora_A, lora_B = lora_A.float(), lora_B.float()
            factors[adapter] = lora_A, lora_B, self.scaling[adapter]
        return factors

    def _parameter_shape(self):
        """``(experts, out, in)`` of the parameter, whether it is stored transposed or not."""
        shape = self.get_param().shape
        if len(shape) < 3:
            return 1, *shape
        return (shape[0], shape[2], shape[1]) if self.get_base_layer().is_transposed else shape

    def _not_factored(self, x):
        """Why the stock path must compute this call, in words; None if the operator can."""
        base = self.get_base_layer()
        if isinstance(base, torch.nn.Linear):
            return None
        if (implementation := base.config._experts_implementation) != IMPLEMENTATION:
            return f"the experts implementation is {implementation!r}"
        return unserved(base, x)


def _without_dropout(config):
    """A copy of the configuration without dropout, which PEFT's ``ParamWrapper`` refuses."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


@dataclasses.dataclass
class LoraConfigWithDropout(LoraConfig):
    """A LoraConfig whose ``lora_dropout`` applies to expert parameters too. Stock PEFT can load the file it writes."""

    def to_dict(self):
        return super().to_dict() | {"lora_dropout": 0.0, SAVED_DROPOUT: self.lora_dropout}


def load_lora_config(folder):
    """The LoraConfig of the adapter in ``folder``, with which its training can be continued::

        config = ktlib.load_lora_config(folder)
        model = PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)

    Expert adapters take the factored path, as with :func:`lora_config`. Stock PEFT can load the same folder: it warns
    that it ignores ``ktlib_lora_dropout`` and trains expert adapters without dropout. Inference is the same.

    Raises:
        FileNotFoundError: ``folder`` has no ``adapter_config.json``.
        ValueError: that file is damaged or does not configure a LoRA adapter; or the adapter's weights are not, or not
            certainly, in PEFT's present layout of expert parameters (see :mod:`ktlib.integrations.factor_layouts`).
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
    """The adapter layer for a target, or None for targets that PEFT wraps itself. PEFT calls this function first."""
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not _can_factor(base_layer, parameter_name):
        return None
    return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)


def factor_adapters(model):
    """Switch adapters that stock PEFT put on expert parameters of ``model`` to the factored path, in place.

    For adapters loaded with ``PeftModel.from_pretrained`` or made from a plain LoraConfig. Values, names and training
    state stay unchanged. Returns the number of adapted parameters that were switched.

    Raises:
        ValueError: an adapter's tensors are not, or not certainly, in PEFT's present layout of expert parameters,
            judged by the configuration that PEFT loaded (see :mod:`ktlib.integrations.factor_layouts`). No adapter is
            switched then.
    """
    wrappers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is StockParamWrapper and _can_factor(module.get_base_layer(), module.parameter_name)
    }
    for adapter, config in getattr(model, "peft_config", {}).items():
        shapes = {
            f"{name}.{wrapper.parameter_name}": (
                wrapper.lora_A[adapter].weight.shape,
                wrapper.lora_B[adapter].weight.shape,
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
        target_modules: layers to adapt: names or ends of names, a regular expression for full names, "all-linear"
            (all linear layers of the language model but the output head and the routers), or [] for none. Default:
            attention, shared experts and dense MLPs of the language model. An end of a name that occurs in the language
            model means the layers there only; so towers for images, video and audio are adapted only by names that the
            language model does not have.
        target_parameters: parameters to adapt: a list of names or ends of names. Default: the weights of all routed
            experts of the language model. [] for none.
        **kwargs: any other argument of LoraConfig. ``task_type`` defaults to "CAUSAL_LM" for causal language models.
            ``exclude_modules`` applies to routed experts too, by the name of the module or of the parameter.
            ``lora_dropout`` applies to all adapters, also to those of routed experts, which stock PEFT cannot do: the
            saved configuration calls it ``ktlib_lora_dropout``, see :func:`load_lora_config`.

    The returned targets are ends of names that nothing else in the model has. In most MoE models, PEFT takes
    ``gate_proj``, ``up_proj`` and ``down_proj`` in ``target_modules`` for names of the routed experts, even in
    ``shared_experts.gate_proj``, and does not adapt the shared experts. The weights of such layers are listed in
    ``target_parameters`` instead, from which stock PEFT makes adapters with the same names and shapes in files.

    Warns:
        UserWarning: transformers' own implementation will compute the experts although ktlib's was asked for, and why.

    Raises:
        TypeError, ValueError: an option is not possible with expert parameters; lora_dropout is no probability below 1;
            lora_alpha is no finite number; the model has no routed experts, or has experts outside transformers'
            experts interface; or a target is not in the model, or of a type that PEFT cannot adapt.
    """
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: got {lora_alpha!r}, needs a finite number")
    if isinstance(target_parameters, str):
        raise TypeError(f"target_parameters: got {target_parameters!r}, needs a list of names")
    modules, language = dict(bare_modules(model)), language_modules(model)
    excluded = kwargs.get("exclude_modules")
    parameters = chosen_parameters(model, modules, language, target_parameters, excluded)
    _warn_of_unserved(modules, parameters)
    chosen, expert_targets = chosen_layers(model, modules, language, target_modules)
    if target_parameters is None or target_parameters:  # the experts are among the parameters already
        expert_targets = []
    chosen = [name for name in chosen if not matches(name, excluded)]
    layer_names = unambiguous_ends(chosen, modules)
    taken = taken_by_peft(model, layer_names)
    by_parameter = [f"{end}.weight" for end in taken]

    if parameters or by_parameter:
        _refuse_options_not_for_parameters(kwargs)
        for pattern in ("rank_pattern", "alpha_pattern"):
            # PEFT looks for patterns of these layers by the name of the weight.
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
        target_modules=sorted(layer_names - taken) + expert_targets,
        target_parameters=[*parameters, *sorted(by_parameter)],
        **kwargs,
    )
    config._register_custom_module({torch.nn.Module: _wrap})
    return config


def _warn_of_unserved(modules, parameters):
    """Warn if transformers' own implementation will compute experts that are to have adapters, and say why.

    Experts that are not on the CPU give no warning: they may be pinned to the CPU before they run.
    """
    matching = by_end(f"{name}.{leaf}" for name, m in modules.items() for leaf, _ in m.named_parameters(recurse=False))
    owners = dict.fromkeys(name.rpartition(".")[0] for end in parameters for name in matching[end])
    reasons = set()
    for experts in (modules[name] for name in owners if is_experts(modules[name])):
        on_cpu = all(parameter.device.type == "cpu" for parameter in experts.parameters())
        if on_cpu and experts.config._experts_implementation == IMPLEMENTATION:
            reasons.add((type(experts).__name__, unserved(experts, torch.empty(0, dtype=torch.bfloat16))))
    for name, reason in sorted((name, reason) for name, reason in reasons if reason is not None):
        warnings.warn(
            f"{name}: transformers' own implementation will compute these experts, with adapters as a dense W + BA, "
            f"because {reason}",
            stacklevel=3,
        )


def _refuse_options_not_for_parameters(kwargs):
    """ValueError for an option of LoraConfig that does not work on expert parameters."""
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
