"""Print how large a report is, and when Chromium first paints it: SmolLM2-135M, 30 layers, long prompts, fresh weights.

python benchmarks/page.py [--tokens 28 216] [--token-layers 15] [--folder FOLDER]

Token layers compare all pairs of tokens, which takes long for a long prompt. With a folder, it keeps the pages and a
picture of each at 1280 and 390 pixels, light and dark. It fails if a page has 3 MB or more, logs an error, asks the
network for anything or is wider than the screen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

import tlcoupling as tlc

MOST_BYTES = 3_000_000
PAINT = "name => performance.getEntriesByName(name)[0].startTime / 1000"


def page_of(model: Any, n_tokens: int, token_layers: list[int] | None, folder: Path) -> Path:
    """Measure a prompt of so many tokens, the package's prompts over and over; write its report."""
    prompts = json.loads((resources.files("tlcoupling") / "data" / "prompts.json").read_text(encoding="utf-8"))
    ids = model.to_tokens(" ".join(prompts.values()), prepend_bos=False)[0]
    ids = ids.repeat(-(-n_tokens // len(ids)))[:n_tokens]
    analysis = tlc.analyze(model, ids, token_layers=token_layers, baseline="fresh", shared=True)
    path = tlc.viz.write_html(analysis, folder / f"report-{n_tokens}.html")
    size = path.stat().st_size
    print(f"{n_tokens} tokens: {size / 1e6:.2f} MB, measured in {analysis.provenance.seconds:.0f} s", flush=True)
    assert size < MOST_BYTES, size
    return path


def opened(browser: Any, path: Path, width: int, scheme: str) -> None:
    """Open a page without a network; print its first paint and when its headline was there; take a picture."""
    page = browser.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or faults.append(request.url)
    )
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-drawn]")
    first, headline = (page.evaluate(PAINT, name) for name in ("first-contentful-paint", "summary"))
    print(f"  {width} px, {scheme}: first paint {first:.2f} s, headline {headline:.2f} s", flush=True)
    page.add_style_tag(content="#controls { position: static !important }")  # it would lie over the picture
    page.screenshot(path=path.with_name(f"{path.stem}-{width}-{scheme}.png"), full_page=True)
    assert not faults, faults
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[28, 216])
    parser.add_argument("--token-layers", type=int, nargs="+")
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="page-"))
    folder.mkdir(parents=True, exist_ok=True)
    model = tlc.load_model("smollm2-135m")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        for n_tokens in chosen.tokens:
            path = page_of(model, n_tokens, chosen.token_layers, folder)
            for width, scheme in product((1280, 390), ("light", "dark")):
                opened(browser, path, width, scheme)
    print(f"pages and pictures in {folder}")


if __name__ == "__main__":
    main()
