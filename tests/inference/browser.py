"""A headless Chromium, driven through chromedriver's WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of an element's number
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1300,1800"]  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition, what: str, seconds: float = 60):
    """The first true result of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds} s for {what}")


class Browser:
    def __init__(self, session: str):
        self.session = session

    def call(self, method: str, path: str, **content):
        data = json.dumps(content).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self.session}{path}", data, {"Content-Type": "application/json"})
        request.method = method
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address: str):
        self.call("POST", "/url", url=address)

    def find(self, css: str) -> str:
        """The number of the first element that there is; waits for it."""
        found = wait_for(lambda: self.call("POST", "/elements", using="css selector", value=css), css)
        return found[0][ELEMENT]

    def type(self, css: str, text: str):
        """Into a field; into one of files, their paths."""
        self.call("POST", f"/element/{self.find(css)}/value", text=text)

    def click(self, css: str):
        self.call("POST", f"/element/{self.find(css)}/click")

    def run(self, script: str):
        return self.call("POST", "/execute/sync", script=script, args=[])

    def text(self, css: str) -> str:
        """What all such elements show, "" where there is none."""
        return self.run(f"return [...document.querySelectorAll({css!r})].map(e => e.innerText).join('\\n')")


@contextmanager
def open_browser(profile):
    """`profile`: an empty folder."""
    port = free_port()
    driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        root = Browser(f"http://127.0.0.1:{port}")
        wait_for(lambda: _ready(root), "chromedriver")
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        number = root.call("POST", "/session", capabilities=wanted)["sessionId"]
        browser = Browser(f"{root.session}/session/{number}")
        try:
            yield browser
        finally:
            browser.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()


def _ready(root: Browser) -> bool:
    try:
        return root.call("GET", "/status")["ready"]
    except OSError:
        return False
