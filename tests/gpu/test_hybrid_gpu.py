"""Experts on the CPU, the rest on a real GPU: the same numbers as on the CPU alone, in any order, with any option."""

import functools

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.models import relative_error, tiny_model, tokens
from support.pinned import assert_same, devices, is_expert, is_expert_lora, is_other, loss_and_gradients, pinned_model
from transformers import Trainer, TrainingArguments

import ktlib
from ktlib.lab import hybrid
from ktlib.operator.host_copies import to_device, to_host
from ktlib.placement.pin import placement
from ktlib.training import sft
from ktlib.training.tasks import dates

# The engine runs the nodes of two devices in two threads and adds gradients, in bf16, in the order in which they come.
SAME = 0.03
FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral")
adapted = functools.partial(pinned_model, device="cuda")


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("lora_device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers_as_on_the_cpu(family, lora_device):
    on_cpu = adapted(family, device="cpu", dtype=torch.float32)
    hybrid_model = adapted(family, lora_device=lora_device, dtype=torch.float32)
    assert devices(hybrid_model, is_expert) == {"cpu"}
    assert devices(hybrid_model, is_expert_lora) == {lora_device}
    assert devices(hybrid_model, is_other) == {"cuda"}
    assert_same(loss_and_gradients(hybrid_model), loss_and_gradients(on_cpu), bound=0.02)


def test_where_the_adapters_live_changes_nothing():
    one, other = (loss_and_gradients(adapted(lora_device=device)) for device in ("cpu", "cuda"))
    assert one[0] == other[0]
    assert_same(one, other, bound=SAME)


@pytest.mark.parametrize(
    "order", [("pin", "move", "adapt", "move"), ("move", "pin", "adapt", "move"), ("adapt", "move", "pin", "upcast"),
              ("adapt", "pin", "upcast", "move"), ("pin", "adapt", "move", "upcast", "move")],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("lora_device", ["cpu", "cuda"])
def test_order_does_not_matter(order, lora_device):
    wanted = loss_and_gradients(adapted(lora_device=lora_device))
    model = adapted(lora_device=lora_device, order=order)
    assert_same(loss_and_gradients(model), wanted, bound=SAME)
    assert devices(model, is_expert) == {"cpu"} and devices(model, is_expert_lora) == {lora_device}


@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}, "selective"], ids=str)
def test_checkpointing(kwargs):
    wanted = loss_and_gradients(adapted())
    model = adapted()
    if kwargs == "selective":
        hybrid.checkpoint_all_but_experts(model)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    assert_same(loss_and_gradients(model), wanted, bound=SAME)


def test_autocast():
    model = adapted(dtype=torch.float32)
    wanted = loss_and_gradients(model)
    with torch.autocast("cuda", torch.bfloat16):
        got = loss_and_gradients(model)
    assert_same(got, wanted, bound=0.1)


def test_accumulation():
    model = adapted()
    first, second = tokens(seed=1), tokens(seed=2)
    apart = [loss_and_gradients(model, ids)[1] for ids in (first, second)]
    model.zero_grad()
    for ids in (first, second):
        model(ids.cuda(), labels=ids.cuda()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(parameter.grad.cpu(), apart[0][name] + apart[1][name]) < 1e-2, name


def test_side_streams():
    """Forward and backward on the user's own streams; results are used at once on the stream that made them."""
    model = adapted()
    wanted = loss_and_gradients(model)
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(torch.cuda.Stream()):
            got = loss_and_gradients(model)
        torch.cuda.synchronize()
        assert_same(got, wanted, bound=SAME)
        stream = torch.cuda.Stream()
        model.zero_grad()
        ids = tokens().cuda()
        loss = model(ids, labels=ids).loss
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss.backward()
        torch.cuda.synchronize()
        grads = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
        assert_same((loss.item(), grads), wanted, bound=SAME)


# -------------------------------------------------------------------------------------------------------- transfers


def test_copies_are_right_while_the_gpu_is_busy():
    """The copy is queued behind long work, and the memory is reused at once."""
    big = torch.randn(4096, 4096, device="cuda")
    for i in range(20):
        for _ in range(5):
            big = torch.nn.functional.normalize(big @ big)
        value = torch.full((512, 512), float(i), device="cuda") + 0 * big[:512, :512].nan_to_num()
        (copy,) = to_host(value)
        assert copy.is_pinned() and torch.all(copy == i)
        back = to_device((copy + 1).pin_memory(), value.device)
        del copy
        junk = torch.empty(512, 512, pin_memory=True).fill_(-1)
        assert torch.all(back == i + 1)
        del junk


def test_transfer_gradients():
    x = torch.randn(8, 16, device="cuda", requires_grad=True)
    index = torch.arange(8, device="cuda")
    a, none, i, frozen = to_host(x, None, index, x.detach())
    assert none is None and not i.requires_grad and i.tolist() == list(range(8))
    assert a.requires_grad and not frozen.requires_grad and torch.equal(a, frozen)
    out = to_device(a.sin() * 2, x.device)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad, 2 * x.detach().cos())


