"""The seam into PEFT: factored expert adapters are stock adapters, in numbers, in files and in every state."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from support.models import FAMILIES, expert_modules, random_adapter, relative_error, tiny_model, tokens

from ktlib.integrations import transformers_experts as experts
from ktlib.integrations.peft_lora import ParamWrapper, factor_adapters, lora_config

U = 2.0**-9  # rounding to bf16, relative
# Rounding points add up in quadrature: at most 4 per MoE layer in forward, and 12 more in backward; two layers.
FORWARD_BOUND = U * (4 * 2) ** 0.5
GRADIENT_BOUND = U * (16 * 2) ** 0.5
OPTIONS = ("r", "lora_alpha", "target_modules", "target_parameters", "use_rslora", "rank_pattern", "alpha_pattern")


@pytest.fixture(autouse=True)
def fallbacks(logged):
    """The lines that ktlib must log in the test, by a substring of each: none, unless the test appends to the list."""
    expected = []
    yield expected
    lines = logged()
    assert len(lines) == len(expected) and all(text in line for text, line in zip(expected, lines, strict=True)), lines


def stock_twin(config):
    """The same adapter as PEFT alone would make it."""
    return LoraConfig(**{name: copy.deepcopy(getattr(config, name)) for name in OPTIONS})


def pair(family="deepseek_v2", adapt=random_adapter, **options):
    """The factored model with bf16 experts in the operator, and its fp32 stock twin with equal weights."""
    ours, stock = tiny_model(family, "ktlib"), tiny_model(family)
    config = lora_config(ours, **{"r": 4, **options})
    twin = stock_twin(config)
    return adapt(get_peft_model(ours, config)), adapt(get_peft_model(stock, twin))


def assert_close(ours, stock, bound=FORWARD_BOUND, **kwargs):
    assert relative_error(ours(tokens(), **kwargs).logits, stock(tokens(), **kwargs).logits) < bound


def gradients(model, ids=None, **kwargs):
    """``{name: gradient}`` of one step on the given tokens."""
    ids = tokens() if ids is None else ids
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def chosen_experts(model, run):
    """Sorted top-k indices of every MoE layer during ``run(model)``."""
    seen, hooks = {}, []
    for name, module in expert_modules(model).items():
        hooks.append(
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[1].sort(-1).values}))
        )
    result = run(model)
    for hook in hooks:
        hook.remove()
    return seen, result


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.compatible("LoRA on all of a model: eight families")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient_agree_with_stock(family):
    ours, stock = pair(family)
    for model in (ours, stock):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(("experts.base_layer.base_layer.gate_up_proj", "down_proj")))
    ids = tokens()
    routed, output = chosen_experts(ours, lambda model: model(ids, labels=ids))
    stock_routed, wanted = chosen_experts(stock, lambda model: model(ids, labels=ids))
    assert routed and routed.keys() == stock_routed.keys()
    assert all(torch.equal(routed[name], stock_routed[name]) for name in routed), "the tokens took other experts"
    assert relative_error(output.logits, wanted.logits) < FORWARD_BOUND

    output.loss.backward()
    wanted.loss.backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    errors = {name: relative_error(p.grad, expected[name]) for name, p in ours.named_parameters() if p.requires_grad}
    assert errors.keys() == expected.keys()
    assert sum(".experts." in name and ".lora_" in name for name in errors) == 4 * len(routed)
    assert any(name.endswith(("mlp.gate.weight", "mlp.router.weight")) for name in errors)
    # Biases and sinks (gpt-oss): sums over all tokens, in which most of the gradient cancels.
    beyond = {n: e for n, e in errors.items() if e >= GRADIENT_BOUND * (4 if n.endswith(("bias", "sinks")) else 1)}
    assert beyond == {}


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"experts.gate_up_proj": 7, "q_proj": 2}, "alpha_pattern": {"experts.down_proj": 3}},
        {"rank_pattern": {r"shared_experts\.gate_proj": 3}},
        {"r": 1, "lora_alpha": 5},
    ],
)
def test_ranks_and_scalings(options):
    ours, stock = pair(**options)
    assert_close(ours, stock)
    shapes = {name: p.shape for name, p in ours.named_parameters() if ".lora_" in name}
    assert shapes == {name: p.shape for name, p in stock.named_parameters() if ".lora_" in name}
    ranks = {name.split("mlp.")[-1]: shape[0] for name, shape in shapes.items() if "1.mlp" in name and "lora_A" in name}
    if "use_rslora" in options:
        assert ours.base_model.model.model.layers[1].mlp.experts.scaling["default"] == 16 / 4**0.5
    elif "alpha_pattern" in options:
        assert ranks["experts.base_layer.lora_A.default.weight"] == 7 * 8
        assert ours.base_model.model.model.layers[1].mlp.experts.scaling["default"] == 3 / 4
    elif "rank_pattern" in options:
        assert ranks["shared_experts.gate_proj.lora_A.default.weight"] == 3
        assert ranks["shared_experts.up_proj.lora_A.default.weight"] == 4


@pytest.mark.compatible("ranks and alphas by layer, adapters on a subset")
@pytest.mark.parametrize(
    "options, ranks",
    [
        ({"target_parameters": ["experts.down_proj"]}, {(0, "down_proj"): 4, (1, "down_proj"): 4}),
        ({"target_parameters": ["experts.gate_up_proj"]}, {(0, "gate_up_proj"): 4, (1, "gate_up_proj"): 4}),
        ({"target_parameters": ["layers.1.mlp.experts.down_proj"]}, {(1, "down_proj"): 4}),
        (
            {"target_parameters": ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]},
            {(0, "gate_up_proj"): 4, (1, "down_proj"): 4},
        ),
        (
            {
                "rank_pattern": {"layers.0.mlp.experts.gate_up_proj": 7, r"layers\.1\.mlp\.experts\.down_proj": 1},
                "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 3},
            },
            {(0, "gate_up_proj"): 7, (0, "down_proj"): 4, (1, "gate_up_proj"): 4, (1, "down_proj"): 1},
        ),
    ],
)
def test_subsets_and_patterns_by_layer(options, ranks):
    """Adapters on some projections, on some layers, with other ranks and alphas: stock numbers on the fast path."""
    ours, stock = pair("qwen3_moe", **options)
    found = {}
    for name, module in ours.named_modules():
        if isinstance(module, ParamWrapper) and module.get_param().dim() == 3:
            layer = int(name.split("layers.")[1].split(".")[0])
            found[layer, module.parameter_name] = module.factors()[0].shape[0] // module.get_param().shape[0]
            if "alpha_pattern" in options:
                alpha = 3 if (layer, module.parameter_name) == (1, "gate_up_proj") else 16
                assert module.factors()[2] == alpha / found[layer, module.parameter_name]
    assert found == ranks
    ids = tokens(seed=1)  # no token of these is so near between two experts that rounding decides
    routed, got = chosen_experts(ours, lambda model: model(ids).logits)
    stock_routed, wanted = chosen_experts(stock, lambda model: model(ids).logits)
    assert all(torch.equal(one, other) for one, other in zip(routed.values(), stock_routed.values(), strict=True))
    assert relative_error(got, wanted) < FORWARD_BOUND
    got, wanted = gradients(ours, ids), gradients(stock, ids)
    experts = [name for name in got if ".experts." in name]
    assert len(experts) == 2 * len(ranks)
    assert max(relative_error(got[name], wanted[name]) for name in got if ".lora_" in name) < GRADIENT_BOUND


def test_adapters_matter():
    """The bounds above are far below the error of a lost or transposed adapter or of a wrong scaling."""
    ours, _ = pair()
    logits = ours(tokens()).logits
    module = ours.base_model.model.model.layers[1].mlp.experts
    for layer in (module, module.base_layer):
        layer.scaling["default"] *= 1.5  # read at every call
        assert relative_error(ours(tokens()).logits, logits) > 4 * FORWARD_BOUND
        layer.scaling["default"] /= 1.5
        assert torch.equal(ours(tokens()).logits, logits)


@pytest.mark.parametrize(
    "matrix, shape", [("lora_A", (4 * 8 + 1, 48)), ("lora_A", (4 * 8, 47)), ("lora_B", (64, 16 * 8))]
)
def test_factors_of_wrong_shape_are_errors(matrix, shape):
    ours, _ = pair()
    module = ours.base_model.model.model.layers[1].mlp.experts
    getattr(module, matrix)["default"].weight = torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match="adapter 'default' of down_proj: got lora_A"):
        ours(tokens())


# ------------------------------------------------------------------------------------------------ dtypes


def assert_as_good_as_stock(ours, stock, reference, run):
    """Errors against the fp32 reference are at most 25 % larger than those of stock PEFT at the same precision."""
    got, peer, wanted = run(ours), run(stock), run(reference)
    assert got.keys() == peer.keys() == wanted.keys()
    for name in wanted:
        assert relative_error(got[name], wanted[name]) < 1.25 * relative_error(peer[name], wanted[name]) + U, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_dtypes(dtype):
    models = []
    for implementation in ("ktlib", "eager"):
        model = tiny_model("deepseek_v2", implementation, dtype=torch.bfloat16)
        config = lora_config(model, r=4) if implementation == "ktlib" else stock_twin(lora_config(model, r=4))
        models.append(random_adapter(get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)))
    ours, stock = models
    assert {p.dtype for name, p in ours.named_parameters() if ".lora_" in name} == {dtype}
    reference = random_adapter(get_peft_model(tiny_model("deepseek_v2"), stock_twin(ours.peft_config["default"])))
    assert_as_good_as_stock(ours, stock, reference, lambda model: {"logits": model(tokens()).logits})
    assert_as_good_as_stock(ours, stock, reference, gradients)
    assert {grad.dtype for grad in gradients(ours).values()} == {dtype}


def test_upcast_at_any_time_changes_nothing():
    """Before the first step, between forward and backward, after a step; also back to bf16."""
    model = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    model = random_adapter(get_peft_model(model, lora_config(model, r=4), autocast_adapter_dtype=False))
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    logits, wanted = model(tokens()).logits, gradients(model)

    output = model(tokens(), labels=tokens())
    for wrapper in wrappers:
        wrapper.lora_A.to(torch.float32)
        wrapper.lora_B.to(torch.float32)
    output.loss.backward()
    # products with bf16-representable values are the same; linear layers in fp32 round once less
    assert relative_error(model(tokens()).logits, logits) < U * (16 * 2 + 1) ** 0.5
    for name, got in gradients(model).items():
        assert got.dtype == dict(model.named_parameters())[name].dtype
        assert relative_error(got, wanted[name]) < U * (64 * 2) ** 0.5, name
    for wrapper in wrappers:
        wrapper.lora_A.to(torch.bfloat16)
        wrapper.lora_B.to(torch.bfloat16)
    assert torch.equal(model(tokens()).logits, logits)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)], ids=str)
def test_matrices_of_other_dtypes_count_as_fp32(dtypes):
    """The operator needs A and B both in bf16 or both in fp32; PEFT allows any dtypes."""
    ours, _ = pair()
    wanted = ours(tokens()).logits
    for module in ours.modules():
        if isinstance(module, ParamWrapper):
            for factor, dtype in zip((module.lora_A, module.lora_B), dtypes, strict=True):
                factor.to(dtype)
    assert relative_error(ours(tokens()).logits, wanted) < U


def test_autocast():
    ours, reference = pair()
    stock = random_adapter(get_peft_model(tiny_model("deepseek_v2"), stock_twin(ours.peft_config["default"])))

    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model is not reference):
            return {**gradients(model), "logits": model(tokens()).logits}

    assert_as_good_as_stock(ours, stock, reference, run)


# ------------------------------------------------------------------------------------------------ training patterns


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, _ = pair()
    model.train()
    wanted = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    hook = model.base_model.model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(model)
    hook.remove()
    assert len(calls) == 2, "checkpointing did not run the layer again"
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_gradient_accumulation():
    model, _ = pair()
    first, second = gradients(model, tokens(seed=3)), gradients(model, tokens(seed=4))
    model.zero_grad()
    for seed in (3, 4):
        model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, first[name] + second[name])


def test_other_forwards_between_forward_and_backward():
    model, _ = pair()
    wanted = gradients(model)
    model.zero_grad()
    loss = model(tokens(), labels=tokens()).loss
    with torch.no_grad():
        model.eval()(tokens(4, 20, seed=9))
    pending = model(tokens(3, 5, seed=8)).logits
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, wanted[name])
    pending.sum().backward()


def test_models_in_threads_do_not_meet():
    """Factors are arguments of the call, so that a thread can neither see nor lose those of another thread."""
    model, _ = pair()
    inputs = [tokens(seed=seed) for seed in range(8)]
    with torch.no_grad():
        wanted = [model(ids).logits for ids in inputs]
        got = [[] for _ in inputs]

        def run(i):
            with torch.no_grad():
                got[i].extend(model(inputs[i]).logits for _ in range(5))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(len(results) == 5 for results in got)
    assert all(torch.equal(one, wanted[i]) for i, results in enumerate(got) for one in results)


def test_generate_with_cache():
    ours, stock = pair()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = ours.generate(input_ids=tokens(), **options)
    assert torch.equal(cached, ours.generate(input_ids=tokens(), use_cache=False, **options))
    assert torch.equal(cached, stock.generate(input_ids=tokens(), **options))
    with ours.disable_adapter():
        assert not torch.equal(cached, ours.generate(input_ids=tokens(), **options))


# ------------------------------------------------------------------------------------------------ adapter states


def test_disable_and_enable():
    ours, stock = pair()
    adapted = ours(tokens()).logits
    plain = tiny_model("deepseek_v2", "ktlib")(tokens()).logits
    with ours.disable_adapter():
        assert torch.equal(ours(tokens()).logits, plain)
    assert torch.equal(ours(tokens()).logits, adapted)
    assert relative_error(adapted, plain) > 0.1


def test_merge_unmerge_and_unload():
    ours, stock = pair()
    adapted = ours(tokens()).logits
    # merged experts are rounded to bf16 once more, weight by weight
    bound = U * (6 * 2) ** 0.5
    ours.merge_adapter()
    assert_close(ours, stock, bound)
    ours.unmerge_adapter()
    assert relative_error(ours(tokens()).logits, adapted) < bound
    unloaded = ours.merge_and_unload()
    assert not any(isinstance(module, StockParamWrapper) for module in unloaded.modules())
    assert_close(unloaded, stock, bound)


def two_adapters():
    ours, stock = pair()
    ours.add_adapter("second", lora_config(ours, r=3, lora_alpha=7))
    stock.add_adapter("second", stock_twin(ours.peft_config["second"]))
    return random_adapter(ours), random_adapter(stock)


def test_two_adapters_one_at_a_time():
    ours, stock = two_adapters()
    first = ours(tokens()).logits
    assert_close(ours, stock)
    for model in (ours, stock):
        model.set_adapter("second")
    assert_close(ours, stock)
    assert relative_error(ours(tokens()).logits, first) > 0.1
    ours.set_adapter("default")
    assert torch.equal(ours(tokens()).logits, first)


def test_two_adapters_together():
    ours, stock = two_adapters()
    for model in (ours, stock):
        model.base_model.set_adapter(["default", "second"])
    assert ours.base_model.model.model.layers[1].mlp.experts.factors()[0].shape == ((4 + 3) * 8, 48)
    assert_close(ours, stock)
    got, wanted = gradients(ours), gradients(stock)
    assert got.keys() == wanted.keys() and any("second" in name for name in got)
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < GRADIENT_BOUND, errors


def test_batches_of_mixed_adapters_are_refused_as_in_peft():
    for model in pair():
        with pytest.raises(ValueError, match="ParamWrapper does not support mixed adapter batches"):
            model.eval()(tokens(), adapter_names=["default", "__base__"])


def test_an_active_adapter_without_experts():
    ours, stock = pair()
    ours.add_adapter("attention", lora_config(ours, r=3, target_parameters=[], target_modules=["q_proj", "o_proj"]))
    stock.add_adapter("attention", stock_twin(ours.peft_config["attention"]))
    for model in (random_adapter(ours), random_adapter(stock)):
        model.base_model.set_adapter(["default", "attention"])
    assert_close(ours, stock)
    for model in (ours, stock):
        model.set_adapter("attention")
    assert ours.base_model.model.model.layers[1].mlp.experts.factors() is None
    assert_close(ours, stock)


def test_only_experts_and_no_experts():
    only, stock = pair(target_modules=[])
    assert all(".experts." in name for name, p in only.named_parameters() if p.requires_grad)
    assert_close(only, stock)
    model = tiny_model("olmoe", "ktlib")
    model = get_peft_model(model, lora_config(model, target_parameters=[], lora_dropout=0.1))
    assert all(".self_attn." in name for name, p in model.named_parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------ without the operator


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_other_implementations_take_the_stock_path(implementation, fallbacks):
    ours, stock = pair()
    if implementation == "grouped_mm":
        fallbacks.append("LoRA adds a dense W + BA, because the experts implementation is 'grouped_mm'")
    factored = ours(tokens()).logits
    ours.get_base_model().set_experts_implementation(implementation)
    if implementation == "eager":  # plain F.linear: one dtype
        ours.float()
    assert_close(ours, stock, U * (6 * 2) ** 0.5 if implementation == "grouped_mm" else 1e-5)
    ours.get_base_model().set_experts_implementation("ktlib")
    if implementation == "grouped_mm":
        assert torch.equal(ours(tokens()).logits, factored)


def test_training_on_another_implementation_is_said_once(fallbacks, logged):
    """Whoever forgets experts_implementation="ktlib" gets stock's dense W + BA."""
    model = tiny_model("olmoe", "grouped_mm", experts_dtype=torch.bfloat16)
    model = random_adapter(get_peft_model(model, lora_config(model, r=4)))
    model.eval()(tokens())
    assert not logged()
    model.train()(tokens())
    model(tokens())
    model.get_base_model().set_experts_implementation("ktlib")
    model(tokens())
    fallbacks.append(
        "OlmoeExperts: LoRA adds a dense W + BA, because the experts implementation is 'grouped_mm'; "
        "model.set_experts_implementation('ktlib')"
    )


