"""Data for fine-tuning: rows of built-in tasks and of JSONL files, split into train and test, tokenised, in batches.

A row is ``{"prompt": str, "response": str}``; a row of a file also has ``"where": "FILE, line N"``. The built-in model
(``ktlib.lab.base_model``) has seen none of the built-in tasks: its training texts contain no date in digits, and the
words of the code only in plain sentences.
"""

import calendar
import random
import warnings
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ktlib.training.chat import check_rendering, check_text, token_ids
from ktlib.training.jsonl import load_jsonl

MONTHS = calendar.month_name[1:]

CODE_WORDS = """red blue green white black golden silver small large old young quiet river mountain garden window
bridge castle market harbour forest letter candle lantern horse falcon fox apple bread honey pepper copper marble velvet
paper winter summer morning evening north south east west music story game order number town colour animal food friend
teacher tool ship key song book job street trade club team""".split()


def dates(n_train=8000, n_test=200, seed=0):
    """Rewrite a date: ``"September 25, 1928"`` -> ``"1928-09-25"``. No date is both in train and in test.

    Dates run from 1800 to 2199. Returns ``(train, test)``, two lists of rows. ValueError if the sizes are below 1 or
    exceed the number of dates.
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

    The code is a random permutation, which can be learnt from the training rows only. Train and test use the same
    words, but no sequence of ``length`` words is in both. Returns ``(train, test)``, two lists of rows. ValueError if
    the sizes are below 1 or exceed nine tenths of the number of sequences.
    """
    if not 2 <= n_words <= len(CODE_WORDS):
        raise ValueError(f"n_words: got {n_words}, need 2 to {len(CODE_WORDS)}")
    most = n_words**length * 9 // 10
    if n_train < 1 or n_test < 1 or n_train + n_test > most:
        raise ValueError(f"n_train, n_test: got {n_train}, {n_test}; need both >= 1 and a sum of at most {most}")
    rng = random.Random(seed)
    words = CODE_WORDS[:n_words]
    cycle = rng.sample(words, n_words)  # the permutation is a single cycle, so that no word stands for itself
    code = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    texts = {}
    while len(texts) < n_train + n_test:
        texts[tuple(rng.choices(words, k=length))] = None
    rows = [
        {"prompt": f"Encode: {' '.join(text)}", "response": " ".join(code[word] for word in text)} for text in texts
    ]
    return rows[:n_train], rows[n_train:]


TASKS = {"dates": dates, "codebook": codebook}


def check_dataset(dataset):
    """ValueError if ``dataset`` is neither a key of TASKS nor a file; a relative path starts at the current folder."""
    path = Path(dataset)
    if str(dataset) not in TASKS and not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(
            f"dataset: got {str(dataset)!r}, need one of {', '.join(TASKS)} or a JSONL file: {path.absolute()} {found}"
        )


def load_data(dataset, seed=0, test_fraction=0.1, max_test=200):
    """``(train, test)`` rows of a built-in task (a key of TASKS) or of a JSONL file.

    A file is split at random; rows that share a prompt go to the same side. ValueError for an unknown name, a row that
    cannot be used, or a file with fewer than two different prompts.
    """
    if str(dataset) in TASKS:
        return TASKS[str(dataset)](seed=seed)
    check_dataset(dataset)
    rows = load_jsonl(dataset)
    prompts = sorted({row["prompt"] for row in rows})
    if len(prompts) < 2:
        raise ValueError(f"dataset: {dataset} has {len(prompts)} different prompt, need at least 2 to hold one out")
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, min(max_test, int(test_fraction * len(prompts))))])
    train = [row for row in rows if row["prompt"] not in held_out]
    test = list({row["prompt"]: row for row in rows if row["prompt"] in held_out}.values())
    return train, test


BATCH = 1000  # rows that are tokenised together


def tokenise(tokenizer, rows, sequence_length, progress=False):
    """``(prompt, response)`` of each row as token ids, the response with its end token; None for rows too long.

    One warning says how many rows are longer than ``sequence_length`` tokens.

    Raises:
        ValueError: no row is short enough; or a row contains the text of a special token, or the chat template writes
            it in other tokens (:mod:`ktlib.training.chat`). The message names the row by its ``where``, or its number.
    """
    if "strftime_now" in str(tokenizer.chat_template):
        warnings.warn(
            "model: its chat template writes today's date into prompts: on another day the same run trains on other "
            "tokens and does not go on from its checkpoints; a fixed date in the template prevents that",
            stacklevel=3,
        )
    rows = [{"where": f"row {number} of {len(rows)}"} | row for number, row in enumerate(rows, 1)]
    pairs = [pair for batch in _batches(rows, "tokenising", progress) for pair in token_ids(tokenizer, batch)]
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    left_out = [i for i, length in enumerate(lengths) if length > sequence_length]
    if left_out:
        first, shortest = left_out[0], min(left_out, key=lengths.__getitem__)
        if len(left_out) == len(rows):
            raise ValueError(
                f"sequence_length: got {sequence_length}, need more: none of {len(rows)} rows fits; the shortest "
                f"({rows[shortest]['where']}) has {lengths[shortest]} tokens, the longest {max(lengths)}"
            )
        warnings.warn(
            f"{len(left_out)} of {len(rows)} rows exceed {sequence_length} tokens, left out; the first is "
            f"{rows[first]['where']} with {lengths[first]} tokens, the longest has {max(lengths)}",
            stacklevel=3,
        )
    short = [(row, pair) for row, pair, length in zip(rows, pairs, lengths, strict=True) if length <= sequence_length]
    for batch in _batches(short, "comparing with the chat template", progress):
        check_text(tokenizer, [row for row, _ in batch])
        check_rendering(tokenizer, *zip(*batch, strict=True))
    return [pair if length <= sequence_length else None for pair, length in zip(pairs, lengths, strict=True)]


def _batches(items, description, progress):
    starts = tqdm(range(0, len(items), BATCH), desc=description, leave=False, disable=not progress)
    return (items[start : start + BATCH] for start in starts)


def encode(tokenizer, rows, sequence_length, progress=False):
    """``{"input_ids", "labels"}`` of each row that is short enough; warnings and errors are those of :func:`tokenise`.

    Labels are -100 on the prompt, so that the loss is that of the response and its end token only.
    """
    pairs = filter(None, tokenise(tokenizer, rows, sequence_length, progress))
    return [{"input_ids": prompt + response, "labels": [-100] * len(prompt) + response} for prompt, response in pairs]


def collator(tokenizer):
    """A function that pads a list of examples on the right and returns int64 tensors ``(batch, longest)``."""

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
