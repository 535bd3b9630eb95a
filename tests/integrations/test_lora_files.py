"""Adapters on disk: made with ktlib they load in stock PEFT in a process without ktlib, and the other way round."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.models import relative_error, tiny_model, tokens
from test_lora import FORWARD_BOUND, pair

from ktlib.integrations.peft_lora import factor_adapters

STOCK_PROCESS = """
import sys, torch
sys.path.insert(0, {tests!r})
from support.models import random_adapter, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

def base():
    return AutoModelForCausalLM.from_pretrained("base", experts_implementation="eager", dtype=torch.float32).eval()

loaded = PeftModel.from_pretrained(base(), "ours")
logits = {{"ours": loaded(tokens()).logits.detach()}}
# the adapter as stock PEFT makes it, from the targets that were saved
config = loaded.peft_config["default"]
config = LoraConfig(r=3, target_modules=config.target_modules, target_parameters=config.target_parameters)
made = random_adapter(get_peft_model(base(), config), seed=5)
made.save_pretrained("stock")
logits["stock"] = made(tokens()).logits.detach()
torch.save(logits, "logits.pt")
assert not any(name.split(".")[0] == "ktlib" for name in sys.modules), "this process must not know ktlib"
"""


@pytest.mark.compatible("adapter files of stock PEFT, both ways")
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe"])
def test_files_are_stock_both_ways(family, tmp_path):
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    ours, _ = pair(family)
    ours.save_pretrained(tmp_path / "ours")
    script = STOCK_PROCESS.format(tests=str(Path(__file__).parents[1]))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt")
    assert relative_error(ours(tokens()).logits, logits["ours"]) < FORWARD_BOUND

    back = PeftModel.from_pretrained(tiny_model(family, "ktlib"), tmp_path / "stock")
    assert factor_adapters(back) > 0
    assert relative_error(back(tokens()).logits, logits["stock"]) < FORWARD_BOUND
    again = PeftModel.from_pretrained(tiny_model(family, "ktlib"), tmp_path / "ours")
    factor_adapters(again)
    assert torch.equal(again(tokens()).logits, ours(tokens()).logits)
