"""What a browser shows of the widgets, offline: the numbers of the result, linked, whatever a token holds."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from analyses import HOSTILE_TOKENS, every_widget, make_analysis, shared_by_hand
from cases import TOKENS, fresh
from cases import huggingface as bridge
from chromium import browser, numbers, opened, print_weight, wait_for_heads
from families import families

from tlcoupling import Analysis, SensitivityAtlas, analyze, sensitivity_atlas, trace, viz
from tlcoupling.viz.panes import ATTENTION_CELLS

__all__ = ["browser"]  # a fixture
pytestmark = pytest.mark.slow

NAN = float("nan")
SHOWN_HOSTILE = ("<bos>", "</script><script>window.x=1</script>", "&lt;", "🦜", "שלום", '"><b>[red]', "\\u{202e}evil")


def head_pixel(page: Any, head: int, dest: int, src: int, n_tokens: int) -> list[int]:
    """The colour of a cell of a head's pattern, as circuitsvis has drawn it."""
    return page.evaluate(
        "([head, x, y]) => { const canvas = document.querySelectorAll('.circuitsvis [role=button] canvas')[head];"
        "const copy = document.createElement('canvas').getContext('2d', { willReadFrequently: true });"
        "copy.drawImage(canvas, -Math.floor(x * canvas.width), -Math.floor(y * canvas.height));"
        "return [...copy.getImageData(0, 0, 1, 1).data]; }",
        [head, (src + 0.5) / n_tokens, (dest + 0.5) / n_tokens],
    )


def cell(pane: Any, row: int, column: int, n: int) -> dict[str, Any]:
    """Where in a heat map a cell is, as Playwright's pointer wants it."""
    box = pane.bounding_box()
    return {"position": {"x": box["width"] * (column + 0.5) / n, "y": box["height"] * (row + 0.5) / n}}


@pytest.fixture
def analysis() -> Analysis:
    """Layers 0 and 2 have their tokens compared; attention differs starkly between layers 0 and 2 in head 1."""
    analysis = make_analysis(positions=(0, -1), ks=(2, 3), token_layers=(0, 2))
    analysis.attention[0, 1, 3] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    analysis.attention[2, 1, 3] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    return analysis


@pytest.mark.parametrize("width", [1280, 375])
def test_every_section_of_a_hostile_dashboard_is_drawn(browser: Any, tmp_path: Path, width: int) -> None:
    analysis = make_analysis(HOSTILE_TOKENS, positions=(0, -1), ks=(2, 3), token_layers=(1,))
    analysis.linearity.lss[0, 2] = NAN
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path, viewport={"width": width, "height": 800}) as page:
        wait_for_heads(page, 2)
        for selector, count in {
            "#header dt": 9,
            "#summary tbody tr": 6 + 6 + 4 + 6,
            "#controls .chooser:not([hidden])": 3,
            "#coupling .heatmap image[href^='data:image/png']": 3,
            "#coupling .chart .line": 6,
            "#pairs .thumbs img[src^='data:image/png']": 7,
            "#pairs .heatmap image[href^='data:image/png']": 2,  # attention and coupling
            "#tokens ol button": len(HOSTILE_TOKENS),
            "#growth .line": len(HOSTILE_TOKENS) + 1,
            "#growth .bar": 8,
        }.items():
            assert page.locator(selector).count() == count, selector
        text = page.inner_text("body")
        for token in SHOWN_HOSTILE:
            assert token in text
        assert "–" in page.locator("#tokens ol button").nth(2).get_attribute("title")
        assert page.evaluate("typeof window.x") == "undefined"
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_choosing_a_layer_changes_attention_and_coupling_of_tokens(
    browser: Any, tmp_path: Path, analysis: Analysis
) -> None:
    with opened(browser, viz.write_html(analysis, tmp_path / "report.html")) as page:
        readout, slider = page.locator("#pairs [data-part=readout]"), page.locator("#controls input[type=range]")

        def shows(layer: int, k: int, row: int, column: int) -> None:
            """The pane that is open, token-wise of the block, reads out the numbers of a layer."""
            result = analysis.token_coupling
            at = (0, result.layers.index(layer), result.ks.index(k), row, column)
            *attention, excess, value, null, z = numbers(readout.inner_text())
            expected = [float(result.values[at]), float(result.null[at]), float(result.excess[at])]
            assert [value, null, excess] == pytest.approx(expected, abs=1.1e-4)  # four digits, and 16 bits
            assert z == pytest.approx(float(result.z[at]), abs=0.06)
            if row >= column:
                heads = analysis.attention[layer, :, row, column]
                assert attention == pytest.approx([float(heads.mean()), float(heads.max())], abs=1 / 255 + 5e-4)

        wait_for_heads(page, 2)
        assert page.inner_text("#pairs-title").endswith("layer 2")  # the middle one of those measured
        page.locator("#pairs [data-part=maps] .zoom").last.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        shows(layer=2, k=2, row=2, column=1)
        assert "Row 2 “\u2068 sat\u2069”, column 1 “\u2068 cat\u2069”" in readout.inner_text()
        white, blue = head_pixel(page, 1, 3, 0, 4), head_pixel(page, 1, 3, 1, 4)
        assert white != blue

        slider.focus()
        page.keyboard.press("Home")
        assert page.inner_text("#pairs-title").endswith("layer 0")
        shows(layer=0, k=2, row=2, column=1)
        wait_for_heads(page, 2)
        assert (head_pixel(page, 1, 3, 0, 4), head_pixel(page, 1, 3, 1, 4)) == (blue, white)

        page.locator("#controls select").nth(1).select_option("3")
        shows(layer=0, k=3, row=2, column=1)

        slider.focus()
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#pairs-title").endswith("layer 1")
        assert "token_layers=[1]" in page.inner_text("#pairs") and "--token-layers 1" in page.inner_text("#pairs")
        assert not page.locator("#pairs .thumbs").is_visible()
        wait_for_heads(page, 2)

        # a click on a cell of the coupling across depth chooses the row's layer
        pane = page.locator("#coupling .heatmap image").first
        pane.click(**cell(pane, 2, 0, 4))
        assert page.inner_text("#pairs-title").endswith("layer 2")
        assert page.locator("#controls input[type=range]").get_attribute("aria-valuetext") == "layer 2, tokens compared"


