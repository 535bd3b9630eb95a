"""lora_dropout on routed experts through PEFT: its numbers, its files, when it is on, and where it is refused."""

import functools
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.models import FAMILIES, random_adapter, relative_error, tiny_model, tokens
from test_compile import ONE_GRAPH
from test_lora import FORWARD_BOUND, GRADIENT_BOUND, chosen_experts, gradients

import ktlib
from ktlib import reference
from ktlib.diagnosis.trace import NonFinite
from ktlib.integrations import transformers_experts
from ktlib.integrations.peft_lora import ParamWrapper, lora_config
from ktlib.lab import hybrid
from ktlib.lab.validation import evaluate, in_float64, random_layer

P = 0.3


def adapted(family="deepseek_v2", p=P, **options):
    """A tiny model in training mode with random adapters on everything and dropout on all of them."""
    model = tiny_model(family, "ktlib")
    return random_adapter(get_peft_model(model, lora_config(model, **{"r": 4, "lora_dropout": p} | options))).train()


def seeded(model, run=gradients, seed=7, **arguments):
    torch.manual_seed(seed)
    return run(model, **arguments)


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def assert_same(got, wanted):
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.compatible("LoRA dropout on routed experts: eight families")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient_agree_with_the_reference(family, monkeypatch):
    """The same model with float64 experts that have the same masks; PEFT's own dropout everywhere else."""
    model = adapted(family)

    def in_float64(hidden_states, *arguments, parts, stream_rows, **options):
        options["dropout_seed"] = torch.randint(2**63 - 1, ())  # as the operator draws it
        return reference.moe_experts(hidden_states, *arguments, **options).to(hidden_states.dtype)

    for seed in range(4):  # the first of them with no token so near between two experts that rounding decides
        ids = tokens(seed=seed)
        with monkeypatch.context() as patch:
            forward = functools.partial(seeded, run=logits, ids=ids)
            (routed, got_logits), got = chosen_experts(model, forward), seeded(model, ids=ids)
            patch.setattr(transformers_experts, "moe_experts", in_float64)
            (reference_routed, wanted_logits), wanted = chosen_experts(model, forward), seeded(model, ids=ids)
        if all(torch.equal(routed[name], reference_routed[name]) for name in routed):
            break
    assert relative_error(got_logits, wanted_logits) < FORWARD_BOUND
    assert got.keys() == wanted.keys() and any(".experts." in name for name in got)
    assert {n: e for n in got if (e := relative_error(got[n], wanted[n])) >= GRADIENT_BOUND and ".lora_" in n} == {}
    assert relative_error(logits(model.eval(), ids), wanted_logits) > 4 * FORWARD_BOUND, "there was no dropout"


