"""The main job, by its two commands: what the tiny demo leaves on disk, on the server and in the terminal."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from demo_runs import DemoRun, run_demo, snapshot

from models.store import store_digest
from tasks.qc import quarantine_table
from tasks.verify import verify

pytestmark = pytest.mark.timeout(900)
BENCHMARKS = ("phantom-tumour", "phantom-control")


class Page(HTMLParser):
    """Collects what a browser would load besides the page itself."""

    LOADS = frozenset({"src", "srcset", "poster", "data", "background"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.pictures = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [value or "" for name, value in attrs if name in self.LOADS]
        if tag in ("link", "use", "image", "base"):
            self.loaded.append(given.get("href") or given.get("xlink:href") or "")
        self.pictures += tag in ("img", "svg")
        assert tag != "script" or "src" not in given


def test_every_link_of_the_chain_leaves_its_file(tiny_demo: DemoRun) -> None:
    tables = [f"tables/{name}.{suffix}" for name in BENCHMARKS for suffix in ("md", "csv", "tex")]
    trainings = ["brainmvp_tiny", *(f"{name}-{row}-seed0" for name in BENCHMARKS for row in ("pre-trained", "scratch"))]
    files = ["run.json", "metrics.jsonl", "weights.safetensors", "model_card.md", "done.json"]
    expected = [
        "catalog.parquet", "catalog.json", "phenotypes.parquet", "store.zarr/zarr.json", "store.zarr/cases.parquet",
        "splits/default.parquet", "splits/default.json", "scores.parquet", "report/index.html", *tables,
        *(f"trainings/{training}/{file}" for training in trainings for file in files),
    ]  # fmt: skip
    missing = [name for name in expected if not (tiny_demo.workspace / name).is_file()]
    assert not missing
    assert {path.name for path in (tiny_demo.workspace / "trainings").iterdir()} == set(trainings)


def test_the_digests_are_those_of_the_voxels_and_of_the_weights(tiny_demo: DemoRun) -> None:
    store = str(tiny_demo.workspace / "store.zarr")
    assert verify(store, deep=True) == []
    done = json.loads((tiny_demo.workspace / "trainings/brainmvp_tiny/done.json").read_text())
    assert tiny_demo.digests == {"store": store_digest(store)[:16], "weights": done["weights_digest"][:16]}


def test_every_broken_file_is_in_quarantine_with_its_reason_and_nothing_else_is(tiny_demo: DemoRun) -> None:
    listed = json.loads((tiny_demo.workspace / "sources/broken.json").read_text())
    found = quarantine_table(str(tiny_demo.workspace / "store.zarr"), str(tiny_demo.workspace / "catalog.parquet"))
    wanted = {(entry["dataset"], entry["subject"], Path(entry["file"]).name, entry["reason"]) for entry in listed}
    assert len(wanted) == 5
    assert {(row["dataset"], row["case"], row["file"], row["reason"]) for row in found} == wanted
    assert len(found) == len(wanted)
    shown = tiny_demo.artifacts()["quarantine"]["data"]
    assert {(row["dataset"], row["case"], row["file"], row["reason"]) for row in shown} == wanted


def test_the_scores_are_finite_where_there_is_a_number(tiny_demo: DemoRun) -> None:
    scores = pd.read_parquet(tiny_demo.workspace / "scores.parquet")
    assert set(scores["benchmark"]) == set(BENCHMARKS)
    assert scores["value"].map(math.isfinite).all()


def test_the_report_is_one_file_that_loads_nothing(tiny_demo: DemoRun) -> None:
    text = (tiny_demo.workspace / "report/index.html").read_text()
    page = Page(text)
    assert page.pictures >= 5
    assert [value[:60] for value in page.loaded if not value.startswith("data:")] == []
    assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?!['\"]?data:|#)[^)\s]{0,60}", text)
    for words in ("Phantom tumour", "Phantom positive control", "pre-trained", "scratch", "sub-9002_FLAIR.nii.gz"):
        assert words in text


def test_the_terminal_tells_the_story_and_nothing_else(tiny_demo: DemoRun) -> None:
    assert "Prefect UI: http://127.0.0.1:" in tiny_demo.stdout
    for row in ("pre-trained", "scratch", "template overlap", "majority", "ceiling"):
        assert re.search(rf"^ +{row}\b", tiny_demo.stdout, re.MULTILINE)
    assert "…" not in tiny_demo.stdout, "a cell was cut"
    for stage in ("phantom", "catalog", "preprocess", "pretrain", "fine-tune", "score"):
        assert re.search(rf"^{stage}: .* in all\)$", tiny_demo.stderr, re.MULTILINE), stage
    allowed = re.compile(r"^(phantom|catalog|preprocess|pretrain|fine-tune|score): ")
    noise = [line for line in tiny_demo.stderr.splitlines() if not allowed.match(line)]
    assert [line for line in noise if " | INFO " in line] == []


def test_the_ui_has_a_telling_run_for_every_link(tiny_demo: DemoRun) -> None:
    runs = tiny_demo.ask("flow_runs/filter")
    assert {run["state_name"] for run in runs} == {"Completed"}
    assert {run["name"] for run in runs} == {
        "benchmark tiny",
        "phantom 16 + 6 subjects",
        "catalog phantom-bids phantom-16k",
        "preprocess phantom-16k phantom-bids into store.zarr",
        "pretrain brainmvp_tiny on store.zarr",
        "evaluate brainmvp_tiny on phantom-tumour, phantom-control",
    }
    tasks = {run["name"] for run in tiny_demo.ask("task_runs/filter")}
    assert {"train brainmvp_tiny", *(f"score {name}" for name in BENCHMARKS)} <= tasks
    assert any(re.fullmatch(r"phantom-bids: sub-\d+ and \d+ more", name) for name in tasks)


def test_the_ui_has_an_artifact_for_everything_worth_seeing(tiny_demo: DemoRun) -> None:
    found = tiny_demo.artifacts()
    stages = ("phantom", "catalog", "preprocess", "pretrain", "fine-tune", "score")
    assert {key: found[key]["data"] for key in (f"progress-{stage}" for stage in stages)} == {
        f"progress-{stage}": 100 for stage in stages
    }
    training = "brainmvp-tiny"
    for key in ("qc", f"losses-{training}", f"reconstruction-{training}", f"templates-{training}"):
        assert "](data:image/png;base64," in found[key]["data"], key
    for name in BENCHMARKS:
        assert "| pre-trained |" in found[f"benchmark-{name}"]["data"]
        rows = found[f"scores-{name}"]["data"]
        assert {"pre-trained", "scratch"} <= {row["row"] for row in rows}
        assert all(row["n"] for row in rows)
    for key in (f"validation-{training}", "catalog-left-out"):
        assert found[key]["data"], key
    assert _numbers_are_finite([artifact["data"] for artifact in found.values() if artifact["type"] == "table"])


def _numbers_are_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_numbers_are_finite, value))
    if isinstance(value, dict):
        return all(map(_numbers_are_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def test_a_second_run_finds_everything_done(tiny_demo: DemoRun) -> None:
    before, runs_before = snapshot(tiny_demo.workspace), {run["id"] for run in tiny_demo.ask("task_runs/filter")}
    again = run_demo(tiny_demo.workspace, tiny_demo.state_dir)
    assert again.ui_url == tiny_demo.ui_url
    assert again.digests == tiny_demo.digests
    for told in (
        r"preprocess: 27/27 cases, nothing to do",
        r"pretrain: (\d+)/\1 steps, found finished",
        r"fine-tune: (\d+)/\1 steps, 4 of 4 trainings found finished",
        r"0 rows computed",
    ):
        assert re.search(told, again.stderr), again.stderr
    after = snapshot(tiny_demo.workspace)
    rewritten = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert not {name for name in rewritten if name.startswith(("sources/", "trainings/", "report/", "tables/"))}
    assert not {name for name in rewritten if name.startswith("store.zarr/") and "/c/" in name}, "voxels were written"
    tasks = [run["name"] for run in tiny_demo.ask("task_runs/filter") if run["id"] not in runs_before]
    assert tasks
    assert not [name for name in tasks if " more" in name or ": sub-" in name], "a case batch was run"
