"""The seam into transformers: every family through the operator, and a stock implementation where it cannot serve."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.models import FAMILIES, expert_modules, relative_error, tiny_config, tiny_model, tokens

import ktlib
from ktlib.integrations import transformers_experts

U = 2.0**-9  # rounding to bf16, relative
# Rounding points add up in quadrature: at most 4 per MoE layer in forward, and 12 more in backward; two layers.
FORWARD_BOUND = U * (4 * 2) ** 0.5
GRADIENT_BOUND = U * (16 * 2) ** 0.5


@pytest.fixture
def calls(monkeypatch):
    """The calls of the operator: (positional arguments, keyword arguments) each."""
    seen, operator = [], transformers_experts.moe_experts

    def counted(*args, **kwargs):
        seen.append((args, kwargs))
        return operator(*args, **kwargs)

    monkeypatch.setattr(transformers_experts, "moe_experts", counted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_the_operator(family, calls, logged):
    ours, stock = tiny_model(family, "ktlib"), tiny_model(family)
    logits = ours(tokens()).logits
    assert not logged()
    assert len(calls) == len(expert_modules(ours)) > 0
    assert relative_error(logits, stock(tokens()).logits) < FORWARD_BOUND


def test_from_pretrained_is_all_it_takes(tmp_path, calls):
    tiny_model("deepseek_v2", dtype=torch.bfloat16).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours = load(tmp_path, experts_implementation="ktlib", dtype=torch.bfloat16).requires_grad_(False)
    stock = load(tmp_path, experts_implementation="eager", dtype=torch.float32)
    reference = stock(tokens()).logits
    # 12 more rounding points per layer and the head: everything around the experts is bf16 here
    bound = U * (16 * 2 + 1) ** 0.5
    assert relative_error(ours(tokens()).logits, reference) < bound
    assert len(calls) == 1

    switched = load(tmp_path, experts_implementation="eager", dtype=torch.bfloat16).requires_grad_(False)
    switched.set_experts_implementation("ktlib")
    assert torch.equal(switched(tokens()).logits, ours(tokens()).logits)
    assert len(calls) == 3


@pytest.mark.parametrize("first", ["", "import transformers.integrations.moe", "import transformers.modeling_utils"])
def test_registers_in_any_order_of_imports(first):
    # an empty package with the same path, so that only this module and what it needs is imported
    script = f"""