def test_every_pane_of_tokens_shows_its_numbers(browser: Any, tmp_path: Path, analysis: Analysis) -> None:
    with opened(browser, viz.attention_and_coupling(analysis, 2).save(tmp_path / "widget.html")) as page:
        assert page.locator("#controls .layer").is_hidden()
        wait_for_heads(page, 2)
        buttons = page.locator("#pairs .thumbs button")
        parts = {"token-wise": "token_coupling", "from token 0": "context_src", "to token 3": "context_dest"}
        seen = []
        for index in range(buttons.count()):
            buttons.nth(index).click()
            pane = page.locator("#pairs .heatmap image").last
            pane.hover(**cell(pane, 3, 1, 4))
            kind, sublayer = buttons.nth(index).get_attribute("aria-label").split(", ")
            result = getattr(analysis, parts[kind])
            at = (result.sublayers.index(sublayer), 1, 0, 3, 1)
            expected = [float(result.excess[at]), float(result.values[at]), float(result.null[at])]
            assert numbers(page.inner_text("#pairs [data-part=readout]"))[2:5] == pytest.approx(expected, abs=1.1e-4)
            mean = float(result.mean("excess")[at[:3]])
            assert numbers(page.inner_text("#pairs [data-mean=trained]")) == pytest.approx([mean], abs=1.1e-4)
            seen.append((kind, sublayer))
        assert len(set(seen)) == 7

        # the keyboard moves along the panes, and along the quantities
        buttons.nth(6).focus()
        page.keyboard.press("ArrowLeft")
        assert buttons.nth(5).get_attribute("aria-pressed") == "true"
        page.locator("#pairs").get_by_label("coupling", exact=True).check()
        mean = float(analysis.context_dest.mean()[0, 1, 0])
        assert numbers(page.inner_text("#pairs [data-mean=trained]")) == pytest.approx([mean], abs=1.1e-4)

        heads = page.locator(".circuitsvis [role=button]")
        heads.nth(1).focus()
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('.circuitsvis').innerText.includes('Head 1 Zoomed')")


def image_analysis() -> Analysis:
    """An analysis of an image of 2 x 2 patches, whose tokens attend to later ones too."""
    tokens = ("[CLS]", "patch 0,0", "patch 0,1", "patch 1,0", "patch 1,1")
    analysis = make_analysis(tokens, token_layers=(1,))
    colors = torch.tensor([[[200, 30, 10], [10, 90, 220]], [[5, 160, 40], [250, 240, 230]]], dtype=torch.uint8)
    picture = colors.repeat_interleave(4, 0).repeat_interleave(4, 1)
    pattern = torch.rand(4, 2, 5, 5, generator=torch.Generator().manual_seed(2)).softmax(-1)
    return dataclasses.replace(analysis, picture=picture, attention=pattern)


