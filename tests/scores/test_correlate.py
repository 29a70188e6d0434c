"""Measurements against scores: known values, and what holding something fixed leaves."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from score_tables import models

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.scores.partial_correlation import partial_correlation, r_squared_of_groups
from tlcoupling.scores.tables import family_of, published_points

RNG = np.random.default_rng(0)


def test_the_published_points_give_the_figures_r_squared_and_what_width_explains():
    found = tlc.correlate()
    table = published_points()
    line = scipy.stats.linregress(table["coupling"], table["score"])
    coupling = found.of("coupling")
    assert found.models == tuple(table["model"]) and coupling["n"] == 28
    assert coupling["r"] == pytest.approx(line.rvalue, abs=1e-12) and coupling["p"] == pytest.approx(line.pvalue)
    assert round(coupling["r_squared"], 2) == 0.80  # as the figure states
    of_width = np.corrcoef(1 - 1 / np.sqrt(0.1 * table["d_model"]), table["coupling"])[0, 1] ** 2
    assert coupling["by_null"] == pytest.approx(of_width, abs=1e-12) and round(of_width, 2) == 0.93
    assert found.of("excess")["r_squared"] < 0.01  # what is left of coupling above that null


def test_each_number_of_a_predictor_is_scipys():
    table = models(30)
    found = tlc.correlate(table)
    for name, column in (("coupling", "coupling"), ("excess", "excess"), ("depth", "n_layers"), ("width", "d_model")):
        of = found.of(name)
        pearson = scipy.stats.pearsonr(table[column], table["score"])
        spearman = scipy.stats.spearmanr(table[column], table["score"])
        assert (of["r"], of["p"]) == pytest.approx((pearson[0], pearson[1]), rel=1e-9)
        assert (of["rho"], of["rho_p"]) == pytest.approx((spearman[0], spearman[1]), rel=1e-9)
        assert of["low"] < of["r"] < of["high"]


def test_the_interval_is_the_jackknifes_of_models():
    """By hand on Fisher's scale; close to Fisher's own interval of normal pairs at 200 models."""
    table = models(200)
    found = tlc.correlate(table, confidence=0.9).of("coupling")
    x, y = (table[name].to_numpy() for name in ("coupling", "score"))
    each = np.arctanh([np.corrcoef(np.delete(x, i), np.delete(y, i))[0, 1] for i in range(200)])
    half = scipy.stats.t.ppf(0.95, 198) * np.sqrt(199 / 200 * np.square(each - each.mean()).sum())
    z = np.arctanh(found["r"])
    assert (found["low"], found["high"]) == pytest.approx((np.tanh(z - half), np.tanh(z + half)), abs=1e-9)
    fisher = scipy.stats.pearsonr(x, y).confidence_interval(0.9)
    assert (found["low"], found["high"]) == pytest.approx(tuple(fisher), abs=0.03)


def checkpoints(runs: int, steps: int, seed: int) -> pd.DataFrame:
    """Checkpoints of training runs whose coupling and score are independent random walks."""
    rng = np.random.default_rng(seed)
    coupling, score = rng.normal(size=(2, runs, steps)).cumsum(-1).reshape(2, -1)
    table = pd.DataFrame({"run": np.repeat(range(runs), steps), "coupling": coupling, "score": score})
    return table.assign(model=[f"m{i}" for i in range(runs * steps)], null=rng.normal(size=runs * steps))


def test_checkpoints_of_one_run_are_one_cluster():
    """Independent walks: taken row by row, p is below 0.05 in half of the tables. Over 300, over runs, it is in 5 %.

    300 tables tell a share of 5 % to 1.3 %; the jackknife's own lies between 3 and 6 %.
    """
    found, naive = [], []
    for seed in range(300):
        table = checkpoints(8, 10, seed)
        with pytest.warns(UserWarning, match="80 rows are of 8 clusters .*'run'.* not independent"):
            of = tlc.correlate(table).of("coupling")
        found.append([of["p"], of["rho_p"], of["partial_p given null"], of["low"] > 0 or of["high"] < 0])
        naive.append(scipy.stats.pearsonr(table["coupling"], table["score"])[1])
    assert np.mean(np.array(naive) < 0.05) > 0.35
    shares = [*(np.array(found)[:, :3] < 0.05).mean(0), np.array(found)[:, 3].mean()]
    assert all(0.01 < share < 0.06 + 3 * 0.013 for share in shares), shares


def test_a_real_correlation_of_runs_is_found():
    table = checkpoints(12, 5, 0)
    with pytest.warns(UserWarning, match="60 rows are of 12 clusters"):
        of = tlc.correlate(table.assign(score=table["coupling"] + 0.3 * table["score"])).of("coupling")
    assert of["p"] < 0.01 and 0 < of["low"] < of["r"] < of["high"] < 1


def test_a_run_comes_before_a_family_before_a_model():
    table = checkpoints(5, 2, 0).assign(family=["a", "b"] * 5)
    for columns, by, clusters in (
        (["run", "family"], "run", 5),
        (["family"], "family", 2),
        ([], "model", 10),
    ):
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            found = tlc.correlate(table.drop(columns=[name for name in ("run", "family") if name not in columns]))
        assert found.cluster_by == by and len(set(found.cluster)) == clusters
        said = " ".join(str(one.message) for one in raised)
        assert ("not independent" in said) == (clusters < 10)
        assert ("2 independent clusters (column 'family') are too few" in said) == (clusters == 2)
        assert np.isnan(found.of("coupling")["p"]) == (clusters == 2) == np.isnan(found.of("coupling")["low"])


def test_no_spread_between_clusters_is_no_certainty():
    """A rank correlation of 1 stays 1 without any run: its standard error is 0, and 4 runs in order are not p = 0."""
    table = checkpoints(4, 3, 0)
    with pytest.warns(UserWarning, match="12 rows are of 4 clusters"):
        of = tlc.correlate(table.assign(score=np.exp(table["coupling"]))).of("coupling")
    assert of["rho"] == pytest.approx(1) and np.isnan(of["rho_p"]) and 0 < of["p"] < 1
    with pytest.warns(UserWarning, match="12 rows are of 4 clusters"):
        of = tlc.correlate(table.assign(score=2 * table["coupling"])).of("coupling")
    assert of["r"] == pytest.approx(1) and np.isnan([of["p"], of["low"], of["high"]]).all()


def test_the_rank_correlation_of_few_models_counts_their_orders():
    """Student's t gives 0 for a perfect order; scipy's permutation test counts, with ties too."""
    for n, score in ((3, [1, 2, 3]), (4, [1, 4, 9, 16]), (6, [2, 1, 3, 3, 5, 4]), (8, [8, 1, 7, 2, 6, 3, 5, 4])):
        table = pd.DataFrame({"model": list("abcdefgh")[:n], "coupling": np.arange(n) ** 3, "score": score})
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            of = tlc.correlate(table).of("coupling")
        if n < 8:
            counted = scipy.stats.permutation_test(
                (table["score"].to_numpy(float),),
                lambda y, x=table["coupling"]: scipy.stats.spearmanr(x, y)[0],
                permutation_type="pairings",
                n_resamples=1000,
                vectorized=False,
            )
            assert of["rho_p"] == pytest.approx(counted.pvalue, abs=1e-12)
        else:  # 40,320 orders take the permutation test a minute; Student's t is close by then
            assert of["rho_p"] == pytest.approx(scipy.stats.spearmanr(table["coupling"], score)[1], abs=0.02)
        said = [str(one.message) for one in raised]
        assert any("too few for intervals, which are NaN" in one for one in said) == (n == 3)
        assert not np.isnan(of["p"]) and np.isnan(of["low"]) == (n == 3)


def test_a_column_with_some_runs_alone_names_no_clusters_and_says_so():
    table = checkpoints(5, 2, 0).assign(family=["a", "b"] * 5)
    table["run"] = [None, *map(str, table["run"][1:])]
    with pytest.warns(UserWarning, match="'run' has no value for 1 of 10 models.* may count as independent"):
        assert tlc.correlate(table).cluster_by == "family"
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        assert tlc.correlate(table.assign(run=None, family=None)).cluster_by == "model"
    assert not [one for one in raised if "no value for" in str(one.message)]  # empty columns are as no columns


def test_a_condition_holds_on_the_nullable_integers_of_a_stores_table():
    """And a missing number meets no condition, as in a column of floats."""
    table = models(20)
    width = table["d_model"].astype("Int64")
    found = tlc.correlate(table.assign(d_model=width), where="d_model >= 128")
    assert found.models == tuple(table["model"][table["d_model"] >= 128])
    width[table["d_model"] == 256] = pd.NA
    found = tlc.correlate(table.assign(d_model=width), where="d_model >= 128")
    assert found.models == tuple(table["model"][table["d_model"] == 128])


def test_a_condition_leaves_models_out():
    table = models(20)
    found = tlc.correlate(table, where="score > 0 and d_model != 64")
    kept = table.query("score > 0 and d_model != 64")
    assert found.models == tuple(kept["model"]) and set(found.left_out) == set(table["model"]) - set(kept["model"])
    assert found.of("coupling")["r"] == pytest.approx(scipy.stats.pearsonr(kept["coupling"], kept["score"])[0])
    for where, message in (
        ("loss > 1", r"where='loss > 1' .*a condition on the columns 'model', .*'score'"),
        ("score + 1", r"where='score \+ 1' .*a condition"),
        ("score >", "where='score >' .*a condition"),
        ("score > 1e9", "0 measured models"),
    ):
        with pytest.raises(ArgumentError, match=message):
            tlc.correlate(table, where=where)


def test_what_width_drives_alone_vanishes_when_width_is_held_fixed():
    rng = np.random.default_rng(1)
    width = rng.choice([64, 128, 256, 512], 400)
    noise = rng.normal(size=(2, 400))
    table = pd.DataFrame(
        {
            "model": [f"m{i}" for i in range(400)],
            "coupling": np.sqrt(width) + noise[0],
            "null": np.sqrt(width),
            "score": np.sqrt(width) + noise[1],
            "d_model": width,
        }
    )
    of = tlc.correlate(table).of("coupling")
    assert of["r_squared"] > 0.8 and of["by_null"] > 0.9
    for held in ("null", "same width"):  # 400 independent pairs: standard deviation 0.05
        assert abs(of[f"partial given {held}"]) < 0.15 and of[f"partial_p given {held}"] > 0.005


def test_leaving_a_family_out_is_the_correlation_of_the_others():
    table = models(18)
    found = tlc.correlate(table)
    families = table["model"].map(family_of)
    assert found.family == tuple(families) and set(found.families) == {"pythia", "gpt", "llama"}
    for index, family in enumerate(found.families):
        others = table[families != family]
        expected = scipy.stats.pearsonr(others["coupling"], others["score"])[0]
        assert found.r_without[0, index].item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50), st.sampled_from([-1, 1]))
def test_scores_in_other_units_and_rows_in_another_order_change_nothing(
    seed: int, scale: float, shift: float, sign: int
):
    table = models(10, seed)
    changed = table.assign(score=sign * scale * table["score"] + shift).sample(frac=1, random_state=seed)
    before, after = (correlations_of(each) for each in (table, changed))
    np.testing.assert_allclose(after, sign * before, atol=1e-7)


def correlations_of(table: pd.DataFrame) -> np.ndarray:
    """Plain, given the null, and at equal width."""
    columns = {name: table[name].to_numpy(float) for name in ("coupling", "score", "null")}
    x, y = columns["coupling"], columns["score"]
    by_width = partial_correlation(x, y, within=table["d_model"].tolist()).r
    return np.array([partial_correlation(x, y).r, partial_correlation(x, y, [columns["null"]]).r, by_width])


def test_the_order_of_rows_does_not_change_the_result():
    table = models(14)
    one, other = (tlc.correlate(each) for each in (table, table.iloc[::-1]))
    for name in one.predictors:
        first, second = one.of(name), other.of(name)
        for number in first:
            assert first[number] == pytest.approx(second[number], abs=1e-9, nan_ok=True)


def test_models_at_several_steps_are_told_apart_by_the_scores():
    steps = [(model, step) for model in "ab" for step in (0, 10, 20)]
    table = pd.DataFrame(steps, columns=["model", "step"]).assign(coupling=RNG.normal(size=6))
    table["revision"] = [f"step{step}" for _, step in steps]
    scores = table[["model", "step"]].assign(score=range(6))
    found = tlc.correlate(table, scores)
    assert found.models == ("a@0", "a@10", "a@20", "b@0", "b@10", "b@20")
    assert found.of("coupling")["r"] == pytest.approx(scipy.stats.pearsonr(table["coupling"], range(6))[0])
    with pytest.raises(ArgumentError, match="a column 'revision' as well: 'a' is measured at 3"):
        tlc.correlate(table, {"a": 1, "b": 2})


def test_a_result_survives_a_file_and_shows_its_models(tmp_path: Path):
    found = tlc.correlate(models())
    again = tlc.load(found.save(tmp_path / "found.safetensors"))
    pd.testing.assert_frame_equal(again.to_dataframe(), found.to_dataframe())
    assert list(again.by_model()["model"]) == list(found.models)
    assert "12 models" in repr(found)
    with pytest.raises(KeyError, match="no such"):
        found.of("no such")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": {"gpt-0": 1.0}}, "there is none for 'm0'; 'm1'; 'm2'; 'm3' \\("),
        ({"scores": {"m0": 1, "m1": 2, "m2": 3, "m3x": 4}}, r"there is none for 'm3' \(nearest: 'm3x'\)"),
        ({"scores": dict.fromkeys(("m0", "m1", "m2", "m3"), 7.0)}, "score.*scores that differ"),
        ({"scores": {"m0": 1, "m1": 2}, "missing": "drop"}, "2 measured models with a score.*three or more"),
        ({"scores": {"m0": "high", "m1": 1, "m2": 2, "m3": 3}}, "a column of numbers"),
        ({"scores": pd.DataFrame({"model": ["m0", "m0"], "score": [1, 2]})}, "one score per model"),
        ({"scores": pd.DataFrame({"name": ["m0"], "score": [1]})}, "a column 'model'"),
        ({"scores": pd.DataFrame({"model": ["m0"], "mmlu": [1], "arc": [2]})}, "one of mmlu, arc"),
        ({"scores": pd.DataFrame({"model": ["m0"], "mmlu": [1]}), "score": "mmul"}, "nearest: 'mmlu'"),
        ({"scores": None}, "if the table has no column 'score'"),
        ({"scores": "nowhere.csv"}, "nowhere.csv.*can be read"),
        ({"table": pd.DataFrame({"name": [1]})}, "table.*a column 'model'"),
        ({"table": 5}, "table=5"),
        ({"missing": "guess"}, "missing='guess'"),
        ({"confidence": 1.0}, "confidence=1.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_an_error_that_names_it(changes: dict, message: str):
    table = pd.DataFrame({"model": ["m0", "m1", "m2", "m3"], "coupling": [1.0, 2.0, 4.0, 3.0]})
    with pytest.raises(ArgumentError, match=message):
        tlc.correlate(**{"table": table, "scores": {"m0": 1, "m1": 2, "m2": 3, "m3": 5}, **changes})


def test_a_score_that_is_no_number_is_left_out_with_a_warning():
    table = models(8)
    scores = dict(zip(table["model"], table["score"], strict=True)) | {table["model"][2]: np.nan}
    with pytest.warns(UserWarning, match=f"1 models have no numeric score.*{table['model'][2]}"):
        found = tlc.correlate(table, scores)
    rest = table.drop(index=2)
    assert found.of("coupling")["r"] == pytest.approx(scipy.stats.pearsonr(rest["coupling"], rest["score"])[0])


def test_a_measurement_that_is_everywhere_the_same_has_no_correlation():
    table = models(8).assign(d_model=64, null=0.5)
    with pytest.warns(UserWarning, match="width or the score is the same"):
        of = tlc.correlate(table).of("width")
    assert all(np.isnan(of[name]) for name in ("r", "p", "low", "rho", "by_width"))


def test_what_is_not_known_of_every_model_explains_nothing():
    """A width or a null that is blank makes no group of its own, and no error of an argument that nobody gave."""
    table = models(8).astype({"d_model": float})
    table.loc[[1, 4], "d_model"] = np.nan
    with pytest.warns(UserWarning, match="width is unknown for some models with coupling"):
        found = tlc.correlate(table)
    assert np.isnan(found.of("coupling")["by_width"]) and np.isnan(found.of("coupling")["partial given same width"])
    assert found.of("width")["by_width"] == 1.0 and not np.isnan(found.of("coupling")["by_null"])
    table = models(8)
    table.loc[2, "null"] = np.nan
    with pytest.warns(UserWarning, match="null is unknown for some models with coupling"):
        of = tlc.correlate(table).of("coupling")
    assert of["n"] == 8 and np.isnan(of["by_null"]) and np.isnan(of["partial given null"])
    assert of["by_width"] == pytest.approx(r_squared_of_groups(table["coupling"], table["d_model"].tolist()))


def test_a_linear_function_of_what_is_held_fixed_leaves_nothing():
    x = RNG.normal(size=9)
    assert np.isnan(partial_correlation(3 * x - 1e3, RNG.normal(size=9), [x]).r)
    assert np.isnan(partial_correlation([1.0, 2.0], [3.0, 5.0]).r)  # two always lie on a line
    with pytest.raises(ArgumentError, match="one finite number per model"):
        partial_correlation([1.0, np.nan], [1.0, 2.0])


def test_importing_the_library_loads_neither_scipy_stats_nor_pandas():
    module = importlib.import_module("tlcoupling.scores.correlate")
    assert not {"pandas", "bootstrap", "scipy"} & set(vars(module))
    assert "tlcoupling.scores.partial_correlation" in sys.modules
