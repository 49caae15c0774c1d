"""Catalog: find the scans of all sources and say what is there, and what is not."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import ConfigDict, Field

from flows.artifacts import counted, pictures_allowed, shown_names
from flows.forms import Form, few, params_of
from flows.pages import Pages
from flows.progress import Progress
from tasks.catalog import CatalogResult, build_catalog, write_catalog
from tasks.catalog_estimate import estimate_catalog
from tasks.catalog_report import catalog_report, left_out_table
from tasks.sources import CONVERTERS, READERS, SourceConfig

SOURCE_EXAMPLE = {"kind": "bids", "dataset": "ixi", "root": "./sources/ixi"}
KINDS_TOLD = (
    f"Each is edited as JSON; its `kind` is one of: {', '.join(sorted((*READERS, *CONVERTERS)))}. The keys of each "
    "kind are in docs/sources.md."
)


class CatalogParams(Form):
    """Where the scans are."""

    model_config = ConfigDict(title="Catalog")

    sources: list[SourceConfig] = Field(
        title="Sources",
        description="One entry per dataset: a BIDS tree, datalist, table, folder tree or DICOM folder, grey-matter "
        f"maps and regions, fMRIPrep's derivatives or ROI series, with its root. At least one. {KINDS_TOLD}",
        min_length=1,
        examples=[[SOURCE_EXAMPLE]],
    )
    workspace: str = Field(
        "./state/demo",
        title="Workspace",
        description="Folder or URL that receives catalog.parquet, catalog.json, phenotypes.parquet, converted DICOM.",
        examples=["./state/demo", "s3://mri/work"],
        min_length=1,
    )
    strict: bool = Field(
        False,
        title="Strict",
        description="Fail, and leave the former catalog as it is, when a file must be left out or phenotypes disagree.",
    )
    checksums: bool = Field(
        False,
        title="Checksums",
        description="Read every file whole and take its SHA-256 as identity instead of size and modification time or "
        "ETag. Costs reading all data at every run.",
    )


class StrictCatalogError(ValueError):
    """Strict mode: something was left out, so no work may start."""


def _run_name() -> str:
    return run_name(params_of(CatalogParams))


def run_name(params: CatalogParams) -> str:
    """Return `catalog <datasets>`, shortened after three."""
    return f"catalog {few((source.dataset for source in params.sources), ' ')}"


@task(name="find scans", cache_policy=NO_CACHE)
def find_all(sources: list[SourceConfig], workspace: str, checksums: bool) -> CatalogResult:
    """Build the catalog with a progress display; see tasks.catalog.build_catalog."""
    with ExitStack() as stack:
        progress: Progress | None = None

        def show(done: int, total: int) -> None:
            # Only when all sources are listed is it known how many scans there are.
            nonlocal progress
            progress = progress or stack.enter_context(Progress("catalog", total, "scans"))
            progress.update(done)

        return build_catalog(sources, show, workspace, checksums)


def refuse_unusable(result: CatalogResult) -> None:
    """Raise ValueError when no image of any source can be used: a wrong config must not replace a good catalog."""
    if result.report["scans"]:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.report["reasons"].items())
    raise ValueError(
        f"no image of {', '.join(result.report['datasets'])} can be used ({reasons}); the former catalog, if any, is "
        "kept; correct the sources"
    )


def refuse_left_out(result: CatalogResult) -> None:
    """Raise StrictCatalogError naming the files that were left out or the phenotypes that disagree, if any."""
    rows = left_out_table(result.scans)
    if not rows:
        refuse_conflicts(result)
        return
    named = [f"{row['dataset']} {row['case']} {row['file']}: {row['reason']} ({row['detail']})" for row in rows]
    shown = shown_names(named, counted(f"{row['reason']} in {row['dataset']}" for row in rows))
    raise StrictCatalogError(
        "\n  ".join(
            [
                f"strict catalog: {len(rows)} files would be left out, 0 are allowed; "
                "repair or remove them, or run without strict:",
                *shown,
            ]
        )
    )


def refuse_conflicts(result: CatalogResult) -> None:
    """Raise StrictCatalogError naming the phenotypes that disagree between tables or say nothing known, if any."""
    faulty = [issue for issue in result.issues if issue.problem in ("conflict", "bad value")]
    if faulty:
        named = [f"{issue.dataset} {issue.detail}" for issue in faulty]
        shown = shown_names(named, counted(f"in {issue.dataset}" for issue in faulty))
        unread = "" if all(issue.problem == "conflict" for issue in faulty) else " or cannot be read"
        first = f"strict catalog: {len(faulty)} phenotypes disagree{unread}, 0 may; correct the tables:"
        raise StrictCatalogError("\n  ".join([first, *shown]))


def dry_run(params: CatalogParams) -> str:
    """Return what the flow would cost, in lines; lists the sources and reads a sample of headers, writes nothing."""
    return estimate_catalog(params.sources, params.workspace, params.checksums)


@flow(name="catalog", flow_run_name=_run_name)
def catalog(params: CatalogParams) -> dict[str, Any]:
    """Find the scans of all sources and write the catalog into the workspace; unchanged sources rewrite nothing.

    Raises ValueError when no image can be used, and StrictCatalogError; both leave the former catalog as it is.
    """
    result = find_all(params.sources, params.workspace, params.checksums)
    page = catalog_report(result, name_files=pictures_allowed())
    with Pages(params.workspace) as pages:
        pages.markdown("catalog", page, "What was found at the sources")
        pages.table("catalog-left-out", left_out_table(result.scans), "Files that were left out, with the reason")
        refuse_unusable(result)
        if params.strict:
            refuse_left_out(result)
        written = write_catalog(result, params.workspace)
    names = ("cases", "scans", "labels", "left_out", "digest", "rows_digest", "phenotypes_digest")
    counts = {name: result.report[name] for name in names}
    return {"workspace": params.workspace, "written": written, **counts}
