"""Makes the built-in model: a small DeepSeek-V2 checkpoint, pre-trained on text that this file generates.

    python -m ktlib.lab.base_model OUT_DIR

makes a checkpoint like that in ``ktlib/assets/base``: a stock ``DeepseekV2ForCausalLM`` (MLA attention, first layer
dense, then MoE layers with a shared expert), a byte-level BPE tokenizer that splits numbers into digits, and a chat
template. The shipped checkpoint was made by this command on a GPU in 3 minutes. On two CPU cores the command takes
about 15 minutes, and gives a different, equally good model, because roundings differ. ktlib ships the checkpoint so
that results can be compared between machines.

The generated documents state facts and ask for them, repeat strings, and reorder items. They teach the model to read,
look up and copy, but no knowledge: what a fine-tuned model knows comes from the data of its fine-tuning.
"""

import argparse
import math
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ktlib.files.ownership import new_folder, refuse_existing
from ktlib.system.environment import without_cuda

BEGIN, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

MONTHS = """January February March April May June July August September October November December""".split()
WORDS = """red blue green white black golden silver small large old young quiet river mountain garden window bridge
castle market harbour forest letter candle lantern horse falcon fox apple bread honey pepper copper marble velvet paper
winter summer morning evening north south east west music story game order number""".split()
NOUNS = """home town colour animal food code birthday friend teacher tool ship key song book job number street trade
club team""".split()
STATE = ("The {a} of {n} is {v}.", "{n} has the {a} {v}.", "{v} is the {a} of {n}.", "For {n} the {a} is {v}.")
ASK = ("What is the {a} of {n}?", "Tell me the {a} of {n}.", "Which {a} does {n} have?", "Write the {a} of {n}.")
COPY = ("Repeat: {}", "Write this again: {}", "Copy the text {}", "Say {}")
SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvwz" for vowel in "aeiou"]
NAMES = [first.capitalize() + second for first in SYLLABLES[::6] for second in SYLLABLES[::5]]
ORDERS = {
    "Reverse": lambda items: items[::-1],
    "Last first": lambda items: items[-1:] + items[:-1],
    "First last": lambda items: items[1:] + items[:1],
    "Keep": lambda items: items,
}
JOINS = {"": " ", " with dashes": "-", " with slashes": "/", " with commas": ", "}


def name(rng):
    """A made-up name of two syllables."""
    return rng.choice(NAMES)


