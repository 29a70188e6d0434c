"""The global random generators, left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the generators of Python, NumPy and torch (CPU and every CUDA device) back as they were.

    TransformerLens draws from them when it boots a model, and seeds Python's and NumPy's too.
    """
    python, arrays = random.getstate(), np.random.get_state()
    # torch.manual_seed seeds every device, whichever the model is on
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
