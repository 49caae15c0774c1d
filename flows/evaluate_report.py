"""What an evaluation writes: tables, pictures, the report and the methods text, unless nothing has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from flows.evaluate_params import EvaluateParams
from flows.results import write_leaderboard, write_section
from infra.storage import write_bytes
from models.records import digest_of
from tasks.benchmarks import BENCHMARKS, find_benchmark
from tasks.evaluation import Cohort
from tasks.finetune import Finetuning, read_json
from tasks.leaderboard import leaderboard
from tasks.methods_text import MethodsText, methods_text
from tasks.report import TableSection, write_report
from tasks.report_content import Made, provenance, report_content
from tasks.rows import import_notes, left_out_notes
from tasks.sections import make_section, make_table, with_further
from tasks.statistics import REPLICATES, RULES_VERSION
from tasks.tables import FurtherTable

KEPT = Path("report", "evaluation.json")
"""Where a workspace keeps what its last evaluation wrote down."""
Further = dict[str, dict[str, FurtherTable]]
"""By kind and benchmark: the tables beside the main ones."""


@dataclass(frozen=True)
class Evaluated:
    """Everything that tables and report are made from."""

    params: EvaluateParams
    made: Made
    cohorts: Sequence[Cohort]
    """Also those without data."""
    trainings: Sequence[Finetuning]
    """On all labels."""
    scores: pd.DataFrame
    further: Further


def kept_or_written(found: Evaluated) -> dict[str, Any]:
    """Write tables and report unless they are there from the same inputs; return what shows them again."""
    asked, missing = found.params, bool(found.further.get("missing"))
    methods = methods_text(found.made, found.trainings, found.cohorts, asked.replicates, asked.label_shares, missing)
    workspace, inputs = found.made.workspace, _inputs(found, methods)
    kept = read_kept(workspace)
    if kept.get("inputs") != inputs or not _results_exist(workspace, kept):
        kept = {"inputs": inputs, **_write_results(found, methods)}
        write_bytes(str(workspace / KEPT), json.dumps(kept, indent=1).encode())
    return kept


def read_kept(workspace: Path) -> dict[str, Any]:
    """Return what the last evaluation wrote down; nothing when it is missing or damaged: all is written again then."""
    try:
        return read_json(workspace / KEPT) or {}
    except ValueError:
        return {}


def _results_exist(workspace: Path, kept: Mapping[str, Any]) -> bool:
    """Return whether every file that the last evaluation wrote is on disk; older ones did not say which."""
    return "files" in kept and all((workspace / name).exists() for name in kept["files"])


def _inputs(found: Evaluated, methods: MethodsText) -> str:
    """Return the digest of everything that decides tables and report."""
    made = found.made
    scores = made.workspace / "scores.parquet"
    return digest_of(
        {
            "params": found.params.model_dump(mode="json", exclude={"workspace", "lanes", "launch"}),
            "provenance": provenance(made, found.trainings),
            "benchmarks": [benchmark.content_digest() for benchmark in BENCHMARKS.values()],
            "cases": [[case.model_dump(mode="json") for case in cohort.selected] for cohort in found.cohorts],
            "scores": hashlib.sha256(scores.read_bytes()).hexdigest() if scores.exists() else "",
            "further": {
                f"{kind} {name}": [table.to_markdown(), table.to_csv()]
                for kind, tables in found.further.items()
                for name, table in tables.items()
            },
            "methods": methods.to_markdown(),
            "statistics": RULES_VERSION,
        }
    )


def _write_results(found: Evaluated, methods: MethodsText) -> dict[str, Any]:
    """Write tables, pictures and the report; return what the next flow run needs to show them again."""
    made, params, scores = found.made, found.params, found.scores
    date = datetime.now(UTC).date().isoformat()
    facts = provenance(made)[:3]
    sections: dict[str, TableSection] = {}
    files = [made.workspace / "report" / name for name in ("index.html", "methods.md")]
    for cohort in found.cohorts:
        name = cohort.benchmark.name
        mine = cohort.own(found.trainings)
        part = scores[scores["benchmark"] == name] if len(scores) else scores
        notes = _notes(found, cohort)
        first = mine[0].row if mine else params.first
        table = make_table(cohort, part, mine, facts, date, params.replicates, first, notes)
        beside = {kind: tables[name] for kind, tables in found.further.items() if name in tables}
        sections[name] = with_further(make_section(table, cohort, mine, part), beside)
        files += write_section(sections[name], made.workspace / "tables")
    shown = [section for section in sections.values() if section.table.has_scores]
    absent = [section for section in sections.values() if not section.table.has_scores]
    others = [_absent_section(name, made, date) for name in BENCHMARKS if name not in sections]
    ranked = [cohort.benchmark for cohort in found.cohorts if not cohort.native]
    kinds = {row: kind for cohort in found.cohorts for row, kind in cohort.kinds.items()}
    board = leaderboard(scores, ranked, kinds, params.replicates)
    files += write_leaderboard(board, made.workspace / "tables")
    page = report_content(made, found.trainings, shown, [*absent, *others], methods, date)
    write_report(replace(page, leaderboard=board), files[0])
    write_bytes(str(files[1]), methods.to_markdown().encode("utf-8"))
    return {
        "tables": [section.table.model_dump(mode="json") for section in sections.values()],
        "digests": {name: section.table.digest for name, section in sections.items()},
        "files": [str(path.relative_to(made.workspace)) for path in files],
        "no_data": [section.table.benchmark.name for section in absent],
    }


def _notes(found: Evaluated, cohort: Cohort) -> list[str]:
    """Return the sentences of a table about its rows: which are left out, which weights were imported."""
    if not cohort.selected:
        return []
    runs = found.made.runs
    return [*left_out_notes(cohort.benchmark, found.params.networks, runs), *import_notes(runs), *found.made.unchecked]


def _absent_section(name: str, made: Made, date: str) -> TableSection:
    cohort = Cohort(find_benchmark(name), (), made.cases, made.store)
    table = make_table(cohort, pd.DataFrame(), (), (), date, REPLICATES)
    return make_section(table, cohort, (), pd.DataFrame())
