"""The report page: whole without a network, and safe whatever a token holds."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from analyses import HOSTILE_TOKENS, every_widget, make_analysis
from cases import TOKENS, fresh
from hypothesis import given
from hypothesis import strategies as st

from tlcoupling import analyze, viz
from tlcoupling.analysis.summary import coupling_rows, growth_summary, linearity_rows, straightest
from tlcoupling.errors import ArgumentError, ResultFileError
from tlcoupling.viz import panes
from tlcoupling.viz.plain import packed, plain

NAN = float("nan")


def decompressed(text: str) -> bytes:
    """What a page's script makes of base 85 without characters special to HTML."""
    return zlib.decompress(base64.b85decode(text.translate(str.maketrans(",./", "&<>"))))


def data_of(page: str) -> dict:
    """The data that a page carries, with the bytes of its arrays in place."""
    content = decompressed(re.search(r'<script type="text/plain" id="data">([^<]*)</script>', page)[1])
    end = 4 + int.from_bytes(content[:4], "little")

    def with_bytes(part: dict) -> dict:
        if set(part) in ({"shape", "data"}, {"shape", "scale", "data"}):
            start, length = part["data"]
            part["data"] = content[end + start : end + start + length]
        return part

    return json.loads(content[4:end], object_hook=with_bytes)


def unpacked(array: dict) -> torch.Tensor:
    """What a page's script makes of a packed array, with NaN for what is not defined."""
    planes = torch.frombuffer(bytearray(array["data"]), dtype=torch.uint8)
    if "scale" not in array:  # square roots
        return (planes.double() / 255).square().reshape(array["shape"])
    low, high = planes.reshape(2, -1)
    steps = (low.int() + 256 * high.view(torch.int8).int()).reshape(array["shape"])
    return torch.where(steps == -32768, NAN, steps.double() * array["scale"])


def off_diagonal(coupling: torch.Tensor) -> torch.Tensor:
    """Coupling as a page packs it: without the diagonal, which is 1 by definition."""
    return coupling.double() * (1 - torch.eye(coupling.shape[-1]))


def bundles(page: str) -> int:
    """How often a page carries circuitsvis."""
    found = re.findall(r'<script type="text/plain" id="circuitsvis-bundle">([^<]*)</script>', page)
    scripts = [decompressed(one).decode() for one in found if one]
    assert all("var CircuitsVis=(" in script for script in scripts)
    return len(scripts) + page.count("var CircuitsVis=(")


def elements_of(page: str) -> str:
    """The page without what its scripts and styles hold."""
    return re.sub(r"(<(script|style)[^>]*>).*?(</\2>)", r"\1\3", page, flags=re.S)


def test_a_page_carries_the_circuitsvis_bundle_once_where_it_shows_attention() -> None:
    pages = {name: widget.html for name, widget in every_widget(make_analysis(token_layers=(1,))).items()}
    assert {name: bundles(page) for name, page in pages.items()} == {
        "attention_and_coupling": 1,
        "depth_coupling": 0,
        "tokens": 0,
        "dashboard": 1,
    }
    assert len(pages["depth_coupling"]) < 130_000 > len(pages["tokens"])


@pytest.mark.parametrize("tokens", [("a", "b"), HOSTILE_TOKENS], ids=["plain", "hostile"])
def test_page_refers_to_nothing_outside(tokens: tuple[str, ...]) -> None:
    page = viz.render_html(make_analysis(tokens))
    sources = re.findall(r"""(?:src|href|action)\s*=\s*["']?([^"'\s>]*)""", elements_of(page))
    assert sources == ["data:,"]
    assert not re.search(r"@import|url\(", page.split("<style>")[1].split("</style>")[0])
    assert "default-src 'none'" in page


def test_hostile_tokens_are_data_and_never_markup() -> None:
    page = viz.render_html(make_analysis(HOSTILE_TOKENS))
    calm = viz.render_html(make_analysis(["calm"] * len(HOSTILE_TOKENS)))
    assert elements_of(page) == elements_of(calm)
    assert page.count("<script") == calm.count("<script")
    assert data_of(page)["header"]["prompt"] == "".join(HOSTILE_TOKENS)
    for token in ("<bos>", "</script><script>window.x=1</script>", "<img src=x onerror=window.x=2>"):
        assert token not in page
        assert token in data_of(page)["tokens"]["tokens"]


