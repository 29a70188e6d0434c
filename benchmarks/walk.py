"""Print the walk of a prompt: which modules ``depth_coupling`` enters, in which order, and from where.

    python benchmarks/walk.py

Profiles one call on a small random model, with its trace. Lists each module at its first entry from outside its folder,
with all modules outside the folder that enter it. ``docs/design.md`` shows the output.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from llamas import llama, save, word_tokenizer

import tlcoupling as tlc

PACKAGE = Path(tlc.__file__).parent


class Walk:
    """The entries of modules from outside their folders, while attached to the profiler."""

    def __init__(self) -> None:
        """Start without any."""
        self.entries: dict[str, set[str]] = defaultdict(set)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Record a call from one module of the package to a module of another folder."""
        entered = _module(frame)
        if event != "call" or entered is None:
            return
        caller = frame.f_back
        while caller is not None and _module(caller) is None:
            caller = caller.f_back
        source = "the user" if caller is None else _module(caller) or ""
        if source.rpartition("/")[0] != entered.rpartition("/")[0] or source == "the user":
            self.entries[entered].add(source)


def _module(frame: FrameType) -> str | None:
    """The module of a frame as ``folder/file``; None outside the package and in a module's or a class's own code."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(PACKAGE) or frame.f_code.co_name == "<module>":
        return None
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def main() -> None:
    """Profile one call and print its walk."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        model = tlc.load_model(str(save(llama(32, 3, 4, 65), word_tokenizer(64), Path(name))))
    walk = Walk()
    _measure(model)  # first: imports and caches
    threading.setprofile(walk)
    sys.setprofile(walk)
    _measure(model)
    sys.setprofile(None)
    threading.setprofile(None)
    for module, sources in walk.entries.items():
        print(f"{module:24} from {', '.join(sorted(sources))}")


def _measure(model: Any) -> None:
    tlc.depth_coupling(tlc.trace(model, torch.arange(6)), k=4, tokens=[3, -1])


if __name__ == "__main__":
    main()
