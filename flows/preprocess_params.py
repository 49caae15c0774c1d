"""What preprocessing is asked to do, and what is refused before a store is made or touched."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pydantic import ConfigDict, Field, model_validator

from flows.artifacts import counted, shown_names
from flows.forms import Form, Place
from infra import storage
from infra.clusters import worker_count, worker_memory
from infra.settings import Settings, machine_memory
from models.records import BOLD, PlannedCase, Scan
from models.spec import SPECS, PreprocessSpec, find_spec
from models.store_layout import CASES
from models.store_writer import check_place, open_writer
from tasks import plan as plans
from tasks import receipts, shards
from tasks.catalog import read_catalog
from tasks.dry_run import estimate_store, free_bytes
from tasks.estimate import Estimate, bare_bytes
from tasks.forget import without_forgotten
from tasks.hidden_paths import check_paths
from tasks.verify import damaged_rows

_log = logging.getLogger(__name__)
DEFAULT_SPEC = "brainmvp"


class PreprocessParams(Form):
    """Which catalog becomes which store."""

    model_config = ConfigDict(title="Preprocess")

    catalog: Place = Field(
        title="Catalog",
        description="Path or URL of catalog.parquet, as the flow 'catalog' writes it.",
        examples=["./state/demo/catalog.parquet"],
        min_length=1,
    )
    store: Place = Field(
        title="Store",
        description="Path or URL of the Zarr store to create or to continue, on disk or s3://.",
        examples=["./state/demo/store.zarr"],
        min_length=1,
    )
    spec: str = Field(
        DEFAULT_SPEC,
        title="Preprocessing spec",
        description=f"How scans become voxels; fixed for the life of a store. One of: {', '.join(SPECS)}.",
        json_schema_extra={"enum": list(SPECS)},
    )
    own_spec: PreprocessSpec | None = Field(
        None,
        title="Own preprocessing spec",
        description="Used instead of a named one; leave `spec` as it is then. "
        "For example {name: mine, spacing_mm: 2, grid: [128, 128, 128]}.",
    )
    datasets: list[str] = Field(
        default_factory=list,
        title="Datasets",
        description="Only these datasets of the catalog; empty: all of them.",
    )
    case_batch: int = Field(
        32,
        title="Case batch",
        description="Cases that one task run preprocesses, from 1 to 1024. Enlarged when there would be more than "
        "32 task runs and 8 a worker, and cut so that no worker idles.",
        ge=1,
        le=1024,
    )
    workers: int | None = Field(
        None,
        title="Workers",
        description="Dask worker processes on this host, 1 or more; empty: BRAINLOOM_WORKERS.",
        ge=1,
    )
    max_quarantined_share: float = Field(
        0.05,
        title="Allowed share in quarantine",
        description="From 0 to 1. With more, the flow fails at its end with the table; finished work stays.",
        ge=0,
        le=1,
    )
    strict: bool = Field(
        False,
        title="Strict",
        description="Refuse to start when the catalog left out any scan.",
    )
    retry_quarantined: bool = Field(
        False,
        title="Try the quarantine again",
        description="Also run cases that are in quarantine although their files have not changed.",
    )

    repair: bool = Field(
        False,
        title="Repair",
        description="First read every voxel of the store, and preprocess again what is damaged or lost, into the same "
        "rows.",
    )
    hide_paths: bool = Field(
        False,
        title="Hide paths",
        description="Write keyed hashes in place of the sources' paths into plans, receipts, tables and pages. For the "
        "life of a store; needs BRAINLOOM_PATH_KEY where the flow runs.",
    )
    performance_report: bool = Field(
        False,
        title="Performance report",
        description="Write Dask's performance report (HTML) as `<store>-dask.html` beside the store.",
    )

    @model_validator(mode="after")
    def _one_spec(self) -> Self:
        if self.own_spec is not None and self.spec != DEFAULT_SPEC:
            raise ValueError(
                f"spec {self.spec!r} and own_spec {self.own_spec.name!r} are both given and only one can count; leave "
                "one of them out"
            )
        return self


@dataclass(frozen=True)
class Wanted:
    """What the parameters ask for, checked as far as it can be without touching the store."""

    url: str
    spec: PreprocessSpec
    catalog: list[Scan]
    """Every row of the catalog."""
    scans: list[Scan]
    """Those of the chosen datasets that can be used."""
    settings: Settings
    refused: dict[plans.CaseKey, str]
    """Cases that would not fit a worker's memory, with the numbers."""
    estimate: Estimate | None = None
    """What is left to do, where it had to be known: with `repair` every voxel of the store is read for it."""


def check_params(params: PreprocessParams) -> Wanted:
    """Refuse what cannot be done before a store is made; the flow and its dry run alike.

    Raises ValueError for the catalog, its datasets and BOLD images without an atlas, what `check_store` raises, and
    StoreError for too little memory for the spec's grid and for a disk that is too small.
    """
    url, spec = check_store(params)
    catalog = read_catalog(params.catalog)
    scans = usable_scans(catalog, params)
    check_functional(scans, spec)
    settings = Settings() if params.workers is None else Settings(workers=params.workers)
    by_case = plans.scans_by_case(scans)
    sentence, refused = plans.memory_verdicts(by_case, spec, memory_limit(settings))
    _log.info(sentence)
    wanted = Wanted(url, spec, catalog, scans, settings, refused)
    free = free_bytes(url)
    # What is stored already needs no room; that is looked up only where it matters.
    if free is not None and bare_bytes(by_case.values(), spec) > free:
        estimate = estimate_work(wanted, params)
        estimate.check_disk()
        return replace(wanted, estimate=estimate)
    return wanted


