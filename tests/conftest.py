"""Lets the tests import the scripts in the repository's root, and keeps their small tensors on one thread."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        if sys.version_info >= (3, 13) and "No module named 'dm_control'" in str(error):
            pytest.skip("dm_control requires labmaze, which has no wheel for Python 3.13")
        raise
