"""Checkpoints with one tensor per expert are used where they lie in their files, with the bits of stacked experts."""

import copy
import io
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import family_models
from support.models import PER_EXPERT, expert_modules, random_adapter, relative_error, tiny_model, tokens
from support.quantised_files import quantise_files
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ktlib
from ktlib.conversion.fuse import fuse_checkpoint
from ktlib.integrations.stored_weight import StoredWeight, is_mapped
from ktlib.integrations.transformers_experts import WEIGHT_NAMES
from ktlib.training.resume import run_identity
from ktlib.training.sft import train_weights

ONE_GRAPH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
MULTIMODAL = ("glm4v_moe", "Glm4vMoeForConditionalGeneration")


def load(folder, **options):
    options = {"dtype": "bfloat16", "experts_implementation": "ktlib"} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def stacked(folder):
    """The same model with ordinary parameters, as transformers stacks them."""
    model = load(folder, experts_implementation="eager")
    model.set_experts_implementation("ktlib")
    assert not is_mapped(model)
    return model


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def with_lora(model, **options):
    torch.manual_seed(0)
    return random_adapter(get_peft_model(model, ktlib.lora_config(model, r=3, **options))).train()


def step(model):
    """``(logits, {name: gradient})`` of one training step."""
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(one, other):
    (logits, gradients), (wanted, wanted_gradients) = step(one), step(other)
    assert torch.equal(logits, wanted) and gradients.keys() == wanted_gradients.keys()
    assert any(".experts." in name for name in gradients)
    assert [name for name in gradients if not torch.equal(gradients[name], wanted_gradients[name])] == []


def mapped_files(folder, weight):
    """Whether every tensor of a mapped weight lies in the map of a file of the folder."""
    spans = []
    for line in open("/proc/self/maps"):
        if f" {folder}/" in line:
            spans.append([int(text, 16) for text in line.split(" ")[0].split("-")])
    addresses = [code.data_ptr() for code in weight.source.codes]
    return all(any(low <= address < high for low, high in spans) for address in addresses)


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PER_EXPERT)
def test_experts_lie_in_their_files_and_train_adapters_with_the_bits_of_stacked_ones(family, tmp_path):
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model, other = load(tmp_path), stacked(tmp_path)
    experts = expert_modules(model)
    assert experts
    for name, module in experts.items():
        for own in WEIGHT_NAMES:
            weight, wanted = getattr(module, own), getattr(other.get_submodule(name), own)
            assert isinstance(weight, torch.nn.Parameter) and isinstance(weight, StoredWeight)
            assert weight.requires_grad and mapped_files(tmp_path, weight), f"{name}.{own} is a copy"
            assert (weight.shape, weight.dtype, weight.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
            assert torch.equal(weight, wanted)
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)
    assert_same_step(with_lora(model), with_lora(other))


def test_a_multimodal_model_is_mapped_too(tmp_path):
    family_models.tiny_model(*MULTIMODAL, dtype=torch.bfloat16).save_pretrained(tmp_path)
    (kind,) = (cls for cls in family_models.model_classes(MULTIMODAL[0]) if cls.__name__ == MULTIMODAL[1])
    model = kind.from_pretrained(tmp_path, dtype="bfloat16", experts_implementation="ktlib")
    other = kind.from_pretrained(tmp_path, dtype="bfloat16")
    other.set_experts_implementation("ktlib")
    weights = [p for p in model.parameters() if isinstance(p, StoredWeight)]
    assert len(weights) == 2 and all(mapped_files(tmp_path, weight) for weight in weights) and not is_mapped(other)
    assert_same_step(with_lora(model), with_lora(other))


@pytest.mark.parametrize(
    "options",
    [
        {"experts_implementation": "grouped_mm"},
        {"dtype": "float32"},
        {"device_map": {"model": "cpu", "lm_head": "meta"}},
    ],
    ids=str,
)
def test_what_the_operator_does_not_take_from_files_is_stacked_as_ever(options, hub):
    assert is_mapped(load(hub)) and is_mapped(load(hub, dtype="auto")) and is_mapped(load(hub, device_map="cpu"))
    assert not is_mapped(load(hub, **options))


