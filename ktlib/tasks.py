"""Instruction data for fine-tuning: built-in tasks with leak-free splits, JSONL files of prompt/response rows, batches.

A row is ``{"prompt": str, "response": str}``. The embedded base model (``ktlib.base_model``) has seen none of the
built-in tasks: its documents contain no date in digits, and they use its words without a code.
"""

import calendar
import json
import random
import warnings
from pathlib import Path

import torch
from tqdm.auto import tqdm

MONTHS = calendar.month_name[1:]

CODE_WORDS = """red blue green white black golden silver small large old young quiet river mountain garden window
bridge castle market harbour forest letter candle lantern horse falcon fox apple bread honey pepper copper marble velvet
paper winter summer morning evening north south east west music story game order number town colour animal food friend
teacher tool ship key song book job street trade club team""".split()


def dates(n_train=8000, n_test=200, seed=0):
    """Rewrite a date: ``"September 25, 1928"`` -> ``"1928-09-25"``. A date is either in train or in test.

    Dates run from 1800 to 2199. Returns ``(train, test)``, two lists of rows. Raises ValueError if the sizes do not
    fit.
    """
    days = [
        (year, month, day)
        for year in range(1800, 2200)
        for month in range(1, 13)
        for day in range(1, calendar.monthrange(year, month)[1] + 1)
    ]
    if n_train < 1 or n_test < 1 or n_train + n_test > len(days):
        raise ValueError(f"n_train, n_test: got {n_train}, {n_test}; need both >= 1 and a sum of at most {len(days)}")
    rows = [
        {"prompt": f"Date: {MONTHS[m - 1]} {d}, {y}", "response": f"{y}-{m:02}-{d:02}"}
        for y, m, d in random.Random(seed).sample(days, n_train + n_test)
    ]
    return rows[:n_train], rows[n_train:]


def codebook(n_train=4000, n_test=200, seed=0, n_words=24, length=3):
    """Translate word by word with a secret code: each of ``n_words`` words stands for another of them.

    The code is a random permutation that only the training rows state; test sequences of ``length`` words are new,
    their words are not. Returns ``(train, test)``, two lists of rows. Raises ValueError if the sizes do not fit.
    """
    if not 2 <= n_words <= len(CODE_WORDS):
        raise ValueError(f"n_words: got {n_words}, need 2 to {len(CODE_WORDS)}")
    most = n_words**length * 9 // 10
    if n_train < 1 or n_test < 1 or n_train + n_test > most:
        raise ValueError(f"n_train, n_test: got {n_train}, {n_test}; need both >= 1 and a sum of at most {most}")
    rng = random.Random(seed)
    words = CODE_WORDS[:n_words]
    cycle = rng.sample(words, n_words)  # one long cycle: no word stands for itself
    code = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    texts = {}
    while len(texts) < n_train + n_test:
        texts[tuple(rng.choices(words, k=length))] = None
    rows = [
        {"prompt": f"Encode: {' '.join(text)}", "response": " ".join(code[word] for word in text)} for text in texts
    ]
    return rows[:n_train], rows[n_train:]


MAX_ROW = 2**20  # bytes of a row in a file: what is longer is no prompt and response, and would be tokenised first
TASKS = {"dates": dates, "codebook": codebook}


def load_jsonl(path):
    """Rows of a UTF-8 JSON-lines file with non-empty string keys ``prompt`` and ``response``; blank lines are skipped.

    Raises FileNotFoundError, or ValueError that names the file and line of the first row that is not usable: not UTF-8,
    not JSON, without these keys, or of more than :data:`MAX_ROW` bytes.
    """
    path, rows = Path(path), []
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        if len(line) > MAX_ROW:
            raise ValueError(f"{where}: more than {MAX_ROW:,} bytes")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
        if not text:
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number of too many digits
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: need an object with prompt and response, got {type(row).__name__}")
        for key in ("prompt", "response"):
            if key not in row:
                raise ValueError(f"{where}: missing key {key!r}, got keys {sorted(row)}")
            if not isinstance(row[key], str) or not row[key].strip():
                raise ValueError(f"{where}: {key!r} must be a non-empty string, got {row[key]!r:.60}")
            if any("\ud800" <= character <= "\udfff" for character in row[key]):
                raise ValueError(f"{where}: {key!r} holds half a character (a lone surrogate)")
        rows.append({"prompt": row["prompt"], "response": row["response"]})
    if not rows:
        raise ValueError(f"{path}: no rows, need at least one line with prompt and response")
    return rows


def _lines(path):
    """Its lines, of one that is too long only the beginning: no file fills the memory."""
    with open(path, "rb") as file:
        while line := file.readline(MAX_ROW + 1):
            yield line


def load_data(dataset, seed=0, test_fraction=0.1, max_test=200):
    """``(train, test)`` rows of a built-in task (a key of TASKS) or of a JSONL file.

    A file is split at random; rows that share a prompt go to the same side. Raises ValueError for an unknown name, an
    unusable row, or a file with fewer than two different prompts.
    """
    if str(dataset) in TASKS:
        return TASKS[str(dataset)](seed=seed)
    if not Path(dataset).is_file():
        raise ValueError(f"dataset: got {str(dataset)!r}, need one of {sorted(TASKS)} or the path of a JSONL file")
    rows = load_jsonl(dataset)
    prompts = sorted({row["prompt"] for row in rows})
    if len(prompts) < 2:
        raise ValueError(f"dataset: {dataset} has {len(prompts)} different prompt, need at least 2 to hold one out")
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, min(max_test, int(test_fraction * len(prompts))))])
    train = [row for row in rows if row["prompt"] not in held_out]
    test = list({row["prompt"]: row for row in rows if row["prompt"] in held_out}.values())
    return train, test


def prompt_ids(tokenizer, prompt):
    """Token ids of a user prompt up to where the answer starts: the chat template if there is one, else a newline."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n")["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def tokenise(tokenizer, rows, sequence_length, progress=False):
    """``(prompt, response)`` of each row as token ids, the response with its end token; None if they are too long.

    Rows longer than ``sequence_length`` tokens are left out with a warning; ValueError if none is short enough.
    """
    pairs = []
    for row in tqdm(rows, desc="tokenising", leave=False, disable=not progress):
        prompt = prompt_ids(tokenizer, row["prompt"])
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        pairs.append((prompt, response) if len(prompt) + len(response) <= sequence_length else None)
    left_out = pairs.count(None)
    if left_out == len(rows):
        raise ValueError(f"sequence_length: got {sequence_length}, need more: none of {len(rows)} rows fits")
    if left_out:
        warnings.warn(f"{left_out} of {len(rows)} rows exceed {sequence_length} tokens, left out", stacklevel=3)
    return pairs


def encode(tokenizer, rows, sequence_length, progress=False):
    """Token ids and labels (-100 on the prompt, so that the loss sees the response and its end token only).

    Rows that are too long are left out, with what :func:`tokenise` says of them.
    """
    pairs = filter(None, tokenise(tokenizer, rows, sequence_length, progress))
    return [{"input_ids": prompt + response, "labels": [-100] * len(prompt) + response} for prompt, response in pairs]


def collator(tokenizer):
    """A function that pads examples on the right to their longest: int64 tensors ``(batch, longest)``."""

    def collate(examples):
        longest = max(len(example["input_ids"]) for example in examples)

        def pad(rows, filler):
            return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

        return {
            "input_ids": pad([example["input_ids"] for example in examples], tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(example["input_ids"]) for example in examples], 0),
            "labels": pad([example["labels"] for example in examples], -100),
        }

    return collate