def test_model_name_is_text() -> None:
    analysis = make_analysis()
    object.__setattr__(analysis.provenance, "model_name", "</title><script>window.x=1</script>")
    page = viz.render_html(analysis)
    assert "<title>&lt;/title&gt;&lt;script&gt;" in page
    assert "<script>window.x=1</script>" not in page


def test_scripts_match_the_hashes_that_the_page_allows() -> None:
    page = viz.render_html(make_analysis(HOSTILE_TOKENS))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    bundle = re.search(r'id="circuitsvis-bundle">([^<]*)</script>', page)[1]
    assert len(scripts) == 1 and page.count("'sha256-") == 2
    for script in (*scripts, decompressed(bundle).decode()):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page


def test_nan_and_infinity_become_null() -> None:
    analysis = make_analysis()
    analysis.coupling.values[0, 0, 0, 1, 2] = NAN
    analysis.linearity.lss[0, 1] = NAN
    analysis.growth.expodistance[0] = float("inf")
    data = data_of(viz.render_html(analysis))
    assert unpacked(data["coupling"]["values"])[0, 0, 0, 1].isnan().tolist() == [False, False, True, False]
    assert data["coupling"]["mean"]["coupling"][0][0][0] is None
    assert data["tokens"]["lss"][1] is None
    assert data["tokens"]["ed"][0] is None
    assert 1 not in data["tokens"]["most"] + data["tokens"]["least"]


def test_a_page_holds_the_numbers_of_its_analysis() -> None:
    analysis = make_analysis(positions=(0, -1), ks=(2, 3), token_layers=(0, 2))
    data = data_of(viz.render_html(analysis))
    coupling, step = analysis.coupling, 1 / 32767  # 16 bits of numbers up to 1
    torch.testing.assert_close(unpacked(data["coupling"]["values"]), off_diagonal(coupling.values), atol=step, rtol=0)
    torch.testing.assert_close(unpacked(data["coupling"]["null"]), coupling.null[..., 0].double(), atol=step, rtol=0)
    assert (data["tokens"]["most"], data["tokens"]["least"]) == straightest(analysis.linearity.path("block"))
    assert data["coupling"]["positions"] == [0, 3]
    assert data["coupling"]["ks"] == [2, 3]
    kinds = {kind["name"]: kind for kind in data["pairs"]["kinds"]}
    parts = {"token": "token_coupling", "context src": "context_src", "context dest": "context_dest"}
    assert list(kinds) == list(parts)
    for name, part in parts.items():
        result, kind = getattr(analysis, part), kinds[name]
        assert (kind["layers"], kind["sublayers"]) == ([0, 2], list(result.sublayers))
        torch.testing.assert_close(unpacked(kind["values"]), off_diagonal(result.values), atol=step, rtol=0)
        torch.testing.assert_close(unpacked(kind["null"]), result.null[..., 0].double(), atol=step, rtol=0)
    rows, columns = torch.tril_indices(4, 4)
    attention, patterns = data["pairs"]["attention"], analysis.attention.double()
    assert attention["layers"] == attention["head_layers"] == [0, 1, 2, 3]
    half = 1 / 255  # half a step of the root, doubled by squaring
    torch.testing.assert_close(unpacked(attention["heads"]), patterns[..., rows, columns], atol=half, rtol=0)
    torch.testing.assert_close(unpacked(attention["mean"]), patterns.mean(1)[..., rows, columns], atol=half, rtol=0)
    numbers, growth = data["tokens"], analysis.growth
    assert numbers["norm"] == growth.norms[-1].tolist(), "not rounded: the page rounds once"
    assert data["growth"]["alpha"] == growth.alpha.mean(1).tolist()
    log_norms = growth.norms.double().log()
    torch.testing.assert_close(unpacked(data["growth"]["log_norms"]), log_norms, atol=1e-4, rtol=0)
    assert numbers["cv"] == pytest.approx([x**0.5 for x in analysis.growth.expodistance.tolist()], rel=1e-6)
    both = [a + m for a, m in zip(numbers["attn_share"], numbers["mlp_share"], strict=True)]
    assert both == pytest.approx(numbers["rate"], abs=1e-6)
    assert data["header"]["headline"] == analysis.headline()


