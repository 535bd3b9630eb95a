"""Adapters of expert parameters in other layouts than PEFT's of now: the numbers they were trained for, or refused."""

import json
import re
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import relative_error, tiny_config, tiny_model, tokens

import ktlib
from ktlib.conversion.adapters import export_adapter, import_adapter
from ktlib.integrations.factor_layouts import Base, layouts_of

ADAPTER_FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANK, ALPHA = 3, 6
UNSLOTH = {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}}
SQUARE = 32  # intermediate size with which gate_up_proj has as many out_features as in_features
TELLS_NOTHING = (
    "nothing in it says whether lora_A of .*experts.gate_up_proj.*lora_a_features .*--lora-a-features.*'in' or"
)
UNORDERED = (
    "written by Unsloth, .* whether lora_B of .*lora_b_order .*--lora-b-order.*'grouped_by_expert' or 'rank_major'"
)


class Written:
    """An adapter of routed experts as another program wrote it, and the logits of that program's model with it.

    Args:
        folder: where to write it.
        writer: how the program multiplies, where W (E, m, n) is the parameter as it is stored:
            "before 0.19.1": PEFT's ``einsum("o r e, e r i -> e i o", B (n, r, E), A (E, r, m))``;
            "now": the same product, with the in_features of W for m and the out_features for n;
            "unsloth": as "now", but with B read as (out, E, r).
        settings: fields of adapter_config.json.
    """

    def __init__(
        self, folder, writer, parameters=("gate_up_proj",), family="qwen3_moe", size=SQUARE, rank=RANK, **settings
    ):
        self.folder, self.writer, self.family, self.rank = folder, writer, family, rank
        self.changes = {"moe_intermediate_size": size, "intermediate_size": size}
        self.config, model = tiny_config(family, **self.changes), self.model()
        tensors, generator = {}, torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if leaf in parameters:
                wrapper = module + ".base_layer" * (leaf == "gate_up_proj" and len(parameters) == 2)
                a_features, b_features = self.sides(leaf, parameter.shape)
                experts = parameter.shape[0]
                a = 0.3 * torch.randn(experts * rank, a_features, generator=generator)
                b = 0.3 * torch.randn(b_features, rank * experts, generator=generator)
                tensors |= {f"base_model.model.{wrapper}.lora_{letter}.weight": x for letter, x in (("A", a), ("B", b))}
                parameter.data += (ALPHA / rank) * self.delta(leaf, parameter.shape, a, b)
        folder.mkdir()
        save_file(tensors, folder / ADAPTER_FILE)
        targets = {"target_modules": [], "target_parameters": [f"mlp.experts.{leaf}" for leaf in parameters]}
        self.rewrite({"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA} | targets | settings)
        with torch.no_grad():
            self.logits = model(tokens()).logits

    def rewrite(self, settings):
        (self.folder / CONFIG).write_text(json.dumps(settings))

    def model(self):
        return tiny_model(self.family, **self.changes)

    def is_stored_in_out(self):
        return self.family == "gpt_oss"

    def sides(self, leaf, shape):
        in_out = self.writer == "before 0.19.1" or self.is_stored_in_out()
        return (shape[1], shape[2]) if in_out else (shape[2], shape[1])

    def delta(self, leaf, shape, a, b):
        experts = shape[0]
        a = a.reshape(experts, -1, a.shape[1])
        if self.writer == "unsloth":
            b = b.reshape(b.shape[0], experts, -1).transpose(1, 2)
        else:
            b = b.reshape(b.shape[0], -1, experts)
        to = "e i o" if self.writer == "before 0.19.1" or self.is_stored_in_out() else "e o i"
        return torch.einsum(f"o r e, e r i -> {to}", b, a)

    def error(self, folder):
        """The error of stock PEFT's logits with the adapter in ``folder``."""
        with torch.no_grad():
            return relative_error(PeftModel.from_pretrained(self.model(), folder)(tokens()).logits, self.logits)

    def imported(self, **options):
        out = self.folder.with_name(f"{self.folder.name}-{len(list(self.folder.parent.iterdir()))}")
        return self.error(import_adapter(self.folder, out, self.config, **options))

    def every_refusal(self):
        """The error messages of everything that reads the adapter, and the problems that audits report."""
        sentences = []
        for call in (
            lambda: import_adapter(self.folder, self.folder.with_name("refused"), self.config),
            lambda: export_adapter(self.folder, self.folder.with_name("refused"), self.config),
            lambda: ktlib.load_lora_config(self.folder),
        ):
            with pytest.raises(ValueError) as refused:
                call()
            sentences.append(str(refused.value))
        for report in (ktlib.audit(self.folder), ktlib.audit(self.folder, self.config)):
            (problem,) = report.problems
            sentences.append(problem)
        return sentences


WITH_ERRORS = 1e-6  # of fp32 sums in another order


# --------------------------------------------------------------------------------------------------- PEFT before 0.19.1


@pytest.mark.parametrize(
    "options",
    [
        {"peft_version": "0.18.1"},
        {"parameters": ("gate_up_proj", "down_proj"), "size": 48},
        {"parameters": ("gate_up_proj", "down_proj"), "peft_version": "0.19.0"},  # down_proj shows it
        {"parameters": ("down_proj",), "size": 64, "peft_version": "0.18.0"},
        {"parameters": ("gate_up_proj", "down_proj"), "size": 48, "family": "gpt_oss", "peft_version": "0.18.1"},
        {"parameters": ("down_proj",), "size": 64, "family": "gpt_oss", "peft_version": "0.17.1.post1"},
    ],
)
def test_adapters_of_peft_before_0_19_1_keep_their_numbers(options, tmp_path):
    written = Written(tmp_path / "old", "before 0.19.1", **options)
    assert written.imported() < WITH_ERRORS
    with torch.no_grad():
        assert relative_error(written.model()(tokens()).logits, written.logits) > 0.1


def test_what_no_version_decides_is_refused_until_the_user_says_it(tmp_path):
    written = Written(tmp_path / "old", "before 0.19.1")
    settings = json.loads((written.folder / CONFIG).read_text())
    assert written.error(written.folder) > 0.1, "stock PEFT of now takes it for something else, without a word"
    versions = [None, "0.19.0", "0.18.2.dev0@UNKNOWN", "0.19.1.dev0@abc", "new"]
    for more in [{"peft_version": version} for version in versions] + [UNSLOTH | {"lora_B_layout": "rank_major"}]:
        written.rewrite(settings | more)
        for sentence in written.every_refusal():
            assert re.search(TELLS_NOTHING, sentence), sentence
    assert written.imported(lora_a_features="out") < WITH_ERRORS
    assert written.imported(lora_a_features="in") > 0.1
    written.rewrite(settings | {"peft_version": "0.18.1"})
    assert written.imported(lora_a_features="in") > 0.1, "what the user says is more than what a version says"


def test_parameters_that_transformers_4_may_have_stored_the_other_way_are_not_guessed():
    """Such as Qwen3-VL-MoE's, (E, in, out) in transformers 4 and (E, out, in) in 5: PEFT 0.18 followed either."""
    shapes, settings = {"experts.down_proj": ((24, 64), (64, 24))}, {"r": 3, "peft_version": "0.18.1"}
    known = Base({"experts.down_proj": (8, 64, 64)}, transposed=False, were_modules=True)
    assert layouts_of(settings, shapes, "x", known) == ({"experts.down_proj": "rank_major"}, "out")
    with pytest.raises(ValueError, match="x was written by PEFT 0.18.1, .* say which with lora_a_features"):
        layouts_of(settings, shapes, "x", known._replace(were_modules=False))


@pytest.mark.parametrize("family, version", [("qwen3_moe", "0.19.1"), ("qwen3_moe", "0.21.2"), ("gpt_oss", "0.18.1")])
def test_the_layout_of_now_is_not_touched(family, version, tmp_path):
    options = {"size": 64, "parameters": ("down_proj",)} if family == "gpt_oss" else {}
    written = Written(tmp_path / "new", "now", family=family, peft_version=version, **options)
    assert written.imported() < WITH_ERRORS and ktlib.audit(written.folder, written.config).clean
    files = [load_file(path / ADAPTER_FILE) for path in tmp_path.iterdir()]
    assert len(files) == 2 and all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_shapes_against_the_version_are_refused_as_another_model_s(tmp_path):
    """An adapter of a model whose sizes are swapped looks like an older layout. Its version says that it is none."""
    written = Written(tmp_path / "old", "before 0.19.1", size=48, peft_version="0.21.2")
    refused = "written by PEFT 0.21.2, for which lora_A has the in_features, .* needs another base model, or"
    with pytest.raises(ValueError, match=refused):
        written.imported()
    (problem,) = ktlib.audit(written.folder, written.config).problems
    assert re.search(refused, problem)
    assert written.imported(lora_a_features="out") < WITH_ERRORS


def test_an_option_against_the_shapes_is_refused(tmp_path):
    written = Written(tmp_path / "old", "before 0.19.1", size=48)
    with pytest.raises(
        ValueError, match=r"lora_a_features: got 'in', but in .*adapter_config.json lora_A has the out_"
    ):
        written.imported(lora_a_features="in")
    assert written.imported(lora_a_features="out") < WITH_ERRORS
    for name in ("lora_a_features", "lora_b_order"):
        with pytest.raises(ValueError, match=f"{name}: got 'both', needs"):
            written.imported(**{name: "both"})


def test_a_known_older_layout_is_said_by_the_audit(tmp_path):
    written = Written(tmp_path / "old", "before 0.19.1", peft_version="0.18.1")
    (problem,) = ktlib.audit(written.folder, written.config).problems
    assert problem.startswith(
        "routed_experts: lora_A in adapter_config.json has the out_features, as PEFT before 0.19.1"
    )
    assert "ktlib.import_adapter" in problem


# -------------------------------------------------------------------------------------------------------------- Unsloth


def detail(**layouts):
    """What Unsloth since 2026.9.6 records beside ``lora_B_layout``."""
    return {"parameters": {name: {"lora_B_layout": layout, "num_experts": 8} for name, layout in layouts.items()}}


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_B_layout": "grouped_by_expert"},
        {"auto_mapping": {"unsloth_fixed": True, "lora_B_layout": "grouped_by_expert"}},
        UNSLOTH | {"unsloth_fused_expert_lora": detail(gate_up_proj="grouped_by_expert", down_proj="rank_major")},
    ],
)
def test_a_recorded_order_is_converted(settings, tmp_path):
    written = Written(tmp_path / "unsloth", "unsloth", peft_version="0.21.0", **settings)
    assert written.error(written.folder) > 0.1
    assert written.imported() < WITH_ERRORS
    with pytest.raises(ValueError, match="lora_B in .* is grouped by expert, .* ktlib.import_adapter rewrites"):
        ktlib.load_lora_config(written.folder)
    for config in (None, written.config):
        (problem,) = ktlib.audit(written.folder, config).problems
        assert problem.startswith("routed_experts: lora_B in ") and "is grouped by expert" in problem


