"""A headless Chromium for tests, driven over its DevTools pipe: no driver program, no package, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium on this machine: apt-get install chromium"

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Page:
    """One tab, as a context manager: what it shows, what it logged and what it asked the network for.

    Attributes:
        errors: exceptions, console errors and warnings, and what the browser itself complained about.
        requests: URLs that were asked for, apart from the page itself and what lies inside it (data:, blob:).
    """

    def __init__(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._size = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": width < 600,
        }
        self._serial = 0
        self._buffer = b""

    def __enter__(self) -> Page:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command_read, self._write = os.pipe()
        self._read, answer_write = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4; 10 and 11 keep them apart on their way there.
        script = f'exec 10<&{command_read} 11>&{answer_write}; exec 3<&10 4>&11; exec "$@" 10<&- 11>&-'
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                script,
                "bash",
                str(CHROMIUM),
                *_FLAGS,
                f"--user-data-dir={self._profile.name}",
            ],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(command_read)
        os.close(answer_write)
        self._session = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", **self._size)
        self._call("Emulation.setEmulatedMedia", features=self._media)
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def open(self, path: Path, until: str = "document.readyState === 'complete'") -> None:
        """Load a file and wait until an expression is true in it."""
        self._call("Page.navigate", url=path.resolve().as_uri())
        self.wait(f"location.protocol === 'file:' && ({until})")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {expression}; errors: {self.errors}")
            time.sleep(0.1)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, keys: Sequence[str]) -> None:
        """Press keys, named as in KeyboardEvent.key."""
        for key in keys:
            code = {
                "Tab": 9,
                "Enter": 13,
                " ": 32,
                "ArrowLeft": 37,
                "ArrowUp": 38,
                "ArrowRight": 39,
                "ArrowDown": 40,
            }
            common = {"key": key, "windowsVirtualKeyCode": code[key]}
            text = {"Enter": "\r", " ": " "}.get(key)
            self._call(
                "Input.dispatchKeyEvent",
                type="keyDown",
                **common,
                **({"text": text} if text else {}),
            )
            self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def move_to(self, x: float, y: float) -> None:
        """Move the mouse."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, clip: tuple[float, float, float, float] | None = None) -> None:
        """Save the whole page, or (x, y, width, height) of it, as PNG."""
        height = self.evaluate("document.documentElement.scrollHeight")
        self._call("Emulation.setDeviceMetricsOverride", **{**self._size, "height": height})
        time.sleep(1)  # charts that follow the window's size draw themselves again
        area = {}
        if clip is not None:
            area["clip"] = dict(zip(("x", "y", "width", "height"), clip, strict=True), scale=1)
        shot = self._call("Page.captureScreenshot", **area)
        path.write_bytes(base64.b64decode(shot["data"]))

    def wait_for_ink(self, element: str, seconds: float = 30) -> None:
        """Wait until an element, given as an expression, shows more than one plain colour."""
        measure = (
            "e => { const b = e.getBoundingClientRect(); return [b.x + scrollX, b.y + scrollY, b.width, b.height]; }"
        )
        deadline = time.monotonic() + seconds
        with tempfile.TemporaryDirectory() as folder:
            while True:
                shot = Path(folder, "shot.png")
                self.screenshot(shot, clip=tuple(self.evaluate(f"({measure})({element})")))
                if shot.stat().st_size > 8000:  # a plain surface of this size compresses to less
                    return
                if time.monotonic() > deadline:
                    raise TimeoutError(f"never drawn: {element}; errors: {self.errors}")

    def pdf(self, path: Path) -> None:
        """Save the page as it prints."""
        printed = self._call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(printed["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._serial += 1
        message: dict[str, Any] = {"id": self._serial, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._serial:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _receive(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], seconds)[0]:
                raise TimeoutError(f"Chromium has been silent for {seconds:.0f} s")
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError("Chromium has closed the pipe")
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(" ".join(str(a.get("value", a)) for a in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("data:", "blob:", "about:")) and params["type"] != "Document":
                    self.requests.append(url)
