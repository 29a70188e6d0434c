"""What the tests of scores share: a table of made-up models."""

from __future__ import annotations

import numpy as np
import pandas as pd


def models(n: int = 12, seed: int = 0) -> pd.DataFrame:
    """A table of made-up models: score and coupling have a part in common beside width."""
    rng = np.random.default_rng(seed)
    width = rng.choice([64, 128, 256], n)
    coupling, score = rng.normal(size=(2, n)) + 0.01 * width + rng.normal(size=n)
    names = [f"{family}-{i}" for i, family in enumerate(rng.choice(["pythia", "gpt", "llama"], n))]
    table = pd.DataFrame({"model": names, "coupling": coupling, "null": 1 - 1 / np.sqrt(width), "score": score})
    return table.assign(excess=coupling - table["null"], d_model=width, n_layers=rng.integers(2, 9, n))
