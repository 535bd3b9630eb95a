"""Writes the table of ktlib/integrations/README.md from results of the tests that are marked ``compatible``.

    python tests/support/compatibility.py NEWEST.json OLDEST.json      (make compatibility)

The files are what ``pytest -m compatible --compatibility FILE`` writes, on the newest and on the oldest versions.
"""

import json
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "ktlib/integrations/README.md"
BEGIN, END = "<!-- compatibility: written by make compatibility -->", "<!-- end of compatibility -->"


def table(newest, oldest):
    """The lines of the table: a row for each thing, how many of its tests pass on the two sets of versions."""

    def versions(results):
        return ", ".join(
            f"{name} {results['versions'][name].split('+')[0]}" for name in ("torch", "transformers", "peft")
        )

    lines = [f"| tests that pass with | {versions(newest)} | {versions(oldest)} |", "|---|---|---|"]
    for what in sorted({*newest["rows"], *oldest["rows"]}, key=lambda text: text.strip("`").lower()):
        lines.append(f"| {what} | {cell(newest['rows'].get(what))} | {cell(oldest['rows'].get(what))} |")
    return lines


def cell(outcomes):
    """``"7 of 7"``; a skipped test counts as one that was not passed."""
    return f"{outcomes.get('passed', 0)} of {sum(outcomes.values())}" if outcomes else "not tested"


def rows_of(text):
    """``{what: [cell, ...]}`` of the table in the page's text."""
    body = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    return {row[0]: row[1:] for row in ([one.strip() for one in line.strip("|").split("|")] for line in body[2:])}


if __name__ == "__main__":
    newest, oldest = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    new = "\n".join([BEGIN, *table(newest, oldest), END])
    PAGE.write_text(re.sub(rf"{BEGIN}.*{END}", lambda _: new, PAGE.read_text(), flags=re.DOTALL))
