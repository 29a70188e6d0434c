"""Try the live report with real kernels, in JupyterLab and in marimo, through headless Chromium.

A layer and a token that were not measured are chosen in the page. The kernel must measure them, and the page must then
show them. Then a pair of layers, of tokens and of heads is opened: the kernel must measure what each shares.
JupyterLab's notebook is saved and opened again in a new kernel: the page must still be there.

Run: pip install anywidget jupyterlab marimo playwright && python scripts/live.py [FOLDER]
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

CODE = """import torch
import tlcoupling as tlc
from transformer_lens.model_bridge import TransformerBridge
shape = {"n_layers": 4, "d_model": 96, "n_heads": 4, "d_head": 24, "d_mlp": 384, "n_ctx": 32, "d_vocab": 50}
torch.manual_seed(0)
model = TransformerBridge.boot_native({**shape, "act_fn": "gelu", "seed": 0}).eval()
live = tlc.viz.Live(tlc.analyze(model, torch.tensor([7, 23, 3, 41, 11, 3]), k=2, token_layers=2))
live"""
MARIMO = "import marimo\napp = marimo.App()\n\n@app.cell\ndef _():\n    {}\n    return\n"
PATIENCE = 120_000  # milliseconds: importing PyTorch on a busy machine


@contextmanager
def served(command: Sequence[str], path: str, folder: Path) -> Iterator[str]:
    """Run a server on a free port; yield its address when it answers, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(folder / f"{path or 'marimo'}.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port)], cwd=folder, stdout=log, stderr=log
        )
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}").close()
                break
            except OSError:
                continue
        else:
            raise TimeoutError(f"no answer from {command[0]} in a minute: see {log.name}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # JupyterLab does not end while a kernel starts
            server.kill()


def choose_and_wait(page: Any, where: str) -> None:
    """Choose a layer and a token that were not measured, and wait for a page that has them."""
    frame = page.frame_locator(".tlcoupling-status ~ iframe")
    shown = frame.locator('[data-part="layer-shown"]')
    shown.filter(has_text="2tokens compared").wait_for(timeout=PATIENCE)
    assert page.locator(".tlcoupling-status ~ iframe").evaluate("one => one.clientHeight") > 1000, "the frame fits"
    frame.locator('[data-part="layer"][type="range"]').fill("0")
    shown.filter(has_text="0tokens compared").wait_for(timeout=PATIENCE)
    frame.locator('select[data-part="token"]').select_option("1")
    frame.locator('optgroup[label*="depth measured"] option[value="1"]').wait_for(state="attached", timeout=PATIENCE)
    assert shown.inner_text().startswith("0"), "the layer that was chosen stays chosen"
    print(f"{where}: layer 0 and token 1 were measured on demand")
    # in the row of the layer and of the token that are chosen: another one would be measured, and bring a new page
    for section, cells, title, down in (
        ("coupling", "#coupling .panes .heatmap image", "Jacobian of layer 0, bases of layer 3", 0.1),
        ("pairs", '#pairs [data-part="maps"] figure:last-child .heatmap image', "Jacobian of token 1", 0.25),
        ("pairs", '[data-part="head-map"] image', "Jacobian of head 0, bases of head 3", 0.1),
    ):
        if "head-map" in cells:
            frame.locator('[data-part="head-ask"]').click()
        map_of_pairs = frame.locator(cells).first
        map_of_pairs.wait_for(timeout=PATIENCE)
        size = map_of_pairs.bounding_box()
        map_of_pairs.click(position={"x": 0.95 * size["width"], "y": down * size["height"]})
        opened = frame.locator(f'#{section} [data-part="shared-title"]').filter(has_text=title)
        opened.wait_for(timeout=PATIENCE)
        print(f"{where}: {opened.inner_text()}")


def jupyterlab(browser: Any, folder: Path) -> None:
    """Measure in JupyterLab; then open the saved notebook in a new kernel."""
    cell = {"cell_type": "code", "source": CODE, "metadata": {}, "outputs": [], "execution_count": None, "id": "one"}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    book = folder / "live.ipynb"
    book.write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    options = ["--no-browser", "--allow-root", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    with served(["jupyterlab", *options], "api", folder) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{address}/lab/tree/live.ipynb")
        page.locator(".jp-Notebook .cm-content").first.click(timeout=PATIENCE)
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=PATIENCE)
        page.keyboard.press("Control+Enter")
        choose_and_wait(page, "JupyterLab")
        page.screenshot(path=folder / "jupyterlab.png")
        page.locator(".jp-Notebook .cm-content").first.click()  # the frame has the keyboard
        page.keyboard.press("Control+s")
        for _ in range(60):
            time.sleep(0.5)
            if "data-tlcoupling" in book.read_text():
                break
        else:
            raise AssertionError("the notebook was not saved with its page")
    # another server has no kernel that knows the widget
    with served(["jupyterlab", *options], "api", folder) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{address}/lab/tree/live.ipynb")
        frame = page.frame_locator("[data-tlcoupling] iframe")
        frame.locator('[data-part="layer-shown"]').filter(has_text="tokens compared").wait_for(timeout=PATIENCE)
        page.screenshot(path=folder / "jupyterlab-saved.png")
        page.close()
        print("JupyterLab: the saved notebook shows the page, without the kernel that made it")


def marimo(browser: Any, folder: Path) -> None:
    """Measure in a marimo notebook."""
    (folder / "live.py").write_text(MARIMO.format(CODE.replace("\n", "\n    ")))
    with served(["marimo", "run", "live.py", "--headless", "--no-token"], "", folder) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(address)
        choose_and_wait(page, "marimo")
        page.screenshot(path=folder / "marimo.png")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="live-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        jupyterlab(browser, folder)
        marimo(browser, folder)
        browser.close()
    print(f"pictures in {folder}")


if __name__ == "__main__":
    main()
