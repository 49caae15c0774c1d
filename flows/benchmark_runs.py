"""Finished trainings compared on benchmarks of all protocols: the flows of each, and one page with all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.artifacts import publish_markdown
from flows.benchmark_params import BenchmarkParams, by_protocol
from flows.evaluate import check_given, evaluate
from flows.probe import probe
from flows.prompt import prompt
from flows.start import start
from infra.storage import write_bytes
from models.store import open_store
from tasks.benchmark_summary import PROTOCOLS, find_any, read_part, to_html, to_markdown
from tasks.rows import Run
from tasks.serving import Serving, check_runs, check_templates

FLOWS: dict[str, Any] = {"probe": probe, "prompt": prompt, "fine-tune": evaluate}
"""By protocol; what takes longest comes last."""


def compare_runs(params: BenchmarkParams) -> dict[str, Any]:
    """Compare the runs on every benchmark by its protocol; what is computed and unchanged is not computed again.

    A run that no benchmark of a protocol can use is left out of its tables, and the page says why. Raises RunError,
    before anything is computed, as tasks.serving.check_runs and check_templates do, and ScoreError for predictions of
    others that cannot be scored.
    """
    workspace = Path(params.workspace).resolve()
    asked = by_protocol(params.benchmarks)
    runs = [run.in_folder(workspace / "trainings") for run in params.runs]
    serving = _serving(params, runs)
    if tuned := _names(serving, "fine-tune", asked):
        own = [run for run in runs if run.name in tuned]
        check_templates(own, params.template_mix, params.missing_modalities)
        if params.predictions:
            check_given(params.only(tuned).evaluate_params())
    found = {
        protocol: start(flow, params=params.only(_names(serving, protocol, asked)).params_of(protocol))
        for protocol, flow in FLOWS.items()
        if protocol in asked
    }
    parts = [
        replace(read_part(workspace, protocol, asked[protocol]), notes=tuple(serving.left_out(asked[protocol])))
        for protocol in PROTOCOLS
        if protocol in asked
    ]
    title = f"brainloom benchmark: {', '.join(run.name for run in runs)}"
    text = to_markdown(title, parts)
    page = workspace / "report" / "benchmark.html"
    date = datetime.now(UTC).date().isoformat()
    page.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(str(page), to_html(title, parts, date).encode("utf-8"))
    write_bytes(str(page.with_suffix(".md")), text.encode("utf-8"))
    publish_markdown("benchmark-summary", text, "All runs, all benchmarks")
    folders = {protocol: workspace / PROTOCOLS[protocol].tables for protocol in asked}
    return {
        "summary": str(page.with_suffix(".md")),
        "page": str(page),
        "reports": {protocol: one["report"] for protocol, one in found.items()},
        "scores": {protocol: str(workspace / PROTOCOLS[protocol].scores) for protocol in asked},
        "tables": [str(folders[protocol] / f"{name}.md") for protocol, one in found.items() for name in one["tables"]],
        "no_data": [name for one in found.values() for name in one["no_data"]],
        "trained": sum(one.get("trained", 0) for one in found.values()),
        "scored": sum(one["scored"] for one in found.values()),
    }


def _serving(params: BenchmarkParams, runs: Sequence[Run]) -> Serving:
    """Return which run serves which benchmark, each protocol on its store."""
    stores = {protocol: open_store(url) for protocol, url in params.stores.items()}
    return check_runs(runs, [find_any(name) for name in params.benchmarks], stores["fine-tune"], stores)


def _names(serving: Serving, protocol: str, asked: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the runs that a protocol compares: fine-tuning leaves out by benchmark, the others have one table."""
    if protocol != "fine-tune":
        return [run.name for run in serving.of(asked[protocol])]
    return [run.name for run in serving.runs if any(run in serving.of([name]) for name in asked.get(protocol, ()))]