def test_unserved_experts_keep_their_adapters(fallbacks):
    model = tiny_model("olmoe", "ktlib", experts_dtype=torch.float32)
    config = lora_config(model, r=4)
    twin = stock_twin(config)
    fallbacks.append("gate_up_proj is torch.float32")
    ours = random_adapter(get_peft_model(model, config))
    stock = random_adapter(get_peft_model(tiny_model("olmoe"), twin))
    got, wanted = gradients(ours), gradients(stock)
    assert_close(ours, stock, 1e-5)
    assert all(relative_error(got[name], wanted[name]) < 1e-4 for name in wanted)


def test_adapters_on_a_gate_that_is_not_served_log_the_gate_as_the_reason(fallbacks):
    """After the first forward, gates are looked up in the cache."""
    model = tiny_model("qwen3_moe", "ktlib")
    for layer in model.model.layers:
        del layer.mlp.experts.act_fn
        layer.mlp.experts.act_fn = torch.relu
    fallbacks.append("its gate is none of silu")
    model = get_peft_model(model, lora_config(model, r=2))
    model(tokens())
    known = dict(experts._gates)
    model(tokens())
    assert experts._gates == known


def test_stock_adapters_can_be_factored_in_place(fallbacks):
    ours, stock = pair()
    model = random_adapter(get_peft_model(tiny_model("deepseek_v2", "ktlib"), stock_twin(ours.peft_config["default"])))
    fallbacks.append("ktlib.factor_adapters(model) switches")
    assert_close(model, stock, U * (6 * 2) ** 0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert factor_adapters(model) == 2 + 6
    assert factor_adapters(model) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(tokens()).logits, ours(tokens()).logits)
    got, wanted = gradients(model), gradients(ours)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_adapters_of_what_has_no_factored_path_stay_stock():
    model = get_peft_model(tiny_model("deepseek_v2", "ktlib"), LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
    wanted = random_adapter(model)(tokens()).logits
    assert factor_adapters(model) == 0 and torch.equal(model(tokens()).logits, wanted)
