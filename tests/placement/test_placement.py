"""Pinned experts stay on the CPU whatever moves the model; a simulated device stands for the GPU."""

import copy
import functools
import pickle

import pytest
import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version
from support.models import FAMILIES, expert_modules, relative_error, tiny_model, tokens
from support.pinned import assert_same, devices, is_expert, is_expert_lora, is_other, loss_and_gradients, pinned_model
from support.simulated_device import register

import ktlib
from ktlib.lab import hybrid
from ktlib.operator import host_copies
from ktlib.placement.pin import placement
from ktlib.training import sft
from ktlib.training.tasks import dates

SIM = register()
NOISE = 2**-7  # the simulated device rounds like the CPU, but takes other kernels
# The engine runs the nodes of two devices in two threads and adds gradients, in bf16, in the order in which they come.
SAME = 0.03
adapted = functools.partial(pinned_model, device=SIM)


# ------------------------------------------------------------------------------------------------------- what moves


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_moves_but_the_experts(family):
    model = ktlib.pin_experts(tiny_model(family, "ktlib"))
    model.to("meta")
    assert devices(model, is_expert) == {"cpu"} and devices(model, is_other) == {"meta"}


def test_casts_pass():
    model = ktlib.pin_experts(tiny_model("deepseek_v2", "ktlib"))
    model.to(SIM, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert devices(model, is_expert) == {"cpu"} and devices(model, is_other) == {"sim"}


def test_what_moves_nothing_reaches_the_experts():
    model = ktlib.pin_experts(tiny_model("deepseek_v2", "ktlib"))
    assert all(p.is_shared() for p in model.share_memory().parameters())


def test_weights_are_not_copied():
    model = tiny_model("deepseek_v2", "ktlib")
    before = {name: p.data_ptr() for name, p in model.named_parameters() if is_expert(name)}
    ktlib.pin_experts(model).to(SIM)
    assert before == {name: p.data_ptr() for name, p in model.named_parameters() if is_expert(name)}


def test_pinning_brings_experts_back():
    model = tiny_model("deepseek_v2", "ktlib").to(SIM)
    assert devices(ktlib.pin_experts(model), is_expert) == {"cpu"} and devices(model, is_other) == {"sim"}


def test_gradients_stay_with_their_parameters():
    model = adapted(order=("pin", "adapt"))
    loss_and_gradients(model)
    model.to(SIM)
    assert all(p.grad is None or p.grad.device == p.device for p in model.parameters())


@pytest.mark.parametrize(("cuda", "experts", "stays"), [
    (True, "ktlib", "cpu"), (True, "eager", "sim"), (False, "ktlib", "sim"),
])  # fmt: skip
def test_fine_tuning_pins_the_experts_where_there_is_a_gpu(cuda, experts, stays, monkeypatch):
    """Experts of ktlib's implementation are pinned; stock experts move with the model, as without ktlib."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    model = sft.add_lora(sft.load_model("base", experts)[0], rank=2).to(SIM)
    assert devices(model, is_expert) == devices(model, is_expert_lora) == {stays}
    assert devices(model, is_other) == {"sim"}


def test_fine_tuning_with_the_rest_on_a_gpu(tmp_path, monkeypatch, one_thread):
    """The losses of sft are the same if the Trainer's device is the simulated one, from which nothing can be saved."""

    class NothingSaved(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = False

    rows, losses, tensor = dates(n_train=16, n_test=4)[0], [], torch.tensor
    # the simulated device cannot make a tensor of Python numbers
    monkeypatch.setattr(torch, "tensor", lambda *args, device=None, **kwargs: tensor(*args, **kwargs).to(device))
    for device in (torch.device("cpu"), SIM):
        for owner, state in ((transformers.TrainingArguments, "_setup_devices"), (Accelerator, "state")):
            chosen = property(lambda self, state=state, device=device: getattr(self, state) and device)
            monkeypatch.setattr(owner, "device", chosen)
        model, tokenizer = sft.load_model("base")
        ktlib.pin_experts(model)  # load_model does it where there is CUDA
        model.config.use_cache = False
        model = sft.prepare(model, targets="all", rank=4)
        options = {"steps": 3, "batch_size": 2, "sequence_length": 64, "gradient_checkpointing": True}
        options |= {"progress": False, "callbacks": [NothingSaved()]}
        log = sft.train(model, tokenizer, rows, tmp_path / str(device), **options)["log"]
        losses.append([entry["loss"] for entry in log])
        assert devices(model, is_expert) == devices(model, is_expert_lora) == {"cpu"}
        assert devices(model, is_other) == {device.type}
    assert losses[1] == pytest.approx(losses[0], rel=SAME)


def test_to_empty():
    with torch.device("meta"):
        model = tiny_model.__globals__["transformers"].AutoModelForCausalLM.from_config(
            tiny_model("deepseek_v2").config
        )
    ktlib.pin_experts(model).to_empty(device=SIM)
    assert devices(model, is_expert) == {"cpu"} and devices(model, is_other) == {"sim"}
    with torch.device("meta"):
        model = type(model)(model.config)
    with pytest.raises(NotImplementedError, match="to_empty"):
        ktlib.pin_experts(model).to(SIM)


def test_names_copies_and_pickles_of_pinned_modules():
    model = ktlib.pin_experts(tiny_model("deepseek_v2", "ktlib"))
    block = model.model.layers[1].mlp
    assert type(block).__name__ == "DeepseekV2Moe" and isinstance(
        block, type(tiny_model("deepseek_v2").model.layers[1].mlp)
    )
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
        twin.to("meta")
        assert devices(twin, is_expert) == {"cpu"}
    assert devices(model) == {"cpu"}


def test_what_has_no_experts_is_refused():
    with pytest.raises(ValueError, match="Linear has no submodule with routed experts"):
        ktlib.pin_experts(torch.nn.Linear(2, 2))
    (experts,) = expert_modules(tiny_model("deepseek_v2", "ktlib")).values()
    with pytest.raises(ValueError, match="no submodule with routed experts"):
        ktlib.pin_experts(experts)


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora_device", ["cpu", "sim"])
def test_same_numbers_as_on_the_cpu(family, lora_device):
    if family == "gpt_oss" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its mask calls torch.tensor(device=...), which the simulation does not know")
    model = adapted(family, lora_device=lora_device, dtype=torch.float32)
    assert devices(model, is_expert) == {"cpu"} and devices(model, is_other) == {"sim"}
    on_cpu = adapted(family, device="cpu", dtype=torch.float32)
    assert_same(loss_and_gradients(model), loss_and_gradients(on_cpu), NOISE)
    assert devices(model, is_expert_lora) == {lora_device}


@pytest.mark.parametrize("lora_device", ["cpu", "sim"])
@pytest.mark.parametrize(
    "order",
    [
        ("pin", "move", "adapt", "move"),
        ("move", "pin", "adapt"),
        ("adapt", "move", "pin", "upcast"),
        ("adapt", "pin", "upcast", "move"),
        ("pin", "adapt", "move", "upcast", "move"),
    ],
    ids="-".join,
)
def test_order_does_not_matter(order, lora_device):
    model, wanted = adapted(lora_device=lora_device, order=order), adapted(lora_device=lora_device)
    assert_same(loss_and_gradients(model), loss_and_gradients(wanted), bound=SAME)
    assert placement(model) == placement(wanted)


def test_adapters_move_when_pinned_again():
    model = adapted()
    wanted = loss_and_gradients(model)
    for device in ("sim", "cpu"):
        ktlib.pin_experts(model, device)
        assert devices(model, is_expert_lora) == {device} and devices(model, is_expert) == {"cpu"}
        assert_same(loss_and_gradients(model), wanted, bound=SAME)


@pytest.mark.parametrize("kind", [{"use_reentrant": False}, {"use_reentrant": True}, "selective"], ids=str)
def test_checkpointing(kind):
    model, wanted = adapted(), loss_and_gradients(adapted())
    if kind == "selective":
        hybrid.checkpoint_all_but_experts(model)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        model.enable_input_require_grads()
    assert_same(loss_and_gradients(model), wanted, bound=SAME)


@pytest.mark.parametrize("device", ["cpu", SIM], ids=str)
def test_selective_checkpointing_computes_experts_once(device, monkeypatch):
    from ktlib.operator import registered_op

    calls, forward = [], registered_op._kernels.forward

    monkeypatch.setattr(registered_op._kernels, "forward", lambda *args: calls.append(1) or forward(*args))
    for enable, wanted in ((hybrid.checkpoint_all_but_experts, 1), (lambda m: m.gradient_checkpointing_enable(), 2)):
        model = adapted(device=device)
        enable(model)
        calls.clear()
        loss_and_gradients(model)
        assert len(calls) == wanted


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("lora_device", ["cpu", "sim"])
def test_clipping_and_adamw(options, lora_device):
    losses = []
    for device in ("cpu", SIM):
        model = adapted(device=device, lora_device=lora_device if device is SIM else "cpu")
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, **options)
        losses.append([])
        for _ in range(3):
            losses[-1].append(loss_and_gradients(model)[0])
            assert torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 0.1).cpu())
            optimizer.step()
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.02, atol=0)


