"""How much memory can still be had."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; on the CPU within the control group's limit too (containers, Slurm)."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(float(psutil.virtual_memory().available), left_in_control_group())


def left_in_control_group(root: Path = Path("/sys/fs/cgroup"), of_process: Path = Path("/proc/self/cgroup")) -> float:
    """The least that any of this process's control groups (version 2) leaves, infinite where there is none."""
    try:
        path = next(line.split("::", 1)[1] for line in of_process.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return math.inf
    folder, left = root / path.lstrip("/"), math.inf
    for group in (folder, *folder.parents):
        try:
            limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        except OSError:
            continue
        if limit.strip() != "max":
            left = min(left, float(limit) - float(used))
    return left
