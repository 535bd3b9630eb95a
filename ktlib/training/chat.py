"""Prompts and responses as token ids, and the check that the chat template gives the same ids.

A row is trained on as ``prompt + response + end token``. The prompt is what the chat template writes of the user's
message with ``add_generation_prompt``, as in later use of the model. The response and the tokenizer's ``eos_token``
follow unchanged. Many templates write a finished conversation in other tokens: they strip the response, put an empty
``<think>`` block before it, or end it with another token than ``eos_token``. A model trained on tokens that differ from
those of its template would have learnt tokens that nobody uses. So :func:`check_rendering` compares both for every row,
and the first difference is an error.
"""

import re
from itertools import zip_longest


def prompt_ids(tokenizer, prompt):
    """Token ids of a user prompt up to the response: by the chat template if there is one, else with a newline."""
    return _prompts(tokenizer, [{"prompt": prompt, "where": "prompt"}])[0]


def token_ids(tokenizer, rows):
    """``(prompt, response)`` of each row as lists of token ids, the response with its end token.

    ``rows`` are dicts with the keys ``prompt``, ``response`` and ``where``; errors name a row by its ``where``.

    Raises:
        ValueError: the chat template fails on a row, or the tokenizer puts an end token behind prompts.
    """
    responses = tokenizer([row["response"] for row in rows], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return [(prompt, response + end) for prompt, response in zip(_prompts(tokenizer, rows), responses, strict=True)]


def check_text(tokenizer, rows):
    """ValueError for the first row whose prompt or response contains the text of a special token.

    The tokenizer would turn this text into the special token: a ``</s>`` in a quoted web page would end the response.
    """
    special = sorted(map(tokenizer.convert_ids_to_tokens, _special_ids(tokenizer)), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special)))
    for row in rows:
        for key in ("prompt", "response"):
            for token in dict.fromkeys(pattern.findall(row[key])):
                if tokenizer.convert_tokens_to_ids(token) in tokenizer(row[key], add_special_tokens=False)["input_ids"]:
                    raise ValueError(
                        f"{row['where']}: {key!r} holds {token!r}, which this tokenizer reads as a special token; "
                        "needs other words for it (ktlib adds the chat template's special tokens and the end token)"
                    )


def check_rendering(tokenizer, rows, pairs):
    """ValueError for the first row whose token ids differ from those of the chat template for the whole conversation.

    ``pairs`` are the :func:`token_ids` of ``rows``. Behind the end token the template may write blanks and special
    tokens, such as the newline of ChatML, because the response has ended before them. A tokenizer without a chat
    template passes.
    """
    if tokenizer.chat_template is None:
        return
    for row, (prompt, response), whole in zip(rows, pairs, _conversations(tokenizer, rows), strict=True):
        ours = prompt + response
        after_end = whole[len(ours) :]
        if whole[: len(ours)] != ours or after_end and tokenizer.decode(after_end, skip_special_tokens=True).strip():
            raise ValueError(_difference(tokenizer, row["where"], prompt, response, whole))


def _special_ids(tokenizer):
    """Ids of all special tokens: those with a role, such as eos_token, and added tokens that are marked as special."""
    marked = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def _prompts(tokenizer, rows):
    if tokenizer.chat_template is not None:
        return _rendered(tokenizer, rows, [[_message("user", row["prompt"])] for row in rows], True)
    prompts = tokenizer([row["prompt"] + "\n" for row in rows])["input_ids"]
    if any(prompt[-1] == tokenizer.eos_token_id for prompt in prompts):
        raise ValueError(
            f"model: the tokenizer ends every text with {tokenizer.eos_token!r}, also a prompt, before its response; "
            "needs add_eos_token false in tokenizer_config.json, or a chat template"
        )
    return prompts


def _conversations(tokenizer, rows):
    turns = [[_message("user", row["prompt"]), _message("assistant", row["response"])] for row in rows]
    return _rendered(tokenizer, rows, turns, False)


def _message(role, content):
    return {"role": role, "content": content}


def _rendered(tokenizer, rows, conversations, add_generation_prompt):
    """Token ids of each conversation by the chat template; ValueError that names the row on which it fails."""
    try:
        return tokenizer.apply_chat_template(
            conversations, add_generation_prompt=add_generation_prompt, return_dict=False
        )
    except Exception as error:  # a template is a program that may raise errors of any type
        if len(rows) == 1:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{rows[0]['where']}: the chat template of the model fails on it ({reason})") from error
    # One of several rows failed: the row that fails alone, too, is named in the error.
    rendered = []
    for row, conversation in zip(rows, conversations, strict=True):
        rendered += _rendered(tokenizer, [row], [conversation], add_generation_prompt)
    return rendered


def _difference(tokenizer, where, prompt, response, whole):
    """The error text for the first difference between a row's tokens and those of the chat template for it."""
    ours = prompt + response
    at = next(i for i, (our_id, their_id) in enumerate(zip_longest(ours, whole)) if our_id != their_id)
    end = len(ours) - 1
    if at < len(ours) and tokenizer.decode(whole).startswith(tokenizer.decode(ours)):
        needs = "a response whose first token does not merge with the prompt's last: the same text has other tokens"
    elif at == end and at < len(whole) and whole[at] in _special_ids(tokenizer):
        needs = f"eos_token {tokenizer.decode([whole[at]])!r} in tokenizer_config.json, as the template ends responses"
    elif at >= end:
        needs = "a chat template that ends the conversation with eos_token right behind the response"
    elif at < len(prompt) or any(whole[i : i + len(response) - 1] == response[:-1] for i in range(at, len(whole))):
        needs = "a chat template whose generation prompt is all that it writes before a response"
    else:
        needs = "the response as the template writes it, or a chat template that writes responses as they are"

    def token(ids):
        return f"{tokenizer.decode([ids[at]])!r} (id {ids[at]})" if at < len(ids) else "nothing"

    texts = " against ".join(f"{tokenizer.decode(ids[at : at + 12])!r:.80}" for ids in (ours, whole))
    return (
        f"{where}: token {at + 1} of prompt and response is {token(ours)}, where the chat template writes "
        f"{token(whole)} in the whole conversation ({texts}); needs {needs}"
    )