def test_merging_saving_loading(tmp_path):
    for lora_device in ("cpu", "sim"):
        model = adapted(lora_device=lora_device).eval()
        model.to("cpu")  # the simulated device has no addresses, by which safetensors looks for shared tensors
        ktlib.pin_experts(model).save_pretrained(tmp_path)
        ktlib.pin_experts(model.to(SIM), lora_device)
        assert ktlib.audit(tmp_path, model.get_base_model().config).clean
        before = model(tokens().to(SIM)).logits.cpu()
        merged = model.merge_and_unload()
        assert devices(merged, is_expert) == {"cpu"}
        assert relative_error(merged(tokens().to(SIM)).logits.cpu(), before) < 0.02
        merged.to("cpu")
        assert devices(merged) == {"cpu"}


# ----------------------------------------------------------------------------------------------- errors and transfers


def test_stock_experts_with_inputs_elsewhere_are_refused():
    model = adapted()
    model.get_base_model().set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="DeepseekV2Experts: pinned to the CPU with inputs on sim:0, .*'eager'"):
        loss_and_gradients(model)


def test_experts_that_the_operator_cannot_compute_are_refused():
    model = ktlib.pin_experts(tiny_model("deepseek_v2", "ktlib", experts_dtype=torch.float32)).to(SIM)
    with pytest.raises(
        RuntimeError, match="pinned to the CPU, but ktlib cannot compute it: gate_up_proj is torch.float32"
    ):
        model(tokens().to(SIM), use_cache=False)


