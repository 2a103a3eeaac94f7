"""A headless browser through chromedriver's HTTP interface, where the machine has both."""

import base64
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx

DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver's standard has an element's id."""


class Browser:
    """One window."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client, self._session = client, session

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        url = f"/session/{self._session}/{path}"
        answer = self._client.request(method, url, json=body if method == "POST" else None)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self.ask("POST", "url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns."""
        return self.ask("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def wait_for(self, script: str, seconds: float = 30) -> Any:
        """The first true value of an expression."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"return {script}"):
                return value
            time.sleep(0.05)
        raise AssertionError(
            f"{script} did not come true: {self.run('return document.body.innerText')}"
        )

    def type_into(self, selector: str, text: str) -> None:
        found = self.ask("POST", "element", {"using": "css selector", "value": selector})
        self.ask("POST", f"element/{found[ELEMENT]}/value", {"text": text})

    def picture(self) -> bytes:
        return base64.b64decode(self.ask("GET", "screenshot"))


@contextlib.contextmanager
def browser(width: int = 1200, height: int = 800) -> Iterator[Browser]:
    """A window of that size; ended afterwards."""
    assert DRIVER is not None
    driver = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        line = next(x for x in driver.stdout if "started successfully on port" in x)
        port = int(line.rstrip().rstrip(".").rsplit(" ", 1)[1])
        options = {
            "binary": BROWSER,
            "args": [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",  # containers have little of it
                f"--window-size={width},{height}",
            ],
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            made = client.post("/session", json=wanted).json()["value"]
            assert "sessionId" in made, made
            window = Browser(client, made["sessionId"])
            yield window
            client.delete(f"/session/{made['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(10)