import sys, types
{first}
package = sys.modules["ktlib"] = types.ModuleType("ktlib")
package.__path__ = {list(ktlib.__path__)!r}
import ktlib.integrations.registration
for heavy in ("transformers", "torch._dynamo"):
    assert {bool(first)} or heavy not in sys.modules, f"the import must not pay for {{heavy}}"
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert ALL_EXPERTS_FUNCTIONS["ktlib"] is ktlib.integrations.transformers_experts.experts_forward
from transformers.modeling_utils import convert_and_load_state_dict_in_model
assert convert_and_load_state_dict_in_model.__globals__["__name__"] == "ktlib.integrations.mapped_experts"
assert not any("OnImport" in type(finder).__name__ for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def set_activation(module, activation):
    del module.act_fn  # a function cannot replace a submodule otherwise
    module.act_fn = activation


def test_gate_is_recognised_by_its_values():
    model = tiny_model("qwen3_moe", "ktlib")
    (_, module), *_ = expert_modules(model).items()

    def gate():
        found = transformers_experts.gate_of(module)
        return found and (found["gate"], found["limit"])

    F = torch.nn.functional
    assert gate() == ("silu", None)
    for activation in (F.silu, torch.nn.SiLU(), lambda x: x * torch.sigmoid(x)):
        set_activation(module, activation)
        assert gate() == ("silu", None)
    for activation in (torch.relu, lambda x: F.silu(x).clamp(max=7), lambda x: F.silu(x.clamp(max=7)), torch.tanh):
        set_activation(module, activation)
        assert gate() is None
    known = [(F.gelu, "gelu"), (torch.nn.GELU("tanh"), "gelu_tanh"), (torch.nn.SiLU(), "silu"), (F.gelu, "gelu")]
    for activation, name in known:
        set_activation(module, activation)
        assert gate() == (name, None)


def test_a_gate_that_can_be_trained_is_left_to_stock():
    class Swish(torch.nn.Module):
        """SiLU, until beta is trained."""

        def __init__(self):
            super().__init__()
            self.beta = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * torch.sigmoid(self.beta * x)

    (_, module), *_ = expert_modules(tiny_model("qwen3_moe", "ktlib")).items()
    set_activation(module, Swish())
    assert transformers_experts.gate_of(module) is None


def test_a_patched_gate_is_recognised_by_its_values(monkeypatch):
    (_, module), *_ = expert_modules(tiny_model("qwen3_moe", "ktlib")).items()
    assert transformers_experts.gate_of(module)["gate"] == "silu"

    def clamped(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate.clamp(max=self.bound)) * up.clamp(-self.bound, self.bound)

    module.bound = 0.3
    for function, found in (
        (lambda self, gate_up: gate_up.chunk(2, dim=-1)[0], None),
        (lambda self, gate_up: gate_up.chunk(2, dim=-1)[1] * self.act_fn(gate_up.chunk(2, dim=-1)[0]), ("silu", None)),
        (clamped, ("gelu", 0.3)),
    ):
        monkeypatch.setattr(type(module), "_apply_gate", function)
        gate = transformers_experts.gate_of(module)
        assert (gate and (gate["gate"], gate["limit"])) == found
    module.bound = 11.5  # a setting that changes is noticed
    assert transformers_experts.gate_of(module)["limit"] == 11.5


def test_a_changed_activation_is_noticed(calls, logged):
    ours, stock = tiny_model("qwen3_moe", "ktlib"), tiny_model("qwen3_moe")
    silu = ours(tokens()).logits
    served = len(calls)
    for module in (*expert_modules(ours).values(), *expert_modules(stock).values()):
        set_activation(module, torch.tanh)
    other = ours(tokens()).logits
    (line,) = logged()
    assert "Qwen3MoeExperts: using transformers' grouped_mm experts instead of ktlib: its gate is none of" in line
    assert len(calls) == served
    assert relative_error(other, stock(tokens()).logits) < 2 * FORWARD_BOUND
    assert relative_error(silu, other) > 10 * FORWARD_BOUND


def test_a_method_gate_is_noticed(calls, logged):
    model = tiny_model("olmoe", "ktlib")
    model(tokens())
    served = len(calls)
    for module in expert_modules(model).values():
        module._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[1]
    model(tokens())
    assert len(logged()) == 1 and "its gate is none of" in logged()[0]
    assert len(calls) == served


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda name: tiny_model("olmoe", name, experts_dtype=torch.float32), "gate_up_proj is torch.float32"),
        (lambda name: tiny_model("olmoe", name, experts_dtype=torch.float32, intermediate_size=30), "eager experts"),
        (lambda name: tiny_model("gpt_oss", name, experts_dtype=torch.float32), "gate_up_proj is torch.float32"),
    ],
)
def test_unserved_experts_run_stock_with_one_line_in_the_log(build, reason, calls, logged):
    """One warning for all layers of a model, and one for each model."""
    for number in (1, 2):
        ours, stock = build("ktlib"), build("eager")
        logits = ours(tokens()).logits
        ours(tokens())
        assert len(logged()) == number and reason in logged()[-1]
    assert not calls
    assert relative_error(logits, stock(tokens()).logits) < 1e-5


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"has_gate": False}, "no gate"),
        ({"has_post_expert_norm": True}, "norm"),
        ({"_is_expert_parallel": True}, "distributed"),
    ],
)
def test_reasons(change, reason):
    (_, module), *_ = expert_modules(tiny_model("olmoe", "ktlib")).items()
    hidden_states = torch.zeros(1, 64)
    assert transformers_experts.unserved(module, hidden_states) is None
    for name, value in change.items():
        setattr(module, name, value)
    assert reason in transformers_experts.unserved(module, hidden_states)


