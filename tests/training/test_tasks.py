"""Built-in tasks: no leakage, deterministic. JSONL files: every unusable row is named."""

import bz2
import gzip
import json
import lzma
import re

import pytest

from ktlib.lab.base_model import documents
from ktlib.training import tasks


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
        (b'{"prompt": "\\u200b\\ufeff\\u2060", "response": "b"}', "'prompt' must be a non-empty string"),
        (b'{"prompt": "a", "response": "\\u0000\\u001b\\u3000"}', "'response' must be a non-empty string"),
        (b'{"prompt": "a", "response": "b", "response": "c"}', "the key 'response' is given twice"),
        (b'{"prompt": "a", "response": "b", "meta": {"id": 1, "id": 1}}', "the key 'id' is given twice"),
        (b"\xef\xbb\xbf" + GOOD.strip(), "not JSON .*BOM"),
        (b"prompt,response", "not JSON"),
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
    with pytest.warns(UserWarning, match="rows.jsonl: keys other than prompt and response are not used: 'id' .line 2."):
        rows = tasks.load_jsonl(path)
    assert rows == [
        {"prompt": "a", "response": "b", "where": f"{path}, line 1"},
        {"prompt": "\u2028x", "response": "ü", "where": f"{path}, line 2"},
    ]


@pytest.mark.parametrize(
    "key, value",
    [
        ("system", "Be brief."),
        ("System", "Be brief."),
        ("messages", [{"role": "user", "content": "hi"}]),
        ("conversations", [{"from": "human", "value": "hi"}]),
        ("history", [["hi", "hello"]]),
        ("tools", [{"name": "search"}]),
        ("weight", 0.5),
        ("weight", 0),
        ("input", "some text"),
        ("output", "c"),
        ("completion", "c"),
        ("rejected", "c"),
        ("images", ["a.png"]),
        ("reasoning_content", "because"),
    ],
)
def test_a_key_that_changes_what_a_row_means_is_refused(tmp_path, key, value):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + json.dumps({"prompt": "a", "response": "b", key: value}).encode())
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: has the key '{key}', which would not be used"):
        tasks.load_jsonl(path)


def test_other_keys_are_named_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a", "response": "b", "id": i, "system": None, "history": [], f"note {i}": "x"} for i in range(9)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="not used") as caught:
        assert len(tasks.load_jsonl(path)) == 9
    (warning,) = caught
    assert (
        "'id' (line 1), 'system' (line 1), 'history' (line 1), 'note 0' (line 1), 'note 1' (line 2) and 7 others"
        in str(warning.message)
    )


FORMATS = {
    "gzip": (gzip.compress(GOOD), "a gzip file", "gunzip"),
    "bzip2": (bz2.compress(GOOD), "a bzip2 file", "bunzip2"),
    "xz": (lzma.compress(GOOD), "an xz file", "unxz"),
    "a spreadsheet": (b"PK\x03\x04" + bytes(30), "a ZIP file or a spreadsheet", "read_excel"),
    "Parquet": (
        b"PAR1" + bytes(30),
        "a Parquet file",
        "pandas.read_parquet(FILE).to_json(OUT, orient='records', lines",
    ),
    "Arrow": (b"ARROW1\0\0" + bytes(30), "an Arrow file", "read_feather"),
    "an Arrow stream": (b"\xff\xff\xff\xff" + bytes(30), "an Arrow stream", "datasets.Dataset.from_file"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "text in UTF-16", "iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without a mark": (GOOD.decode().encode("utf-16-le"), "text in UTF-16-LE", "iconv -f UTF-16-LE"),
    "UTF-32": (GOOD.decode().encode("utf-32"), "text in UTF-32", "iconv -f UTF-32"),
    "CSV": (b"prompt,response\na,b\n", "no JSON object, but perhaps a line of CSV", "pandas.read_csv"),
    "quoted CSV": (b'"prompt","response"\n"a","b"\n', "no JSON object, but perhaps a line of CSV", "pandas.read_csv"),
    "TSV": (b"prompt\tresponse\na\tb\n", "no JSON object, but perhaps a line of CSV", "pandas.read_csv"),
    "a JSON array": (b"[" + GOOD.strip() + b"]", "a JSON array", "pandas.read_json"),
    "a JSON array of many lines": (b"[\n  {\n" + GOOD + b"]", "a JSON array", "pandas.read_json"),
    "a JSON object of many lines": (b'{\n  "prompt": "a"\n}', "a JSON object of several lines", "jq -c"),
}


@pytest.mark.parametrize("content, what, how", FORMATS.values(), ids=FORMATS)
def test_another_format_is_told_what_is_needed(tmp_path, content, what, how):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rows.jsonl, line 1: ") as error:
        tasks.load_jsonl(path)
    message = str(error.value)
    assert f"is {what}, needs JSON lines in UTF-8" in message and how in message and len(message) < 400


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
