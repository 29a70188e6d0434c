"""Metadata of the package that depends on the repository's address: links, and a readme that works outside a clone."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Addresses(MetadataHookInterface):
    """Set ``urls`` and ``readme`` from ``[tool.tlcoupling]`` of ``pyproject.toml``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the two fields."""
        release = runpy.run_path(str(Path(self.root) / "scripts" / "release.py"))
        metadata["urls"] = release["addresses"]()
        metadata["readme"] = {"content-type": "text/markdown", "text": release["readme"]()}
