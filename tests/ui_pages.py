"""What is wrong with a page of the UI, as far as a program can see it, and how its forms are filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from browser import Browser
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

RUBBISH = re.compile(r"\bNaN\b|\[object Object\]|Invalid Date|\$ref|anyOf|allOf|oneOf|additionalProperties")
"""What programs write where people want words."""
RAW_MARKDOWN = re.compile(r"^\s*#{1,6} |\*\*\w|\w\]\(|^\|.*\|$|!\[|<br>|&[a-z]+;|^```", re.MULTILINE)
NOTHING = ("undefined", "null", "NaN")
"""Whole texts of a cell or line; in sentences the words mean something."""
ICONS = ("/favicon.ico", "/ico/")
"""Missing in Prefect 3.8.8 itself."""
SETTLED = """
return [...document.images].every(image => image.complete)
    && !document.querySelector('.p-loading-icon, .schema-form-property__loading')
"""
BROKEN = "return [...document.images].filter(i => i.src && !(i.naturalWidth > 0)).map(i => i.alt || i.src.slice(0, 80))"
CUT = """
return [...document.querySelectorAll('.artifact-data-view .p-table')]
    .map(table => table.scrollWidth - table.clientWidth).filter(hidden => hidden > 1)
"""


def problems_of(browser: Browser, *, markdown: bool = True) -> list[str]:
    """Return what is wrong with the page that is open: rubbish, Markdown that was not rendered, broken pictures."""
    browser.wait_until(lambda driver: driver.execute_script(SETTLED), "a settled page")
    text = browser.text()
    found = [f"rubbish: {part}" for part in RUBBISH.findall(text)]
    found += [f"nothing: {line}" for line in text.splitlines() if line.strip() in NOTHING]
    found += [f"raw Markdown: {part.strip()}" for part in RAW_MARKDOWN.findall(text) if markdown]
    found += [f"broken picture: {name}" for name in browser.driver.execute_script(BROKEN)]
    return found + console_errors(browser)


def console_errors(browser: Browser) -> list[str]:
    """Return what scripts of the page complained of since it was opened, or since the last call."""
    entries = [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    return [f"console: {one['message']}" for one in entries if not any(icon in one["message"] for icon in ICONS)]


def hidden_px(browser: Browser) -> int:
    """Return by how many pixels the widest table of an artifact is wider than the page."""
    return max(browser.driver.execute_script(CUT), default=0)


def told_fields(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield title and description of what a form shows when it is opened: nested models too, closed lists not."""
    models = schema["definitions"]

    def inside(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for field in model.get("properties", {}).values():
            lent = models[field["$ref"].rsplit("/", 1)[-1]] if "$ref" in field else {}
            told = {**lent, **field}
            yield told["title"], told.get("description", "")
            if lent.get("type") == "object":
                yield from inside(lent)

    for parameter in schema["properties"].values():
        if "$ref" in parameter:
            yield from inside(models[parameter["$ref"].rsplit("/", 1)[-1]])


def painted(description: str) -> str:
    """Return a description in Markdown as the words that are seen."""
    text = re.sub(r"^- ", "", description.replace("`", ""), flags=re.MULTILINE)
    return " ".join(text.split())


def field(browser: Browser, title: str) -> WebElement:
    """Return what surrounds a field of a form, by its title."""
    label = f"//span[contains(@class, 'schema-form-property__label') and starts-with(normalize-space(), {title!r})]"
    place = f"({label}/ancestor::div[contains(concat(' ', @class, ' '), ' schema-form-property ')][1])[last()]"
    found: WebElement = browser.wait_until(lambda driver: driver.find_element(By.XPATH, place), f"the field {title}")
    return found


def fill(browser: Browser, title: str, value: str) -> None:
    """Write a value into a field: the first box of text, of a number or of JSON."""
    box = field(browser, title).find_element(By.CSS_SELECTOR, "input, textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(value)


def choose(browser: Browser, title: str, choice: str) -> None:
    """Take one of the choices of a field."""
    Select(field(browser, title).find_element(By.TAG_NAME, "select")).select_by_visible_text(choice)