def test_attention_to_later_tokens_is_kept_where_a_model_has_it() -> None:
    """An encoder's patterns are whole; the lower triangle of a decoder's is all there is."""
    analysis = make_analysis()
    patterns = torch.rand(4, 2, 4, 4, generator=torch.Generator().manual_seed(1)).softmax(-1)
    attention = panes.pairs(analysis.tokens, dataclasses.replace(analysis, attention=patterns), {}, 0)["attention"]
    assert not attention["causal"] and panes.pairs(analysis.tokens, analysis, {}, 0)["attention"]["causal"]
    half = 1 / 255
    torch.testing.assert_close(unpacked(attention["heads"]), patterns.double().flatten(-2), atol=half, rtol=0)
    torch.testing.assert_close(unpacked(attention["mean"]), patterns.double().mean(1).flatten(-2), atol=half, rtol=0)


def test_sinks_are_no_straightest_tokens() -> None:
    analysis = make_analysis()
    analysis.growth.norms[1, 0] = 1e4
    data = data_of(viz.render_html(analysis))
    assert 0 not in data["tokens"]["most"] + data["tokens"]["least"] and len(data["tokens"]["most"]) == 1


def test_fresh_weights_are_in_the_page_where_they_were_measured() -> None:
    fresh = make_analysis(token_layers=(0, 2))
    fresh = dataclasses.replace(fresh, coupling=dataclasses.replace(fresh.coupling, values=fresh.coupling.values / 2))
    data = data_of(viz.render_html(make_analysis(token_layers=(0, 2), baseline=fresh)))
    values, step = off_diagonal(fresh.coupling.values), 1 / 32767
    torch.testing.assert_close(unpacked(data["coupling"]["fresh"]["values"]), values, atol=step, rtol=0)
    assert data["coupling"]["fresh"]["mean"]["excess"] == fresh.coupling.mean("excess").tolist()
    for kind in data["pairs"]["kinds"]:
        assert kind["fresh"] is not None
    assert data["summary"]["fresh"]["growth"]["mean_rate"] == float(fresh.growth.rate.mean())
    without = data_of(viz.render_html(make_analysis()))
    assert without["coupling"]["fresh"] is None and without["summary"]["fresh"] is None


@pytest.mark.filterwarnings("ignore:linearity over")  # of a few tokens
def test_measures_on_request_are_in_the_page_by_sublayer_beside_chance_and_baseline() -> None:
    analysis = analyze(fresh(0), TOKENS, k=2, baseline=fresh(1), measures="all")
    measures = {one["name"]: one for one in data_of(viz.render_html(analysis))["measures"]}
    charts = {chart["title"]: chart["lines"] for one in measures.values() for chart in one["charts"]}
    geometry, profile, lyapunov = analysis.geometry, analysis.profile, analysis.lyapunov
    assert geometry is not None and profile is not None and lyapunov is not None
    for at, name in enumerate(geometry.sublayers):
        for index, of in enumerate(("J", "I + J")):
            expected = {
                "model": geometry.rotation[at, 0, :, index],
                "chance": geometry.rotation_null[at, 0, :, index],
                "baseline": geometry.baseline.rotation[at, 0, :, index],
                "baseline_chance": geometry.baseline.rotation_null[at, 0, :, index],
            }
            assert charts[f"rotation of {of}, {name}"] == {role: line.tolist() for role, line in expected.items()}
        expected = {
            "model": profile.angular_distance[0, at],
            "chance": profile.angular_null[0, at],
            "baseline": profile.baseline.angular_distance[0, at],
            "baseline_chance": profile.baseline.angular_null[0, at],
        }
        assert charts[f"angular distance, {name}"] == {role: line.tolist() for role, line in expected.items()}
        assert charts[f"cosine, {name}"]["chance"] == [0.0] * 3
        assert "chance" not in charts[f"loss effect, {name}"], "it has none"
        row = next(row for row in measures["profile"]["rows"] if row[0] == f"loss effect, {name}")
        means = [float(one.loss_effect[0, at].mean()) for one in (profile, profile.baseline)]
        assert [row[1], row[3]] == pytest.approx(means) and row[2] is None
    for at, name in enumerate(lyapunov.sublayers):
        assert charts[f"what a layer adds to ln s₁, {name}"]["model"] == lyapunov.growth[:, at, 0].tolist()
    assert charts["Lyapunov exponents, per layer"]["baseline"] == lyapunov.baseline.exponents.tolist()
    assert measures["geometry"]["has_baseline"]
    assert "noise has 1.00" in measures["profile"]["note"], "fewer tokens than dimensions"
    assert "measures" not in data_of(viz.render_html(make_analysis()))