def test_an_order_that_is_not_recorded_is_refused_until_the_user_says_it(tmp_path):
    written = Written(tmp_path / "unsloth", "unsloth", peft_version="0.21.0", **UNSLOTH)
    for sentence in written.every_refusal():
        assert re.search(UNORDERED, sentence), sentence
    model = PeftModel.from_pretrained(written.model(), written.folder)
    with pytest.raises(ValueError, match=UNORDERED):
        ktlib.factor_adapters(model)
    assert "written by Unsloth" in ktlib.audit(model).problems[0]
    assert written.imported(lora_b_order="grouped_by_expert") < WITH_ERRORS
    assert written.imported(lora_b_order="rank_major") > 0.1


@pytest.mark.parametrize(
    "options", [{"lora_b_order": "rank_major"}, UNSLOTH | {"lora_B_layout": "rank_major"}, {"rank": 1}]
)
def test_a_file_that_unsloth_may_have_written_is_warned_of(options, tmp_path):
    written = Written(
        tmp_path / "either", "now", peft_version="0.21.0", base_model_name_or_path="unsloth/Qwen3-30B-A3B"
    )
    with pytest.warns(
        UserWarning, match="names unsloth/Qwen3-30B-A3B as its base, and nothing .* lora_b_order='grouped"
    ):
        assert written.imported() < WITH_ERRORS
    base = {"peft_version": "0.21.0", "base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}
    given = {name: options[name] for name in options.keys() & {"lora_b_order"}}
    known = Written(
        tmp_path / "known", "now", **base, **{name: options[name] for name in options.keys() - given.keys()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        import_adapter(known.folder, tmp_path / "out", known.config, **given)


def test_parameters_may_differ_in_their_order(tmp_path):
    layouts = {"gate_up_proj": "rank_major", "down_proj": "mixed"}
    written = Written(tmp_path / "now", "now", peft_version="0.21.0", unsloth_fused_expert_lora=detail(**layouts))
    assert written.imported() < WITH_ERRORS and ktlib.audit(written.folder, written.config).clean
    both = {"parameters": ("gate_up_proj", "down_proj"), "unsloth_fused_expert_lora": detail(**layouts)}
    with pytest.raises(ValueError, match="lora_B of model.layers.0.mlp.experts.down_proj is grouped"):
        Written(tmp_path / "mixed", "now", **both).imported()


@pytest.mark.parametrize("settings", [{"lora_B_layout": "rank_major"}, UNSLOTH | {"lora_B_layout": "rank_major"}])
def test_an_adapter_of_newer_unsloth_is_taken_as_it_is(settings, tmp_path):
    written = Written(tmp_path / "unsloth", "now", peft_version="0.21.0", **settings)
    assert written.imported() < WITH_ERRORS and ktlib.audit(written.folder, written.config).clean
    with pytest.raises(ValueError, match="lora_b_order: got 'grouped_by_expert', but .*adapter_config.json says that"):
        written.imported(lora_b_order="grouped_by_expert")
    with pytest.warns(UserWarning, match="lora_B_layout"):
        config = ktlib.load_lora_config(written.folder)
    assert config.r == RANK


def test_the_order_of_one_column_for_each_expert_needs_no_record(tmp_path):
    written = Written(tmp_path / "unsloth", "unsloth", rank=1, peft_version="0.21.0", **UNSLOTH)
    assert written.imported() < WITH_ERRORS and ktlib.audit(written.folder).clean
    assert ktlib.factor_adapters(PeftModel.from_pretrained(written.model(), written.folder)) == 2


@pytest.mark.parametrize(
    "writer, settings, options",
    [
        ("unsloth", {"peft_version": "0.21.0", "lora_B_layout": "grouped_by_expert"}, {}),
        ("unsloth", UNSLOTH | {"peft_version": "0.21.0"}, {"lora_b_order": "grouped_by_expert"}),
        ("now", {"peft_version": "0.21.0"}, {}),
        ("before 0.19.1", {"peft_version": "0.18.1"}, {}),
    ],
)
def test_a_rank_that_is_the_number_of_experts_is_not_taken_for_it(writer, settings, options, tmp_path):
    written = Written(tmp_path / "square", writer, rank=8, **settings)
    assert tiny_config("qwen3_moe").num_experts == 8
    assert written.imported(**options) < WITH_ERRORS


def test_both_older_layouts_together(tmp_path):
    """Unsloth on PEFT 0.18: lora_A has the out_features, and the columns of lora_B are grouped by expert."""
    written = Written(tmp_path / "old", "before 0.19.1", size=48, peft_version="0.18.1", **UNSLOTH)
    tensors = load_file(written.folder / ADAPTER_FILE)
    for name, b in tensors.items():
        if "lora_B" in name:
            tensors[name] = b.view(-1, RANK, 8).transpose(1, 2).flatten(1).contiguous()
    save_file(tensors, written.folder / ADAPTER_FILE)
    assert written.imported(lora_b_order="grouped_by_expert") < WITH_ERRORS