def test_reasons_in_the_biases():
    (_, module), *_ = expert_modules(tiny_model("gpt_oss", "ktlib")).items()
    assert transformers_experts.unserved(module, torch.zeros(1, 64)) is None
    module.down_proj_bias.data = module.down_proj_bias.data.half()
    assert "down_proj_bias is torch.float16" in transformers_experts.unserved(module, torch.zeros(1, 64))


def test_reasons_in_the_tensors():
    (_, module), *_ = expert_modules(tiny_model("olmoe", "ktlib")).items()
    assert "float16" in transformers_experts.unserved(module, torch.zeros(1, 64, dtype=torch.float16))
    module.down_proj.data = module.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert "down_proj is not contiguous" in transformers_experts.unserved(module, torch.zeros(1, 64))
    module.down_proj = torch.nn.Parameter(module.down_proj.to("meta"), requires_grad=False)
    assert "down_proj is on meta" in transformers_experts.unserved(module, torch.zeros(1, 64))


def test_factors_for_unserved_experts_are_an_error():
    (_, module), *_ = expert_modules(tiny_model("olmoe", "ktlib", experts_dtype=torch.float32)).items()
    routing = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2)
    factors = torch.zeros(8, 64), torch.zeros(96, 8), 1.0
    with pytest.raises(RuntimeError, match="OlmoeExperts, which ktlib does not serve: gate_up_proj is torch.float32"):
        transformers_experts.experts_forward(module, torch.zeros(1, 64), *routing, gate_up_lora=factors)


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [sys.argv[1]]
from support.models import tiny_model, tokens
from peft import get_peft_model
import ktlib, torch
model = tiny_model("qwen3_moe", "ktlib", experts_dtype=torch.float32, num_hidden_layers=3)
model = get_peft_model(model, ktlib.lora_config(model, r=2)).train()
for _ in range(2):
    model(tokens(), labels=tokens()).loss.backward()
"""


def test_a_model_in_fp32_says_once_what_to_do_also_where_warnings_are_ignored():
    """As TRL loads it if it is not told a dtype; six weights with adapters."""
    command = [sys.executable, "-c", SCRIPT, Path(__file__).parents[1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (line,) = [line for line in done.stderr.splitlines() if "ktlib" in line]
    assert line == (
        "ktlib: Qwen3MoeExperts: using transformers' grouped_mm experts instead of ktlib: gate_up_proj is "
        "torch.float32, the operator takes torch.bfloat16: load the model with dtype='bfloat16' (for TRL to do it: "
        "model_init_kwargs={'dtype': 'bfloat16'})"
    )


def test_gradients_without_adapters():
    ours, stock = tiny_model("deepseek_v2", "ktlib"), tiny_model("deepseek_v2")
    for model in (ours, stock):
        model(tokens(), labels=tokens()).loss.backward()
    wanted = dict(stock.named_parameters())
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    errors = {name: relative_error(p.grad, wanted[name].grad) for name, p in trained.items()}
    assert "model.layers.1.mlp.gate.weight" in errors
    assert max(errors.values()) < GRADIENT_BOUND, errors


def test_full_fine_tuning_of_experts():
    ours, stock = tiny_model("deepseek_v2", "ktlib").requires_grad_(True), tiny_model("deepseek_v2")
    ours(tokens(), labels=tokens()).loss.backward()
    stock(tokens(), labels=tokens()).loss.backward()
    for (name, got), want in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert relative_error(got.grad, want.grad) < 2 * GRADIENT_BOUND, name


def test_autocast():
    ours, stock = tiny_model("deepseek_v2", "ktlib"), tiny_model("deepseek_v2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = ours(tokens()).logits
    assert relative_error(logits, stock(tokens()).logits) < U * (16 * 2 + 1) ** 0.5


def test_generate_with_cache_is_generate_without():
    model = tiny_model("deepseek_v2", "ktlib")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(tokens(), **options)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **options))
    assert torch.equal(cached, tiny_model("deepseek_v2").generate(tokens(), **options))


def test_an_unknown_implementation_is_still_an_error():
    with pytest.raises(ValueError, match="ktlib"):
        transformers.AutoModelForCausalLM.from_config(tiny_config("olmoe"), experts_implementation="ktlip")
