"""Run the Python blocks of the pages as tests, each page in one namespace."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import tlcoupling as tlc

load_model = functools.cache(tlc.load_model)  # all pages share one model


def setup(namespace: dict[str, Any]) -> None:
    """Change to a temporary folder, and share one model between all pages."""
    namespace["_directory"], namespace["_home"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_directory"].name)
    tlc.load_model = load_model


def teardown(namespace: dict[str, Any]) -> None:
    """Undo the set-up."""
    os.chdir(namespace["_home"])
    namespace["_directory"].cleanup()
    tlc.load_model = load_model.__wrapped__


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md"], setup=setup, teardown=teardown
).pytest()
