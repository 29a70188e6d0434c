"""How much memory is free, and memory given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from pathlib import Path

import psutil
import torch

UNLIMITED = 2.0**62  # bytes; version 1 writes about 2^63 where there is no limit


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a device; on the CPU within the limits of control groups and of the process too."""
    if device.type == "cuda":  # PyTorch keeps what was freed for its next tensors
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return min(float(psutil.virtual_memory().available), left_in_control_group(), left_to_process())


def give_back_memory() -> None:
    """Return the heap's free pages to the system, where the C library can (glibc).

    Long-lived matrices lie between temporary ones on the heap. Without this, what the temporary ones free stays
    resident: 25 to 50 % beyond the tensors.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def left_to_process() -> float:
    """Return the bytes that limits of this process leave (``ulimit -v`` and ``-d``, on Linux); infinite without."""
    if sys.platform != "linux":
        return math.inf
    import resource

    pages = [int(each) * resource.getpagesize() for each in Path("/proc/self/statm").read_text().split()]
    used = {resource.RLIMIT_AS: pages[0], resource.RLIMIT_DATA: pages[5]}
    limits = {kind: resource.getrlimit(kind)[0] for kind in used}
    left = (limit - used[kind] for kind, limit in limits.items() if limit != resource.RLIM_INFINITY)
    return float(min(left, default=math.inf))


def left_in_control_group(root: Path = Path("/sys/fs/cgroup"), of_process: Path = Path("/proc/self/cgroup")) -> float:
    """Return the least bytes that any of this process's control groups leaves (versions 1 and 2); infinite without one.

    Args:
        root: where control groups are mounted; version 1 has its memory controller in ``memory`` below.
        of_process: the list of the process's groups, a line ``id:controllers:path`` each.
    """
    try:
        lines = [line.split(":", 2) for line in of_process.read_text().splitlines()]
    except OSError:
        return math.inf
    left = math.inf
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                limit, used = (float((group / name).read_text()) for name in names)
                if limit < UNLIMITED:
                    left = min(left, limit - used)
    return left
