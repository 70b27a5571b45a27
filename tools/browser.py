"""A headless browser, driven over its own debugging protocol: what a page looks like once it is laid out.

`python tools/browser.py PAGE PICTURE` takes a picture of the top of a page (`make figures`)."""

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--remote-debugging-port=0"),
)
TROUBLE = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")


class Page:
    "One page of a separate browser; use it in a `with`."

    def __init__(self, profile: Path):  # an empty folder for the browser's own files
        self.profile, self.number, self.trouble = profile, 0, []

    def __enter__(self):
        from websocket import create_connection

        command = [BROWSER, *OPTIONS, f"--user-data-dir={self.profile}", "about:blank"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, **quiet)
        targets = json.load(urllib.request.urlopen(f"http://127.0.0.1:{self._port()}/json", timeout=60))
        page = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
        self.socket = create_connection(page, suppress_origin=True, timeout=60)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def _port(self) -> str:
        "The port of the browser, which writes it into its folder; waits a minute for it."
        address = self.profile / "DevToolsActivePort"
        for _ in range(600):
            if address.is_file() and "\n" in address.read_text():
                break
            if self.process.poll() is not None:
                raise RuntimeError(f"the browser ended at once (status {self.process.returncode})")
            time.sleep(0.1)
        return address.read_text().split()[0]

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    def call(self, method: str, **values) -> dict:
        "One command of the protocol; what goes wrong on the page meanwhile is kept in `trouble`."
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": values}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") in TROUBLE:
                self.trouble.append(message)
            if message.get("method") == "Page.loadEventFired":
                self.loaded = True
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def open(self, file: Path | str, width: int, height: int = 900, dark: bool = False):
        "Lay a file, or the page at an address, out at a width in CSS pixels."
        self.loaded, self.trouble = False, []
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file if isinstance(file, str) else file.resolve().as_uri())
        for _ in range(600):
            if self.loaded:
                return
            self.evaluate("1")
            time.sleep(0.05)
        raise TimeoutError(f"{file} did not load")

    def evaluate(self, script: str):
        "The value of an expression on the page."
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, file: Path) -> Path:
        "What is in view, as PNG."
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return file


if __name__ == "__main__":
    from PIL import Image

    if BROWSER is None:
        sys.exit("no browser on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile, Page(Path(profile)) as browser:
        browser.open(Path(sys.argv[1]), 1280, 1500)
        picture = browser.screenshot(Path(sys.argv[2]))
    # small enough to keep in git
    Image.open(picture).convert("RGB").resize((960, 1125), Image.LANCZOS).quantize(
        128, Image.Quantize.MAXCOVERAGE
    ).save(picture, optimize=True)
