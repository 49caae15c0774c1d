"""What people see of every flow: forms, runs, artifacts, cancel and resume in headless Chromium, on a real server.

`BRAINLOOM_SCREENSHOTS=docs/images` leaves the pictures of the documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_states import ask, last_runs, start_deployment, wait_for_state
from browser import MISSING, Browser, available, open_browser
from demo_runs import DemoRun
from deployed import GONE_WITHIN_S, deployed, processes_of, worker_log
from nifti_files import write_case
from prefect_connection import connected
from selenium.webdriver.common.by import By
from ui_pages import choose, field, fill, hidden_px, painted, problems_of, told_fields
from waiting import until

from infra.automations import FAILURES, PROPOSALS, ZOMBIES
from infra.server import ServerInfo
from infra.settings import Settings

pytestmark = [
    pytest.mark.full,
    pytest.mark.browser,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not available(), reason=MISSING),
]
ROOT = Path(__file__).resolve().parents[1]
DEPLOYMENTS = {one["name"]: one for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
SHOWN = 10
"""Deployments of a page of their list."""
HIDDEN_MAX_PX = 260
"""Of a table in Markdown in a window of 1440 pixels: at 1700 all of it is seen."""

KEYS = {
    *("catalog", "catalog-left-out", "qc", "quarantine", "duplicates", "progress-preprocess", "proposal", "verify"),
    *("losses", "reconstruction", "templates", "validation", "benchmark", "scores", "retention"),
}
"""Artifacts that must be there, by the start of their keys."""
PICTURES = {"benchmark-blobs-ad": "probe", "benchmark-toy-diagnosis": "prompt"}
RUNS = {
    "phantom": r"phantom 16 \+ 6 subjects",
    "catalog": r"catalog \S+",
    "preprocess": r"preprocess toy into store\.zarr",
    "ingest": r"ingest into store\.zarr",
    "pretrain": r"pretrain \S+ on store\.zarr",
    "evaluate": r"evaluate brainmvp_tiny on phantom-tumour, phantom-control",
    "benchmark": r"benchmark tiny",
    "probe": r"probe AnatCL on blobs-ad, openbhb-age",
    "prompt": r"prompt CINP on toy-diagnosis, cinp-abide",
    "verify": r"verify store\.zarr",
    "retention": r"retention\b.*",
    "propose-pretraining": r"proposal brainmvp_tiny-[0-9a-f]{8}",
}
"""Names of the newest flow runs, by flow."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tiny_demo: DemoRun) -> Path:
    """Return the folder in which flow runs start; the demo's workspace and state are in it."""
    return tiny_demo.state_dir.parent


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[ServerInfo]:
    """Return the server of the finished tiny demo, now with deployments, automations and workers."""
    with deployed(folder, BRAINLOOM_GPU_POOL="brainloom-gpu") as info:
        yield info


@pytest.fixture(scope="module")
def tree(folder: Path) -> Path:
    """Return a BIDS tree of two subjects."""
    for number in range(2):
        subject = f"sub-{number + 1:02d}"
        anat = folder / "bids" / subject / "anat"
        for modality, path in write_case(anat, subject, number).items():
            path.rename(anat / f"{subject}_{'T1w' if modality == 't1' else 'T2w'}.nii.gz")
    return folder / "bids"