def value(rng):
    """A word, name, number, hyphenated code or date in words; never a date in digits."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(WORDS)
    if kind == 1:
        return f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
    if kind == 2:
        return name(rng)
    if kind == 3:
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    if kind == 4:
        return f"{rng.choice(MONTHS)} {rng.randint(1, 31)}, {rng.randint(1000, 2999)}"
    groups = [rng.choice((1, 2, 3)) for _ in range(rng.choice((2, 3)))]
    return "-".join("".join(rng.choice("0123456789") for _ in range(digits)) for digits in groups)


def facts_document(rng):
    """Facts about made-up people, stated up to three times in random order, then questions about them."""
    people = [f"{name(rng)} {name(rng)}" if rng.random() < 0.5 else name(rng) for _ in range(rng.randint(1, 3))]
    facts = [{"n": person, "a": rng.choice(NOUNS), "v": value(rng)} for person in people]
    sentence, question = rng.choice(STATE), rng.choice(ASK)
    text = ""
    for _ in range(rng.randint(1, 3)):
        text += " ".join(sentence.format(**fact) for fact in rng.sample(facts, len(facts))) + " "
    text = text.rstrip()
    for fact in rng.sample(facts, len(facts)):
        text += USER + question.format(**fact) + ASSISTANT + fact["v"] + END
    return text


def repeat_document(rng):
    """A few random words and numbers, repeated two to four times."""
    items = " ".join(value(rng) for _ in range(rng.randint(1, 5)))
    return " ".join([items] * rng.randint(2, 4))


def copy_document(rng):
    """Requests to copy random strings, with their answers."""
    text, request = "", rng.choice(COPY)
    for _ in range(rng.randint(1, 3)):
        items = " ".join(value(rng) for _ in range(rng.randint(1, 3)))
        text += USER + request.format(items) + ASSISTANT + items + END
    return text


def fields(rng):
    """Two or three items: a month, day and year, or a mixture of names, words and numbers."""
    if rng.random() < 0.3:
        return [rng.choice(MONTHS), str(rng.randint(1, 31)), str(rng.randint(1000, 2999))]
    kinds = (name, lambda r: r.choice(WORDS), lambda r: str(r.randrange(10 ** r.randint(1, 4))))
    return [kind(rng) for kind in rng.sample(kinds, rng.randint(2, 3))]


def reorder_document(rng):
    """Requests to reorder items and to join them with a separator, with their answers."""
    text = ""
    for _ in range(rng.randint(1, 3)):
        items, order, join = fields(rng), rng.choice(list(ORDERS)), rng.choice(list(JOINS))
        text += f"{USER}{order}{join}: {' '.join(items)}{ASSISTANT}{JOINS[join].join(ORDERS[order](items))}{END}"
    return text


def pattern_document(rng):
    """Items that are reordered four times by one rule, which only the examples show."""
    text, order, join = "", rng.choice(list(ORDERS)), rng.choice(list(JOINS))
    for _ in range(4):
        items = fields(rng)
        text += f"{USER}{' '.join(items)}{ASSISTANT}{JOINS[join].join(ORDERS[order](items))}{END}"
    return text


KINDS = {facts_document: 4, repeat_document: 3, copy_document: 3, reorder_document: 3, pattern_document: 1}


def documents(seed):
    """Endless generator of pre-training documents (str); the same seed gives the same documents."""
    rng, weights = random.Random(seed), list(KINDS.values())
    while True:
        kind = rng.choices(list(KINDS), weights)[0]
        yield BEGIN + kind(rng).removesuffix(END) + END


def train_tokenizer(n_documents=4000, vocab_size=1024, seed=1):
    """A byte-level BPE tokenizer that splits numbers into digits, trained on the documents; with chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|[^\p{L}\d]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    source = documents(seed)
    bpe.train_from_iterator((next(source) for _ in range(n_documents)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def config(tokenizer):
    """Config of the model: about 4.3 M parameters, 16 routed experts of width 64, top-4, one shared expert."""
    return DeepseekV2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=8,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        n_shared_experts=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        max_position_embeddings=1024,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batches(tokenizer, batch_size, length, seed):
    """Endless generator of token ids, int64 ``(batch_size, length)``; documents follow each other without padding."""
    source, tokens = documents(seed), []
    while True:
        while len(tokens) < batch_size * length:
            tokens += tokenizer(next(source), add_special_tokens=False)["input_ids"]
        yield torch.tensor(tokens[: batch_size * length]).view(batch_size, length)
        tokens = tokens[batch_size * length :]


def pretrain(model, tokenizer, steps=3000, batch_size=16, length=128, lr=5e-4, muon_lr=0.02, seed=2, balance=0.01):
    """Train the fp32 model in place on next-token prediction; returns the mean loss (nats) of each step.

    Muon trains the matrices of attention and MLPs, and AdamW all other parameters. With AdamW alone, the model needs
    twice as many steps until it copies from its context. ``balance`` is the weight of the usual auxiliary loss that
    spreads tokens evenly over the experts.
    """
    matrices, others = [], []
    for key, parameter in model.named_parameters():
        is_excluded = any(name in key for name in ("embed_tokens", "lm_head", "mlp.gate.weight"))
        (matrices if parameter.dim() == 2 and not is_excluded else others).append(parameter)
    optimizers = (
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    )
    rates = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1, (s + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1, s / steps))))
        )
        for optimizer in optimizers
    ]
    router_logits = []

    def logits(gate, hidden_states):
        return torch.nn.functional.linear(hidden_states.flatten(0, -2).float(), gate.weight.float())

    hooks = [
        layer.mlp.gate.register_forward_hook(lambda gate, args, _: router_logits.append(logits(gate, args[0])))
        for layer in model.model.layers
        if hasattr(layer.mlp, "experts")
    ]
    experts, top_k = model.config.n_routed_experts, model.config.num_experts_per_tok
    source, losses = batches(tokenizer, batch_size, length, seed), []
    model.train()
    progress = tqdm(range(steps), desc="pre-training", unit="step")
    for _ in progress:
        tokens = next(source).to(model.device)
        router_logits.clear()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        (loss + balance * load_balancing_loss_func(tuple(router_logits), experts, top_k)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            progress.set_postfix(loss=f"{sum(losses[-20:]) / 20:.3f}")
    for hook in hooks:
        hook.remove()
    return losses


def make(out_dir, steps=3000, seed=0):
    """Train tokenizer and model, and save them as a bf16 checkpoint in ``out_dir``; returns the loss of each step.

    The folder ``out_dir`` appears complete or not at all.

    Raises:
        FileExistsError: ``out_dir`` exists and is not an empty folder; raised before any work.
        ValueError: ``steps`` is less than 1.
    """
    refuse_existing(out_dir, "out_dir")
    if steps < 1:
        raise ValueError(f"steps: got {steps}, need at least 1")
    tokenizer = train_tokenizer()
    torch.manual_seed(seed)
    on_gpu = torch.cuda.is_available() and not without_cuda()
    device, experts = ("cuda", "batched_mm") if on_gpu else ("cpu", "eager")
    model = DeepseekV2ForCausalLM._from_config(config(tokenizer), experts_implementation=experts).to(device)
    losses = pretrain(model, tokenizer, steps)
    with new_folder(out_dir, "out_dir") as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ktlib.lab.base_model", description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", help="folder of the checkpoint; must be new or empty")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    history = make(arguments.out_dir, arguments.steps, arguments.seed)
    print(f"{arguments.out_dir}: loss {history[0]:.3f} -> {sum(history[-20:]) / len(history[-20:]):.3f}")