@pytest.mark.parametrize("width", [1280, 390])
def test_patches_are_shown_on_the_image(browser: Any, tmp_path: Path, width: int) -> None:
    """Colours, outlines and numbers are those of the selected token's row, by pointer and by keyboard."""
    analysis = image_analysis()
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path, viewport={"width": width, "height": 844}) as page:
        readout = page.locator("#pairs [data-part=readout]").first
        over = page.get_by_label("Over the image", exact=True)
        wait_for_heads(page, 2)

        def fills() -> list[str]:
            return page.eval_on_selector_all("#pairs .patch", "all => all.map(one => one.style.fill)")

        def darkest() -> int:
            sums = [sum(map(int, re.findall(r"\d+", fill))) or 999 for fill in fills()]  # a bare patch has no colour
            return sums.index(min(sums))

        def outlined(kind: str) -> list[float]:
            box = page.locator(f"#pairs .outline.{kind}")
            return [float(box.get_attribute(name)) for name in ("x", "y")]

        over.select_option("image alone")
        assert fills() == ["transparent"] * 4
        shown = page.evaluate(
            "async () => { const image = new Image();"
            "image.src = document.querySelector('.picture image').getAttribute('href'); await image.decode();"
            "const copy = document.createElement('canvas').getContext('2d'); copy.drawImage(image, 0, 0);"
            "return [...copy.getImageData(0, 0, 8, 8).data]; }"
        )
        assert torch.equal(torch.tensor(shown, dtype=torch.uint8).view(8, 8, 4)[..., :3], analysis.picture)

        assert outlined("chosen") == [4, 4]  # the last patch, whose coupling across depth was measured
        over.select_option("attention")
        assert darkest() == int(analysis.attention[1].mean(0)[4, 1:].argmax())
        over.select_option("coupling")
        excess = analysis.token_coupling.excess[0, 0, 0]
        assert darkest() == int(excess[4, 1:4].argmax())  # the diagonal is 1 by definition
        assert fills()[3] == "transparent"

        page.locator("#pairs .patch").nth(1).click()  # pointed at, and selected
        assert outlined("chosen") == outlined("pointed") == [4, 0]
        assert page.locator("#controls select").first.input_value() == "2"
        others = [1, 3, 4]
        assert darkest() + 1 == others[int(excess[2, others].argmax())]
        page.locator("#pairs [aria-label^='The image:']").focus()
        page.keyboard.press("ArrowDown")
        assert outlined("pointed") == [4, 4]
        assert "Row 2 “\u2068patch 0,1\u2069”, column 4 “\u2068patch 1,1\u2069”" in readout.inner_text()
        heads = analysis.attention[1, :, 2, 4]  # to a later token
        expected = [float(heads.mean()), float(heads.max()), float(excess[2, 4])]
        assert numbers(readout.inner_text())[:3] == pytest.approx(expected, abs=5e-3)
        page.keyboard.press("Enter")
        assert outlined("chosen") == [4, 4]
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.filterwarnings("ignore:linearity over")  # of a few tokens
@pytest.mark.parametrize("width", [1280, 390])
def test_measures_read_out_their_numbers_by_sublayer(browser: Any, tmp_path: Path, width: int) -> None:
    analysis = analyze(fresh(0), TOKENS, k=2, baseline=fresh(1), measures=("geometry", "profile"), attention=False)
    geometry, profile = analysis.geometry, analysis.profile
    assert geometry is not None and profile is not None
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path, viewport={"width": width, "height": 800}, color_scheme="dark") as page:

        def shows(measure: str, layer: int, lines: list[torch.Tensor]) -> None:
            """Each sublayer's chart draws the lines, with their means above it and the layer's numbers below."""
            figures = page.locator(f"[data-measure={measure}] figure")
            assert figures.count() == len(analysis.coupling.sublayers)
            for at in range(figures.count()):
                figure = figures.nth(at)
                assert figure.locator(".line").count() == len(lines)
                means = [float(line[at].mean()) for line in lines]
                assert numbers(figure.locator("figcaption").inner_text()) == pytest.approx(means, abs=6e-5)
                readout = figure.locator(".readout").inner_text()
                assert readout.startswith(f"layer {layer}: ")
                assert numbers(readout) == pytest.approx([float(line[at, layer]) for line in lines], abs=6e-5)

        def of(field: str, map: int) -> list[torch.Tensor]:
            both = (geometry, geometry.baseline)
            return [getattr(one, f"{field}{end}")[:, 0, :, map] for one in both for end in ("", "_null")]

        row = page.locator("[data-measure=geometry] .columns")
        row.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        shows("geometry", 1, of("symmetric", 0))
        page.locator("[data-measure=geometry] select").select_option("departure of I + J")
        row.focus()
        page.keyboard.press("ArrowRight")
        shows("geometry", 0, of("departure", 1))
        page.keyboard.press("Enter")
        assert page.locator("#controls input[type=range]").input_value() == "0"

        page.locator("[data-measure=profile] select").select_option("loss effect")
        chart = page.locator("[data-measure=profile] svg").first
        box = chart.bounding_box()
        chart.click(position={"x": box["width"] * 0.97, "y": box["height"] / 2})
        shows("profile", 2, [profile.loss_effect[0], profile.baseline.loss_effect[0]])
        assert page.locator("#controls input[type=range]").input_value() == "2", "the layer is chosen"

        page.locator("[data-measure=geometry] summary").click()
        first = page.locator("[data-measure=geometry] tbody tr").first.locator("td").all_inner_texts()
        symmetric = geometry.symmetric[0, 0, :, 0]
        expected = [float(symmetric[0]), float(symmetric[-1]), *(float(line[0].mean()) for line in of("symmetric", 0))]
        assert [float(text) for text in first] == pytest.approx(expected, abs=6e-5)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 390])
def test_an_atlas_reads_out_its_slices_beside_the_baselines(browser: Any, tmp_path: Path, width: int) -> None:
    found = sensitivity_atlas(trace(fresh(0), TOKENS), 2, baseline=fresh(1))
    assert found.baseline is not None
    path = viz.sensitivity_atlas(found).save(tmp_path / "atlas.html")
    with opened(browser, path, viewport={"width": width, "height": 800}, color_scheme="dark") as page:
        maps, readout = page.locator("#atlas [data-part=maps]"), page.locator("#atlas [data-part=readout]")

        def shows(here: torch.Tensor, there: torch.Tensor) -> None:
            """Model, baseline and difference, from layer 0 to layer 2; above the panes are means over all pairs."""
            assert readout.inner_text().startswith("From layer 0 to layer 2: the model ")
            expected = [float(one[0, 2]) for one in (here, there, here - there)]
            assert numbers(readout.inner_text()) == pytest.approx(expected, abs=6e-5)
            means = [float(one.nanmean()) for one in (here, there, here - there)]
            captions = " ".join(maps.locator("figcaption").all_inner_texts())
            assert numbers(captions) == pytest.approx(means, abs=6e-5)

        def share(one: SensitivityAtlas) -> torch.Tensor:
            return (one.singular_values[..., 0] / one.norm_product).log10()

        def fed(one: SensitivityAtlas) -> torch.Tensor:
            """What slices read of what the block at their source writes; blocks are numbered as layers are."""
            cells = one.block_overlap[2].diagonal(dim1=0, dim2=2).T - one.null
            return cells.where(torch.ones_like(cells).triu(1).bool(), torch.nan)

        maps.focus()
        page.keyboard.press("ArrowRight")
        assert readout.inner_text().startswith("From layer 0 to layer 2")
        shows(found.singular_values[..., 0].log10(), found.baseline.singular_values[..., 0].log10())
        page.locator("#atlas select").select_option("largest singular value over the product of norms")
        shows(share(found), share(found.baseline))
        page.locator("#atlas select").select_option("reads what the source writes: overlap")
        shows(fed(found), fed(found.baseline))
        maps.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        assert "no slice" in readout.inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    alone = viz.sensitivity_atlas(found.baseline)
    with opened(browser, alone.save(tmp_path / "alone.html")) as page:
        assert page.locator("#atlas figure").count() == 1
        assert "Fresh weights were not measured" in page.locator("#atlas").inner_text()


