"""The README's example of one's own model and data, on tiny checkpoints of many families."""

import re

import pytest
import yaml
from peft import PeftModel
from support.models import tiny_checkpoint
from support.pages import README

from ktlib import audit
from ktlib.diagnosis import readback
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
