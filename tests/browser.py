"""A headless Chromium on the real Prefect UI, with Debian's binaries only: nothing is downloaded."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = Path("/usr/bin/chromium")
CHROMEDRIVER = Path("/usr/bin/chromedriver")
MISSING = "needs Chromium; install it with: apt-get install chromium chromium-driver"
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)
WIDTH, HEIGHT = 1440, 1000
WAIT_S = 60.0
PICTURE_WIDTH, PICTURE_COLOURS = 1080, 96
"""Of the screenshots for the documentation."""


def available() -> bool:
    """Say whether both binaries are there."""
    return CHROMIUM.exists() and CHROMEDRIVER.exists()


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with a new profile in an empty folder, and end it."""
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for switch in (*SWITCHES, f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={profile}"):
        options.add_argument(switch)
    driver = Chrome(options=options, service=Service(str(CHROMEDRIVER), log_output=str(profile / "driver.log")))
    try:
        driver.set_page_load_timeout(WAIT_S)
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """What a person does with the UI: open a page, read it, click, look at pictures."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Load a page; what it shows comes later, see `wait_for`. The log of the console begins anew."""
        self.driver.get_log("browser")
        self.driver.get(url)

    def text(self) -> str:
        """Return the visible text of the page."""
        try:
            return self.driver.find_element(By.TAG_NAME, "body").text
        except StaleElementReferenceException:
            return ""

    def wait_for(self, *texts: str, case: bool = True) -> str:
        """Wait until the page shows all texts and return the whole visible text."""

        def found(_: Any) -> str | None:
            seen = self.text() if case else self.text().lower()
            return seen if all(text in seen for text in texts) else None

        return self.wait_until(found, f"the texts {texts} on {self.driver.current_url}")

    def click(self, text: str) -> None:
        """Click the link or the button that reads exactly so."""
        quoted = f"normalize-space()={text!r}"
        self.click_on(f"//a[{quoted}] | //button[{quoted}]", f"a link or button {text!r}")

    def follow(self, path: str) -> None:
        """Click the link to a path of this site, e.g. `/artifacts/key/qc`."""
        self.click_on(f"//a[@href={path!r}]", f"a link to {path}")

    def click_on(self, xpath: str, what: str) -> None:
        """Click the first thing shown that an XPath finds; `what` names it for people."""

        def clicked(_: Any) -> bool:
            shown = [element for element in self.driver.find_elements(By.XPATH, xpath) if element.is_displayed()]
            if shown:
                shown[0].click()
            return bool(shown)

        self.wait_until(clicked, f"{what} on {self.driver.current_url}")

    def pictures(self, alt: str) -> list[WebElement]:
        """Wait until every picture whose alternative text holds `alt` is painted (natural width), and return them."""

        def painted(_: Any) -> list[WebElement] | None:
            found = [
                image
                for image in self.driver.find_elements(By.TAG_NAME, "img")
                if alt in (image.get_attribute("alt") or "")
            ]
            whole = "return arguments[0].complete && arguments[0].naturalWidth > 0 && arguments[0].clientWidth > 0"
            return found if found and all(self.driver.execute_script(whole, image) for image in found) else None

        return self.wait_until(painted, f"painted pictures {alt!r} on {self.driver.current_url}")

    def scroll_to(self, element: WebElement) -> None:
        """Bring something into the middle of the window."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)

    def screenshot(self, name: str) -> None:
        """Write `<BRAINLOOM_SCREENSHOTS>/ui-<name>.png`, small, when that variable names a folder."""
        folder = os.environ.get("BRAINLOOM_SCREENSHOTS")
        if not folder:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(self.driver.get_screenshot_as_png())) as image:
            small = image.convert("RGB").resize((PICTURE_WIDTH, image.height * PICTURE_WIDTH // image.width))
            few = small.quantize(PICTURE_COLOURS, dither=Image.Dither.NONE)
            few.save(Path(folder) / f"ui-{name}.png", optimize=True)

    def wait_until(self, condition: Any, what: str) -> Any:
        """Wait for a condition on the driver and return what it gives; AssertionError tells what the page shows."""
        try:
            return WebDriverWait(
                self.driver, WAIT_S, ignored_exceptions=[StaleElementReferenceException, NoSuchElementException]
            ).until(condition)
        except Exception as error:
            shown = "\n".join(self.text().splitlines()[:60])
            raise AssertionError(f"{what} did not appear within {WAIT_S:g} s; the page shows:\n{shown}") from error
