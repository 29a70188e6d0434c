"""The Python blocks of the pages are run as tests, each page in one namespace."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import tlcoupling as tlc

load_model = functools.cache(tlc.load_model)  # every page loads the same one


def setup(namespace: dict[str, Any]) -> None:
    """Let files be written where none stay, and load a model once for all pages."""
    namespace["_directory"], namespace["_home"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_directory"].name)
    tlc.load_model = load_model


def teardown(namespace: dict[str, Any]) -> None:
    """Undo what the set-up did."""
    os.chdir(namespace["_home"])
    namespace["_directory"].cleanup()
    tlc.load_model = load_model.__wrapped__


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md"], setup=setup, teardown=teardown
).pytest()