def test_choosing_a_token_changes_the_coupling_across_depth(browser: Any, tmp_path: Path, analysis: Analysis) -> None:
    with opened(browser, viz.write_html(analysis, tmp_path / "report.html")) as page:

        def shows(token: int, k: int) -> None:
            """Every caption and readout has the numbers of a token."""
            at = analysis.coupling.positions.index(token), analysis.coupling.ks.index(k)
            assert page.inner_text("#coupling h2").endswith(f"token {token}")
            where = page.inner_text("#coupling [data-part=where]")
            assert where == "Jacobian of layer 1, bases of layer 2"
            for s in range(3):
                pane = page.locator("#coupling .panes figure").nth(s)
                mean = float(analysis.coupling.mean("excess")[(s, *at)])
                assert numbers(pane.locator("figcaption").inner_text()) == pytest.approx([mean], abs=1.1e-4)
                pair = (s, *at, 1, 2)
                parts = (analysis.coupling.excess, analysis.coupling.values, analysis.coupling.null)
                *found, z = numbers(pane.locator(".readout").inner_text())
                assert found == pytest.approx([float(part[pair]) for part in parts], abs=1.1e-4)
                assert z == pytest.approx(float(analysis.coupling.z[pair]), abs=0.06)

        page.locator("#coupling .panes").first.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        shows(token=3, k=2)
        chips = page.locator("#tokens ol button")
        chips.nth(0).click()
        shows(token=0, k=2)
        assert chips.nth(0).get_attribute("aria-pressed") == "true"
        assert page.locator("#growth .line.token.chosen.pointed").get_attribute("d") == (
            page.locator("#growth .line.token").nth(0).get_attribute("d")
        )
        assert page.inner_text("#tokens .readout").startswith("0 “\u2068The\u2069”: LSS ")

        page.keyboard.press("ArrowRight")  # points at the next token, and Enter chooses it: it was not measured
        shows(token=0, k=2)
        page.keyboard.press("Enter")
        assert "tokens=[1]" in page.inner_text("#coupling") and "--tokens 1" in page.inner_text("#coupling")
        assert not page.locator("#coupling .panes").first.is_visible()

        page.locator("#controls select").first.select_option("3")
        page.locator("#controls select").nth(1).select_option("3")
        shows(token=3, k=3)

        # a click on a cell of the coupling of tokens chooses the row's token
        pane = page.locator("#pairs .heatmap image").last
        pane.click(**cell(pane, 0, 2, 4))
        shows(token=0, k=3)


def test_tokens_are_coloured_by_each_of_their_numbers(browser: Any, tmp_path: Path, analysis: Analysis) -> None:
    with opened(browser, viz.tokens(analysis).save(tmp_path / "tokens.html")) as page:
        growth = analysis.growth
        shown = {
            "LSS": analysis.linearity.path("block"),
            "ED": growth.expodistance,
            "CV": growth.cv,
            "final norm": growth.norms[-1],
            "attention\u2019s share of growth": growth.attn_share.mean(0),
            "MLP\u2019s share of growth": growth.mlp_share.mean(0),
        }
        assert page.locator("#tokens .switch label").all_inner_texts() == list(shown)
        for name, values in shown.items():
            page.get_by_label(name, exact=True).check()
            ends = page.locator("#tokens .colorbar span").all_inner_texts()
            assert [float(end) for end in ends] == pytest.approx([float(values.min()), float(values.max())], abs=0.051)
            colours = page.eval_on_selector_all("#tokens ol button", "all => all.map(one => one.style.background)")
            darkest = int(values.argmax())  # the light ramp ends dark
            light = [sum(map(int, colour[4:-1].replace(",", " ").split()[:3])) for colour in colours]
            assert light.index(min(light)) == darkest


