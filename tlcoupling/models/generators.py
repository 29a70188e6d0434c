"""Protection of the global random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch (CPU and every CUDA device) on exit.

    TransformerLens draws from them when it boots a model, and also seeds those of Python and NumPy.
    """
    python, arrays = random.getstate(), np.random.get_state()
    # torch.manual_seed seeds every device, not only the model's
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
