"""What is trained on is what the chat template writes of the whole conversation, or the row is refused by name."""

import json
import shutil

import pytest
from tokenizers import processors
from transformers import AddedToken, AutoTokenizer

from ktlib.assets import BASE
from ktlib.training import sft, tasks
from ktlib.training.chat import prompt_ids

ROW = {"prompt": "Say fox", "response": "red fox"}


def chatml(answer, system="", generation="<|im_start|>assistant\n"):
    """A template of ChatML's kind whose answers are ``answer`` with m for the message."""
    return (
        system + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'user' %}"
        "{{ m.content + '<|im_end|>\n' }}{% else %}" + answer + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + generation + "{% endif %}"
    )


def turns(user, answer, generation=""):
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + answer + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + generation + "{% endif %}"
    )


LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
GEMMA = turns(
    "<start_of_turn>user\n{{ m.content | trim }}<end_of_turn>\n",
    "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>\n",
    "<start_of_turn>model\n",
)
LAST = "{{% if not add_generation_prompt %}}{}{{% endif %}}"
QWEN3 = chatml("{{ '<think>\n\n</think>\n\n' + m.content }}")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TODAY = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
SPECIAL = (
    "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> "
    "[INST] [/INST] <|start|> <|message|> <|channel|> <|return|> <|endoftext|>"
).split()

SAME = {  # kind: template, eos_token; what the template writes behind the end token
    "ChatML": (chatml("{{ m.content }}"), "<|im_end|>", "\n"),
    "ChatML with a default system prompt": (chatml("{{ m.content }}", SYSTEM), "<|im_end|>", "\n"),
    "Llama-3": (
        turns(
            LLAMA.format("user") + "{{ m.content | trim }}<|eot_id|>",
            LLAMA.format("assistant") + "{{ m.content | trim }}<|eot_id|>",
            LLAMA.format("assistant"),
        ),
        "<|eot_id|>",
        "",
    ),
    "Mistral": (turns("[INST] {{ m.content }} [/INST]", "{{ m.content }}{{ eos_token }}"), "<|end|>", ""),
    "Gemma, its eos_token corrected": (GEMMA, "<end_of_turn>", "\n"),
    "Phi-3, which ends documents too": (
        chatml("{{ m.content }}") + LAST.format("<|endoftext|>"),
        "<|im_end|>",
        "\n<|endoftext|>",
    ),
    "the built-in model": (None, "<|end|>", ""),
}


def tokenizer_with(template, eos_token, special=SPECIAL):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template, tokenizer.eos_token = template or tokenizer.chat_template, eos_token
    return tokenizer