def test_a_notebook_without_a_kernel_shows_every_widget(browser: Any, tmp_path: Path) -> None:
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    from IPython.core.formatters import DisplayFormatter

    widgets = every_widget(make_analysis(HOSTILE_TOKENS, token_layers=(1,)))
    cells = []
    for name, widget in widgets.items():
        data, _ = DisplayFormatter().format(widget)  # what a kernel sends
        output = nbformat.v4.new_output("execute_result", data=data, execution_count=1)
        cells.append(nbformat.v4.new_code_cell(f"tlc.viz.{name}(result)", outputs=[output], execution_count=1))
    saved = tmp_path / "notebook.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), saved)
    exporter = nbconvert.HTMLExporter()
    # the template's own MathJax and RequireJS come from the network; ours must not need them
    exporter.mathjax_url = exporter.require_js_url = ""
    page_text, _ = exporter.from_notebook_node(nbformat.read(saved, as_version=4))
    reopened = tmp_path / "notebook.html"
    reopened.write_text(page_text, encoding="utf-8")
    print(f"notebook of every widget: {saved.stat().st_size / 1e6:.2f} MB")
    drawn = {
        "attention_and_coupling": (".thumbs img[src^='data:']", 7),
        "depth_coupling": (".heatmap image[href^='data:']", 3),
        "tokens": ("ol button", len(HOSTILE_TOKENS)),
        "dashboard": ("#growth .line", len(HOSTILE_TOKENS) + 1),
    }
    with opened(browser, reopened, strict=False) as page:
        frames = page.locator("iframe[srcdoc]")
        assert frames.count() == len(widgets)
        for index, name in enumerate(widgets):
            frame = frames.nth(index).element_handle().content_frame()
            selector, count = drawn[name]
            frame.wait_for_selector(selector, state="attached")
            assert frame.locator(selector).count() == count
            if "attention" in name or name == "dashboard":
                wait_for_heads(frame, 2)
            assert frame.evaluate("typeof window.x") == "undefined"
        assert page.evaluate("typeof window.x") == "undefined"


