"""What ``tlcoupling --version --verbose`` prints: what a report of a bug needs to say of the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator


def installed(package: str) -> str:
    """Return the version of a package, or "(not installed)"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def lines() -> Iterator[str]:
    """Yield the versions of Python, torch and each direct dependency, and the devices that torch sees."""
    import torch

    yield f"Python {platform.python_version()}, {platform.platform()}"
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield f"CUDA {torch.version.cuda} device {index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "MPS device"
    for package in _dependencies():
        yield f"{package} {installed(package)}"


def _dependencies() -> list[str]:
    """Return the names of the packages that the library, or one of its optional parts, uses; torch has its own line."""
    try:
        declared = importlib.metadata.requires("tlcoupling") or []
    except importlib.metadata.PackageNotFoundError:
        declared = ["transformer-lens"]
    used = [each for each in declared if "extra ==" not in each or "extra == 'all'" in each]
    names = {re.match(r"[\w.-]+", each)[0] for each in used}  # pyright: ignore[reportOptionalSubscript]
    return sorted((names | {"transformers", "numpy"}) - {"torch", "tlcoupling"})
