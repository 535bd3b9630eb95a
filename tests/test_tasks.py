"""Built-in tasks: no leakage, deterministic. JSONL files: every unusable row is named."""

import re

import pytest

from ktlib import tasks
from ktlib.base_model import documents


@pytest.mark.parametrize("name", tasks.TASKS)
def test_splits_are_disjoint_and_deterministic(name):
    train, test = tasks.load_data(name, seed=3)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert (train, test) == tasks.load_data(name, seed=3)
    assert (train, test) != tasks.load_data(name, seed=4)
    assert all(row["prompt"].strip() and row["response"].strip() for row in train + test)


def test_no_date_is_in_both_splits():
    train, test = tasks.dates(n_train=3000, n_test=500)
    assert not {row["response"] for row in train} & {row["response"] for row in test}
    assert {"prompt": "Date: September 5, 1928", "response": "1928-09-05"} in sum(
        tasks.dates(n_train=146_096, n_test=1), []
    )


def test_the_code_is_learnable_from_train_and_test_texts_are_new():
    train, test = tasks.codebook()

    def words(row):
        return zip(row["prompt"].removeprefix("Encode: ").split(), row["response"].split(), strict=True)

    code = {}
    for row in train:
        for word, meaning in words(row):
            assert code.setdefault(word, meaning) == meaning != word
    assert sorted(code) == sorted(code.values())
    assert all(code[word] == meaning for row in test for word, meaning in words(row))


def test_the_base_model_has_read_nothing_of_the_tasks():
    source = documents(2)
    text = " ".join(next(source) for _ in range(8000))
    assert not re.search(r"(?<!\d)\d{4}-\d\d-\d\d(?!\d)", text), "a date in digits"
    assert "Date" not in text and "Encode" not in text


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (146_000, 200)])
def test_dates_refuses_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="n_train, n_test"):
        tasks.dates(*sizes)


@pytest.mark.parametrize(
    "sizes, name",
    [
        ({"n_words": 1}, "n_words"),
        ({"n_words": 100}, "n_words"),
        ({"n_train": 0}, "n_train"),
        ({"n_test": 0}, "n_test"),
        ({"n_test": 10**6}, "n_test"),
    ],
)
def test_codebook_refuses_impossible_sizes(sizes, name):
    with pytest.raises(ValueError, match=name):
        tasks.codebook(**sizes)


GOOD = b'{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "a"}', "missing key 'response'"),
        (b'{"prompt": 3, "response": "b"}', "'prompt' must be a non-empty string, got 3"),
        (b'{"prompt": "a", "response": " "}', "'response' must be a non-empty string"),
        (b'{"prompt": "a", "response": null}', "'response' must be a non-empty string, got None"),
        (b'{"prompt": "\xff", "response": "b"}', "not UTF-8"),
        (b'{"prompt": "a", "response": ', "not JSON"),
        (b'["a", "b"]', "need an object"),
    ],
)
def test_jsonl_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        tasks.load_jsonl(path)
    assert "rows.jsonl, line 3: " in str(error.value)


def test_jsonl_accepts_what_editors_write(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + '{"prompt": "\u2028x", "response": "ü", "id": 1}'.encode()
    )
    assert tasks.load_jsonl(path) == [{"prompt": "a", "response": "b"}, {"prompt": "\u2028x", "response": "ü"}]


@pytest.mark.parametrize("content, message", [(b"\n\n", "no rows"), (GOOD * 3, "at least 2")])
def test_a_file_needs_enough_rows(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tasks.load_data(path)


def test_file_split_keeps_equal_prompts_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i % 30}", "response": "r{i}"}}\n' for i in range(60)))
    train, test = tasks.load_data(path)
    assert (len(train), len(test)) == (54, 3)
    assert (train, test) == tasks.load_data(path)


def test_unknown_dataset_lists_the_tasks():
    with pytest.raises(ValueError, match="dataset: got 'datez', need one of .*dates.*codebook|codebook.*dates"):
        tasks.load_data("datez")
