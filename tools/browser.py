"""A headless Chromium, driven over its debugging protocol, to test pages as a reader uses them."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds for a browser to start, or a page to become ready


def program() -> str | None:
    """The path of the browser, or None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


Point = tuple[float, float]


def between(a: Point, b: Point) -> list[Point]:
    """Three points on the way from a to b, the last of which is b."""
    return [(a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1])) for s in (0.2, 0.6, 1.0)]


class Page:
    """One page. Points are in CSS pixels of the window; errors of its scripts are collected."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self.number = 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result. Raises RuntimeError if it fails."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"])[:500])
            if answer.get("id") == self.number:
                break
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def run(self, script: str) -> Any:
        """The value of an expression, or of its promise. Raises RuntimeError if it throws."""
        found = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until the expression is true. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE
        while not self.run(script):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {PATIENCE:.0f} s: {script}")
            time.sleep(0.05)

    def open(self, address: str, width: int, height: int, *, dark: bool = False) -> None:
        """Load a page in a window of this size. dark: for a reader who prefers a dark theme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        value = "dark" if dark else "light"
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": value}],
        )
        self.send("Page.navigate", url=address)
        self.wait(f"location.href === {address!r} && document.readyState === 'complete'")

    def centre(self, selector: str) -> Point:
        """The centre of the first element that matches the selector, scrolled into view."""
        script = f"""(() => {{
            const node = document.querySelector({selector!r});
            node.scrollIntoView({{block: "nearest"}});
            const r = node.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2];
        }})()"""
        x, y = self.run(script)
        return x, y

    def mouse(self, kind: str, at: Point) -> None:
        pressed = 0 if kind == "mouseReleased" else 1
        self.send(
            "Input.dispatchMouseEvent",
            type=kind,
            x=at[0],
            y=at[1],
            button="left",
            buttons=pressed,
            clickCount=1,
        )

    def drag(self, start: str, target: str) -> None:
        """Drag the element of the first selector, and drop it on that of the second."""
        a, b = self.centre(start), self.centre(target)
        self.mouse("mousePressed", a)
        for point in between(a, b):
            self.mouse("mouseMoved", point)
        self.mouse("mouseReleased", b)

    def touch(self, start: str, target: str) -> None:
        """Like `drag`, with a finger."""
        a, b = self.centre(start), self.centre(target)

        def send(kind: str, *points: Point) -> None:
            where = [{"x": x, "y": y} for x, y in points]
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=where)

        send("touchStart", a)
        for point in between(a, b):
            send("touchMove", point)
        send("touchEnd")

    def key(self, name: str) -> None:
        """Press and release a key, by its name in JavaScript."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38}
        codes |= {"ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}
        more = {"text": "\r"} if name == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=codes[name],
                **more,
            )
            more = {}


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start a browser with one empty page, whose profile is in `folder`."""
    path = program()
    if path is None:
        raise FileNotFoundError(f"no browser: none of {', '.join(NAMES)}")
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    arguments += [f"--user-data-dir={folder}", "--no-first-run", "about:blank"]
    process = subprocess.Popen(
        [path, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        page = Page(_address(folder, process))
        with contextlib.closing(page.socket):
            yield page
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """The address of the debugging socket of the browser's first page."""
    from urllib.request import urlopen

    said, end = folder / "DevToolsActivePort", time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if said.exists() and (lines := said.read_text().split()):
            with urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=PATIENCE) as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise TimeoutError(f"{process.args!r} did not open its debugging port")
