"""The demo as its visitors meet it: a server started as a Space starts it, and a headless Chromium."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


APP = Path(__file__).parents[2] / "src" / "transdiff_pipelines" / "demo" / "app.py"
PATIENCE = 240  # seconds: a busy machine is slow, and a wait ends as soon as there is what it waits for

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def serve(folder: Path, model: str | None = None) -> Iterator[tuple[str, Path]]:
    """Address and log of a server that runs a copy of the demo's file in an otherwise empty folder.

    Args:
        model: what the Space's variable names; None leaves it unset, for the demo's default.
    """
    app, log = shutil.copy(APP, folder / "app.py"), folder / "server.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "cache")}
    environment.pop("TRANSDIFF_MODEL", None)
    if model is not None:
        environment["TRANSDIFF_MODEL"] = model
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, app], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}", log
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urlopen(address, timeout=30).close()
            return
        except (URLError, TimeoutError):
            time.sleep(0.3)
    raise RuntimeError(f"the demo does not answer:\n{log.read_text(errors='replace')[-3000:]}")


class Visitor:
    """A browser on the demo's page, with a profile of its own."""

    def __init__(self, address: str, profile: Path, width: int = 1280, height: int = 900):
        options = webdriver.ChromeOptions()
        options.binary_location = _program("chromium")
        for flag in [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(_program("chromedriver")))
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self.driver.get(address)
        self.wait(lambda: self.find("#draw") and "transdiff generate" in self.text("#recipe"))

    def wait(self, condition):
        """What `condition` returns, once that is something."""
        return WebDriverWait(self.driver, PATIENCE, ignored_exceptions=[Exception]).until(lambda _: condition())

    def find(self, selector: str):
        """All elements of a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.find(selector))

    def choose(self, name: str) -> None:
        """One of the modes."""
        label = next(label for label in self.find("#mode label") if label.text.strip() == name)
        label.click()

    def number(self, element: str, value: float) -> None:
        """Type a number into a control."""
        field = self.find(f"{element} input[type=number]")[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def pick(self, element: str, text: str) -> None:
        """Search a dropdown and take what is found."""
        field = self.find(f"{element} input")[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
        self.wait(lambda: self.find(f"{element} ul li, ul.options li"))
        field.send_keys(Keys.ENTER)

    def click(self, element: str) -> None:
        button = self.find(element)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def start(self) -> None:
        """Press the button; what is there of the run before does not count as this one's end."""
        self.driver.execute_script("document.querySelector('#sequence [role=status]').textContent = ''")
        self.click("#draw")

    def finish(self) -> list[Image.Image]:
        """The finished images, as a visitor downloads them."""
        self.wait(lambda: self.text("#sequence [role=status]") == "Done.")
        links = [link.get_attribute("href") for link in self.find("#sequence a[download]")]
        return [Image.open(io.BytesIO(base64.b64decode(link.partition("base64,")[2]))) for link in links]

    def draw(self) -> list[Image.Image]:
        self.start()
        return self.finish()

    def message(self) -> str:
        """The text of the error that pops up."""
        return self.wait(lambda: self.text("[data-testid=toast-body]"))

    def hosts(self) -> set[str]:
        """Every host that the page has asked for something."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        return {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}

    def leave(self) -> None:
        self.driver.quit()


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed; on Debian: apt-get install chromium chromium-driver")
    return found