@pytest.fixture(scope="module")
def compared(site: ServerInfo, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run probe, prompt, verify and retention on the server of the demo, on the smallest stores that they work with."""
    with pytest.MonkeyPatch.context() as patch, connected(Settings(state_dir=folder / "state")):
        _probe(tmp_path_factory.mktemp("probing"), patch)
        _prompt(tmp_path_factory.mktemp("prompting"), patch)
        _check_and_tidy(folder)


def _probe(workspace: Path, patch: pytest.MonkeyPatch) -> None:
    from probe_phantoms import AD, write_encoder, write_workspace

    from flows.probe import ProbeParams, probe
    from tasks.probe_tasks import PROBES

    write_workspace(workspace)
    for number, name in enumerate(("one", "two")):
        write_encoder(workspace / "trainings" / name, number)
    patch.setitem(PROBES, AD.name, AD)
    patch.setattr("tasks.probes.GRID", (1.0,))
    patch.setattr("tasks.probes.INNER_FOLDS", 2)
    rows: list[Any] = [{"name": "AnatCL", "trainings": ["one"]}, {"name": "another seed", "trainings": ["two"]}]
    benchmarks = [AD.name, "openbhb-age"]
    probe(ProbeParams(workspace=str(workspace), rows=rows, benchmarks=benchmarks, folds=3, random_seeds=1))


def _prompt(workspace: Path, patch: pytest.MonkeyPatch) -> None:
    from prompt_phantoms import TOY, write_pair, write_workspace

    from flows.prompt import PromptParams, prompt
    from tasks.prompt_tasks import PROMPT_TASKS

    selection = write_workspace(workspace)
    write_pair(workspace / "trainings" / "one", 0, selection)
    patch.setitem(PROMPT_TASKS, TOY.name, TOY)
    patch.setattr("tasks.connectome_baselines.GRID", (1.0,))
    patch.setattr("tasks.connectome_baselines.INNER_FOLDS", 2)
    rows: list[Any] = [{"name": "CINP", "trainings": ["one"]}]
    few: dict[str, Any] = {"folds": 3, "network_epochs": 0, "shares": [1.0, 0.5], "draws": 2, "variants": ["mean"]}
    prompt(PromptParams(workspace=str(workspace), rows=rows, benchmarks=[TOY.name, "cinp-abide"], **few))


def _check_and_tidy(folder: Path) -> None:
    from flows.retention import RetentionParams, retention
    from flows.verify import VerifyParams, verify

    verify(VerifyParams(stores=[str(folder / "ws/store.zarr")]))
    retention(RetentionParams(workspaces=[str(folder / "ws")]))


def open_form(browser: Browser, site: ServerInfo, name: str) -> dict[str, Any]:
    """Open the form of a deployment and return the deployment."""
    flow = DEPLOYMENTS[name]["entrypoint"].rsplit(".", 1)[-1].replace("_", "-")
    found = dict(ask(site.api_url, f"deployments/name/{flow}/{name}"))
    browser.open(f"{site.ui_url}/deployments/deployment/{found['id']}/run")
    browser.wait_for("Run Name", "Validate parameters", "Submit")
    return found


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_form_of_a_deployment_is_told_in_words(browser: Browser, site: ServerInfo, name: str) -> None:
    fields = list(told_fields(open_form(browser, site, name)["parameter_openapi_schema"]))
    assert fields
    browser.wait_for(*(title for title, _ in fields))
    seen = " ".join(browser.text().split())
    assert [title for title, description in fields if painted(description) not in seen] == []
    assert "is a required property" not in seen, "nobody has submitted it yet"
    assert problems_of(browser) == []


@pytest.fixture(scope="module")
def ingested(browser: Browser, site: ServerInfo, tree: Path) -> dict[str, Any]:
    """Fill in and submit the form of the nightly ingest; return its flow run when it has ended."""
    open_form(browser, site, "nightly-ingest")
    fill(browser, "Sources", f'{{"kind": "bids", "dataset": "toy", "root": "{tree}"}}')
    fill(browser, "Workspace", "./new")
    fill(browser, "Catalog", "./new/catalog.parquet")
    fill(browser, "Store", "./new/store.zarr")
    choose(browser, "Preprocessing spec", "demo")
    fill(browser, "Case batch", "4")
    browser.scroll_to(field(browser, "Sources"))
    browser.screenshot("form")
    browser.click("Submit")
    browser.wait_for("scheduled to start now")
    (run,) = [one for one in last_runs(site.api_url, "ingest") if not one["auto_scheduled"]]
    wait_for_state(site.api_url, run["id"], "Completed")
    return dict(ask(site.api_url, f"flow_runs/{run['id']}"))


@pytest.fixture(scope="module")
def proposal(site: ServerInfo, ingested: dict[str, Any]) -> dict[str, Any]:
    """Return the proposal that the ingest led to, when it waits for a person and has no process any more."""
    (run,) = until(lambda: last_runs(site.api_url, "propose-pretraining"), "a proposal", poll_s=0.5)
    wait_for_state(site.api_url, run["id"], "Suspended")
    until(lambda: not processes_of(run["id"]), "its process has gone", poll_s=0.5)
    return dict(ask(site.api_url, f"flow_runs/{run['id']}"))


def test_an_ingest_runs_with_what_its_form_said(ingested: dict[str, Any]) -> None:
    assert (ingested["name"], ingested["state_name"]) == ("ingest into store.zarr", "Completed")
    given = ingested["parameters"]["params"]
    assert (given["preprocess"]["spec"], given["preprocess"]["case_batch"]) == ("demo", 4)
    (source,) = given["catalog"]["sources"]
    assert (source["kind"], source["dataset"]) == ("bids", "toy")


def test_a_value_out_of_bounds_is_refused_in_the_page(browser: Browser, site: ServerInfo) -> None:
    open_form(browser, site, "preprocess")
    fill(browser, "Catalog", "./catalog.parquet")
    fill(browser, "Store", "./store.zarr")
    fill(browser, "Case batch", "5000")
    browser.click("Submit")
    browser.wait_for("'params.case_batch'. Failure reason: 5000 is greater than the maximum of 1024")


def test_what_is_missing_is_said_beside_its_field(browser: Browser, site: ServerInfo) -> None:
    open_form(browser, site, "probe")
    browser.click("Submit")
    browser.wait_for("'rows' is a required property")


def test_an_added_source_begins_as_an_example_and_an_unknown_kind_is_refused(
    browser: Browser, site: ServerInfo
) -> None:
    open_form(browser, site, "catalog")
    browser.click("Add item")
    browser.wait_for('"kind": "bids"', '"root": "./sources/ixi"')
    fill(browser, "Sources", '{"kind": "bidz", "dataset": "ixi", "root": "./x"}')
    browser.click("Submit")
    browser.wait_for("'kind': 'bidz', 'dataset': 'ixi', 'root': './x'} is not valid under any of the given schemas")


def test_a_proposal_is_declined_by_its_form(browser: Browser, site: ServerInfo, proposal: dict[str, Any]) -> None:
    browser.open(f"{site.ui_url}/runs/flow-run/{proposal['id']}")
    browser.wait_for("Suspended", "proposal brainmvp_tiny-")
    browser.click("Resume")
    browser.wait_for("2 cases are new or changed", "approve starts the pre-training; decline ends the proposal.")
    browser.screenshot("approve")
    assert problems_of(browser) == []
    choose(browser, "Decision", "decline")
    submit = "//div[contains(@class, 'p-modal')]//button[normalize-space()='Submit']"
    browser.click_on(submit, "the button Submit of the form")
    state = wait_for_state(site.api_url, proposal["id"], "Declined")
    assert "was declined" in state["message"]


def test_a_running_training_is_cancelled_by_its_button(browser: Browser, site: ServerInfo, folder: Path) -> None:
    params = {"workspace": str(folder / "ws"), "name": "long", "epochs": 100_000}
    run = start_deployment(site.api_url, "pretrain/pretrain", params)
    until(lambda: steps_of(folder / "ws/trainings/long"), lambda: f"a step:\n{worker_log(folder)}", poll_s=0.5)
    browser.open(f"{site.ui_url}/runs/flow-run/{run}")
    browser.wait_for("pretrain long on store.zarr", "Running")
    open_tab(browser, "Artifacts")
    browser.wait_for("progress-pretrain")
    browser.scroll_to(browser.driver.find_element(By.CLASS_NAME, "artifact-card"))
    browser.screenshot("running")
    browser.click("Cancel")
    browser.wait_for("This will put flow run pretrain long on store.zarr into a")
    browser.screenshot("cancel")
    browser.click("Confirm")
    wait_for_state(site.api_url, run, "Cancelled")
    until(lambda: not processes_of(run), "no rank is left", GONE_WITHIN_S, poll_s=0.5)
    browser.wait_for("Cancelled")


def steps_of(training: Path) -> int:
    metrics = training / "metrics.jsonl"
    return metrics.read_text().count('"train"') if metrics.exists() else 0


def open_tab(browser: Browser, name: str) -> None:
    browser.click_on(f"//*[contains(@class, 'p-tab')][normalize-space()={name!r}]", f"the tab {name}")


def test_no_artifact_is_empty_broken_or_unreadable(
    browser: Browser, site: ServerInfo, tiny_demo: DemoRun, ingested: Any, proposal: Any, compared: None
) -> None:
    found = tiny_demo.artifacts()
    assert {re.split(r"-(phantom|brainmvp|toy|blobs|openbhb|cinp)", key)[0] for key in found} >= KEYS
    problems: dict[str, list[str]] = {}
    for key, artifact in found.items():
        browser.open(f"{site.ui_url}/artifacts/artifact/{artifact['latest_id']}")
        browser.wait_for(artifact["latest_id"], "Created", "Show raw data")
        shown = browser.wait_until(lambda driver: driver.find_element(By.CLASS_NAME, "artifact-data-view").text, key)
        wrong = problems_of(browser)
        told = len(shown) > 20 or artifact["type"] == "progress" or artifact["description"].endswith(": none")
        wrong += [] if told else [f"nearly empty: {shown!r}"]
        wrong += [] if artifact["description"] else ["no description"]
        hidden = hidden_px(browser) if artifact["type"] == "markdown" else 0
        wrong += [f"{hidden} px of a table hidden"] if hidden > HIDDEN_MAX_PX else []
        problems |= {key: wrong} if wrong else {}
        if picture := PICTURES.get(key):
            browser.screenshot(picture)
    assert problems == {}


def test_the_newest_run_of_every_flow_has_a_telling_name_and_a_sound_page(
    browser: Browser, site: ServerInfo, ingested: Any, proposal: Any, compared: None
) -> None:
    problems: dict[str, list[str]] = {}
    for flow, name in RUNS.items():
        run = next(one for one in last_runs(site.api_url, flow) if one["state_type"] != "SCHEDULED")
        assert re.fullmatch(name, run["name"]), run["name"]
        browser.open(f"{site.ui_url}/runs/flow-run/{run['id']}")
        browser.wait_for(run["name"], run["state_name"], "Logs", "Artifacts")
        wrong = problems_of(browser, markdown=False)
        open_tab(browser, "Artifacts")
        browser.wait_until(lambda driver: "tab=Artifacts" in driver.current_url, "the tab of the artifacts")
        wrong += problems_of(browser, markdown=False)
        problems |= {flow: wrong} if wrong else {}
    assert problems == {}


def test_the_lists_name_what_is_ours(browser: Browser, site: ServerInfo) -> None:
    browser.open(f"{site.ui_url}/deployments")
    browser.wait_for(f"{len(DEPLOYMENTS)} Deployments", *sorted(DEPLOYMENTS)[:SHOWN], "At 02:00 AM every day")
    assert problems_of(browser) == []
    browser.open(f"{site.ui_url}/work-pools")
    browser.wait_for("brainloom-cpu", "brainloom-gpu", "Process")
    assert problems_of(browser) == []
    browser.open(f"{site.ui_url}/automations")
    browser.wait_for(ZOMBIES, FAILURES, PROPOSALS, "CRASHED", "Run deployment", "wait for a person to approve it")
    assert "`" not in browser.text(), "descriptions of automations are no Markdown"
    assert problems_of(browser) == []
    browser.screenshot("automations")


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_deployment_says_what_it_does(name: str) -> None:
    described = DEPLOYMENTS[name]["description"]
    assert described.endswith(".")
    assert 30 < len(described) < 130
