"""The files that ktlib ships: ``BASE``, the folder of the embedded model."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