@given(st.lists(st.floats(width=32) | st.just(NAN), min_size=1, max_size=20))
def test_packing_keeps_numbers_to_half_a_step_and_says_what_is_undefined(numbers: list[float]) -> None:
    array = torch.tensor(numbers, dtype=torch.float64)
    packing = packed(array)
    back, finite = unpacked(packing), array.isfinite()
    assert torch.equal(back.isnan(), ~finite)
    assert ((back - array)[finite].abs() <= 0.5 * packing["scale"] * (1 + 1e-6)).all()  # the product is rounded too
    if finite.any() and (largest := array[finite].abs().max()) > 0:
        assert packing["scale"] == pytest.approx(float(largest) / 32767)


def test_a_budget_makes_numbers_coarser_and_no_more_than_it_must() -> None:
    array = torch.rand(50, 50, generator=torch.Generator().manual_seed(0))
    fine, coarse = packed(array), packed(array, 1900)  # 2500 numbers at about six bits
    assert len(zlib.compress(coarse["data"])) <= 1900 < len(zlib.compress(packed(array, 2200)["data"]))
    assert 2**-7 < coarse["scale"] <= 2**-5 and fine["scale"] < 2**-14
    assert ((unpacked(coarse) - array).abs() <= coarse["scale"] / 2 + 1e-12).all()
    assert packed(array, 10_000) == fine


def test_summary_reduces_over_pairs_and_tokens() -> None:
    analysis = make_analysis(positions=(0, 1, 2), ks=(2, 3))
    rows = coupling_rows(analysis.coupling)
    assert [(row.k, row.sublayer) for row in rows] == [(k, s) for k in (2, 3) for s in ("block", "attn", "mlp")]
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    expected = analysis.coupling.values[1, :, 1][:, off_diagonal].mean().item()
    assert rows[4].coupling == pytest.approx(expected, rel=1e-6)  # float32 means in another order
    for row in rows:
        assert row.excess == pytest.approx(row.coupling - row.null, abs=1e-6)
        assert row.overlap_null_u == row.overlap_null_v == row.k / 16
        assert row.p is None and row.excess_determined is None
    one = make_analysis(ks=(2, 3))
    close = torch.zeros(3, 1, 4, 3)
    close[1, 0, 2, 1] = 1.0  # the attention of layer 2 as basis: three of twelve pairs
    one = dataclasses.replace(one, coupling=dataclasses.replace(one.coupling, uncertainty=close))
    rows = coupling_rows(one.coupling, one.depth_test)
    assert [row.undetermined for row in rows] == [0, 1, 0] * 2
    assert rows[0].excess_determined == pytest.approx(rows[0].excess, rel=1e-6)
    off_diagonal[:, 2] = False
    expected = one.coupling.excess[1, 0, 1][off_diagonal].mean().item()
    assert rows[4].excess_determined == pytest.approx(expected, rel=1e-6) != rows[4].excess
    test = one.coupling.test(draws=199)
    assert (rows[4].p, rows[4].excess_low) == (test.p[1, 0, 1, 0], test.low[1, 0, 1, 0])
    assert make_analysis(positions=(0, 1)).depth_test is None
    growth = growth_summary(analysis.growth)
    assert growth.attn_share + growth.mlp_share == pytest.approx(growth.mean_rate, abs=1e-6)
    assert growth.mean_slope == pytest.approx(float(analysis.growth.slope.mean()), rel=1e-6)
    assert growth.mean_rate == pytest.approx(float(analysis.growth.rate.mean()), rel=1e-6)
    assert analysis.coupling.d_model == 16


