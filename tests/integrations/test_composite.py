"""Checkpoints whose config holds a text_config: the class they are published for, adapters for it, and its training."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.families import discover
from support.family_models import model_classes, tiny_config
from support.models import VOCAB, random_adapter, relative_error, tokens

import ktlib
from ktlib.conversion import write
from ktlib.conversion.write import read_by_peft
from ktlib.estimate import estimate
from ktlib.integrations.expert_names import ExpertLayout
from ktlib.integrations.model_classes import check_trainable, decoder_name, meta_model, model_class
from ktlib.integrations.peft_lora import lora_config
from ktlib.integrations.transformers_experts import is_experts
from ktlib.training import sft

ADAPTER_FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CLASSES = {
    cls.__name__: cls for family in sorted({family for family, _ in discover()}) for cls in model_classes(family)
}
# Not classes of a language model that predicts the next token.
OTHER_KINDS = ("DiffusionGemmaForBlockDiffusion", "OpenAIPrivacyFilterForTokenClassification")
LANGUAGE_MODELS = [name for name in CLASSES if name not in OTHER_KINDS]
# Stock PEFT does not convert their files with a module per expert, or not all of them, and loads the rest.
MISREAD = [
    name
    for name in CLASSES
    if name.startswith(("Dots3Note", "Ernie4_5_VL", "MiniMaxM3Sparse", "NemotronH"))
    or name in ("Qwen3_5MoeForConditionalGeneration", "Qwen4ExpForConditionalGeneration")
]
MULTIMODAL = [name for name in LANGUAGE_MODELS if hasattr(CLASSES[name].config_class(), "text_config")]


def config_of(name, **changes):
    """A tiny config that names its model class, as the config of a published checkpoint does."""
    config = tiny_config(CLASSES[name].config_class)
    config.architectures = [name]
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    return config


def random_model(name, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = CLASSES[name]._from_config(copy.deepcopy(config_of(name, **changes)), dtype=dtype)
    model.set_experts_implementation("eager")
    return model.eval()


def save_adapter(name, folder):
    """A random adapter on the model of a class, written without the model: its names and shapes are PEFT's."""
    model = meta_model(config_of(name))
    config = lora_config(model, r=2, lora_alpha=3)
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for key, value in get_peft_model_state_dict(adapted, save_embedding_layers=False).items():
        tensors[key] = torch.randn(value.shape, generator=generator)
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / ADAPTER_FILE)
    return folder, adapted


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def loaded(model, folder):
    """``(PeftModel, warnings about missing keys)`` of stock PEFT."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, folder)
    return model, [str(warning.message) for warning in caught if "adapter keys" in str(warning.message)]


# ------------------------------------------------------------------------------------------------- the class


def test_the_families_with_a_multimodal_class_are_here():
    wanted = "Qwen3VLMoe Qwen3_5Moe Ernie4_5_VLMoe Gemma4 Glm4vMoe Aria MistralLarge4 Qwen3OmniMoeThinker".split()
    assert {f"{family}ForConditionalGeneration" for family in wanted} <= set(MULTIMODAL)
    assert "MiniMaxM3SparseForConditionalGeneration" in MULTIMODAL


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_config_stands_for_the_class_that_it_names(name):
    config = config_of(name)
    before = config.to_dict()
    assert type(meta_model(config)).__name__ == name
    assert config.to_dict() == before


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if not name.startswith("Qwen3OmniMoeForC")])
def test_every_language_model_can_be_trained_on_text(name):
    check_trainable(meta_model(config_of(name)))


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_composite_config_without_a_name_stands_for_the_class_that_takes_all_of_it(name):
    config = config_of(name)
    config.architectures = None
    assert model_class(config).config_class is type(config)
    config.architectures = [name.replace("ForConditionalGeneration", "Model"), "ClassOfALaterRelease"]
    assert model_class(config).config_class is type(config), "a class without a head generates nothing"


def test_a_text_class_on_a_composite_config_takes_its_text_config():
    config = config_of("Qwen3_5MoeForConditionalGeneration")
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    assert decoder_name(meta_model(config)) == "model"


def test_configs_without_a_language_model_are_refused():
    with pytest.raises(ValueError, match=r"no class that generates text for a CLIPConfig \(model_type 'clip'\)"):
        model_class(transformers.CLIPConfig())


@pytest.mark.parametrize(
    "name, words",
    [
        ("DiffusionGemmaForBlockDiffusion", "has no forward pass with a loss of the next token"),
        ("Qwen3OmniMoeForConditionalGeneration", "has no forward pass with a loss of the next token"),
        ("Llama4ForConditionalGeneration", r"its routed experts \(Llama4TextExperts\) outside transformers' experts"),
    ],
)
def test_models_that_cannot_be_trained_on_text_are_refused(name, words):
    config = tiny_config(getattr(transformers, name).config_class)
    config.architectures = [name]
    with pytest.raises(ValueError, match=f"model: {name} .*{words}"):
        check_trainable(meta_model(config))


def test_an_estimate_counts_adapters_where_text_passes():
    config = config_of("Qwen3VLMoeForConditionalGeneration")
    small = estimate(config, timing=False, gpu=False)
    config.vision_config.depth = 8
    large = estimate(config, timing=False, gpu=False)
    assert large.host["other weights"] > small.host["other weights"]
    trained = "other adapters, gradients, moments"
    assert large.host[trained] == small.host[trained] > 0


# ------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_adapters_of_every_family_go_there_and_back(name, tmp_path, monkeypatch):
    if not any(is_experts(module) for module in meta_model(config_of(name)).modules()):
        pytest.skip("the tiny model has no layer with experts")
    source, adapted = save_adapter(name, tmp_path / "a")
    config, wanted = config_of(name), load_file(source / ADAPTER_FILE)
    if ExpertLayout(meta_model(config)).per_expert:
        if name in MISREAD:  # a file as other programs write it
            monkeypatch.setattr(write, "_refuse_what_peft_misreads", lambda *_: None)
        ktlib.export_adapter(source, tmp_path / "apart", config)
        assert any(".experts.0." in key for key in load_file(tmp_path / "apart" / ADAPTER_FILE))
        source = tmp_path / "apart"
    else:
        with pytest.raises(ValueError, match="transformers knows no per-expert spelling of the experts of"):
            ktlib.export_adapter(source, tmp_path / "apart", config)
    ktlib.import_adapter(source, tmp_path / "back", config)
    got = load_file(tmp_path / "back" / ADAPTER_FILE)
    keys = read_by_peft(adapted, list(got))
    if name.startswith("Inkling2"):  # PEFT takes names of its convolutions for others, whichever they are
        keys = {key: key for key in got}
    assert set(keys.values()) == set(wanted), "stock PEFT finds every tensor, under whatever name"
    assert all(torch.equal(value, wanted[keys[key]]) for key, value in got.items())


@pytest.mark.parametrize(
    "name", [*MISREAD, "Glm4vMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"]
)
def test_a_file_with_a_module_per_expert_is_read_by_stock_peft_or_refused(name, tmp_path, monkeypatch):
    model, config = random_model(name), config_of(name)
    plain, model = logits(model), random_adapter(get_peft_model(model, lora_config(model, r=2, lora_alpha=3)))
    model.save_pretrained(tmp_path / "fused")
    if name in MISREAD:
        words = rf"layout: got 'per_expert', but PEFT .* cannot read \d+ of the \d+ adapted weights of {name} .*'peft'"
        with pytest.raises(ValueError, match=words):
            ktlib.export_adapter(tmp_path / "fused", tmp_path / "apart", config)
        assert not (tmp_path / "apart").exists()
        monkeypatch.setattr(write, "_refuse_what_peft_misreads", lambda *_: None)
    errors = {}
    for layout in ("peft", "per_expert"):
        ktlib.export_adapter(tmp_path / "fused", tmp_path / layout, config, layout)
        read, _ = loaded(random_model(name), tmp_path / layout)
        errors[layout] = relative_error(logits(read), logits(model))
    assert errors["peft"] < 1e-5 < 0.05 < relative_error(plain, logits(model))
    assert errors["per_expert"] > 0.05 if name in MISREAD else errors["per_expert"] < 1e-5


def test_an_export_says_that_vllm_has_the_experts_of_a_family_stacked(tmp_path):
    name = "Qwen3OmniMoeThinkerForConditionalGeneration"
    source, _ = save_adapter(name, tmp_path / "a")
    with pytest.warns(UserWarning, match="layout: vLLM has the experts of 'qwen3_omni_moe_thinker' stacked .*'peft'"):
        ktlib.export_adapter(source, tmp_path / "apart", config_of(name))


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], "all-linear"])
def test_what_stock_peft_reads_of_such_a_family_is_written(targets, tmp_path):
    name = "Qwen3_5MoeForConditionalGeneration"
    model = random_model(name)
    model = random_adapter(get_peft_model(model, lora_config(model, target_modules=targets, target_parameters=[])))
    model.save_pretrained(tmp_path / "fused")
    ktlib.export_adapter(tmp_path / "fused", tmp_path / "apart", config_of(name))
    read, missing = loaded(random_model(name), tmp_path / "apart")
    assert missing == [] and relative_error(logits(read), logits(model)) < 1e-5


@pytest.mark.parametrize("name", ["Qwen3VLMoeForConditionalGeneration", "MistralLarge4ForConditionalGeneration"])
def test_an_audit_knows_the_names_of_a_composite_base(name, tmp_path):
    source, _ = save_adapter(name, tmp_path / "a")
    assert ktlib.audit(source, config_of(name)).clean


@pytest.mark.parametrize(
    "text, published",
    [
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
        ("AriaTextForCausalLM", "AriaForConditionalGeneration"),
    ],
)
def test_an_adapter_of_the_text_class_is_imported_for_the_published_one(text, published, tmp_path):
    whole = random_model(published)
    text_model = CLASSES[text]._from_config(copy.deepcopy(whole.config.get_text_config()), dtype=torch.float32)
    text_model.set_experts_implementation("eager")
    state = whole.model.language_model.state_dict() | {"lm_head.weight": whole.lm_head.weight}
    text_model.load_state_dict(
        {key if key.startswith("lm_head") else f"model.{key}": value for key, value in state.items()}
    )
    options = {"rank_pattern": {r"model\.layers\.0\.self_attn\.o_proj": 3}, "alpha_pattern": {"down_proj": 5}}
    text_model = random_adapter(get_peft_model(text_model, lora_config(text_model, r=2, lora_alpha=3, **options)))
    text_model.save_pretrained(tmp_path / "text")
    ktlib.import_adapter(tmp_path / "text", tmp_path / "published", config_of(published))
    plain = logits(whole)
    model, missing = loaded(whole, tmp_path / "published")
    assert missing == []
    assert relative_error(logits(model), logits(text_model)) < 1e-5 < relative_error(plain, logits(text_model))
    ktlib.import_adapter(tmp_path / "published", tmp_path / "back", text_model.get_base_model())
    first, second = load_file(tmp_path / "text" / ADAPTER_FILE), load_file(tmp_path / "back" / ADAPTER_FILE)
    assert first.keys() == second.keys()


def test_names_that_two_tensors_have_are_refused(tmp_path):
    source, _ = save_adapter("Qwen3_5MoeForConditionalGeneration", tmp_path / "a")
    tensors = load_file(source / ADAPTER_FILE)
    key = next(key for key in tensors if "o_proj.lora_A" in key)
    tensors[key.replace("language_model.", "")] = tensors[key].clone()
    save_file(tensors, source / ADAPTER_FILE)
    with pytest.raises(ValueError, match=r"twice \(1\): .*self_attn.o_proj.lora_A.weight"):
        ktlib.import_adapter(source, tmp_path / "out", config_of("Qwen3_5MoeForConditionalGeneration"))


def test_what_checkpoints_hold_in_another_form_has_no_name_in_files(tmp_path):
    name = "UnlimitedOcrForConditionalGeneration"
    model = random_model(name)
    tower = [n for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj") and "vision" in n]
    get_peft_model(model, lora_config(model, target_modules=tower, target_parameters=[])).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match=r"layout: model.vision_tower.* in another form \(Chunk\)"):
        ktlib.export_adapter(tmp_path / "a", tmp_path / "b", config_of(name))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["Qwen3_5MoeForConditionalGeneration", "MistralLarge4ForConditionalGeneration"])
def test_sft_trains_the_language_model_of_the_published_class(name, tmp_path):
    """Names of the second are not found by PEFT under its own keys. The checkpoint is resumed from, too."""
    _, tokenizer = sft.load_model("base")
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = random_model(name, torch.bfloat16, **changes)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"dataset": "dates", "batch_size": 2, "rank": 4, "sequence_length": 64, "learning_rate": 1e-2}
    options |= {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "run"), "targets": "attention+experts"}

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    train_rows, _ = ktlib.training.tasks.load_data("dates", 0)
    for callbacks in ([Stop()], []):  # interrupted, and gone on with
        trained, tokenizer = sft.load_model(options["model"])
        trained = sft.prepare(trained, targets=options["targets"], rank=4)
        given = {key: options[key] for key in ("batch_size", "sequence_length", "learning_rate")}
        result = sft.train(
            trained, tokenizer, train_rows, tmp_path / "run", steps=4, save_every=2, progress=False, **given,
            callbacks=callbacks,
        )  # fmt: skip
    assert result["resumed_from"] == 2
    sft.save(trained, tmp_path / "run")
    keys = load_file(tmp_path / "run" / ADAPTER_FILE)
    assert not any("vision" in key or "visual" in key for key in keys)
    base = CLASSES[name].from_pretrained(tmp_path / "model", dtype=torch.bfloat16, experts_implementation="eager")
    plain = logits(base)
    published, missing = loaded(base, tmp_path / "run")
    assert missing == []
    got, wanted = logits(published).double(), logits(trained).double()
    errors = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert errors.median() < 0.03 < relative_error(plain, wanted)
    assert ktlib.audit(tmp_path / "run", base.config).problems == []
    assert json.loads((tmp_path / "run" / CONFIG).read_text())["r"] == 4
    assert VOCAB < len(tokenizer)
