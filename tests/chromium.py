"""Debian's Chromium, offline, driven by Playwright: what a page shows, logs and asks the network for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for the tests of a module that imports this; they are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, path: Path, *, strict: bool = True, **options: Any) -> Iterator[Any]:
    """A page that has loaded and drawn a file, offline; at the end it must have logged no error, and asked for no more.

    Args:
        browser: the browser.
        path: the file.
        strict: False for a page that may ask for what lies outside it, in vain.
        options: those of a browser context, such as ``viewport`` and ``color_scheme``.
    """
    context = browser.new_context(offline=True, **{"viewport": {"width": 1280, "height": 900}, **options})
    page, faults = context.new_page(), []
    page.set_default_timeout(60_000)

    def note(kind: str, text: str) -> None:
        if kind in ("error", "warning", "request") and not text.startswith(("data:", "blob:", "about:")):
            faults.append(f"{kind}: {text}")

    page.on("pageerror", lambda error: note("error", str(error)))
    page.on("console", lambda message: note(message.type, message.text))
    page.on("request", lambda request: note("request", request.url))
    address = path.resolve().as_uri()
    page.goto(address, wait_until="load" if strict else "domcontentloaded")
    # a page of ours draws its parts one after another
    page.wait_for_selector("html[data-drawn], html:not(:has(#data))", state="attached")
    try:
        yield page
        if strict:
            assert faults == [f"request: {address}"]
    finally:
        context.close()


def numbers(text: str) -> list[float]:
    """The decimal numbers of a text, in order."""
    words = text.replace("−", "-").replace(",", " ").replace(";", " ").split()
    return [float(word) for word in words if word.lstrip("-").replace(".", "", 1).isdigit() and "." in word]


def wait_for_heads(page: Any, count: int) -> None:
    """Until circuitsvis has drawn its heads and the zoomed one, none of them blank."""
    page.wait_for_function(
        "count => { const canvases = [...document.querySelectorAll('.circuitsvis canvas')];"
        "const copy = document.createElement('canvas').getContext('2d', { willReadFrequently: true });"
        "return canvases.length === count + 1 && canvases.every(c => { copy.drawImage(c, 0, 0, 100, 100);"
        "return c.width && copy.getImageData(0, 0, 100, 100).data.some(x => x > 0 && x < 255); }); }",
        arg=count,
    )


def print_weight(name: str, path: Path, page: Any) -> None:
    """Print a page's size, and when it first showed something and its headline: on a quiet machine, under a second."""
    times = [
        page.evaluate(f"performance.getEntriesByName('{entry}')[0].startTime / 1000")
        for entry in ("first-contentful-paint", "summary")
    ]
    print(f"{name}: {path.stat().st_size / 1e6:.2f} MB, first paint {times[0]:.2f} s, headline {times[1]:.2f} s")
