"""Reads JSON-lines files of prompts and responses; an error names the file, the line and what is needed."""

import json
import unicodedata
import warnings
from pathlib import Path

MAX_ROW = 2**20  # bytes; a longer line is hardly a prompt and a response, and tokenising it would take long
NEEDED = 'JSON lines in UTF-8, each {"prompt": "...", "response": "..."}'

# Other formats use these keys for more of the conversation or for how to train on it. A row with a value for one of
# them would lose its meaning if only its prompt and response were read.
FOREIGN = frozenset(
    "system system_prompt messages conversation conversations history instruction input context output completion "
    "chosen rejected tools functions documents images videos audio thinking reasoning reasoning_content weight "
    "loss_weight input_ids labels attention_mask completion_mask assistant_masks chat_template_kwargs".split()
)

PANDAS = "pandas.{}(FILE).to_json(OUT, orient='records', lines=True) writes them"
BINARY = {  # the first bytes of files in other formats: (name of the format, how to convert it to JSON lines)
    b"\x1f\x8b": ("a gzip file", "gunzip unpacks it"),
    b"BZh": ("a bzip2 file", "bunzip2 unpacks it"),
    b"\xfd7zXZ": ("an xz file", "unxz unpacks it"),
    b"\x28\xb5\x2f\xfd": ("a zstandard file", "unzstd unpacks it"),
    b"PK\x03\x04": ("a ZIP file or a spreadsheet", "unzip unpacks the one, " + PANDAS.format("read_excel")),
    b"PAR1": ("a Parquet file", PANDAS.format("read_parquet")),
    b"ARROW1": ("an Arrow file", PANDAS.format("read_feather")),
    b"\xff\xff\xff\xff": ("an Arrow stream", "datasets.Dataset.from_file(FILE).to_json(OUT) writes them"),
}


def load_jsonl(path):
    """Rows of a UTF-8 JSON-lines file with non-empty string keys ``prompt`` and ``response``; blank lines are skipped.

    Returns a list of ``{"prompt": str, "response": str, "where": "FILE, line N"}``. Other keys are left out, with one
    warning that names them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row is not UTF-8, is not JSON, gives a key twice, has no prompt or no response, has no visible
            character in one of them, has a value for a key in :data:`FOREIGN`, or is longer than :data:`MAX_ROW` bytes;
            or there are no rows. The message names the file and the line.
    """
    path, rows, ignored = Path(path), [], {}
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        if number == 1 and (other_format := _binary_format(line)):
            raise ValueError(f"{where}: is {other_format[0]}, needs {NEEDED} ({other_format[1]})")
        if len(line) > MAX_ROW:
            raise ValueError(f"{where}: more than {MAX_ROW:,} bytes, needs at most so many in a row")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}), needs {NEEDED}") from None
        if not text:
            continue
        if not rows and (other_format := _text_format(text)):
            raise ValueError(f"{where}: is {other_format[0]}, needs {NEEDED} ({other_format[1]})")
        row = _parse(text, where)
        for key in ("prompt", "response"):
            if key not in row:
                raise ValueError(f"{where}: missing key {key!r}, got keys {sorted(row)!r:.200}, needs {NEEDED}")
            if not isinstance(row[key], str) or _is_blank(row[key]):
                raise ValueError(f"{where}: {key!r} must be a non-empty string, got {row[key]!r:.60}")
            if any("\ud800" <= character <= "\udfff" for character in row[key]):
                raise ValueError(f"{where}: {key!r} holds half a character (a lone surrogate)")
        for key, value in row.items():
            if key.casefold() in FOREIGN and value not in (None, "", [], {}):
                raise ValueError(
                    f"{where}: has the key {key!r}, which would not be used, although it may change what the row "
                    "means; needs prompt and response alone: move its value into one of them, or remove the key"
                )
            if key not in ("prompt", "response"):
                ignored.setdefault(key, number)
        rows.append({"prompt": row["prompt"], "response": row["response"], "where": where})
    if not rows:
        raise ValueError(f"{path}: no rows, need at least one line with prompt and response")
    if ignored:
        first = ", ".join(f"{key!r:.40} (line {number})" for key, number in list(ignored.items())[:5])
        more = f" and {len(ignored) - 5} others" if len(ignored) > 5 else ""
        warnings.warn(f"{path}: keys other than prompt and response are not used: {first}{more}", stacklevel=2)
    return rows


def _lines(path):
    """The lines of a file, in chunks of at most MAX_ROW + 1 bytes: a file without newlines must not fill the memory."""
    with open(path, "rb") as file:
        while line := file.readline(MAX_ROW + 1):
            yield line


def _binary_format(line):
    """``(name, conversion)`` of the format of a file with this first line, as bytes; None if it may be UTF-8 text."""
    for first_bytes, name_and_conversion in BINARY.items():
        if line.startswith(first_bytes):
            return name_and_conversion
    encoding = json.detect_encoding(line[:4]).upper()
    if encoding.startswith(("UTF-16", "UTF-32")) and line.strip(b"\0"):
        return f"text in {encoding}", f"iconv -f {encoding} -t UTF-8 converts it"
    return None


def _text_format(line):
    """``(name, conversion)`` of the text format of a file with this first non-blank line; None if it may be a row."""
    if line.startswith("["):
        return "a JSON array", PANDAS.format("read_json")
    if line == "{":
        return "a JSON object of several lines", "jq -c . FILE writes each object in one line"
    if not line.startswith("{") and any(separator in line for separator in ",;\t"):
        return "no JSON object, but perhaps a line of CSV", PANDAS.format("read_csv")
    return None


def _parse(text, where):
    """The JSON object in a line, as a dict."""
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except KeyError as error:
        raise ValueError(f"{where}: the key {error.args[0]!r:.60} is given twice, needs each key once") from None
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested too deeply
        raise ValueError(f"{where}: not JSON ({error}), needs {NEEDED}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: need an object with prompt and response, got {type(row).__name__}")
    return row


def _unique(pairs):
    """A JSON object as a dict; KeyError if it has a key twice, where json by itself would take the last value."""
    row = {}
    for key, value in pairs:
        if key in row:
            raise KeyError(key)
        row[key] = value
    return row


def _is_blank(text):
    """Whether a text has only invisible characters: separators, controls and zero-width marks (U+200B, U+FEFF)."""
    return all(unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc", "Cf") for character in text)