def test_transfers_on_the_cpu_are_none():
    value = torch.randn(3)
    assert host_copies.to_host(value, None)[0] is value
    assert host_copies.to_device(value, torch.device("cpu")) is value


def test_transfers_are_differentiable():
    x = torch.randn(3, 2).to(SIM).requires_grad_()
    (copied,) = host_copies.to_host(x)
    assert copied.device.type == "cpu"
    back = host_copies.to_device(copied.sin(), SIM)
    back.backward(torch.ones(3, 2).to(SIM))
    torch.testing.assert_close(x.grad.cpu(), x.detach().cpu().cos())


@pytest.mark.parametrize("trained", [(), (0,), (1,), (0, 1)])
def test_copies_of_frozen_tensors_are_frozen(trained):
    """The function that copies from CUDA, called with CPU tensors."""
    tensors = [torch.randn(3).requires_grad_(i in trained) for i in range(2)] + [torch.arange(3)]
    copies = host_copies._ToHost.apply(*tensors)
    assert [copy.requires_grad for copy in copies] == [t.requires_grad for t in tensors]
    if trained:
        (copies[0] * copies[1] * copies[2]).sum().backward()
    for i in trained:
        assert torch.equal(tensors[i].grad, tensors[1 - i].detach() * tensors[2])
    assert all(tensors[i].grad is None for i in {0, 1}.difference(trained))


def test_placement_table_adds_up():
    model = adapted()
    table = placement(model)
    assert sum(table.values()) == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert {device for label, device, _ in table if label.startswith("routed_experts")} == {"cpu"}


def test_moves_from_cpu_to_cpu_copy_nothing():
    """``cpu:0`` is another name of the same memory, but torch copies for it; a change of dtype still happens."""
    model = ktlib.pin_experts(tiny_model("deepseek_v2", "ktlib"))
    experts = model.model.layers[1].mlp.experts
    address = experts.gate_up_proj.data_ptr()
    model.to("cpu:0").to("cpu:1")
    assert experts.gate_up_proj.data_ptr() == address
    assert model.float().model.layers[1].mlp.experts.gate_up_proj.dtype == torch.float32
    model.to("cpu:0", torch.bfloat16)
    assert experts.gate_up_proj.dtype == torch.bfloat16
