"""The dashboard of SmolLM2 as people see it: on a desk, in the dark, on a phone and on paper."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import browser, numbers, opened, print_weight, wait_for_heads

import tlcoupling as tlc

__all__ = ["browser"]  # a fixture
pytestmark = pytest.mark.slow

SCREENSHOTS = Path(os.environ.get("OUT", "out"), "screenshots")
WAYS: dict[str, dict[str, Any]] = {
    "desktop-light": {},
    "desktop-dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 375, "height": 812}, "device_scale_factor": 2, "is_mobile": True},
    "print": {"viewport": {"width": 1000, "height": 1400}},
}


def test_the_dashboard_on_screens_and_on_paper(
    browser: Any, smollm2: torch.nn.Module, prompts: dict[str, str], tmp_path: Path
) -> None:
    analysis = tlc.analyze(smollm2, prompts["landmarks"], token_layers=15)
    path = tlc.viz.dashboard(analysis).save(tmp_path / "dashboard.html")
    pair = [float(getattr(analysis.token_coupling, name)[0, 0, 0, 2, 1]) for name in ("excess", "values", "null")]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for way, options in WAYS.items():
        with opened(browser, path, **options) as page:
            wait_for_heads(page, 9)
            print_weight(f"SmolLM2, {way}", path, page)
            page.locator("#pairs .zoom[aria-label^=trained]").focus()
            page.keyboard.press("ArrowDown")
            assert "1 by definition" in page.inner_text("#pairs [data-part=readout]"), way
            page.keyboard.press("ArrowDown")
            assert numbers(page.inner_text("#pairs [data-part=readout]"))[2:5] == pytest.approx(pair, abs=1.1e-4), way
            if way == "print":
                page.emulate_media(media="print")
                page.pdf(path=SCREENSHOTS / "print.pdf", format="A4")
                assert not page.locator("#controls").is_visible()
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(500)  # charts that follow the window's size draw themselves again
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), way
            shot = page.screenshot(path=SCREENSHOTS / f"{way}.png", full_page=True)
            assert len(shot) > 100_000, way  # a blank page compresses to far less