def test_summary_leaves_out_undefined_scores() -> None:
    analysis = make_analysis()
    analysis.linearity.lss[0] = torch.tensor([2.0, NAN, 1.0, 3.0])
    analysis.linearity.lss[1] = NAN
    block, sublayer, *_ = linearity_rows(analysis.linearity)
    assert (block.mean, block.lowest, block.highest, block.random) == (2.0, 1.0, 3.0, 2.0)
    assert sublayer.mean != sublayer.mean and sublayer.highest != sublayer.highest
    assert straightest(analysis.linearity.lss[0]) == ([2], [3])


def test_no_token_is_both_most_and_least_straight() -> None:
    assert straightest(torch.tensor([2.0])) == ([], [])
    assert straightest(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([True, False, True])) == ([0], [2])
    assert straightest(torch.tensor([2.0, 1.0, NAN])) == ([1], [0])
    assert straightest(torch.arange(20.0)) == ([0, 1, 2, 3, 4], [19, 18, 17, 16, 15])


def test_page_states_the_metric_that_was_used() -> None:
    coupling = make_analysis().coupling
    assert panes.depth(coupling)["formula"] == "c = 1 − ‖ |U₂ᵀ J₁ V₂| − S₁ ‖ / ‖S₁‖"
    assert panes.depth(coupling)["diagonal_is_one"]
    swapped = dataclasses.replace(coupling, bases="vu", absolute=False, normalizer="trace")
    assert panes.depth(swapped)["formula"] == "c = 1 − ‖ V₂ᵀ J₁ U₂ − S₁ ‖ / tr S₁"
    assert not panes.depth(swapped)["diagonal_is_one"]


def test_parallel_blocks_have_no_shares() -> None:
    analysis = make_analysis(sequential=False)
    assert growth_summary(analysis.growth).attn_share is None
    assert data_of(viz.render_html(analysis))["growth"]["shares"] == {}


