"""Run the Python blocks of the pages as tests, each page in one namespace.

A block uses the names of the blocks above it. If a test process gets only some blocks of a page (from xdist, or as
``pytest docs/page.md::line:31,column:1``), it runs the blocks above them first.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import unittest
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import tlcoupling as tlc

load_model = functools.cache(tlc.load_model)  # all pages share one model


def setup(namespace: dict[str, Any]) -> None:
    """Start a page with no names, an empty folder to write to, and one model that all pages share."""
    namespace.clear()
    namespace["_run"] = set()  # start positions of the blocks that this namespace has run
    namespace["_directory"], namespace["_home"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_directory"].name)
    tlc.load_model = load_model


def teardown(namespace: dict[str, Any]) -> None:
    """Undo the set-up."""
    os.chdir(namespace["_home"])
    namespace["_directory"].cleanup()
    tlc.load_model = load_model.__wrapped__


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Run the earlier blocks of the page that this namespace has not run."""
    block = item.example
    for above in block.document.examples():
        if above.start < block.start and above.start not in block.namespace["_run"]:
            block.namespace["_run"].add(above.start)
            with contextlib.suppress(unittest.SkipTest):
                above.evaluate()
    block.namespace["_run"].add(block.start)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md"], setup=setup, teardown=teardown
).pytest()
