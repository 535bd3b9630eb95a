"""Names given to ``lora_config``: which layers they mean, and what is refused or warned of."""

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from support.families import _DECORATED, discover
from support.family_models import adapted, model_classes, tiny_model
from support.models import random_adapter, tokens

from ktlib.integrations.peft_lora import lora_config

GEMMA, GLM = ("gemma4", "Gemma4ForConditionalGeneration"), ("glm4v_moe", "Glm4vMoeForConditionalGeneration")
INKLING = ("inkling2", "Inkling2ForCausalLM")
TOWER_Q = "model.vision_tower.encoder.layers.0.self_attn.q_proj"


def with_layers(case, targets):
    """A model of this family and class with LoRA on these layers alone."""
    model = tiny_model(*case)
    return get_peft_model(model, lora_config(model, r=2, target_modules=targets, target_parameters=[]))


@pytest.mark.parametrize(
    "targets, leaves",
    [
        (["q_proj", "o_proj"], "qo"),
        (r".*language_model.*\.[qo]_proj", "qo"),
        ([f"language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)], "q"),
    ],
)
def test_names_that_a_tower_has_too_are_those_of_the_language_model(targets, leaves):
    """Gemma-4's towers have wrappers of these names, which PEFT cannot adapt."""
    wanted = {f"model.language_model.layers.{i}.self_attn.{leaf}_proj" for i in (0, 1) for leaf in leaves}
    assert set(adapted(with_layers(GEMMA, targets))) == wanted


def test_a_tower_is_adapted_if_it_is_named():
    targets = ["model.language_model.layers.0.self_attn.q_proj", f"{TOWER_Q}.linear"]
    assert set(adapted(with_layers(GEMMA, targets))) == set(targets)
    both = adapted(with_layers(GLM, r".*(language_model|visual).*\.(o_proj|qkv)"))
    assert {name.split(".")[1] for name in both} == {"language_model", "visual"}


@pytest.mark.parametrize(
    "case, targets, message",
    [
        (GEMMA, [TOWER_Q], rf"{TOWER_Q} is a Gemma4ClippableLinear, .* but {TOWER_Q}\.linear in it is a Linear"),
        (GEMMA, r".*\.q_proj", rf"{TOWER_Q} is a Gemma4ClippableLinear"),
        (GEMMA, ["model.vision_tower"], "model.vision_tower is a Gemma4VisionModel"),
        (INKLING, ["k_proj"], r"k_proj is a Inkling2\w+, .*k_proj.linear in it is a Linear"),
        (("deepseek_v4", "DeepseekV4ForCausalLM"), ["o_a_proj"], "o_a_proj is a DeepseekV4GroupedLinear"),
        (("deepseek_v3", "DeepseekV3ForCausalLM"), ["mlp.gate"], "mlp.gate is a DeepseekV3TopkRouter"),
    ],
)
def test_what_peft_cannot_adapt_is_refused_with_its_name_and_type(case, targets, message):
    if case[0] not in {family for family, _ in discover()}:
        pytest.skip("this transformers does not have the family")
    with pytest.raises(ValueError, match=f"target_modules: got .*, needs layers that can be adapted; .*{message}"):
        lora_config(tiny_model(*case), target_modules=targets)


@pytest.mark.parametrize("pattern", [r".*language_model.*", r".*\.self_attn\..*", r".*\.mlp\..*"])
def test_patterns_may_match_blocks_norms_routers_and_experts_beside_layers(pattern):
    linears = {name for name, m in tiny_model(*GLM).named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(adapted(with_layers(GLM, pattern))) == {name for name in linears if re.fullmatch(pattern, name)}


def test_an_end_that_a_convolution_or_an_embedding_has_too_is_made_longer():
    model = torch.nn.Module()
    model.a, model.b, model.c = (torch.nn.ModuleDict() for _ in range(3))
    model.a["proj"], model.b["proj"], model.c["proj"] = (
        torch.nn.Linear(4, 4), torch.nn.Conv1d(4, 4, 1), torch.nn.Embedding(4, 4)
    )  # fmt: skip
    model.a["deep"] = torch.nn.ModuleDict({"b": torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})})
    config = lora_config(model, target_modules=["proj"], target_parameters=[])
    assert config.target_modules == {"a.proj", "deep.b.proj"}
    # the whole name "b.proj" is the end of another
    with pytest.raises(ValueError, match="b.proj: PEFT cannot adapt it without a.deep.b.proj"):
        lora_config(model, target_modules=r"b\.proj", target_parameters=[])


def test_experts_that_only_images_reach_have_adapters_if_they_are_named():
    model = tiny_model("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration")
    routed = [name for name in lora_config(model).target_parameters if "shared" not in name]
    assert routed == ["mlp.text_moe.experts.down_proj", "mlp.text_moe.experts.gate_up_proj"]
    named = lora_config(model, target_modules=[], target_parameters=["vision_moe.experts.down_proj"])
    assert set(named.target_parameters) == {"mlp.vision_moe.experts.down_proj"}


# ---- experts that do not go through transformers' experts interface -------------------------------------------------


def own_ways():
    """``[(family, class of a model)]`` whose experts have a forward of their own, by a look at the sources."""
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = file.read_text()
        if not _DECORATED.search(source) and re.search(r"^class \w+Experts\(", source, re.MULTILINE):
            yield from ((file.parent.name, cls.__name__) for cls in model_classes(file.parent.name))


OWN_WAYS = list(own_ways())


def test_the_scan_for_experts_of_their_own_finds_what_it_should():
    assert {"llama4", "dbrx", "longcat_flash", "jetmoe", "switch_transformers"} <= {family for family, _ in OWN_WAYS}


@pytest.mark.parametrize("family, name", OWN_WAYS, ids=map("/".join, OWN_WAYS))
def test_experts_with_a_forward_of_their_own_are_told_so_and_what_works_instead(family, name):
    model = tiny_model(family, name)
    with pytest.raises(ValueError) as caught:
        lora_config(model)
    message = str(caught.value)
    assert "through transformers' experts interface, so ktlib cannot serve them" in message
    assert re.search(rf"model: {name} computes its experts \((\w+), at ([\w.]+)\)", message)
    # all that the message offers works
    options = [{"target_parameters": []}]
    if named := re.search(r"target_parameters=(\['.+'\]) adapts them too", message):
        options.append({"target_parameters": ast.literal_eval(named[1])})
    if named := re.search(r"target_modules can name the linear layers in them, such as '(.+)'", message):
        options.append({"target_parameters": [], "target_modules": [named[1]]})
    assert len(options) == (1 if family == "dbrx" else 2)  # DBRX reads its weights past PEFT's layer
    for option in options:
        made = get_peft_model(tiny_model(family, name), lora_config(model, r=2, **option))
        with_experts = any(
            ".experts" in path or "JetMoeParallel" in str(layers) for path, layers in adapted(made).items()
        )
        assert with_experts == (option is not options[0])
        # the forward of Llama-4's multimodal class needs an image
        text = made.base_model.model.language_model if name == "Llama4ForConditionalGeneration" else made
        decoder = {"decoder_input_ids": tokens()} if made.config.is_encoder_decoder else {}
        random_adapter(made)
        text(input_ids=tokens(), **decoder).logits.float().square().mean().backward()
        assert [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None] == []


# ---- adapters that will not take the factored path ------------------------------------------------------------------


def lora_warnings(model, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora_config(model, **options)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("family, name, dtype, reason", [
    ("mixtral", "MixtralForCausalLM", torch.float32, "MixtralExperts: .*: load the model with dtype='bfloat16' .*$"),
    ("nemotron_h", "NemotronHForCausalLM", torch.bfloat16, "NemotronHExperts: .*its experts have no gate$"),
])  # fmt: skip
def test_expert_adapters_that_ktlib_will_not_serve_are_warned_of_at_once_in_one_line(family, name, dtype, reason):
    model = tiny_model(family, name, dtype=dtype)
    assert lora_warnings(model) == []  # not asked to serve them
    model.set_experts_implementation("ktlib")
    (message,) = lora_warnings(model)
    assert re.match(reason, message) and "\n" not in message
    assert lora_warnings(model, target_parameters=[]) == []
    assert lora_warnings(model.to("meta")) == []  # where the weights will be is not known
    served = tiny_model("mixtral", "MixtralForCausalLM", dtype=torch.bfloat16)
    served.set_experts_implementation("ktlib")
    assert lora_warnings(served) == []
