"""The report and the widgets: whole without a network, and safe whatever a token holds."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import time
from pathlib import Path

import pytest
import torch
from analyses import HOSTILE_TOKENS, make_analysis
from chromium import CHROMIUM, NO_CHROMIUM, Page

from tlcoupling import viz
from tlcoupling.errors import ArgumentError, ResultFileError
from tlcoupling.viz import payload
from tlcoupling.viz.summary import by_straightness, coupling_rows, d_model_of, growth_summary, linearity_rows

BUNDLE = "var CircuitsVis=("
NAN = float("nan")


def data_of(page: str) -> dict:
    """The data that a page carries."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def elements_of(page: str) -> str:
    """The page without what its scripts and styles hold."""
    return re.sub(r"(<(script|style)[^>]*>).*?(</\2>)", r"\1\3", page, flags=re.S)


def test_report_carries_the_circuitsvis_bundle_once() -> None:
    page = viz.render_html(make_analysis())
    assert page.count(BUNDLE) == 1
    assert len(page) < 3_000_000


def test_only_what_shows_attention_carries_the_bundle() -> None:
    analysis = make_analysis()
    assert viz.attention(analysis).html.count(BUNDLE) == 1
    for widget in (viz.tokens(analysis), viz.depth_coupling(analysis), viz.depth_coupling(analysis.coupling)):
        assert BUNDLE not in widget.html
        assert len(widget.html) < 100_000


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
    import base64
    import hashlib

    page = viz.render_html(make_analysis(HOSTILE_TOKENS))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page


def test_nan_and_infinity_become_null() -> None:
    analysis = make_analysis()
    analysis.coupling.values[0, 0, 0, 1, 2] = NAN
    analysis.linearity.lss[0, 1] = NAN
    analysis.growth.expodistance[0] = float("inf")
    data = data_of(viz.render_html(analysis))
    assert data["coupling"]["values"][0][0][0][1][2] is None
    assert data["coupling"]["mean"]["values"][0][0][0] is None
    assert data["tokens"]["lss"][1] is None
    assert data["tokens"]["ed"][0] is None
    assert 1 not in data["tokens"]["order"]


def test_a_page_holds_the_numbers_of_its_analysis() -> None:
    analysis = make_analysis(positions=(0, -1), ks=(2, 3))
    data = data_of(viz.render_html(analysis))
    coupling, half_a_digit = analysis.coupling, 0.5e-4 + 1e-7  # rounded to four digits
    assert torch.allclose(torch.tensor(data["coupling"]["values"]), coupling.values, atol=half_a_digit, rtol=0)
    null = torch.tensor(data["coupling"]["null"])[..., None].expand_as(coupling.null)
    assert torch.allclose(null, coupling.null, atol=half_a_digit, rtol=0)
    assert data["tokens"]["order"] == analysis.linearity.path("block").argsort().tolist()
    assert data["coupling"]["positions"] == [0, 3]
    assert data["coupling"]["ks"] == [2, 3]


def test_summary_reduces_over_pairs_and_tokens() -> None:
    analysis = make_analysis(positions=(0, 1, 2), ks=(2, 3))
    rows = coupling_rows(analysis.coupling)
    assert [(row.k, row.sublayer) for row in rows] == [(k, s) for k in (2, 3) for s in ("block", "attn", "mlp")]
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    expected = analysis.coupling.values[1, :, 1][:, off_diagonal].mean().item()
    assert rows[4].coupling == pytest.approx(expected, rel=1e-6)  # float32 means in another order
    for row in rows:
        assert row.excess == pytest.approx(row.coupling - row.null, abs=1e-6)
        assert row.overlap_null == row.k / 16
    growth = growth_summary(analysis.growth)
    assert growth.attn_share + growth.mlp_share == pytest.approx(growth.mean_rate, abs=1e-6)
    assert d_model_of(analysis.coupling) == 16


def test_summary_leaves_out_undefined_scores() -> None:
    analysis = make_analysis()
    analysis.linearity.lss[0] = torch.tensor([2.0, NAN, 1.0, 3.0])
    analysis.linearity.lss[1] = NAN
    block, sublayer, *_ = linearity_rows(analysis.linearity)
    assert (block.mean, block.lowest, block.highest, block.random) == (2.0, 1.0, 3.0, 2.0)
    assert sublayer.mean != sublayer.mean and sublayer.highest != sublayer.highest
    assert by_straightness(analysis.linearity.lss[0]) == [2, 0, 3]


