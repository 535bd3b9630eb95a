"""JSON-lines files of prompt and response: read row by row, or refused by file and line with what is needed instead."""

import json
import unicodedata
import warnings
from pathlib import Path

MAX_ROW = 2**20  # bytes of a row in a file: what is longer is no prompt and response, and would be tokenised first
NEEDED = 'JSON lines in UTF-8, each {"prompt": "...", "response": "..."}'

# Keys by which other formats say more of the conversation, or how it is to be trained on. A row that has one of them
# means something else than its prompt and response alone.
FOREIGN = frozenset(
    "system system_prompt messages conversation conversations history instruction input context output completion "
    "chosen rejected tools functions documents images videos audio thinking reasoning reasoning_content weight "
    "loss_weight input_ids labels attention_mask completion_mask assistant_masks chat_template_kwargs".split()
)

PANDAS = "pandas.{}(FILE).to_json(OUT, orient='records', lines=True) writes them"
BINARY = {  # how files of other formats begin, what they are, and how to come to JSON lines from there
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
    warning that names them; a row with one of :data:`FOREIGN` that holds a value is refused. Raises FileNotFoundError,
    or ValueError that names the file and line of the first row that is not usable: not UTF-8, not JSON, a key given
    twice, without these keys, without a visible character in one of them, or of more than :data:`MAX_ROW` bytes.
    """
    path, rows, ignored = Path(path), [], {}
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        if number == 1 and (other := _binary(line)):
            raise ValueError(f"{where}: is {other[0]}, needs {NEEDED} ({other[1]})")
        if len(line) > MAX_ROW:
            raise ValueError(f"{where}: more than {MAX_ROW:,} bytes, needs at most so many in a row")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}), needs {NEEDED}") from None
        if not text:
            continue
        if not rows and (other := _other_text(text)):
            raise ValueError(f"{where}: is {other[0]}, needs {NEEDED} ({other[1]})")
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
                    f"means; needs prompt and response alone: put what it says into them, or take the key out"
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
    """Its lines, of one that is too long only the beginning: no file fills the memory."""
    with open(path, "rb") as file:
        while line := file.readline(MAX_ROW + 1):
            yield line


def _binary(line):
    """What a file is that begins with these bytes, and how to make JSON lines of it; None if it may be UTF-8 text."""
    for beginning, other in BINARY.items():
        if line.startswith(beginning):
            return other
    encoding = json.detect_encoding(line[:4]).upper()
    if encoding.startswith(("UTF-16", "UTF-32")) and line.strip(b"\0"):
        return f"text in {encoding}", f"iconv -f {encoding} -t UTF-8 converts it"
    return None


def _other_text(line):
    """The same of the first line of text that is not blank; None if it may be a row."""
    if line.startswith("["):
        return "a JSON array", PANDAS.format("read_json")
    if line == "{":
        return "a JSON object of several lines", "jq -c . FILE writes each object in one line"
    if not line.startswith("{") and any(separator in line for separator in ",;\t"):
        return "no JSON object, but perhaps a line of CSV", PANDAS.format("read_csv")
    return None


def _parse(text, where):
    """The object of a line, as a dict."""
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except KeyError as error:
        raise ValueError(f"{where}: the key {error.args[0]!r:.60} is given twice, needs each key once") from None
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise ValueError(f"{where}: not JSON ({error}), needs {NEEDED}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: need an object with prompt and response, got {type(row).__name__}")
    return row


def _unique(pairs):
    """A JSON object as a dict; KeyError if a key comes twice, of which json would keep the last."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def _is_blank(text):
    """Whether there is nothing to see: only separators, control characters and marks of no width (U+200B, U+FEFF)."""
    return all(unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc", "Cf") for character in text)