def test_no_device_wide_synchronisation(monkeypatch):
    model, ids = adapted(), tokens().cuda()
    loss_and_gradients(model)
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    model(ids, labels=ids).loss.backward()


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("lora_device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_clipping_and_adamw_on_mixed_devices(options, lora_device):
    losses = []
    for device in ("cpu", "cuda"):
        model = adapted(device=device, lora_device=lora_device if device == "cuda" else "cpu", dtype=torch.float32)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, **options)
        ids = tokens(4, 12).to(device)
        losses.append([])
        for _ in range(4):
            loss = model(ids, labels=ids).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            assert torch.isfinite(norm)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.02, atol=0)


def trainer(directory, steps=6, lora_device="cpu", **arguments):
    model = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    ktlib.pin_experts(model, lora_device)
    torch.manual_seed(7)
    model = get_peft_model(model, ktlib.lora_config(model, r=4))
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]
    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 2e-2, "max_steps": steps,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 3, "report_to": [], "disable_tqdm": True,
        "seed": 3,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(str(directory), **{**options, **arguments}), train_dataset=rows)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora_device", ["cpu", "cuda"])
def test_trainer_saves_resumes_and_generates(tmp_path, lora_device):
    run = trainer(tmp_path / "a", lora_device=lora_device)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert devices(run.model, is_expert) == {"cpu"} and devices(run.model, is_expert_lora) == {lora_device}
    assert devices(run.model, is_other) == {"cuda"}
    assert ktlib.audit(tmp_path / "a" / "checkpoint-6", run.model.get_base_model().config).clean

    resumed = trainer(tmp_path / "b", lora_device=lora_device)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    torch.testing.assert_close(torch.tensor(losses(resumed)), torch.tensor(losses(run)), rtol=1e-3, atol=0)

    loaded = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    loaded = ktlib.pin_experts(PeftModel.from_pretrained(loaded, tmp_path / "a" / "checkpoint-6"), lora_device)
    ktlib.factor_adapters(loaded)
    loaded = loaded.to("cuda").eval()
    ids = tokens(2, 8).cuda()
    torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits)
    made = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert made.shape == (2, 14) and made.device.type == "cuda"

    before = loaded(ids).logits
    merged = loaded.merge_and_unload()
    assert devices(merged, is_expert) == {"cpu"}
    assert relative_error(merged(ids).logits, before) < 0.05


def test_trainer_with_checkpointing(tmp_path):
    plain, checkpointed = trainer(tmp_path / "a", 3), trainer(tmp_path / "b", 3, gradient_checkpointing=True)
    plain.train(), checkpointed.train()
    torch.testing.assert_close(torch.tensor(losses(checkpointed)), torch.tensor(losses(plain)), rtol=1e-3, atol=0)


def test_moving_by_all_names():
    model = adapted(order=("pin", "adapt"))
    for move in (
        lambda m: m.cuda(),
        lambda m: m.to("cuda:0"),
        lambda m: m.to("cpu"),
        lambda m: m.to("cuda", torch.float32),
    ):
        move(model)
        assert devices(model, is_expert) == {"cpu"}
    assert {str(p.dtype) for name, p in model.named_parameters()} == {"torch.float32"}
    assert ("routed_experts", "cpu", "float32") in placement(model)


def test_stock_experts_on_the_cpu_say_what_is_wrong():
    model = adapted()
    model.get_base_model().set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="pinned to the CPU"):
        model(tokens().cuda())


def test_fine_tuning_keeps_the_experts_on_the_cpu(tmp_path):
    rows = dates(n_train=64, n_test=4)[0]
    model, tokenizer = sft.load_model("base")
    model = sft.add_lora(model, rank=4)
    options = {"steps": 20, "batch_size": 8, "sequence_length": 64, "progress": False}
    log = sft.train(model, tokenizer, rows, tmp_path, **options)["log"]
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    assert devices(model, is_expert) == devices(model, is_expert_lora) == {"cpu"}
    assert devices(model, is_other) == {"cuda"}
    answers = sft.generate(model, tokenizer, [row["prompt"] for row in rows[:4]], 8, progress=False)
    stock = PeftModel.from_pretrained(sft.load_model("base", "eager")[0], sft.save(model, tmp_path))
    theirs = sft.generate(stock, tokenizer, [row["prompt"] for row in rows[:4]], 8, progress=False)
    assert sum(a == b for a, b in zip(answers, theirs, strict=True)) >= 3  # on the CPU, in another order of rounding