def test_files_of_another_dtype_are_stacked(hub, tmp_path):
    shutil.copytree(hub, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(path).items()}, path, {"format": "pt"})
    model = load(tmp_path)
    assert not is_mapped(model) and model.dtype == torch.bfloat16


def test_experts_that_the_operator_does_not_serve_are_stacked(tmp_path):
    tiny_model("qwen3_moe", dtype=torch.bfloat16, hidden_act="relu").save_pretrained(tmp_path)
    assert not is_mapped(load(tmp_path))


def test_an_incomplete_checkpoint_is_reported_as_ever(hub, tmp_path):
    shutil.copytree(hub, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    for name in [name for name in tensors if ".layers.1.mlp.experts.7." in name]:
        del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    found = []
    for implementation in ("eager", "ktlib"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as error:
            load(tmp_path, experts_implementation=implementation)
        found.append(str(error.value))
    assert found[0] == found[1]


def test_files_that_are_deleted_or_replaced_do_no_harm(hub, tmp_path):
    shutil.copytree(hub, tmp_path, dirs_exist_ok=True)
    model = load(tmp_path)
    wanted = stacked(hub)(tokens()).logits
    tiny_model("qwen3_moe", dtype=torch.bfloat16, seed=1).save_pretrained(tmp_path)  # in place of what is mapped
    assert torch.equal(model(tokens()).logits, wanted)
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(model(tokens()).logits, wanted)


# ---- saving, copying, casting ---------------------------------------------------------------------------------------


def test_a_model_is_saved_with_the_bytes_of_a_stacked_one_also_over_its_own_files(hub, tmp_path):
    shutil.copytree(hub, tmp_path / "own")
    model = load(tmp_path / "own")
    stacked(hub).save_pretrained(tmp_path / "wanted")
    wanted = (tmp_path / "wanted" / "model.safetensors").read_bytes()
    for _ in range(2):
        model.save_pretrained(tmp_path / "own")
        assert (tmp_path / "own" / "model.safetensors").read_bytes() == wanted
    with pytest.raises(RuntimeError, match=r"experts\.\w+_proj: an address .*stack_experts"):
        model.save_pretrained(tmp_path / "other", save_original_format=False)


def test_copies_share_the_files_and_pickles_are_plain_tensors(hub):
    model, wanted = load(hub), stacked(hub).state_dict()
    copied = copy.deepcopy(model.requires_grad_(False))
    first, second = (m.model.layers[0].mlp.experts.gate_up_proj for m in (model, copied))
    assert isinstance(second, torch.nn.Parameter) and second.source is first.source and not second.requires_grad
    assert torch.equal(copied(tokens()).logits, model(tokens()).logits)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert state.keys() == wanted.keys() and all(type(value) is torch.Tensor for value in state.values())
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not is_mapped(loaded) and [n for n, _ in loaded.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]


@pytest.mark.parametrize("move", ["float", "half", "meta"])
def test_another_dtype_or_device_makes_ordinary_parameters(move, hub):
    model, wanted = load(hub), stacked(hub)
    moved = [m.to("meta") if move == "meta" else getattr(m, move)() for m in (model, wanted)]
    assert not is_mapped(model)
    for (name, value), (_, other) in zip(*(m.named_parameters() for m in moved), strict=True):
        assert type(value) is torch.nn.Parameter and value.requires_grad, name
        assert (value.dtype, value.device) == (other.dtype, other.device)
        assert value.is_meta or torch.equal(value, other)


def test_the_same_dtype_and_device_copy_nothing(hub):
    model = load(hub)
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    model.to("cpu").to("cpu:0").bfloat16().cpu().train().eval()
    assert model.model.layers[0].mlp.experts.gate_up_proj.source is weight.source


# ---- reading and writing --------------------------------------------------------------------------------------------

READS = {
    "an expert": lambda w: w[3],
    "a negative one": lambda w: w[-1],
    "some experts": lambda w: w[2:5],
    "every second": lambda w: w[::2],
    "no expert": lambda w: w[3:3],
    "by index": lambda w: w[torch.tensor([1, 4])],
    "gates": lambda w: w.chunk(2, dim=1)[0],
    "ups": lambda w: w.chunk(2, dim=-2)[1],
    "some rows": lambda w: w[:, 5:9],
    "parts of rows": lambda w: w.split([40, 40, 16], dim=1)[2],
    "columns": lambda w: w[..., 3:7],
    "transposed": lambda w: w.transpose(1, 2),
    "flat": lambda w: w.flatten()[100:117],
    "a row of an expert": lambda w: w[6][5],
    "squeezed": lambda w: w[2:3].squeeze(0),
    "unbound": lambda w: torch.stack(w.unbind()),
    "bits": lambda w: w.view(torch.int16),
    "joined": lambda w: torch.cat([w, w], dim=1),
    "joined experts": lambda w: torch.cat([w[:2], w[5:]]),
    "bits, and back": lambda w: w.view(torch.int16).to(torch.bfloat16),
    "transposed in memory": lambda w: w.mT.contiguous(),
    "joined matrices": lambda w: torch.cat([w[0, :1], w[1, :1]], dim=1),
    "joined unlike": lambda w: torch.cat([w[:, :4], w], dim=1),
    "numpy": lambda w: torch.from_numpy(w.float().numpy()),
    "list": lambda w: torch.tensor(w.tolist()),
    "sum": lambda w: w.float().sum((1, 2)),
    "product": lambda w: torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16() @ w[4].T,
}


@pytest.fixture(scope="module", params=["bf16", "fp8", "int4, zeros"])
def checkpoint(request, hub, tmp_path_factory):
    if request.param == "bf16":
        return hub
    folder = tmp_path_factory.mktemp("quantised")
    shutil.copytree(hub, folder, dirs_exist_ok=True)
    quantise_files(folder, request.param)
    return folder


@pytest.mark.parametrize("read", READS)
def test_every_reading_gives_the_values(read, checkpoint):
    mapped, plain = (
        model.model.layers[1].mlp.experts.gate_up_proj.detach()
        for model in (load(checkpoint), ktlib.stack_experts(load(checkpoint)))
    )
    assert isinstance(mapped, StoredWeight) and not isinstance(plain, StoredWeight)
    got, wanted = READS[read](mapped), READS[read](plain)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(got.decoded() if isinstance(got, StoredWeight) else got, wanted)


WRITES = {
    "add": lambda w: w.add_(1),
    "an expert": lambda w: w[3].mul_(2),
    "assignment": lambda w: w.__setitem__(0, 1),
    "index": lambda w: w.__setitem__(torch.tensor([0, 2]), 1),
    "gates": lambda w: w.chunk(2, dim=1)[0].zero_(),
    "experts one by one": lambda w: [expert.zero_() for expert in w],
    "flat": lambda w: w.view(-1)[:4].zero_(),
    "transposed": lambda w: w.mT[0, 0].fill_(1),
    "bits": lambda w: w.view(torch.int16).zero_(),
    "many": lambda w: torch._foreach_add_([torch.zeros(1), w], 1),
    "out": lambda w: torch.add(torch.ones_like(w.readable()), 1, out=w),
    "copy": lambda w: w.copy_(torch.zeros(w.shape)),
    "set": lambda w: w.set_(torch.zeros(1).bfloat16()),
    "initialise": lambda w: torch.nn.init.zeros_(w),
    "address": lambda w: w.data_ptr(),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_refused_by_name_and_changes_nothing(write, checkpoint):
    weight = load(checkpoint).model.layers[1].mlp.experts.gate_up_proj
    before = weight.decoded()
    message = r"^model\.layers\.1\.mlp\.experts\.gate_up_proj: .*stays as it is in its checkpoint; call ktlib"
    with pytest.raises(RuntimeError, match=message):
        WRITES[write](weight.detach())
    assert torch.equal(weight, before)


def test_load_state_dict_is_refused_by_name_and_works_on_ordinary_parameters(hub):
    state = stacked(hub).state_dict()
    with pytest.raises(RuntimeError, match=r"gate_up_proj: aten::copy_ needs an ordinary tensor"):
        load(hub).load_state_dict(state)
    ktlib.stack_experts(load(hub)).load_state_dict(state)


def test_other_experts_implementations_compute_with_mapped_weights(hub):
    model, other = load(hub), stacked(hub)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        for one in (model, other):
            one.set_experts_implementation(implementation)
            one.zero_grad()
        assert_same_step(model, other)
    with pytest.raises(RuntimeError, match=r"_proj: .*needs an ordinary tensor"):  # gradients are right, but no use
        torch.optim.SGD(model.parameters(), lr=0.1).step()


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_gradient_of_a_mapped_weight_is_refused_by_name_and_ordinary_parameters_get_it(hub):
    model = load(hub)
    loss = model(tokens(), labels=tokens()).loss  # without a backward pass nothing is in the way
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: requires a gradient, but stays as it is"
    ):
        loss.backward()
    model.requires_grad_(False).model.norm.weight.requires_grad_(True)
    model(tokens(), labels=tokens()).loss.backward()
    assert_same_step(ktlib.stack_experts(load(hub)), stacked(hub))


def test_full_fine_tuning_gets_ordinary_parameters_and_says_so(hub, logged):
    model = train_weights(load(hub), "experts")
    assert ["so expert weights are copied into memory" in text for text in logged()] == [True]
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 4 and all(type(value) is torch.nn.Parameter for value in trained.values())
    step(model)
    torch.optim.AdamW(trained.values(), lr=0.1).step()
    assert not torch.equal(
        model.model.layers[0].mlp.experts.gate_up_proj, load(hub).model.layers[0].mlp.experts.gate_up_proj
    )


def test_stack_experts_keeps_what_requires_gradients_and_leaves_other_models_alone(hub):
    model = load(hub)
    model.model.layers[0].requires_grad_(False)
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    assert ktlib.stack_experts(model) is model and not is_mapped(model)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert torch.equal(model(tokens()).logits, stacked(hub)(tokens()).logits)
    parameters = dict(model.named_parameters())
    ktlib.stack_experts(model)
    assert all(value is parameters[name] for name, value in model.named_parameters())


def test_stock_adapters_are_right_before_and_after_they_are_factored(hub):
    config = {"r": 3, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}
    models = []
    for base in (load(hub), stacked(hub)):
        torch.manual_seed(0)
        models.append(random_adapter(get_peft_model(base, LoraConfig(**config))).train())
    assert_same_step(*models)
    for model in models:
        assert ktlib.factor_adapters(model) == 4
        model.zero_grad()
    assert_same_step(*models)
    assert is_mapped(models[0])


def test_checkpointing_and_dropout_give_the_bits_of_stacked_experts(hub):
    models = []
    for base in (load(hub), stacked(hub)):
        base.gradient_checkpointing_enable()
        models.append(with_lora(base, lora_dropout=0.3))
    got = []
    for model in models:
        torch.manual_seed(4)
        got.append(step(model)[1])
    assert got[0] and all(torch.equal(got[0][name], got[1][name]) for name in got[1])


def test_merging_is_refused_by_name_and_possible_where_memory_is_made_for_it(hub, tmp_path):
    adapted = with_lora(load(hub), target_modules=[])
    wanted = with_lora(stacked(hub), target_modules=[]).merge_and_unload().eval()(tokens()).logits
    assert is_mapped(with_lora(load(hub)).unload())
    with pytest.raises(RuntimeError, match=r"experts\.down_proj: aten::add_.*stack_experts\(model\) first"):
        adapted.merge_and_unload()
    merged = with_lora(ktlib.stack_experts(load(hub)), target_modules=[]).merge_and_unload().eval()
    assert torch.equal(merged(tokens()).logits, wanted)
    safe = with_lora(load(hub), target_modules=[]).merge_and_unload(safe_merge=True).eval()  # assigns to .data
    assert torch.equal(safe(tokens()).logits, wanted) and not is_mapped(safe)


def trainer(hub, folder, **arguments):
    options = {
        "per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_steps": 4, "save_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 3, "logging_steps": 1,
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]
    return Trainer(with_lora(load(hub)), TrainingArguments(folder, **options | arguments), train_dataset=rows)


def test_the_stock_trainer_trains_saves_and_resumes(hub, tmp_path):
    whole = trainer(hub, tmp_path / "whole")
    whole.train()
    resumed = trainer(hub, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert is_mapped(resumed.model)
    wanted = {name: value for name, value in whole.model.named_parameters() if value.requires_grad}
    got = dict(resumed.model.named_parameters())
    assert wanted and all(torch.equal(got[name], value) for name, value in wanted.items())
    config = ktlib.load_lora_config(tmp_path / "whole" / "checkpoint-4")
    loaded = PeftModel.from_pretrained(stacked(hub), tmp_path / "whole" / "checkpoint-4", config=config).eval()
    assert torch.equal(loaded(tokens()).logits, whole.model.eval()(tokens()).logits)
    assert ktlib.audit(tmp_path / "whole" / "checkpoint-4", whole.model.get_base_model().config).clean


def test_a_run_has_the_identity_that_it_has_with_fused_experts(hub, tmp_path):
    fused = load(fuse_checkpoint(hub, tmp_path / "fused", progress=False))
    assert run_identity(load(hub), []) == run_identity(fused, []) == run_identity(stacked(hub), [])


# ---- the rest of ktlib ----------------------------------------------------------------------------------------------


def test_sharing_pinning_and_placing_keep_the_files(hub):
    wanted = stacked(hub)(tokens()).logits
    for prepare in (ktlib.pin_experts, ktlib.share_experts, lambda model: ktlib.place_experts(model, parts=3)):
        model = prepare(load(hub)).to("cpu:0")
        weights = [p for p in model.parameters() if isinstance(p, StoredWeight)]
        assert len(weights) == 4 and all(mapped_files(hub, weight) for weight in weights)
        assert torch.equal(model(tokens()).logits, wanted)
    shared = ktlib.share_experts(load(hub).requires_grad_(False))
    assert len([name for name in shared._ddp_params_and_buffers_to_ignore if ".experts." in name]) == 4


def test_place_experts_moves_the_pages_of_the_files(hub, monkeypatch):
    from ktlib.placement import numa

    placed = []
    monkeypatch.setattr(numa._kernels, "place_pages", lambda address, size, node: placed.append((address, size)))
    model = ktlib.place_experts(load(hub), parts=2)
    weights = [p for p in model.parameters() if isinstance(p, StoredWeight)]
    starts = {code.data_ptr(): code.nbytes for weight in weights for code in weight.source.codes}
    assert sum(size for _, size in placed) == sum(starts.values())
    assert starts.keys() <= {address for address, _ in placed}


def test_streaming_stacks_the_experts_and_says_so(hub, logged):
    model = ktlib.pin_experts(load(hub).requires_grad_(False), stream_rows=8)
    assert not is_mapped(model) and torch.equal(model(tokens()).logits, stacked(hub)(tokens()).logits)
    assert ["stream_rows needs fused experts, so they are stacked in memory" in text for text in logged()] == [True]


def test_the_tracer_names_a_bad_value_of_a_mapped_weight(hub, tmp_path):
    shutil.copytree(hub, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    for expert in range(8):
        tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"][2, 5] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    found = []
    for model in (load(tmp_path), stacked(tmp_path)):
        with pytest.raises(Exception, match="experts") as error, ktlib.trace_nonfinite(model):
            model(tokens())
        found.append(str(error.value))
    assert found[0] == found[1] and "gate_up_proj" in found[0]


def test_a_compiled_model_computes_the_same(tmp_path):
    torch._dynamo.reset()
    tiny_model("olmoe", dtype=torch.bfloat16, num_hidden_layers=1).save_pretrained(tmp_path)
    model = with_lora(load(tmp_path), target_modules=[])
    logits, gradients = step(model)
    model.zero_grad()
    got, got_gradients = step(torch.compile(model, backend="aot_eager", fullgraph=ONE_GRAPH))
    torch._dynamo.reset()
    assert is_mapped(model) and relative_error(got, logits) < 1e-2
    wanted = {f"_orig_mod.{name}": gradient for name, gradient in gradients.items()}
    assert got_gradients.keys() == wanted.keys() and any(".experts." in name for name in wanted)
    assert all(relative_error(got_gradients[name], wanted[name]) < 2e-2 for name in wanted)


def test_offloading_by_accelerate_is_refused_by_name(hub):
    from accelerate import cpu_offload, dispatch_model

    model = dispatch_model(load(hub), {"": "cpu"})
    assert is_mapped(model) and torch.equal(model(tokens()).logits, stacked(hub)(tokens()).logits)
    with pytest.raises(RuntimeError, match=r"stays in its checkpoint's file and cannot be offloaded"):
        cpu_offload(load(hub), "cpu")
