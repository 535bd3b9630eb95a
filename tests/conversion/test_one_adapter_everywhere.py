"""A trained adapter is one function: live, reloaded, merged, exported, imported, merged from the export, served."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.experts_apart import ExpertsApart
from support.merged import load, logits, merge, save_base
from support.models import PER_EXPERT, expert_modules, relative_error, tokens
from support.servers import SGLANG, VLLM, apply_as

import ktlib


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def load_with_ktlib(base):
    """The model in fp32 but for its routed experts, whose values are those of the file too."""
    model = load(base, experts="ktlib")
    for experts in map(model.get_submodule, expert_modules(model)):
        for parameter in experts.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def greedy(model):
    return model.generate(tokens(rows=1), max_new_tokens=8, do_sample=False).tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", [*PER_EXPERT, "gpt_oss"])
def test_one_adapter_is_one_function_wherever_it_is_read(family, tmp_path, one_thread):
    base, adapter = save_base(tmp_path / "base", family), tmp_path / "adapter"
    model = load_with_ktlib(base)
    torch.manual_seed(0)
    # vLLM does not serve kv_b_proj of DeepSeek, nor SGLang its q_proj without v_proj; both serve experts and o_proj.
    config = ktlib.lora_config(model, r=4, target_modules=["o_proj"])
    live = train(get_peft_model(model, config))
    live.save_pretrained(adapter)
    reloaded = PeftModel.from_pretrained(load(base), adapter).eval()  # stock experts and PEFT, in fp32
    wanted = logits(reloaded)
    assert relative_error(wanted, logits(load(base))) > 0.02, "training has changed nothing"
    by_ktlib = PeftModel.from_pretrained(load_with_ktlib(base), adapter).eval()
    ktlib.factor_adapters(by_ktlib)
    assert torch.equal(logits(by_ktlib), logits(live))
    assert relative_error(logits(live), wanted) < 0.02  # experts in bf16 against fp32

    def check(model, what):
        assert relative_error(logits(model), wanted) < 1e-5, what
        assert greedy(model) == greedy(reloaded), what

    check(load(merge(adapter, tmp_path / "merged", base, dtype="fp32")), "merged by ktlib")
    unmerged = PeftModel.from_pretrained(load(base), adapter).eval()
    unmerged.merge_adapter()
    unmerged.unmerge_adapter()
    check(unmerged, "merged and unmerged by PEFT")
    merged = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "by peft")
    check(load(tmp_path / "by peft"), "merged and saved by PEFT")
    if family == "gpt_oss":  # its files have the experts stacked, and so has an adapter for servers
        return
    ktlib.export_adapter(adapter, tmp_path / "apart", base)
    check(PeftModel.from_pretrained(load(base), tmp_path / "apart").eval(), "exported, by stock PEFT")
    ktlib.import_adapter(tmp_path / "apart", tmp_path / "again", base)
    check(PeftModel.from_pretrained(load(base), tmp_path / "again").eval(), "exported and imported")
    check(load(merge(tmp_path / "apart", tmp_path / "from apart", base, dtype="fp32")), "merged from the export")
    for server in (VLLM, SGLANG):
        with torch.no_grad():
            served = apply_as(server, tmp_path / "apart", ExpertsApart(load(base)))(tokens())
        assert relative_error(served, wanted) < 1e-5, server