def test_512_hostile_tokens_through_a_model(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformer_lens.model_bridge", reason="this TransformerLens has no bridge")
    hub_name, architecture, config = families()["gpt2"]
    config.n_positions = 512
    model = bridge(config, hub_name, architecture)(torch.float32)
    tokens = [*(f" t{i}" for i in range(512 - len(HOSTILE_TOKENS))), *HOSTILE_TOKENS]
    monkeypatch.setattr("tlcoupling.forward.inputs.to_str_tokens", lambda model, ids: tuple(tokens))
    analysis = analyze(model, torch.arange(512) % 40, k=4)
    assert analysis.tokens == tuple(tokens)
    window = math.isqrt(ATTENTION_CELLS // (analysis.attention.shape[1] + 1))
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path) as page:
        wait_for_heads(page, analysis.attention.shape[1])
        print_weight("512 tokens", path, page)
        assert f"tokens {512 - window} to 511" in page.inner_text("#pairs [data-part=window-shown]")
        # an attention pane of all tokens: the keyboard reaches the first and zooms in on it
        page.locator("#pairs [data-part=maps] .zoom").first.focus()
        page.keyboard.press("ArrowDown")
        assert page.inner_text("#pairs [data-part=readout]").startswith("Row 1 ")
        for _ in range(4):
            page.keyboard.press("+")
        names = page.locator("#pairs .heatmap text").all_text_contents()
        assert names[0].startswith("0 ") and any(name.startswith("31 ") for name in names)
        assert not any(name.startswith("40 ") for name in names)
        text = page.inner_text("#tokens")
        assert all(token in text for token in SHOWN_HOSTILE[:-1])
        assert page.evaluate("typeof window.x") == "undefined"


@pytest.mark.parametrize("n_tokens", [20, 216, 1000])
def test_many_tokens_stay_small_and_true_below_the_headline(browser: Any, tmp_path: Path, n_tokens: int) -> None:
    """30 layers and fresh weights, with coupling of tokens in all layers, in three, and in one."""
    tokens = [f" token{i}" for i in range(n_tokens)]
    layers = {20: tuple(range(30)), 216: (0, 15, 29), 1000: (15,)}[n_tokens]
    positions = range(20) if n_tokens == 20 else (-1,)
    shape = {"n_heads": 1, "n_layers": 30, "ks": (10,), "token_layers": layers, "positions": positions}
    fresh = make_analysis(tokens, **shape, with_attention=False)
    kept = range(30) if n_tokens < 1000 else layers  # as analyze keeps them
    scores = torch.randn(len(kept), 9, n_tokens, n_tokens, generator=torch.Generator().manual_seed(1))
    patterns = scores.masked_fill(torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    attention = {"attention": patterns, "attention_layers": tuple(kept)}
    analysis = make_analysis(tokens, **shape, **attention, with_attention=False, baseline=fresh)
    path = viz.write_html(analysis, tmp_path / "report.html")
    assert path.stat().st_size < 3_000_000
    with opened(browser, path) as page:
        print_weight(f"{n_tokens} tokens", path, page)
        marks = page.evaluate("performance.getEntriesByType('mark').map((mark) => mark.name)")
        # the headline is in the page before large panes are drawn
        assert marks[0] == "header" and len(marks) > 3
        page.locator("#pairs [data-part=maps] .zoom").nth(1).focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        text = page.inner_text("#pairs [data-part=readout]")
        assert text.startswith("Row 2 “\u2068 token2\u2069”, column 1 “\u2068 token1\u2069”")
        shown = numbers(text.partition("excess")[2])[1]
        precision = page.inner_text("#pairs [data-part=precision]")
        said = re.search(r"coupling to ±\u00a0([0-9.]*[0-9])", precision)
        exact = float(said[1]) if said else 1e-4  # four digits are shown
        assert bool(said) == (n_tokens > 20)
        matrix = analysis.token_coupling.values[0, layers.index(15), 0].double().fill_diagonal_(NAN)
        pooled = "the mean over a block of 3" in precision.partition("attention")[0]
        assert pooled == (n_tokens == 1000)
        cell = matrix[:3, :3].nanmean() if pooled else matrix[2, 1]
        assert shown == pytest.approx(float(cell), abs=exact + 5e-5)
        assert page.locator("#pairs .heatmap image").count() == 4


def dotted(page: Any, pane: Any, row: int, column: int) -> bool:
    """Whether the centre of a heat map's cell has another colour than its corner."""
    centre, corner = page.evaluate(
        "async ([href, x, y]) => { const image = new Image(); image.src = href; await image.decode();"
        "const copy = Object.assign(document.createElement('canvas'), { width: image.width, height: image.height });"
        "const context = copy.getContext('2d', { willReadFrequently: true }); context.drawImage(image, 0, 0);"
        "return [4, 0].map((at) => [...context.getImageData(8 * x + at, 8 * y + at, 1, 1).data].join()); }",
        [pane.get_attribute("href"), column, row],
    )
    return centre != corner


def test_undetermined_bases_have_a_dot_a_legend_and_words(browser: Any, tmp_path: Path) -> None:
    """The second singular vectors of two Jacobians are undetermined: K = 3 uses them, and K = 1 does not."""
    analysis = make_analysis(positions=(0, -1), ks=(1, 3), token_layers=(0, 2))
    sure = {name: torch.zeros_like(getattr(analysis, name).singular_values) for name in ("coupling", "token_coupling")}
    sure["coupling"][1, 1, 2, 1] = 1.0  # attn of layer 2, last token
    sure["token_coupling"][0, 1, 3, 1] = 1.0  # block of layer 2, token 3
    couplings = {name: dataclasses.replace(getattr(analysis, name), uncertainty=sure[name]) for name in sure}
    path = viz.write_html(dataclasses.replace(analysis, **couplings), tmp_path / "report.html")
    legend, words = "dot: bases not determined", "; bases not determined"
    with opened(browser, path) as page:
        panes, tokens = page.locator("#coupling .heatmap image"), page.locator("#pairs .heatmap image").last
        bars = [page.locator(f"{section} [data-part=colorbar]") for section in ("#coupling", "#pairs")]
        page.locator("#controls select").nth(1).select_option("3")
        assert [dotted(page, panes.nth(i), 0, 2) for i in range(3)] == [False, True, False]  # block, attn and mlp
        assert not dotted(page, panes.nth(1), 2, 0) and not dotted(page, panes.nth(1), 2, 2)  # the diagonal is 1
        assert dotted(page, tokens, 0, 3) and not dotted(page, tokens, 3, 0)
        assert all(legend in bar.inner_text() for bar in bars)
        panes.nth(1).hover(**cell(panes.nth(1), 0, 2, 4))
        readouts = page.locator("#coupling .panes .readout").all_inner_texts()
        assert [words in text for text in readouts] == [False, True, False]
        page.locator("#coupling").get_by_label("null", exact=True).check()
        assert not any(dotted(page, panes.nth(i), 0, 2) for i in range(3))  # it does not depend on the bases
        page.locator("#coupling").get_by_label("excess", exact=True).check()
        tokens.hover(**cell(tokens, 0, 3, 4))
        assert words in page.inner_text("#pairs [data-part=readout]")
        page.locator("#controls select").nth(1).select_option("1")
        assert not any(dotted(page, panes.nth(i), 0, 2) for i in range(3)) and not dotted(page, tokens, 0, 3)
        assert not any(legend in bar.inner_text() for bar in bars)
        assert words not in page.inner_text("body")


@pytest.mark.parametrize("late", [False, True])
def test_a_frame_fits_its_page_and_follows_the_scheme_of_its_host(browser: Any, tmp_path: Path, late: bool) -> None:
    """Also where the script beside the frame runs after the page in it is drawn, as in a notebook that is opened."""
    frame = viz.tokens(make_analysis(HOSTILE_TOKENS))._repr_html_()
    if late:
        frame = frame.replace("<script>", '<script type="text/plain">')
    host = tmp_path / "host.html"
    for colour, scheme in (("#111", "dark"), ("#fff", "light")):
        host.write_text(f'<body style="background: {colour}">{frame}</body>', encoding="utf-8")
        # the reader's own scheme is the other one
        other = {"dark": "light", "light": "dark"}[scheme]
        with opened(browser, host, strict=False, color_scheme=other) as page:
            inside = page.locator("iframe").element_handle().content_frame()
            if late:
                inside.wait_for_selector("html[data-drawn]")
                page.evaluate(
                    "const [waiting, script] = [document.querySelector('script'), document.createElement('script')];"
                    "script.textContent = waiting.textContent; waiting.replaceWith(script)"
                )
            inside.wait_for_selector(f"html[data-scheme={scheme}]")
            page.wait_for_function("parseFloat(document.querySelector('iframe').style.height) > 0")
            content = inside.evaluate("document.documentElement.offsetHeight")
            assert page.evaluate("parseFloat(document.querySelector('iframe').style.height)") == pytest.approx(
                content, abs=2
            )
            assert page.get_by_text("open as a page").is_visible()


def test_the_address_chooses_layer_and_token(browser: Any, tmp_path: Path, analysis: Analysis) -> None:
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path, strict=False) as page:
        page.locator("#controls input[type=range]").focus()
        page.keyboard.press("Home")
        address = page.evaluate("location.href")
        assert "layer=0" in address and "token=3" in address
        page.goto("about:blank")
        page.goto(address.replace("token=3", "token=0"))
        page.wait_for_selector("html[data-drawn]")
        assert page.inner_text("#pairs-title").endswith("layer 0")
        assert page.inner_text("#coupling h2").endswith("token 0")


@pytest.mark.parametrize("width", [1280, 390])
def test_no_text_of_a_chart_lies_on_another(browser: Any, tmp_path: Path, width: int) -> None:
    analysis = make_analysis(n_layers=12)
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path, viewport={"width": width, "height": 844}) as page:
        crossed = page.evaluate(
            "[...document.querySelectorAll('svg.chart')].flatMap(svg => {"
            "const all = [...svg.querySelectorAll('text')].filter(one => one.textContent);"
            "const boxes = all.map(one => one.getBoundingClientRect());"
            "const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;"
            "return all.flatMap((one, i) => all.slice(i + 1).flatMap((other, j) =>"
            "apart(boxes[i], boxes[i + 1 + j]) ? [] : [`${one.textContent} on ${other.textContent}`])); })"
        )
        assert crossed == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_headline_is_on_the_first_screen(browser: Any, tmp_path: Path, width: int) -> None:
    """Also of a long prompt and a long name."""
    analysis = make_analysis([" lorem ipsum"] * 200, token_layers=())
    analysis.growth.norms[1, 0] = 1e4  # named in the headline
    provenance = dataclasses.replace(analysis.provenance, model_name="a-long-owner/SomeModel-135M-Instruct-v2-Preview")
    analysis = dataclasses.replace(analysis, provenance=provenance)
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path, viewport={"width": width, "height": 664}) as page:  # a phone, less its browser's bars
        box = page.locator("#header [data-part=headline]").bounding_box()
        assert box["y"] > 0 and box["y"] + box["height"] < 664


