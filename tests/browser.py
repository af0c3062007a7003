"""A headless Chromium, driven through the DevTools protocol over its pipe: no driver, no package, no network."""

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--allow-pre-commit-input", "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows", "--disable-background-networking", "--disable-extensions", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def find_browser() -> str:
    """The path of a Chromium; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is installed")
    return found


class Browser:
    """One process of Chromium. Pages of one `profile` share cookies; those of different ones share nothing."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="browser-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def place_pipes():  # Chromium reads commands from descriptor 3 and answers on 4
            held = os.dup2(to_read, 10), os.dup2(to_write, 11)
            os.dup2(held[0], 3)
            os.dup2(held[1], 4)

        self.process = subprocess.Popen(
            [find_browser(), *FLAGS, f"--user-data-dir={self.folder}", "about:blank"],
            preexec_fn=place_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers, self._answers, self.events = itertools.count(1), {}, []
        self._arrived = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        rest = b""
        while part := os.read(self._read, 1 << 20):
            *whole, rest = (rest + part).split(b"\0")
            with self._arrived:
                for message in map(json.loads, whole):
                    if "id" in message:
                        self._answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self._arrived.notify_all()

    def call(self, method, session=None, /, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        with self._arrived:
            assert self._arrived.wait_for(lambda: number in self._answers, 30), f"{method}: the browser does not answer"
            answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def page(self, *, width=1280, height=900, dark=False):
        """A page with cookies of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        return Page(self, context, width, height, dark)

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._write)
        shutil.rmtree(self.folder, ignore_errors=True)


#: what the browser says of a script on a page that is being left
LEAVING = ("context", "Inspected target navigated or closed")


class Page:
    def __init__(self, browser, context, width, height, dark):
        self.browser, self.context = browser, context
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def resize(self, width, height):
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def script(self, text):
        """The JSON value of a JavaScript expression on the page; a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, text, seconds=20):
        """Until the expression is true. On a page that is being left it may fail, which counts as not yet."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.script(f"(() => {{ try {{ return Boolean({text}); }} catch {{ return false; }} }})()"):
                    return
            except AssertionError as error:
                if not any(word in str(error) for word in LEAVING):
                    raise
            time.sleep(0.03)
        raise AssertionError(
            f"still not true after {seconds} s: {text}\n{self.script('document.body.innerText')[:1500]}"
        )

    def goto(self, url):
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.call("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def click(self, selector):
        """With the mouse, at the middle of the element."""
        found = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        # Input before the page's first frame is dropped, and a frame must show where scrolling ended.
        drawn = "await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));"
        middle = "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2];"
        place = self.script(f"(async () => {{ {found} {drawn} {middle} }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, selector, until):
        """Click until it has taken effect: on a busy machine Chromium drops a click now and then."""
        for _ in range(4):
            self.click(selector)
            try:
                return self.wait(until, seconds=5)
            except AssertionError as error:
                if "still not true" not in str(error):
                    raise
        self.wait(until)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def key(self, key, *, code="", text="", control=False, number=0):
        own = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 2 if control else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **own, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **own)

    def offline(self, offline):
        self.call("Network.enable")
        self.call(
            "Network.emulateNetworkConditions", offline=offline, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )

    def picture(self, path: Path, *, whole=True):
        done = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(done["data"]))

    def complaints(self):
        """What the browser logged as an error: scripts that failed, content that the policy refused."""
        return [
            event["params"]
            for event in self.browser.events
            if event.get("sessionId") == self.session
            and (
                event["method"] == "Runtime.exceptionThrown"
                or (event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
            )
        ]