def check_store(params: PreprocessParams) -> tuple[str, PreprocessSpec]:
    """Return where the store lies or will lie, and its spec.

    Raises MissingExtraError for a step that cannot run here, and StoreError for a place that holds something else or a
    store of another spec, or begun with other paths (see `path_key` for its error).
    """
    spec = chosen_spec(params)
    url = params.store if not storage.is_local(params.store) else str(storage.local_path(params.store))
    check_place(url, spec)
    check_paths(url, path_key(params))
    return url, spec


def path_key(params: PreprocessParams) -> str:
    """Return the key under which paths are hidden, empty when they are not; raises ValueError when there is none."""
    if not params.hide_paths:
        return ""
    key = Settings().path_key
    if key is None:
        raise ValueError(
            "hide_paths needs a key: set BRAINLOOM_PATH_KEY or BRAINLOOM_PATH_KEY_FILE where the flow runs, to 16 "
            "characters or more that you keep as a secret"
        )
    return key.get_secret_value()


def memory_limit(settings: Settings) -> int:
    """Return the bytes that one worker may use: its limit, and on this host never more than there is."""
    limit = worker_memory(settings)
    return limit if settings.cluster == "address" else min(limit, machine_memory())


def rows_to_repair(url: str, repair: bool) -> set[shards.Row]:
    """Return the damaged rows of a store when they are asked for; none of a store that is not there or not finished."""
    if not repair or not storage.exists(storage.join(url, CASES)):
        return set()
    return damaged_rows(url)


def estimate_work(wanted: Wanted, params: PreprocessParams) -> Estimate:
    """Estimate what is left to do; reads the store, writes nothing."""
    scans, _ = without_forgotten(wanted.url, wanted.scans)
    current = plans.plan_rows(plans.cases_from_scans(scans), plans.read_plans(wanted.url), wanted.spec).current
    damaged = rows_to_repair(wanted.url, params.repair)
    todo = pending(wanted.url, current, params.retry_quarantined, damaged)
    workers, limit = worker_count(wanted.settings), memory_limit(wanted.settings)
    estimate = estimate_store(wanted.url, wanted.spec, scans, todo, workers, limit)
    return replace(estimate, damaged=sum((case.dataset, case.row) in damaged for case in todo))


def chosen_spec(params: PreprocessParams) -> PreprocessSpec:
    """Return the spec in the parameters, or the named one.

    Raises MissingExtraError when a step cannot run here, AtlasImageError for an atlas that is not there or another one.
    """
    spec = params.own_spec or find_spec(params.spec)
    if {spec.bias_correction, spec.registration} != {"none"}:
        from tasks.registration import require_extra  # loads torch: a flow run with nothing to do goes without

        require_extra(spec)
    if spec.connectome is not None and spec.connectome.atlas_image:
        from tasks.atlas_image import require_atlas  # the same

        require_atlas(spec.connectome)
    return spec


def check_functional(scans: Sequence[Scan], spec: PreprocessSpec) -> None:
    """Raise ValueError when there are BOLD images and the spec has no label image to average them over."""
    if spec.connectome is None or spec.connectome.atlas_image:
        return
    if found := counted(f"of {scan.dataset}" for scan in scans if scan.modality == BOLD):
        raise ValueError(
            f"there are BOLD images ({', '.join(found)}), and the connectome of spec {spec.name!r} has no label image: "
            "give an own_spec with atlas_image and atlas_sha256 (`brainloom atlas show` prints them), choose other "
            "datasets, or leave the images out of the catalog"
        )


def usable_scans(scans: Sequence[Scan], params: PreprocessParams) -> list[Scan]:
    """Return the scans of the chosen datasets; raises ValueError for unknown datasets, no scans, or when strict."""
    known = sorted({scan.dataset for scan in scans})
    if unknown := sorted(set(params.datasets) - set(known)):
        raise ValueError(f"the catalog has no dataset {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    chosen = [scan for scan in scans if not params.datasets or scan.dataset in params.datasets]
    left_out = [scan for scan in chosen if scan.status != "ok"]
    if params.strict and left_out:
        named = [f"{scan.path}: {scan.reason}" for scan in left_out]
        shown = "; ".join(shown_names(named, counted(f"{scan.reason} in {scan.dataset}" for scan in left_out)))
        raise ValueError(
            f"strict: the catalog left out {len(left_out)} scans, 0 are allowed ({shown}); "
            "repair or remove them, or run without strict"
        )
    usable = [scan for scan in chosen if scan.status == "ok"]
    if not usable:
        raise ValueError(f"{params.catalog} holds no usable scan of {', '.join(params.datasets) or 'any dataset'}")
    return usable


def pending(
    url: str, current: Sequence[PlannedCase], retry_quarantined: bool, damaged: Collection[shards.Row] = ()
) -> tuple[PlannedCase, ...]:
    """Return the cases that are neither published nor have a receipt that counts, and damaged rows.

    Quarantined cases too when asked.
    """
    lines = shards.published(url)
    there = receipts.receipt_rows(url, (case.dataset for case in current))
    # What a killed flow left; its receipts are read, for one that is damaged would keep its case away for ever.
    unpublished = [c for c in current if (c.dataset, c.row) in there and (c.dataset, c.row) not in lines]
    useless = receipts.useless_rows(url, unpublished, open_writer(url).spec.content_digest()) if unpublished else set()
    again = {row for row, line in lines.items() if retry_quarantined and line["status"] == "quarantined"}
    done = (there | set(lines)) - again - useless - set(damaged)
    return tuple(case for case in current if (case.dataset, case.row) not in done)