@pytest.mark.parametrize("width", [1280, 390])
def test_the_headline_and_the_null_are_in_sight(browser: Any, tmp_path: Path, width: int) -> None:
    fresh = make_analysis(token_layers=(1,))
    null = torch.full_like(fresh.coupling.null, 0.0173)
    fresh = dataclasses.replace(fresh, coupling=dataclasses.replace(fresh.coupling, null=null))
    analysis = make_analysis(token_layers=(1,), baseline=fresh)
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path, viewport={"width": width, "height": 800}) as page:
        assert page.inner_text("#header [data-part=headline]") == analysis.headline()
        assert page.locator("#summary [data-part=no-fresh]").is_hidden()
        for name in ("null", "fresh excess", "overlap V", "its null", "random √n", "fresh"):
            box = page.locator("#summary th", has_text=name).first.bounding_box()
            assert box["x"] + box["width"] <= width, name
        assert page.locator("#coupling .panes").count() == 3 and page.locator("#coupling .line.fresh").count() == 3
        assert page.locator("#coupling .line.fresh-null").count() == 3, "fresh weights beside their own null"
        row = page.locator("#coupling [data-part=table] tbody tr").first.locator("th, td").all_text_contents()
        assert [row[column] for column in (4, 8, 12)] == ["0.0173"] * 3
        assert page.locator("#pairs [data-part=maps] figure").count() == 4  # attention, trained, fresh, difference
    with opened(browser, viz.write_html(fresh, tmp_path / "alone.html")) as page:
        for section in ("#summary", "#coupling", "#pairs"):
            assert "--baseline" in page.inner_text(section), "what is missing is said"


def test_growth_is_read_by_keyboard_and_sinks_leave_the_axis(browser: Any, tmp_path: Path) -> None:
    analysis = make_analysis()
    analysis.growth.norms[2, 0] = 1e4
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path) as page:
        ticks = "#growth [data-part=norms] text"
        assert not any(text.startswith(("6", "8")) for text in page.locator(ticks).all_text_contents())
        page.locator("#growth [data-part=norms]").focus()
        page.keyboard.press("ArrowDown")
        value = float(analysis.growth.norms[4, 1].log())
        text = page.inner_text("#growth .readout")
        assert text.startswith("depth 4, token 1 “\u2068 cat\u2069”") and numbers(text)[0] == pytest.approx(
            value, abs=1e-3
        )
        page.keyboard.press("Enter")
        assert page.inner_text("#coupling h2").endswith("token 1")
        page.locator("#growth [data-part=sinks]").check()
        assert any(text.startswith(("6", "8")) for text in page.locator(ticks).all_text_contents())
        page.locator("#growth [data-part=shares]").focus()
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#growth .readout").startswith("layer 1: attention ")


def test_one_token_has_no_ranking(browser: Any, tmp_path: Path) -> None:
    with opened(browser, viz.write_html(make_analysis(("one",)), tmp_path / "report.html")) as page:
        assert not page.get_by_text("Most straight").is_visible()