class DropoutWithMask(torch.nn.Module):
    """Replaces PEFT's dropout: its mask is given, not drawn."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask / (1 - P)


def test_the_reference_is_stock_lora_with_these_masks():
    """Stock PEFT on one nn.Linear per expert and projection, with masks of the reference in its dropout."""
    num_experts, hidden, intermediate, rank, top_k = 3, 10, 8, 2, 2
    layer = in_float64(
        random_layer("trained", tokens=7, experts=num_experts, top_k=top_k, hidden=hidden, intermediate=intermediate,
                     rank=rank)
    )  # fmt: skip
    got = evaluate(reference.moe_experts, layer, lora_dropout=P, dropout_seed=11)

    sizes = {"gate_up": (hidden, 2 * intermediate), "down": (intermediate, hidden)}
    modules = torch.nn.ModuleDict(
        {
            f"{name}_{e}": torch.nn.Linear(*size, bias=False, dtype=torch.float64)
            for name, size in sizes.items()
            for e in range(num_experts)
        }
    )
    linears = get_peft_model(modules, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules))).base_model

    def stock(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_lora, down_lora):
        output = torch.zeros_like(hidden_states)
        for e in range(num_experts):
            token, slot = torch.where(top_k_index == e)
            projections = []
            for projection, (name, weight, (lora_A, lora_B, _)) in enumerate(
                (("gate_up", gate_up_proj, gate_up_lora), ("down", down_proj, down_lora))
            ):
                linear = linears.model[f"{name}_{e}"]
                mask = reference.keep_mask(11, P, projection, token * top_k + slot, sizes[name][0])
                linear.lora_dropout["default"] = DropoutWithMask(mask)
                tensors = {
                    "base_layer.weight": weight[e],
                    "lora_A.default.weight": lora_A.reshape(num_experts, rank, -1)[e],
                    "lora_B.default.weight": lora_B.reshape(-1, rank, num_experts)[:, :, e],
                }
                projections.append(lambda x, f=linear, t=tensors: torch.func.functional_call(f, t, (x,)))
            gate, up = projections[0](hidden_states[token]).chunk(2, dim=-1)
            h = torch.nn.functional.silu(gate) * up
            output = output.index_add(0, token, projections[1](h) * top_k_weights[token, slot, None])
        return output

    want = evaluate(stock, layer)  # its p has more than 32 bits
    assert {name: e for name in want if (e := relative_error(got[name], want[name])) > 1e-9} == {}


def test_shared_experts_by_their_weight_drop_as_a_linear_does():
    """PEFT adapts them as parameters, without dropout; the factored path computes them as linear layers."""
    model = adapted()
    wrapper = model.base_model.model.model.layers[1].mlp.shared_experts.gate_proj
    x, (lora_A, lora_B, scaling) = torch.randn(5, 64), wrapper.factors()
    torch.manual_seed(1)
    got = wrapper(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, P)
    assert torch.equal(got, wrapper.base_layer(x) + dropped @ lora_A.T @ lora_B.T * scaling)
    assert isinstance(wrapper, ParamWrapper) and not torch.equal(got, wrapper.eval()(x))


# ------------------------------------------------------------------------------------------------ when it is on


def test_training_drops_and_evaluation_does_not():
    model, plain = adapted(), adapted(p=0.0)
    first, again, other = seeded(model, logits), seeded(model, logits), seeded(model, logits, seed=8)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, logits(plain)) and torch.equal(logits(model.eval()), logits(plain))
    model.train()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(model))
    model.merge_adapter()
    assert torch.equal(logits(model), logits(model)), "merged weights have nothing to drop from"
    model.unmerge_adapter()


@pytest.mark.parametrize("options", [{"target_modules": []}, {"target_parameters": ["experts.down_proj"]}])
def test_on_a_subset(options):
    model = adapted("qwen3_moe", **options)
    assert not torch.equal(seeded(model, logits), seeded(model, logits, seed=8))
    assert torch.equal(logits(model.eval()), logits(adapted("qwen3_moe", p=0.0, **options)))


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "all but experts"])
def test_gradient_checkpointing_repeats_the_masks(kind):
    model = adapted()
    model.enable_input_require_grads()
    wanted = seeded(model)
    if kind == "all but experts":
        hybrid.checkpoint_all_but_experts(model)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    assert_same(seeded(model), wanted)


def test_compiled_models_draw_in_every_step():
    model = adapted("olmoe", target_modules=[])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=ONE_GRAPH)

    def steps(forward):
        torch.manual_seed(7)
        return [forward(input_ids=tokens()).logits.detach() for _ in range(2)]

    got, wanted = steps(compiled), steps(model)
    assert all(relative_error(*both) < 1e-3 for both in zip(got, wanted, strict=True))
    assert relative_error(got[0], got[1]) > 1e-2
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ several adapters


def test_each_adapter_has_its_own_dropout():
    model = adapted("qwen3_moe", target_modules=[])
    model.add_adapter("other", lora_config(model, r=4, lora_dropout=0.6, target_modules=[]))
    model.add_adapter("none", lora_config(model, r=4, lora_dropout=0.0, target_modules=[]))
    random_adapter(model)
    for name, p in (("default", P), ("other", 0.6), ("none", 0.0)):
        model.set_adapter(name)
        assert {wrapper._expert_dropout() for wrapper in wrappers(model)} == {p}
        assert torch.equal(logits(model), logits(model)) == (name == "none")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="lora_dropout: got 0.6 with adapters default, other active at once"):
        logits(model)
    logits(model.eval())


def test_two_probabilities_on_the_same_experts_are_refused():
    model = adapted()
    model.base_model.model.model.layers[1].mlp.experts.lora_dropout["default"].p = 0.2
    with pytest.raises(ValueError, match="lora_dropout: got 0.3 on gate_up_proj and 0.2 on the other weight"):
        logits(model)


# ------------------------------------------------------------------------------------------------ where it cannot be


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_other_implementations_refuse_to_train_with_it(implementation):
    model = adapted()
    model.get_base_model().set_experts_implementation(implementation)
    words = f"lora_dropout: 0.3 on .*_proj needs .* the experts implementation is '{implementation}'"
    with pytest.raises(RuntimeError, match=words):
        logits(model)
    if implementation == "grouped_mm":
        assert torch.isfinite(logits(model.eval())).all()


def test_unserved_experts_refuse_to_train_with_it():
    model = tiny_model("olmoe", "ktlib", experts_dtype=torch.float32)
    model = get_peft_model(model, lora_config(model, r=4, lora_dropout=P))
    with pytest.raises(RuntimeError, match="lora_dropout: 0.3 on .*needs ktlib's operator, but .* is torch.float32"):
        logits(model.train())


def test_other_parameters_are_left_to_stock_peft_which_refuses():
    model = tiny_model("olmoe", "ktlib")
    config = lora_config(model, target_modules=[], target_parameters=["mlp.gate.weight"], lora_dropout=P)
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        get_peft_model(model, config)


@pytest.mark.parametrize("value, error", [(-0.1, ValueError), (1.0, ValueError), (float("nan"), ValueError),
                                          ("0.1", TypeError), (True, TypeError)])  # fmt: skip
def test_what_is_no_probability_is_refused(value, error):
    with pytest.raises(error, match="lora_dropout: got"):
        lora_config(tiny_model("olmoe"), lora_dropout=value)


def test_the_tracer_says_that_it_looked_without_dropout(monkeypatch):
    model = adapted()
    compute = transformers_experts.moe_experts
    monkeypatch.setattr(transformers_experts, "moe_experts", lambda *a, **o: compute(*a, **o) * float("nan"))
    with (
        pytest.raises(NonFinite, match="in plain torch without dropout: look for memory"),
        ktlib.trace_nonfinite(model),
    ):
        model(tokens())


# ------------------------------------------------------------------------------------------------ files


def test_files_load_in_stock_peft_and_keep_the_value(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "first")

    def settings(folder):
        read = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        return read | {"target_modules": sorted(read["target_modules"])}

    saved = settings("first")
    assert saved["lora_dropout"] == 0.0 and saved["ktlib_lora_dropout"] == P
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['ktlib_lora_dropout'\]"):
        stock = PeftModel.from_pretrained(tiny_model("deepseek_v2"), tmp_path / "first")
    assert relative_error(logits(stock), logits(model.eval())) < FORWARD_BOUND

    config = ktlib.load_lora_config(tmp_path / "first")
    assert isinstance(config, LoraConfig) and config.lora_dropout == P
    back = PeftModel.from_pretrained(
        tiny_model("deepseek_v2", "ktlib"), tmp_path / "first", config=config, is_trainable=True
    )
    assert_same(seeded(back.train()), seeded(model.train()))
    back.save_pretrained(tmp_path / "second")
    assert settings("second") == saved


def test_settings_of_adapters_without_dropout(tmp_path):
    model = adapted(p=0.0)
    model.save_pretrained(tmp_path)
    assert "ktlib" not in (tmp_path / "adapter_config.json").read_text()
    config = ktlib.load_lora_config(tmp_path)
    assert type(config) is LoraConfig and config.lora_dropout == 0.0
    back = PeftModel.from_pretrained(tiny_model("deepseek_v2", "ktlib"), tmp_path, config=config, is_trainable=True)
    assert len(wrappers(back)) == 2 + 6, "on the fast path at once"
    assert_same(gradients(back), gradients(model))


def test_settings_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        ktlib.load_lora_config(tmp_path)
    for settings, words in (
        ({"peft_type": "IA3"}, "peft_type of the adapter in .* is 'IA3', needs 'LORA'"),
        ({"peft_type": "LORA", "ktlib_lora_dropout": 1.5}, "ktlib_lora_dropout: got 1.5"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=words):
            ktlib.load_lora_config(tmp_path)


def test_conversions_keep_the_value(tmp_path):
    model = adapted("qwen3_moe")
    model.save_pretrained(tmp_path / "fused")
    config = model.get_base_model().config
    ktlib.export_adapter(tmp_path / "fused", tmp_path / "apart", config)
    ktlib.import_adapter(tmp_path / "apart", tmp_path / "again", config)
    for folder in ("apart", "again"):  # stock PEFT makes parameters of a file with modules per expert
        settings = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert settings["lora_dropout"] == 0.0 and settings["ktlib_lora_dropout"] == P
        PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path / folder)
