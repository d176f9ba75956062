"""Headless Chromium for tests of pages, driven over its DevTools pipe without further packages."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """Chromium over its DevTools pipe: commands are numbered JSON that ends in a zero byte."""

    def __init__(self, program: str, profile: Path) -> None:
        self.program = program
        from_browser, browser_writes = os.pipe()
        browser_reads, to_browser = os.pipe()

        def wire() -> None:  # the browser reads from 3 and writes to 4
            ends = os.dup(browser_reads), os.dup(browser_writes)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=wire, close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(browser_reads)
        os.close(browser_writes)
        self._reader, self._writer = os.fdopen(from_browser, "rb"), os.fdopen(to_browser, "wb")
        self._numbers, self._session = itertools.count(1), ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        self._writer.write(json.dumps(command).encode() + b"\0")
        self._writer.flush()
        watchdog = threading.Timer(60, self.process.kill)  # a read has no time limit of its own
        watchdog.start()
        try:
            while (answer := self._message()).get("id") != number:
                self.events.append(answer)
        finally:
            watchdog.cancel()
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            assert byte, "the browser is gone"
            text += byte
        return json.loads(text)

    def js(self, expression: str) -> Any:
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(
        self,
        address: Path | str,
        *,
        width: int = 1200,
        scheme: str = "light",
        ready: bool = True,
    ) -> None:
        """Opens a file or a URL; with ``ready`` waits until the page marks its body as rendered."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=800, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        url = address if isinstance(address, str) else address.resolve().as_uri()
        self.call("Page.navigate", url=url)
        if not ready:
            return
        self.js(
            "new Promise((done, fail) => { const start = Date.now(); (function look() {"
            " if (document.body?.dataset.rendered) done();"
            " else if (Date.now() - start > 30000) fail(new Error('nothing was rendered'));"
            " else setTimeout(look, 20); })(); })"
        )

    def choose(self, **values: Any) -> None:
        """Chooses in selects by id, one after the other, and waits for the drawing."""
        for name, value in values.items():
            self.js(
                f"new Promise((done) => {{ const before = document.body.dataset.rendered;"
                f" const select = byId({json.dumps(name)});"
                f" select.value = {json.dumps(str(value))};"
                " select.dispatchEvent(new Event('change', { bubbles: true }));"
                " (function look() { if (document.body.dataset.rendered !== before) done();"
                " else setTimeout(look, 10); })(); })"
            )

    def press(self, key: str, code: int, text: str = "") -> None:
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **shared)
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def problems(self) -> list[Any]:
        wrong = ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [e["params"] for e in self.events if e["method"] in wrong]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.close()
        self._writer.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()
