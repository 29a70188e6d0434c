"""Tables of measurements and scores: what is read off them, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from score_tables import models

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.scores.partial_correlation import partial_correlation
from tlcoupling.scores.tables import family_of


def test_a_sweeps_table_is_averaged_over_prompts_by_sublayer_and_k(tmp_path: Path):
    rng = np.random.default_rng(3)
    rows = [
        {"model": model, "prompt_id": prompt, "sublayer": sublayer, "k_asked": k, "d_model": 8 * (1 + index)}
        | {"coupling": rng.normal(), "null": rng.normal(), "lss": rng.normal(), "ed": rng.normal()}
        | {"status": "measured", "random_seed": None, "settings": "{}"}
        for index, model in enumerate("abcd")
        for prompt in ("p", "q")
        for sublayer in ("block", "attn")
        for k in ("4", "0.1")
    ]
    table = pd.DataFrame(rows)
    table["excess"] = table["coupling"] - table["null"]
    random = table.assign(random_seed=0, coupling=100.0)
    failed = table.assign(status="failed", coupling=np.nan).head(3)
    scores = dict(zip("dcba", rng.normal(size=4), strict=True))
    path = tmp_path / "table.parquet"
    pd.concat([table, random, failed]).to_parquet(path)
    found = tlc.correlate(path, scores)
    of = table[(table["sublayer"] == "attn") & (table["k_asked"] == "0.1")].groupby("model")
    expected = scipy.stats.pearsonr(of["coupling"].mean(), [scores[name] for name in "abcd"])[0]
    assert found.of("coupling attn K=0.1")["r"] == pytest.approx(expected, abs=1e-12)
    assert {"LSS block", "LSS attn", "ED", "excess block K=4", "width"} <= set(found.predictors)
    held = partial_correlation(of["coupling"].mean(), [scores[name] for name in "abcd"], [of["null"].mean()]).r
    assert found.of("coupling attn K=0.1")["partial given null"] == pytest.approx(held, abs=1e-9)


def test_families_are_read_off_names():
    names = ("EleutherAI/pythia-1.4b", "gpt2-xl", "Qwen1.5-7B", "/data/runs/w64-d4/", "7b")
    assert [family_of(name) for name in names] == ["pythia", "gpt", "qwen", "w", "7b"]


def test_mixed_settings_and_unlike_prompts_are_not_averaged_without_a_word():
    table = models(6).assign(settings=["a"] * 3 + ["b"] * 3)
    with pytest.raises(ArgumentError, match="2 different settings"):
        tlc.correlate(table)
    with pytest.warns(UserWarning, match="models are measured on different prompts"):
        tlc.correlate(models(6).assign(prompt_id=["a"] * 5 + ["b"]))
