"""The README's example of one's own model and data, on tiny checkpoints of many families."""

import re

import pytest
import yaml
from peft import PeftModel
from support.models import tiny_checkpoint
from support.pages import README
from support.quantised_files import KINDS, quantise_files

from ktlib import audit
from ktlib.conversion.fuse import fuse_checkpoint
from ktlib.diagnosis import readback
from ktlib.integrations.stored_weight import quantised_format
from ktlib.names import component
from ktlib.training import sft
from ktlib.training.tasks import dates

COMPONENTS = {
    "mixtral": {"self_attn", "routed_experts"},
    "olmoe": {"self_attn", "routed_experts"},
    "gpt_oss": {"self_attn", "routed_experts"},
    "qwen3_moe": {"self_attn", "routed_experts"},
    "qwen2_moe": {"self_attn", "routed_experts", "shared_experts"},
    "qwen3_next": {"self_attn", "routed_experts", "shared_experts"},
    "deepseek_v2": {"self_attn", "routed_experts", "shared_experts", "dense_mlp"},
    "deepseek_v3": {"self_attn", "routed_experts", "shared_experts", "dense_mlp"},
    "glm4_moe": {"self_attn", "routed_experts", "shared_experts", "dense_mlp"},
    "ernie4_5_moe": {"self_attn", "routed_experts", "shared_experts", "dense_mlp"},
    "dots1": {"self_attn", "routed_experts", "shared_experts", "dense_mlp"},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def mine(folder, family):
    """The parameters of the README's ``mine.yaml`` for a checkpoint of the family and a data file."""
    (text,) = re.findall(r"```yaml\n(# mine.yaml\n.*?)```", README, re.DOTALL)
    data = folder / "my-data.jsonl"
    data.write_text("".join(f'{{"prompt": "{row["prompt"]}", "response": "{row["response"]}"}}\n' for row in ROWS))
    return yaml.safe_load(text) | {"model": str(tiny_checkpoint(folder / "model", family)), "dataset": str(data)}


ROWS, _ = dates(n_train=24, n_test=1)


@pytest.mark.parametrize("family", COMPONENTS)
def test_the_example_of_the_readme_runs_on_every_family(family, tmp_path, monkeypatch):
    """With the default targets, which are what the family has; stock reads back what was trained."""
    trained, save = [], sft.save
    monkeypatch.setattr(sft, "save", lambda model, *rest: trained.append(model) or save(model, *rest))
    parameters = mine(tmp_path, family) | {"steps": 2, "batch_size": 4, "output_dir": str(tmp_path / "out")}
    result = sft.run(progress=False, **parameters)
    assert len(result["log"]) == 2 and len(result["answers_after"]) == len(result["test"]) > 0
    (model,) = trained
    assert {component(name) for name, value in model.named_parameters() if value.requires_grad} == COMPONENTS[family]
    assert audit(result["saved"], config=model.config).clean

    tokenizer = sft.load_tokenizer(parameters["model"])
    observed = readback.observe(model, [sft.prompt_ids(tokenizer, row["prompt"]) for row in ROWS[:2]])
    stock, _ = sft.load_model(parameters["model"], experts_implementation="eager")
    report = readback.read_back(PeftModel.from_pretrained(stock, result["saved"]), observed)
    assert not report.wrong and len(report.layers) == len(observed.calls) > 4


@pytest.mark.parametrize("kind", ["fp8", "int4", "gptq", "int4 of ktlib fuse"])
@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_a_quantised_base_trains_by_the_same_parameters(kind, finetuning, tmp_path, monkeypatch):
    """LoRA leaves its codes as they are; full fine-tuning decodes them, and saves a bf16 model."""
    trained, save = [], sft.save
    monkeypatch.setattr(sft, "save", lambda model, *rest: trained.append(model) or save(model, *rest))
    parameters = mine(tmp_path, "qwen3_moe") | {"steps": 2, "batch_size": 4, "output_dir": str(tmp_path / "out")}
    if kind in KINDS:
        quantise_files(tmp_path / "model", kind)
    else:
        made = fuse_checkpoint(tmp_path / "model", tmp_path / "int4", quantise="int4", progress=False)
        parameters["model"] = str(made)
    parameters |= {"finetuning": finetuning, "targets": "all" if finetuning == "lora" else "experts"}
    result = sft.run(progress=False, **parameters)
    assert len(result["log"]) == 2 and result["after"] is not None
    if finetuning == "lora":
        base, _ = sft.load_model(parameters["model"])
        assert quantised_format(base) in ("e4m3", "int4")
        tokenizer = sft.load_tokenizer(parameters["model"])
        observed = readback.observe(trained[0], [sft.prompt_ids(tokenizer, row["prompt"]) for row in ROWS[:2]])
        assert audit(result["saved"], config=base.config).clean
        stock, _ = sft.load_model(parameters["model"], experts_implementation="eager")
        report = readback.read_back(PeftModel.from_pretrained(stock, result["saved"]), observed)
        assert not report.wrong and report.exact_errors and len(report.layers) == len(observed.calls) > 4
        assert quantised_format(stock) == quantised_format(base)  # it was in fp32 meanwhile
    else:
        assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
        trained, _ = sft.load_model(str(tmp_path / "out"))
        assert quantised_format(trained) is None
