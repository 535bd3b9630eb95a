"""The pages that users read: the top README, and those beside the code that they speak of."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BESIDE_CODE = [page for wing in ("ktlib", "csrc", "tests") for page in sorted((ROOT / wing).rglob("README.md"))]
TEXT = "\n\n".join([README, *(page.read_text() for page in BESIDE_CODE)])