def test_a_cell_opens_what_its_layers_share(browser: Any, tmp_path: Path) -> None:
    shared = shared_by_hand(2)  # of layers 0 and 2
    path = viz.write_html(make_analysis(shared=shared), tmp_path / "report.html")
    with opened(browser, path) as page:
        title, readout = "#coupling [data-part=shared-title]", "#coupling [data-part=shared-readout]"
        pane = page.locator("#coupling .heatmap image").first
        pane.click(**cell(pane, 2, 0, 4))
        assert page.inner_text(title).startswith("Jacobian of layer 2, bases of layer 0: coupling ")
        assert page.inner_text("#pairs-title").endswith("layer 2")
        page.locator("#coupling [data-part=shared-map]").focus()
        page.keyboard.press("ArrowDown")  # from the first row and second column
        text = page.inner_text(readout)
        assert "u2" in text and "v2" in text
        value, chance = numbers(text)
        matrix = shared.projected.values[0, 1, 0].abs()
        assert value == pytest.approx(float(matrix[1, 1]), abs=6e-4)
        assert chance == pytest.approx(float(shared.projected.null_entry[0, 1]), abs=6e-4)
        order = matrix.diagonal().argsort(descending=True).tolist()
        rows = page.locator("#coupling [data-part=shared-tokens] tbody tr")
        assert [row[:2] for row in rows.locator("th").all_inner_texts()] == [
            f"{rank + 1}{end}" for rank in order for end in "+−"
        ]
        assert all(word in rows.first.inner_text() for word in HOSTILE_TOKENS[:1])
        # the keyboard alone: a cell of the panes, Enter, and what is shown is of that pair
        page.locator("#coupling .panes").first.focus()
        for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        assert page.inner_text(title).startswith("Jacobian of layer 0, bases of layer 2: ")
        assert numbers(page.inner_text(readout))[0] == pytest.approx(
            float(shared.projected.values[0, 0, 1].abs()[1, 1]), abs=6e-4
        )
        pane.click(**cell(pane, 1, 2, 4))
        assert "Layers 1 and 2 are not both among those kept: 0, 2." in page.inner_text("#coupling")
        # pairs of tokens and heads need a kernel
        assert "tlc.viz.Live(analysis)" in page.inner_text("#pairs [data-part=shared]")
        assert page.locator("#pairs [data-part=head-coupling]").is_hidden()
        assert page.evaluate("typeof window.x") == "undefined"
    # the coupling in the title is that of the matrix, not of the token and K that are chosen
    analysis = make_analysis(shared=shared, positions=(1, 3), ks=(2, 3))
    with opened(browser, viz.write_html(analysis, tmp_path / "several.html")) as page:
        page.evaluate("tlc.choice.set('token', 1); tlc.choice.set('k', 3)")
        assert page.inner_text("#coupling-title").endswith("token 1")
        pane = page.locator("#coupling .heatmap image").first
        pane.click(**cell(pane, 2, 0, 4))
        coupling, null = numbers(page.inner_text(title).partition(": ")[2])
        assert coupling == pytest.approx(float(analysis.coupling.values[0, 1, 0, 2, 0]), abs=6e-5)
        assert null == pytest.approx(float(analysis.coupling.null[0, 1, 0, 2, 0]), abs=6e-5)
    with opened(browser, viz.depth_coupling(make_analysis()).save(tmp_path / "without.html")) as page:
        assert "shared=True" in page.inner_text("#coupling") and "--directions" in page.inner_text("#coupling")
        assert page.locator("#coupling [data-part=shared-how]").is_hidden()


@pytest.mark.parametrize("width", [1280, 390])
def test_any_script_is_shown_whole(browser: Any, tmp_path: Path, width: int) -> None:
    """Tokens may split a character; the prompt is shown whole, and no direction leaks."""
    text = "日本語、\nשָׁלֵם 👩‍👩‍👧 العربية"
    tokens = ("日", "本\ufffd", "\ufffd、", "\n", "שָׁ", "לֵם", " \ufffd", "\ufffd", " العربية")
    analysis = make_analysis(tokens, token_layers=(1,), positions=(4,))
    provenance = dataclasses.replace(analysis.provenance, text=text)
    analysis = dataclasses.replace(analysis, provenance=provenance)
    path = viz.write_html(analysis, tmp_path / "report.html")
    with opened(browser, path, viewport={"width": width, "height": 800}) as page:
        wait_for_heads(page, 2)
        assert page.inner_text("#header blockquote") == text
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        labels = page.locator("#pairs .heatmap").last.locator("text").all_text_contents()
        assert "4 \u2068שָׁ\u2069" in labels, "the number stays before the token"
        assert page.locator("#tokens ol button").count() == len(tokens)


def test_kinds_of_layers_are_marked_on_the_axes(browser: Any, tmp_path: Path) -> None:
    coupling = make_analysis().coupling
    kinds = ["mixer+mlp", "attn+mlp", "mixer+mlp", "mixer+mlp"]
    provenance = dataclasses.replace(coupling.provenance, settings={"layer_kinds": kinds})
    mixed = dataclasses.replace(coupling, provenance=provenance)
    with opened(browser, viz.depth_coupling(mixed).save(tmp_path / "mixed.html")) as page:
        assert all(kind in page.inner_text("#coupling [data-part=kinds]") for kind in set(kinds))
        pane = page.locator("#coupling .heatmap").first
        assert [pane.locator(f"rect.kind-{kind}").count() for kind in (0, 1)] == [6, 2]  # on both axes
        image = page.locator("#coupling .heatmap image").first
        image.hover(**cell(image, 1, 2, 4))
        words = "Jacobian of layer 1 (attn+mlp), bases of layer 2 (mixer+mlp)"
        assert page.inner_text("#coupling [data-part=where]") == words
    with opened(browser, viz.depth_coupling(coupling).save(tmp_path / "alike.html")) as page:
        assert page.locator("#coupling [data-part=kinds]").is_hidden() and page.locator(".kind-0").count() == 0
