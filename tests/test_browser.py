"""What people see: the real UI of the tiny demo in headless Chromium.

`BRAINLOOM_SCREENSHOTS=docs/images pytest -m browser` renews the pictures of the documentation: docs/images/ui-*.png.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import MISSING, Browser, available, open_browser
from demo_runs import DemoRun

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not available(), reason=MISSING),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def open_artifact(browser: Browser, demo: DemoRun, key: str) -> None:
    """Go from the list of artifacts to the newest one of a key, as people do."""
    browser.open(f"{demo.ui_url}/artifacts")
    browser.wait_for("Artifacts", key)
    browser.follow(f"/artifacts/key/{key}")
    newest = demo.artifacts()[key]["latest_id"]
    browser.follow(f"/artifacts/artifact/{newest}")
    browser.wait_for(newest, "Flow Run")


def test_a_flow_run_is_found_by_its_name(browser: Browser, tiny_demo: DemoRun) -> None:
    browser.open(f"{tiny_demo.ui_url}/runs")
    browser.wait_for("benchmark tiny", "pretrain brainmvp_tiny on store.zarr", "Completed")
    browser.click("benchmark tiny")
    shown = browser.wait_for("benchmark tiny", "Completed", "Subflow Runs", "Artifacts")
    assert "/flow-run/" in browser.driver.current_url
    assert "Not found" not in shown
    browser.screenshot("flow-run")


def test_the_qc_page_shows_painted_mosaics(browser: Browser, tiny_demo: DemoRun) -> None:
    open_artifact(browser, tiny_demo, "qc")
    browser.wait_for("Quality of store.zarr", "phantom-16k", "phantom-bids", "Cases that stand out")
    pictures = browser.pictures("phantom-")
    assert len(pictures) == 6
    assert min(picture.size["width"] for picture in pictures) > 500, "too small to judge a scan"
    browser.screenshot("qc")


def test_the_quarantine_table_names_file_and_reason(browser: Browser, tiny_demo: DemoRun) -> None:
    open_artifact(browser, tiny_demo, "quarantine")
    shown = browser.wait_for("5 Items", "sub-9001_T2w.nii.gz", "unreadable", "not finite", "missing file")
    assert "label shape mismatch" in shown
    browser.screenshot("quarantine")


def test_the_benchmark_page_shows_table_and_pictures(browser: Browser, tiny_demo: DemoRun) -> None:
    open_artifact(browser, tiny_demo, "benchmark-phantom-tumour")
    shown = browser.wait_for("Phantom tumour", "pre-trained", "scratch", "template overlap")
    assert "95 % BCa bootstrap over subjects" in shown
    assert browser.pictures("phantom-tumour")
    browser.screenshot("table")


def test_the_scores_page_has_the_rows(browser: Browser, tiny_demo: DemoRun) -> None:
    open_artifact(browser, tiny_demo, "scores-phantom-control")
    browser.wait_for("5 Items", "pre-trained", "scratch", "majority", "age+sex+volume", "ceiling (true latents)")


@pytest.mark.parametrize("what", ["losses", "reconstruction", "templates"])
def test_the_pages_of_a_training_show_painted_pictures(browser: Browser, tiny_demo: DemoRun, what: str) -> None:
    open_artifact(browser, tiny_demo, f"{what}-brainmvp-tiny")
    assert browser.pictures(f"{what} of brainmvp_tiny")
    if what == "reconstruction":
        browser.screenshot(what)
