"""Lets the tests import the scripts in the repository's root, and keeps their small tensors on one thread."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--all-learning", action="store_true", help="run the slow learning tests too")
