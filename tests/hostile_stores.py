"""A store of 50 cells, many of whose files are damaged, malformed, or no files at all."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from analyses import make_analysis
from safetensors.torch import load, save

import tlcoupling as tlc
from tlcoupling.results.files import FORMAT
from tlcoupling.sweeps.cells import ModelFacts

PLAN = tlc.Plan.of(
    {
        "models": ["nowhere/one"],
        "prompts": {"text": [f"prompt {i}" for i in range(50)]},
        "settings": {"k": 3, "sublayers": "block"},
    }
)
ANALYSIS = make_analysis(ks=(3,), sublayers=("block",), with_attention=False)
FACTS = ModelFacts(d_model=16, n_layers=4, n_heads=2, n_params=100)
Spoil = Callable[[Path], Any]


def _bytes(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _flip(index: int) -> Spoil:
    return _bytes(lambda content: bytes([*content[:index], content[index] ^ 64, *content[index + 1 :]]))


def _instead(make: Callable[[Path], Any]) -> Spoil:
    """Puts something else in a file's place."""

    def spoil(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def _header(change: Callable[[dict[str, Any]], Any], tensors: Callable[[dict], dict] = dict) -> Spoil:
    """Changes the header of a file of before there were checksums, so that only the contents can tell."""

    def spoil(path: Path) -> None:
        content = path.read_bytes()
        header = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][FORMAT])
        del header["checksum"]
        change(header)
        path.write_bytes(save(tensors(load(content)), {FORMAT: json.dumps(header)}))

    return spoil


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("kept")


def _socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the name of a socket has at most 108 characters
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _elsewhere(path: Path) -> None:
    """A link to a whole file."""
    target = path.parent.parent / f"target-{path.name}"
    target.write_bytes(next(path.parent.glob("*.safetensors")).read_bytes())
    path.symlink_to(target)


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = {"a": value}
    return value


NOT_FILES: dict[str, Spoil] = {
    "folder": _instead(Path.mkdir),
    "full folder": _instead(_folder),
    "pipe": _instead(os.mkfifo),
    "socket": _instead(_socket),
    "dangling link": _instead(lambda path: path.symlink_to("nowhere")),
    "link to itself": _instead(lambda path: path.symlink_to(path.name)),
    **({"unreadable": lambda path: path.chmod(0)} if os.geteuid() else {}),
}
RESULTS: dict[str, Spoil] = {
    **NOT_FILES,
    "link": _instead(_elsewhere),
    "empty": _bytes(lambda content: b""),
    "half": _bytes(lambda content: content[: len(content) // 2]),
    "garbage": _bytes(lambda content: b"garbage" * 100),
    "huge header": _bytes(lambda content: b"\xff" * 7 + b"\x7f" + content[8:]),
    "header beyond the end": _bytes(lambda content: (2 * len(content)).to_bytes(8, "little") + content[8:]),
    "no UTF-8": _bytes(lambda content: content.replace(b"maker/tiny", b"maker\xff\xfe\xfd\xfc\xfb", 1)),
    "bit of a number": _flip(-20),
    "bit of the header": _flip(150),
    "another format": lambda path: path.write_bytes(save({"x": torch.zeros(2)})),
    "nesting": lambda path: path.write_bytes(save({"x": torch.zeros(2)}, {FORMAT: "[" * 100_000})),
    "kind": _header(lambda header: header.update(kind="Nonsense")),
    "another kind": _header(lambda header: header.update(kind="Growth")),
    "list of fields": _header(lambda header: header.update(plain=[])),
    "extra provenance": _header(lambda header: header["provenance"].update(extra=1)),
    "versions": _header(lambda header: header["provenance"].update(versions=[1])),
    "label less": _header(lambda header: header["nested"]["growth"]["plain"].update(tokens=["a"])),
    "position beyond the end": _header(lambda header: header["nested"]["coupling"]["plain"].update(positions=[4])),
    "shape": _header(lambda header: None, lambda tensors: {**tensors, "growth.rate": torch.zeros(3)}),
    "integers": _header(lambda header: None, lambda tensors: {**tensors, "growth.rate": torch.zeros(4).long()}),
    "tensor of no field": _header(lambda header: None, lambda tensors: {**tensors, "more": torch.zeros(4)}),
    "no note": _header(lambda header: header.pop("note")),
    "note": _header(lambda header: header.update(note=[])),
    "cell": _header(lambda header: header["note"].update(cell="one")),
    "model": _header(lambda header: header["note"]["cell"].update(model={"a": 1})),
    "step": _header(lambda header: header["note"]["cell"].update(step=10**30)),
    "settings": _header(lambda header: header["note"]["cell"]["settings"].update(k="many")),
    "other settings": _header(lambda header: header["note"]["cell"]["settings"].update(k=[1, 2])),
    "deep load": _header(lambda header: header["note"]["cell"].update(load=_deep(300))),
    "sizes": _header(lambda header: header["note"]["model"].update(d_model="wide")),
}  # fmt: skip
FAILURES: dict[str, Spoil] = {
    **{f"failure: {name}": spoil for name, spoil in NOT_FILES.items()},
    "failure: empty": lambda path: path.write_bytes(b""),
    "failure: garbage": lambda path: path.write_bytes(b"\xff\xfe garbage"),
    "failure: list": lambda path: path.write_text("[]"),
    "failure: nesting": lambda path: path.write_text("[" * 100_000),
    "failure: no cell": lambda path: path.write_text('{"error": "none"}'),
}


def whole(folder: Path) -> tlc.SweepStore:
    """The store as it was before."""
    store = tlc.SweepStore(folder, create=True)
    for cell in PLAN.cells:
        store.save(cell, ANALYSIS, FACTS)
    return store


def hostile(folder: Path) -> tuple[tlc.SweepStore, dict[str, str]]:
    """The store, and what is wrong with each bad file, by key."""
    store, bad = whole(folder), {}
    spoils = {**RESULTS, **FAILURES}
    for cell, (name, spoil) in zip(PLAN.cells, spoils.items(), strict=False):
        bad[cell.key] = name
        if name in RESULTS:
            spoil(store.path(cell.key))
        else:
            store.path(cell.key).unlink()
            spoil(folder / "failed" / f"{cell.key}.json")
    assert len(bad) == len(spoils) < len(PLAN.cells)
    return store, bad
