"""TRL's trainers, unchanged, on the embedded model: supervised fine-tuning and DPO, with packing and without."""

import ast
import re

import pytest
import torch
from peft import LoraConfig
from support.models import relative_error
from support.pages import TEXT

from ktlib.assets import BASE
from ktlib.integrations.peft_lora import ParamWrapper, factor_adapters, lora_config
from ktlib.training import sft
from ktlib.training.tasks import dates

trl = pytest.importorskip("trl", reason="trl is in environment.yml, not among ktlib's requirements")
datasets = pytest.importorskip("datasets")

ROWS, _ = dates(n_train=48, n_test=1)


pytestmark = pytest.mark.usefixtures("one_thread")


def message(role, text):
    return [{"role": role, "content": text}]


def conversations():
    return datasets.Dataset.from_list(
        [{"prompt": message("user", r["prompt"]), "completion": message("assistant", r["response"])} for r in ROWS]
    )


def preferences():
    """The right answer against that of another row."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt": message("user", row["prompt"]),
                "chosen": message("assistant", row["response"]),
                "rejected": message("assistant", other["response"]),
            }
            for row, other in zip(ROWS, ROWS[1:] + ROWS[:1], strict=True)
        ]
    )


def arguments(cls, folder, **options):
    return cls(
        str(folder), max_steps=8, per_device_train_batch_size=8, learning_rate=5e-3, lr_scheduler_type="constant",
        max_length=64, logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, seed=0,
        save_strategy="no", **options,
    )  # fmt: skip


def train(trainer_class, settings, data, experts="ktlib"):
    model, tokenizer = sft.load_model("base", experts_implementation=experts)
    config = lora_config(model, r=4, lora_alpha=8)
    trainer = trainer_class(model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=config)
    trainer.train()
    return trainer, torch.tensor([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])


def assert_experts_were_trained(trainer):
    wrappers = [m for m in trainer.model.modules() if isinstance(m, ParamWrapper) and m.get_param().dim() == 3]
    assert len(wrappers) == 2 * 3, "the experts' adapters do not take the factored path"
    assert all(m.lora_B["default"].weight.abs().max() > 1e-3 for m in wrappers)


@pytest.mark.compatible("TRL's SFTTrainer, packed and not")
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(packing, tmp_path):
    settings = arguments(trl.SFTConfig, tmp_path, packing=packing)
    trainer, losses = train(trl.SFTTrainer, settings, conversations())
    assert type(trainer) is trl.SFTTrainer and len(losses) == 8 and losses.isfinite().all()
    assert losses[-2:].mean() < 0.8 * losses[:2].mean()
    assert_experts_were_trained(trainer)
    _, stock = train(trl.SFTTrainer, settings, conversations(), experts="eager")
    assert relative_error(losses, stock) < 0.02


def test_a_model_given_by_its_path_with_the_options_that_the_page_names(tmp_path, logged):
    (options,) = re.findall(r"SFTConfig\(model_init_kwargs=(\{.*?\})\)", TEXT)
    settings = arguments(trl.SFTConfig, tmp_path, model_init_kwargs=ast.literal_eval(options))
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    trainer = trl.SFTTrainer(
        str(BASE), settings, train_dataset=conversations(), processing_class=sft.load_model("base")[1],
        peft_config=LoraConfig(r=4, target_modules=[], target_parameters=targets),
    )  # fmt: skip
    assert factor_adapters(trainer.model) == 2 * 3
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model(rows["input_ids"], labels=rows["labels"]).loss.backward()
    assert not logged(), "the experts are not computed by the operator"
    adapters = [p for name, p in trainer.model.named_parameters() if ".lora_B." in name]
    assert len(adapters) == 2 * 3 and all(p.grad.abs().max() > 0 for p in adapters)


@pytest.mark.compatible("TRL's DPOTrainer")
def test_dpo_trainer(tmp_path):
    trainer, losses = train(trl.DPOTrainer, arguments(trl.DPOConfig, tmp_path), preferences())
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "with B = 0 the policy is the reference: ln 2"
    assert losses[-1] < 0.6
    assert_experts_were_trained(trainer)
    rewards = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert float(rewards[-1]) > 0.1