def test_page_states_the_metric_that_was_used() -> None:
    coupling = make_analysis().coupling
    assert payload.coupling(coupling)["formula"] == "c = 1 − ‖ |U₂ᵀ J₁ V₂| − S₁ ‖ / ‖S₁‖"
    assert payload.coupling(coupling)["diagonal_is_one"]
    swapped = dataclasses.replace(coupling, bases="vu", absolute=False, normalizer="trace")
    assert payload.coupling(swapped)["formula"] == "c = 1 − ‖ V₂ᵀ J₁ U₂ − S₁ ‖ / tr S₁"
    assert not payload.coupling(swapped)["diagonal_is_one"]


def test_parallel_blocks_have_no_shares() -> None:
    analysis = make_analysis(sequential=False)
    assert growth_summary(analysis.growth).attn_share is None
    assert data_of(viz.render_html(analysis))["growth"]["shares"] == {}


def test_invisible_characters_are_shown() -> None:
    assert payload.visible(" a\n\t\u202e\u200b") == " a↵⇥\\u{202e}\\u{200b}"
    assert payload.visible("") == "∅"
    assert payload.visible("\u200d") == "\\u{200d}"
    assert payload.visible("🏳️‍🌈") == "🏳️‍🌈"


def test_long_prompts_show_the_attention_of_their_end() -> None:
    analysis = make_analysis([str(i) for i in range(300)], n_heads=3)
    data = payload.attention(analysis)
    assert data["first"] == 200 and data["tokens"][0] == "200"
    assert data["patterns"][2][99][99] == round(analysis.attention[2, 299, 299].item(), 3)


def test_model_without_attention_patterns() -> None:
    analysis = make_analysis(with_attention=False)
    page = viz.render_html(analysis)
    assert BUNDLE not in page and 'id="attention"' not in page
    with pytest.raises(ArgumentError, match="hook_pattern"):
        viz.attention(analysis)


def test_widgets_are_isolated_frames() -> None:
    analysis = make_analysis(HOSTILE_TOKENS)
    for widget in (
        viz.attention(analysis),
        viz.depth_coupling(analysis.coupling),
        viz.tokens(analysis),
        viz.report(analysis),
    ):
        frame = widget._repr_html_()
        inside = re.fullmatch(r'<iframe sandbox="allow-scripts" [^>]*srcdoc="([^"]*)"></iframe>', frame)
        assert inside is not None
        assert html.unescape(inside[1]) == widget.html
        assert len(repr(widget)) < 100


def test_write_html_says_why_it_cannot(tmp_path: Path) -> None:
    analysis = make_analysis(HOSTILE_TOKENS)
    written = viz.write_html(analysis, tmp_path / "report.html")
    assert written.read_text(encoding="utf-8") == viz.render_html(analysis)
    with pytest.raises(ResultFileError, match="No such file"):
        viz.write_html(analysis, tmp_path / "missing" / "report.html")


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
DRAWN = "document.querySelector('#circuitsvis canvas')"


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_draws_every_section_of_a_hostile_report(tmp_path: Path, width: int) -> None:
    analysis = make_analysis(HOSTILE_TOKENS, positions=(0, -1), ks=(2, 3))
    analysis.linearity.lss[0, 2] = NAN
    path = viz.write_html(analysis, tmp_path / "report.html")
    with Page(width=width) as page:
        page.open(path, DRAWN)
        # Every section has drawn, circuitsvis too: a canvas per head and one zoomed, none of them blank.
        for selector, count in {
            "#header dt": 8,
            "#summary tbody tr": 6 + 4 + 6,
            "#coupling .heatmap image[href^='data:image/png']": 9,
            "#coupling .chart .line": 6,
            "#tokens ol button": len(HOSTILE_TOKENS),
            "#growth .line": len(HOSTILE_TOKENS) + 1,
            "#growth .bar": 8,
            "#circuitsvis canvas": 3,
        }.items():
            page.wait(f"document.querySelectorAll({json.dumps(selector)}).length === {count}")
        page.wait(
            "[...document.querySelectorAll('#circuitsvis canvas')].every(c => "
            "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x > 0 && x < 255))"
        )
        text = page.evaluate("document.body.innerText")
        for token in ("<bos>", "</script><script>window.x=1</script>", "&lt;", "🦜", "שלום", '"><b>[red]'):
            assert token in text
        assert "\\u{202e}evil" in text
        assert "–" in page.evaluate("document.querySelectorAll('#tokens ol button')[2].title")
        assert page.evaluate("typeof window.x") == "undefined"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.errors == []
        assert page.requests == []