def test_long_prompts_have_all_tokens_and_fewer_single_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = make_analysis([str(i) for i in range(100)], n_heads=3, n_layers=6, token_layers=(1,))
    couplings = {"token_coupling": analysis.token_coupling, "context_src": analysis.context_src}
    monkeypatch.setattr(panes, "TOKENS_BYTES", 0)
    monkeypatch.setattr(panes, "PAIRS_BYTES", (6 + 2 * 3) * 5050)  # all means, and the heads of two layers
    data = panes.pairs(analysis.tokens, analysis, couplings, 3)
    assert data["tokens"] == [str(i) for i in range(100)]
    attention = data["attention"]
    assert (attention["layers"], attention["pool"]) == ([0, 1, 2, 3, 4, 5], 1)
    assert attention["head_layers"] == [1, 3], "shown first, then compared"
    assert float(unpacked(attention["heads"])[1, 2, -1]) == pytest.approx(
        float(analysis.attention[3, 2, 99, 99]), abs=4e-3
    )
    for kind, result in zip(data["kinds"], couplings.values(), strict=True):
        assert kind["positions"] == tuple(range(100))
        assert kind["mean"]["excess"] == plain(result.mean("excess"))
    monkeypatch.setattr(panes, "PAIRS_BYTES", 4 * 5050)  # the heads of one layer, and means over blocks of three tokens
    attention = panes.pairs(analysis.tokens, analysis, couplings, 3)["attention"]
    assert (attention["head_layers"], attention["pool"]) == ([3], 3)
    block = analysis.attention[2, :, 30:33, 27:30].double().mean()  # rows 30 to 32, columns 27 to 29
    assert float(unpacked(attention["mean"])[2, 10 * 11 // 2 + 9]) == pytest.approx(float(block), abs=4e-3)
    monkeypatch.setattr(panes, "PAIRS_BYTES", 2 * 5050)
    assert panes.pairs(analysis.tokens, analysis, couplings, 3)["attention"]["head_layers"] == []
    assert panes.pairs(analysis.tokens, analysis, couplings, 3, [3])["attention"]["head_layers"] == [3]


def test_coupling_of_many_tokens_is_averaged_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = make_analysis([str(i) for i in range(10)], token_layers=(1,))
    result = analysis.token_coupling
    couplings = {"token_coupling": result}
    monkeypatch.setattr(panes, "TOKENS_CELLS", 3 * 100 // 9)
    (kind,) = panes.pairs(analysis.tokens, analysis, couplings, 1)["kinds"]
    assert kind["pool"] == 3 or kind["pool"] == 4
    values, pool = unpacked(kind["values"])[0, 0, 0], kind["pool"]
    assert len(values) == -(-10 // pool)
    blocks = result.values[0, 0, 0].double().masked_fill(torch.eye(10, dtype=torch.bool), NAN)
    assert float(values[0, 1]) == pytest.approx(float(blocks[:pool, pool : 2 * pool].mean()), abs=1e-4)
    assert float(values[0, 0]) == pytest.approx(float(blocks[:pool, :pool].nanmean()), abs=1e-4), "without the diagonal"
    assert kind["mean"]["excess"] == plain(result.mean("excess")), "of all cells"


def test_what_was_not_measured_is_left_out() -> None:
    analysis = make_analysis(with_attention=False)
    page = viz.render_html(analysis)
    assert bundles(page) == 0
    assert data_of(page)["pairs"]["attention"] is None and data_of(page)["pairs"]["kinds"] == []
    with pytest.raises(ArgumentError, match=r"layer=1 .* one of \[\]"):
        viz.attention_and_coupling(analysis, 1)
    both = make_analysis(token_layers=(2,))
    assert data_of(viz.attention_and_coupling(both, 1).html)["pairs"]["kinds"] == []
    assert len(data_of(viz.attention_and_coupling(both, -2).html)["pairs"]["kinds"]) == 3
    alone = data_of(viz.attention_and_coupling(both.context_dest, 2).html)["pairs"]
    assert alone["attention"] is None and [kind["name"] for kind in alone["kinds"]] == ["context dest"]
    assert alone["diagonal_is_one"] and not alone["across"]
    for one in (both.context_dest, both.token_coupling):  # in the bases of another layer no diagonal is 1
        assert one is not None
        across = data_of(viz.attention_and_coupling(dataclasses.replace(one, basis_layers=(0,)), 2).html)["pairs"]
        assert (
            across["across"]
            and not across["diagonal_is_one"]
            and across["kinds"][0]["title"].endswith(", bases of layer 0")
        )
        assert float(unpacked(across["kinds"][0]["values"])[0, 0, 0, 0, 0]) == pytest.approx(1, abs=1e-3)  # kept
    with pytest.raises(ArgumentError, match=r"layer=1 .* one of \[2\]"):
        viz.attention_and_coupling(both.token_coupling, 1)
    with pytest.raises(ArgumentError, match="layer=9"):
        viz.attention_and_coupling(both, 9)


@pytest.mark.usefixtures("unchecked")
def test_results_of_another_kind_are_refused() -> None:
    analysis = make_analysis()
    for make in (viz.tokens, viz.dashboard, lambda result: viz.attention_and_coupling(result, 0)):
        with pytest.raises(ArgumentError, match="result='DepthCoupling' .* an Analysis"):
            make(analysis.coupling)
    with pytest.raises(ArgumentError, match="result='Growth' .* a DepthCoupling"):
        viz.depth_coupling(analysis.growth)
    with pytest.raises(ArgumentError, match="result='Growth' .* a SensitivityAtlas"):
        viz.sensitivity_atlas(analysis.growth)
    assert viz.depth_coupling(analysis.coupling).html == viz.depth_coupling(analysis).html


def test_widgets_are_isolated_frames_and_whole_files(tmp_path: Path) -> None:
    for name, widget in every_widget(make_analysis(HOSTILE_TOKENS, token_layers=(1,))).items():
        frame = widget._repr_html_()
        inside = re.fullmatch(r'<iframe sandbox="allow-scripts" [^>]*srcdoc="([^"]*)"></iframe>(.*)', frame, re.S)
        assert inside is not None
        assert html.unescape(inside[1]) == widget.html
        assert inside[2].startswith("<a hidden ") and inside[2].count("<script") == 1
        assert len(repr(widget)) < 100
        assert widget.save(tmp_path / name).read_text(encoding="utf-8") == widget.html


def test_write_html_says_why_it_cannot(tmp_path: Path) -> None:
    analysis = make_analysis(HOSTILE_TOKENS)
    written = viz.write_html(analysis, tmp_path / "report.html")
    assert written.read_text(encoding="utf-8") == viz.render_html(analysis)
    with pytest.raises(ResultFileError, match="No such file"):
        viz.write_html(analysis, tmp_path / "missing" / "report.html")
