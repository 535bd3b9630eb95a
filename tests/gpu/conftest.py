"""Tests here need CUDA; without it they are not collected."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # models.py
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
