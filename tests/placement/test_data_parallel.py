"""Pinned models with several GPUs or processes, both simulated; tests/gpu/test_several_gpus.py has real ones."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from peft import get_peft_model
from support.models import tiny_model, tokens
from support.simulated_device import register
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainingArguments

import ktlib
from ktlib.placement import data_parallel
from ktlib.training import sft
from ktlib.training.tasks import dates

SIM = register()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def new_process(monkeypatch):
    """As if nothing had been pinned in this process: Trainer is not patched, before and after the test."""
    monkeypatch.setattr(Trainer, "add_callback", inspect.unwrap(Trainer.add_callback))
    data_parallel.check_trainers.cache_clear()
    yield
    data_parallel.check_trainers.cache_clear()


@pytest.fixture
def two_gpus(monkeypatch, new_process):
    """torch says that it sees two GPUs; Trainer then wraps a model in DataParallel and doubles its batch."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


@pytest.fixture
def one_gpu(monkeypatch, new_process):
    """torch says that it sees one GPU, and the Trainer's device is the simulated one."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: self._setup_devices and SIM))


def sharding(field):
    """A Trainer class as if launched with FSDP or DeepSpeed, which cannot be launched without GPUs."""

    class Launched(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, field, True)

    return Launched


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group, as torchrun makes it, of which this process is the only member."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adapted(pin=True, device="cpu"):
    model = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    if pin:
        ktlib.pin_experts(model)
    return get_peft_model(model, ktlib.lora_config(model, r=2)).to(device)


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip


def train(**options):
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    trainer = Trainer(train_dataset=rows, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def test_a_trainer_uses_one_of_two_gpus_and_says_so(two_gpus, tmp_path):
    with pytest.warns(UserWarning, match="training on cpu, one of 2 visible GPUs, because .* pinned experts") as caught:
        trainer = train(model=adapted(), args=arguments(tmp_path))
    assert len([warning for warning in caught if "visible GPUs" in str(warning.message)]) == 1
    assert trainer.model_wrapped is trainer.model and trainer.args.n_gpu == 1
    assert trainer.state.train_batch_size == 2 and trainer.state.epoch == 0.5


def test_a_trainer_that_makes_the_model_itself_too(two_gpus, tmp_path):
    """Also if nothing in the process was pinned before."""
    with pytest.warns(UserWarning, match="one of 2 visible GPUs"):
        trainer = train(model_init=lambda: adapted(), args=arguments(tmp_path))
    assert trainer.model_wrapped is trainer.model
    assert trainer.state.train_batch_size == 2 and trainer.state.epoch == 0.5


def test_a_trainer_without_arguments_too(two_gpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="one of 2 visible GPUs"):
        assert Trainer(adapted()).args.n_gpu == 1


def test_other_models_are_trained_as_ever(two_gpus, tmp_path):
    adapted()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*visible GPUs")
        assert Trainer(adapted(pin=False), arguments(tmp_path)).args.n_gpu == 2


@pytest.mark.parametrize("experts", ["ktlib", "eager"])
def test_fine_tuning_uses_one_of_two_gpus(experts, two_gpus, tmp_path, monkeypatch):
    """With as many rows in a step as ``batch_size`` says, also where nothing is pinned."""
    seen = []
    monkeypatch.setattr(sft, "without_cuda", lambda: False)
    model, tokenizer = sft.load_model("base", experts)
    model = sft.add_lora(model, rank=2)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    with pytest.warns(UserWarning, match="one of 2 visible GPUs, because a step has batch_size rows"):
        sft.train(
            model, tokenizer, dates(n_train=16, n_test=4)[0], tmp_path / "run", steps=2, batch_size=2,
            sequence_length=64, progress=False,
        )  # fmt: skip
    assert seen == [2, 2]


@pytest.mark.parametrize("field, name", [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
@pytest.mark.parametrize("given", ["model", "model_init"])
def test_sharding_on_gpus_is_refused_as_the_trainer_is_made(given, field, name, one_gpu, tmp_path):
    words = (
        f"{name} with pinned experts needs the whole model on the CPU, got sim:0 to train on; start .* without {name}"
    )
    options = {"model": adapted()} if given == "model" else {"model_init": lambda: adapted()}
    with pytest.raises(RuntimeError, match=words):
        sharding(field)(args=arguments(tmp_path), **options)
    assert sharding(field)(adapted(pin=False), arguments(tmp_path)).args.device == SIM


@pytest.mark.parametrize("field", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharding_on_cpus_is_not_refused(field, one_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: self._setup_devices))
    assert sharding(field)(adapted(), arguments(tmp_path)).args.device.type == "cpu"


@pytest.mark.parametrize("share", [False, True])
def test_distributed_data_parallel_on_gpus_is_refused(share, group):
    model = adapted()
    if share:
        ktlib.share_experts(model)
    model.to(SIM)
    with pytest.raises(RuntimeError, match="pinned experts needs the whole model on the CPU, got parameters on sim:0"):
        DistributedDataParallel(model)


def test_distributed_data_parallel_on_the_cpu_is_as_ever(group):
    frozen = {name for name, p in adapted().named_parameters() if ".experts." in name and ".lora_" not in name}
    for share in (False, True):
        model = adapted()
        wrapped = DistributedDataParallel(ktlib.share_experts(model) if share else model)
        assert wrapped.parameters_to_ignore == (frozen if share else set())
        wrapped(tokens(), labels=tokens()).loss.backward()


def test_pinning_again_keeps_what_is_shared(group):
    model = ktlib.share_experts(adapted())
    shared = DistributedDataParallel(model).parameters_to_ignore
    assert shared and DistributedDataParallel(ktlib.pin_experts(model)).parameters_to_ignore == shared


def test_copies_and_pickles_ask_the_copy():
    model = ktlib.share_experts(tiny_model("deepseek_v2", "ktlib"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.to(SIM).to("cpu")))):
        asked = twin._ddp_params_and_buffers_to_ignore
        assert asked.model is twin and list(asked) == list(model._ddp_params_and_buffers_to_ignore)