@pytest.mark.parametrize("template, eos_token, behind", SAME.values(), ids=SAME)
def test_the_trained_tokens_are_those_of_the_template(template, eos_token, behind):
    tokenizer = tokenizer_with(template, eos_token)
    (example,) = tasks.encode(tokenizer, [ROW], 128)
    conversation = [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": ROW["response"]}]
    whole = tokenizer.apply_chat_template(conversation, return_dict=False)
    assert whole[: len(example["input_ids"])] == example["input_ids"]
    assert tokenizer.decode(whole[len(example["input_ids"]) :]) == behind
    assert tokenizer.decode([label for label in example["labels"] if label != -100]) == "red fox" + eos_token


BEFORE = "a chat template whose generation prompt is all that it writes before a response"
OTHERS = {  # kind: template, eos_token, response; the trained token, the template's, what to do
    "no generation prompt": (
        chatml("{{ m.content }}", generation=""), "<|im_end|>", "red fox",
        "'red'", "'<|im_start|>'", BEFORE,
    ),
    "DeepSeek-R1 opens a think block": (
        chatml("{{ m.content }}", generation="<|im_start|>assistant\n<think>\n"), "<|im_end|>", "red fox",
        "'<think>'", "'red'", BEFORE,
    ),
    "DeepSeek-R1 drops the thoughts": (
        chatml("{{ m.content.split('</think>')[-1] }}"), "<|im_end|>", "<think>animals</think>red fox",
        "'<think>'", "'red'", "the response as the template writes it",
    ),
    "Qwen3 puts an empty think block": (
        QWEN3, "<|im_end|>", "red fox", "'red'", "'<think>'", BEFORE,
    ),
    "gpt-oss opens a channel": (
        turns(
            "<|start|>user<|message|>{{ m.content }}<|end|>",
            "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>",
            "<|start|>assistant",
        ),
        "<|return|>", "red fox", "'red'", "'<|channel|>'", BEFORE,
    ),
    "Llama-3 strips": (
        SAME["Llama-3"][0], "<|eot_id|>", "red fox ", "' '", "'<|eot_id|>'", "the response as the template writes it",
    ),
    "Gemma as published": (GEMMA, "<|end|>", "red fox", "'<|end|>'", "'<end_of_turn>'", "eos_token '<end_of_turn>'"),
    "no end of responses": (
        turns("<|user|>{{ m.content }}", "<|assistant|>{{ m.content }}", "<|assistant|>"), "<|end|>", "red fox",
        "'<|end|>'", "nothing", "a chat template that ends the conversation with eos_token right behind the response",
    ),
    "more behind the end": (
        chatml("{{ m.content }}") + LAST.format("Good bye"), "<|im_end|>", "red fox",
        "nothing", "'\\n'", "a chat template that ends the conversation with eos_token right behind the response",
    ),
    "a blank that joins the response": (
        turns("Question: {{ m.content }}\n", "Answer: {{ m.content }}{{ eos_token }}", "Answer: "), "<|end|>", "fox",
        "' '", "' fox'", "a response whose first token does not merge with the prompt's last",
    ),
}  # fmt: skip


@pytest.mark.parametrize("template, eos_token, response, ours, theirs, needs", OTHERS.values(), ids=OTHERS)
def test_a_row_that_the_template_writes_otherwise_is_refused(template, eos_token, response, ours, theirs, needs):
    tokenizer = tokenizer_with(template, eos_token)
    rows = [{"prompt": "Say fox", "response": response, "where": "rows.jsonl, line 7"}]
    with pytest.raises(ValueError, match=r"^rows.jsonl, line 7: token \d+ of prompt and response is ") as error:
        tasks.encode(tokenizer, rows, 128)
    message = str(error.value)
    assert f" is {ours}" in message and f" writes {theirs}" in message and f"needs {needs}" in message
    at = int(message.split("token ")[1].split()[0]) - 1
    trained = prompt_ids(tokenizer, "Say fox") + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    assert at == len(trained) if ours == "nothing" else tokenizer.decode([trained[at]]) == ours.strip("'")


def test_what_the_message_says_helps():
    """Qwen3's block in the response, a generation prompt with gpt-oss's channel, Gemma's own end token."""
    block = tokenizer_with(QWEN3, "<|im_end|>")
    block.chat_template = chatml("{{ '<think>\n\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') }}")
    assert len(tasks.encode(block, [ROW | {"response": "<think>\n\n</think>\n\nred fox"}], 128)) == 1
    template, eos_token = OTHERS["gpt-oss opens a channel"][:2]
    channel = template.removesuffix("{% endif %}") + "<|channel|>final<|message|>{% endif %}"
    assert len(tasks.encode(tokenizer_with(channel, eos_token), [ROW], 128)) == 1


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_every_row_is_compared(batch, monkeypatch):
    monkeypatch.setattr(tasks, "BATCH", batch)
    tokenizer = tokenizer_with(SAME["Llama-3"][0], "<|eot_id|>")
    rows = [ROW | {"response": f"fox{end}"} for end in ["", "", "", "", "\n", ""]]
    with pytest.raises(ValueError, match="^row 5 of 6: "):
        tasks.encode(tokenizer, rows, 128)
    long = ROW | {"response": "fox " * 100}
    with pytest.warns(UserWarning, match="1 of 2 rows exceed 64 tokens"):  # what is not trained on may differ
        assert len(tasks.encode(tokenizer, [long, ROW], 64)) == 1


def test_a_template_that_fails_names_the_row():
    refuses = "{% if 'fox' in messages[0].content %}{{ raise_exception('no foxes here') }}{% endif %}"
    tokenizer = tokenizer_with(refuses + chatml("{{ m.content }}"), "<|im_end|>")
    with pytest.raises(ValueError, match="^row 2 of 3: the chat template of the model fails on it .*no foxes here"):
        tasks.encode(tokenizer, [ROW | {"prompt": "Say apple"}, ROW, ROW], 128)
    multimodal = "{% for m in messages %}{{ m.content[0].text.strip() }}{% endfor %}"
    with pytest.raises(ValueError, match="^row 1 of 1: the chat template of the model fails on it"):
        tasks.encode(tokenizer_with(multimodal, "<|end|>"), [ROW], 128)


def test_todays_date_in_a_template_is_said():
    with pytest.warns(UserWarning, match="writes today's date into prompts"):
        tasks.encode(tokenizer_with(chatml("{{ m.content }}", TODAY), "<|im_end|>"), [ROW], 128)


def adds(tokenizer, **template):
    """The tokenizer, which from now on adds special tokens to every text by itself."""
    ids = [("<|begin|>", 0), ("<|end|>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(special_tokens=ids, **template)
    return tokenizer


def test_the_beginning_is_there_once():
    tokenizer = adds(tokenizer_with(None, "<|end|>"), single="<|begin|> $A")
    assert tokenizer("fox")["input_ids"][0] == tokenizer.bos_token_id
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        (example,) = tasks.encode(tokenizer, [ROW], 128)
        assert example["input_ids"][0] == tokenizer.bos_token_id
        assert example["input_ids"].count(tokenizer.bos_token_id) == 1


def test_without_a_template_a_newline_ends_the_prompt():
    tokenizer = tokenizer_with(None, "<|end|>")
    tokenizer.chat_template = None
    (example,) = tasks.encode(tokenizer, [ROW], 128)
    assert tokenizer.decode(example["input_ids"]) == "Say fox\nred fox<|end|>"
    with pytest.raises(ValueError, match="model: the tokenizer ends every text with '<.end.>', .*add_eos_token false"):
        tasks.encode(adds(tokenizer, single="$A <|end|>"), [ROW], 128)


@pytest.mark.parametrize("token", ["<|end|>", "<|pad|>", "<|im_start|>", "[INST]"])
@pytest.mark.parametrize("key", ["prompt", "response"])
@pytest.mark.parametrize("with_template", [True, False])
def test_a_special_token_in_the_text_is_refused(token, key, with_template):
    tokenizer = tokenizer_with(None, "<|end|>")
    if not with_template:
        tokenizer.chat_template = None
    rows = [ROW, ROW | {key: f"a {token} b", "where": "rows.jsonl, line 9"}]
    with pytest.raises(ValueError, match="^rows.jsonl, line 9: ") as error:
        tasks.encode(tokenizer, rows, 128)
    assert f"{key!r} holds {token!r}, which this tokenizer reads as a special token" in str(error.value)


def test_what_only_looks_like_a_special_token_is_text():
    tokenizer = tokenizer_with(None, "<|end|>")
    rows = [ROW | {"response": text} for text in ("<|im_end", "<think>", "< |end|>", "<s>", "[inst]")]
    assert [
        tokenizer.decode(e["input_ids"][:-1]).split("<|assistant|>")[1] for e in tasks.encode(tokenizer, rows, 64)
    ] == [row["response"] for row in rows]


# ---- in a run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_template(tmp_path):
    """A folder with the built-in model and a template that writes a word before every answer."""
    folder = shutil.copytree(BASE, tmp_path / "model")
    template = (BASE / "chat_template.jinja").read_text().replace("<|assistant|>{{", "<|assistant|>thought {{", 1)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_run_is_refused_before_the_weights_are_read(other_template, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("loaded the model first"))
    with pytest.raises(ValueError, match="^row 1 of 200: token .* the chat template writes 'th'"):
        sft.run(model=str(other_template), output_dir=str(tmp_path / "run"), progress=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "response": "fox"}) + "\n" for p in ("Say fox", "Say apple")))
    with pytest.raises(ValueError, match="rows.jsonl, line .: token .* the chat template writes 'th'"):
        sft.run(model=str(other_template), dataset=str(rows), output_dir=str(tmp_path / "run"), progress=False)
    rows.write_text(rows.read_text().replace("Say apple", "Say <|end|>"))
    with pytest.raises(ValueError, match="rows.jsonl, line 2: 'prompt' holds '<.end.>'"):
        sft.run(dataset=str(rows), output_dir=str(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def test_evaluation_asks_only_what_training_would_take(monkeypatch):
    model, _ = sft.load_model("base")
    monkeypatch.setattr(sft, "generate", lambda *_, **__: pytest.fail("asked the model first"))
    with pytest.raises(ValueError, match="^row 1 of 1: token "):
        sft.exact_match(model, tokenizer_with(QWEN3, "<|im_end|>"), [ROW], progress=False)


def test_answers_end_at_the_end_token_that_was_trained():
    model, tokenizer = sft.load_model("base")
    assert sft.generate(model, tokenizer, ["Say fox"], progress=False) == ["fox"]
    for others in (None, tokenizer.pad_token_id, [tokenizer.pad_token_id]):
        model.generation_config.eos_token_id = others
        assert sft.generate(model, tokenizer, ["Say fox"], progress=False) == ["fox"]
    model.generation_config.eos_token_id = [tokenizer("fox", add_special_tokens=False)["input_ids"][0]]
    assert len(sft.generate(model, tokenizer, ["Say fox apple"], progress=False)[0]) <= 3
