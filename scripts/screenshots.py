"""Write docs/report.png: the first screens of the report of SmolLM2-135M and fresh weights, as Chromium shows them.

python scripts/screenshots.py              # measures, about two minutes
python scripts/screenshots.py report.html  # a report that was written before
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent.parent / "docs" / "report.png"
WIDTH, HEIGHT = 1280, 1960  # to the end of the first row of panes


def measured(folder: Path) -> Path:
    """Return the page of a report on the default model and prompt."""
    command = [shutil.which("tlcoupling", path=Path(sys.executable).parent) or "tlcoupling", "report", "--baseline"]
    subprocess.run([*command, "--output", folder], check=True)
    return folder / "report.html"


def picture(page: Path) -> None:
    """Take the picture in light mode; nothing is fetched."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        size = {"width": WIDTH, "height": HEIGHT}
        shown = browser.new_context(offline=True, viewport=size, color_scheme="light").new_page()
        shown.goto(page.resolve().as_uri())
        shown.wait_for_selector("html[data-drawn]")
        shown.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        picture(Path(sys.argv[1]) if len(sys.argv) > 1 else measured(Path(folder)))