@pytest.mark.slow
@needs_chromium
def test_browser_reads_out_numbers_by_keyboard_and_pointer(tmp_path: Path) -> None:
    analysis = make_analysis(positions=(0, -1))
    path = viz.write_html(analysis, tmp_path / "report.html")
    with Page() as page:
        page.open(path, DRAWN)
        page.evaluate("document.querySelector('#coupling .panes').focus()")
        page.press(["ArrowDown", "ArrowRight"])
        readout = "document.querySelector('#coupling .readout').textContent"
        value, excess = analysis.coupling.values[0, 0, 0, 1, 2], analysis.coupling.excess[0, 0, 0, 1, 2]
        assert page.evaluate(readout).startswith("Jacobian of layer 1, bases of layer 2: ")
        assert f"coupling {value:.4f}" in page.evaluate(readout)
        assert float(page.evaluate(readout).split()[-1].replace("−", "-")) == pytest.approx(excess.item(), abs=1.1e-4)

        page.evaluate(
            "(select => { select.value = 1; select.dispatchEvent(new Event('change')); })"
            "(document.querySelector('#coupling select'))"
        )
        assert f"coupling {analysis.coupling.values[0, 1, 0, 1, 2]:.4f}" in page.evaluate(readout)

        box = page.evaluate(
            "(e => { e.scrollIntoView(); const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })"
            "(document.querySelector('#coupling .heatmap image'))"
        )
        page.move_to(box[0] + box[2] * 7 / 8, box[1] + box[3] / 8)
        assert page.evaluate(readout).startswith("Jacobian of layer 0, bases of layer 3: ")

        page.evaluate("document.querySelector('#tokens ol button').focus()")
        page.press(["ArrowRight"])
        assert page.evaluate("document.querySelector('#tokens .readout').textContent").startswith("1 “ cat”: LSS ")
        assert page.evaluate("document.querySelectorAll('#growth .line.pointed').length") == 1

        page.wait("document.querySelectorAll('#circuitsvis [role=button]').length === 2")
        page.evaluate("document.querySelectorAll('#circuitsvis [role=button]')[1].focus()")
        page.press(["Enter"])
        page.wait("document.querySelector('#circuitsvis').innerText.includes('Head 1 Zoomed')")
        assert page.errors == []


@pytest.mark.slow
@needs_chromium
def test_browser_shows_widgets_in_their_frames(tmp_path: Path) -> None:
    analysis = make_analysis(HOSTILE_TOKENS)
    notebook = tmp_path / "notebook.html"
    widgets = (viz.attention(analysis), viz.depth_coupling(analysis), viz.tokens(analysis))
    frames = "".join(widget._repr_html_() for widget in widgets)
    notebook.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}", encoding="utf-8")
    with Page() as page:
        page.open(notebook)
        page.wait("document.querySelectorAll('iframe').length === 3")
        # The frames are sealed, so what they draw is seen from outside: by their pixels.
        for index in range(3):
            page.wait_for_ink(f"document.querySelectorAll('iframe')[{index}]")
        assert page.evaluate("typeof window.x") == "undefined"
        assert page.errors == []
        assert page.requests == []


@pytest.mark.slow
@needs_chromium
def test_browser_opens_a_report_of_512_tokens(tmp_path: Path) -> None:
    tokens = [f" t{i}" for i in range(512 - len(HOSTILE_TOKENS))] + list(HOSTILE_TOKENS)
    path = viz.write_html(make_analysis(tokens, n_heads=12, n_layers=12), tmp_path / "report.html")
    with Page() as page:
        started = time.perf_counter()
        page.open(path, DRAWN)
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(
            f"512 tokens: {path.stat().st_size / 1e6:.2f} MB, first paint {paint / 1000:.2f} s, "
            f"all drawn {time.perf_counter() - started:.2f} s"
        )
        assert path.stat().st_size < 3_000_000
        assert "last 55 of 512 tokens" in page.evaluate("document.querySelector('#attention').innerText")
        assert page.errors == []
