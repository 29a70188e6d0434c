"""Render one self-contained HTML page from sections, data and the files in ``assets``.

Text from a model or a prompt enters the page as compressed JSON, in base 85, which has no markup. The page's scripts
show it as text. The Content-Security-Policy lists the hashes of the page's own scripts: nothing else may run, and
nothing may be fetched. The circuitsvis bundle is included once, compressed; the page's scripts run it, under its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import zlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

_SAFE = str.maketrans("&<>", ",./")
_ASSETS = resources.files("tlcoupling.viz") / "assets"
# In order of dependence.
_SCRIPTS = (
    "dom",
    "arrays",
    "choice",
    "color",
    "chart",
    "heatmap",
    "header",
    "summary",
    "controls",
    "kernel",
    "shared",
    "heads",
    "coupling",
    "attention",
    "picture",
    "pairs",
    "tokens",
    "growth",
    "measures",
    "atlas",
    "main",
)


def render(title: str, sections: Mapping[str, Any]) -> str:
    """Render a page of the named sections, in the given order.

    Args:
        title: the document's title, as text.
        sections: the data of each section, by the name of its file in ``assets/sections``; a section with data None is
            omitted.
    """
    sections = {name: data for name, data in sections.items() if data is not None}
    script = "\n".join(asset(f"scripts/{name}.js") for name in _SCRIPTS)
    bundle = _circuitsvis() if (sections.get("pairs") or {}).get("attention") else ""
    return Template(asset("page.html")).substitute(
        title=html.escape(title),
        policy=_policy([script, bundle] if bundle else [script]),
        style=asset("page.css"),
        body="\n".join(asset(f"sections/{name}.html") for name in sections),
        data=_compressed(_container(sections)),
        bundle=_compressed(bundle.encode()) if bundle else "",
        script=script,
    )


@cache
def asset(name: str) -> str:
    """Return the text of a file in ``assets``."""
    return (_ASSETS / name).read_text(encoding="utf-8")


@cache
def _circuitsvis() -> str:
    """Return the JavaScript bundle of the circuitsvis package, without importing the package.

    Raises:
        ImportError: circuitsvis is not installed.
    """
    spec = importlib.util.find_spec("circuitsvis")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise ImportError("attention patterns need circuitsvis: pip install circuitsvis")
    bundle = Path(folders[0], "dist", "cdn", "iife.js").read_text(encoding="utf-8")
    return bundle.partition("\n//# sourceMappingURL=")[0]  # the page does not include the source map


def _container(data: Mapping[str, Any]) -> bytes:
    """Return the data as JSON behind its length, a little-endian 32-bit integer, then all arrays in one run of bytes.

    In the JSON, an array is where it begins in that run, and its length.
    """
    arrays = bytearray()

    def placed(array: bytes) -> list[int]:
        arrays.extend(array)
        return [len(arrays) - len(array), len(array)]

    text = json.dumps(data, allow_nan=False, separators=(",", ":"), default=placed).encode()
    return len(text).to_bytes(4, "little") + text + arrays


def _compressed(content: bytes) -> str:
    """Compress bytes with zlib to base 85, without the three of its characters that are special to HTML."""
    return base64.b85encode(zlib.compress(content, 9)).decode().translate(_SAFE)


def _policy(scripts: list[str]) -> str:
    """Return a Content-Security-Policy that allows these inline scripts and no request."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
