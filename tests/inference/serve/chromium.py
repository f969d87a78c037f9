"""A headless Chromium, controlled with the DevTools protocol."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0"),
]


class Page:
    """One tab."""

    def __init__(self, line: Any) -> None:
        self._line, self._id = line, 0
        self.complaints: list[str] = []  # errors of the console and violations of the content policy
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        self._line.send(json.dumps({"id": self._id, "method": method, "params": params}))
        while True:
            message = json.loads(self._line.recv(timeout=30))
            if message.get("id") == self._id:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never: {script}; {self.complaints}; {self.run('document.body.innerText')}"
            time.sleep(0.02)

    def screenshot(self, path: Path, *, width: int = 1200, height: int = 760, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        path.write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def open_page(url: str) -> Iterator[Page]:
    """A tab with the address; skips the test without Chromium."""
    client = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("there is no Chromium here")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        errors = Path(folder, "stderr")
        with errors.open("wb") as sink:
            process = subprocess.Popen([binary, *FLAGS, f"--user-data-dir={folder}/profile", "about:blank"], stdout=sink, stderr=sink)
        try:
            port = _port(errors, process)
            target = httpx.put(f"http://127.0.0.1:{port}/json/new?about:blank", timeout=20).json()
            with client.connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as line:
                page = Page(line)
                page.call("Page.navigate", url=url)
                page.wait("location.protocol === 'http:' && document.readyState === 'complete'")
                yield page
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, 9)
                process.wait()


def _port(errors: Path, process: subprocess.Popen[bytes], seconds: float = 40) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(rb"DevTools listening on ws://127\.0\.0\.1:(\d+)/", errors.read_bytes()):
            return int(found[1])
        time.sleep(0.05)
    raise AssertionError(f"Chromium does not start: {errors.read_text(errors='replace')[-500:]}")
