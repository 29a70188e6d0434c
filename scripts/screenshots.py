"""Write the pictures of the documentation: what Chromium shows of a report on SmolLM2-135M and fresh weights.

python scripts/screenshots.py         # measures, about three minutes
python scripts/screenshots.py FOLDER  # the output of a `tlcoupling report --baseline --directions`

docs/report.png, the first screens; docs/phone.png, on a phone; docs/shared.png, what two blocks share;
docs/notebook.png, a cell of a notebook; docs/figure.png, a figure.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from IPython.core.formatters import DisplayFormatter
from nbconvert import HTMLExporter
from playwright.sync_api import sync_playwright

import tlcoupling as tlc

DOCS = Path(__file__).parent.parent / "docs"


def measured(folder: Path) -> Path:
    """Write a report on the default model and prompt; return its folder."""
    command = [sys.executable, "-m", "tlcoupling.cli", "report", "--baseline", "--directions", "--output", str(folder)]
    subprocess.run(command, check=True)
    return folder


def notebook_page(analysis: tlc.Analysis, folder: Path) -> Path:
    """Write a notebook with one cell that shows a widget, as HTML."""
    data, _ = DisplayFormatter().format(tlc.viz.attention_and_coupling(analysis, 15))  # what a kernel sends
    output = nbformat.v4.new_output("execute_result", data=data, execution_count=1)
    source = 'analysis = tlc.analyze(model, prompt, token_layers=[0, 15, 29], baseline="fresh")\n'
    source += "tlc.viz.attention_and_coupling(analysis, layer=15)"
    cell = nbformat.v4.new_code_cell(source, outputs=[output], execution_count=1)
    exporter = HTMLExporter()
    exporter.mathjax_url = exporter.require_js_url = ""  # they are on a network
    page, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    path = folder / "notebook.html"
    path.write_text(page, encoding="utf-8")
    return path


def opened(browser: Any, path: Path, width: int, height: int, scheme: str = "light") -> Any:
    """Open a page without a network."""
    size = {"width": width, "height": height}
    page = browser.new_context(offline=True, viewport=size, color_scheme=scheme).new_page()
    page.goto(path.resolve().as_uri(), wait_until="domcontentloaded")
    return page


def pictures(folder: Path) -> None:
    """Take all pictures."""
    analysis = tlc.load(folder / "result.safetensors")
    report = tlc.viz.write_html(analysis, folder / "report.html")
    tlc.viz.figures.depth_coupling(analysis).savefig(DOCS / "figure.png", dpi=150)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        page = opened(browser, report, 1280, 2080)  # to the end of the first row of panes
        page.wait_for_selector("html[data-drawn]")
        page.screenshot(path=DOCS / "report.png")
        page.add_style_tag(content="#controls { position: static }")  # it would lie over the picture
        page.locator("#coupling [data-part=shared]").screenshot(path=DOCS / "shared.png")
        page = opened(browser, report, 390, 1900, "dark")
        page.wait_for_selector("html[data-drawn]")
        page.screenshot(path=DOCS / "phone.png")
        page = opened(browser, notebook_page(analysis, folder), 1100, 1200)
        frame = page.locator("iframe").element_handle().content_frame()
        frame.wait_for_selector("html[data-drawn]")
        frame.wait_for_selector(".circuitsvis canvas")
        page.screenshot(path=DOCS / "notebook.png")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        pictures(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            pictures(measured(Path(temporary) / "report"))
