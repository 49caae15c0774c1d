"""Stores written without Prefect or Dask, for the tests of what happens to a store as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nifti_files import SMALL, scan_of, write_case

from infra import storage
from models.records import PlannedCase, Scan
from models.spec import PreprocessSpec
from models.store import create_or_open
from tasks import plan as plans
from tasks import shards
from tasks.catalog import CatalogResult, summarise, write_catalog
from tasks.forget import without_forgotten
from tasks.phenotypes import combine
from tasks.preprocess import preprocess_batch


def ingest(url: str, scans: Sequence[Scan], token: str = "t", spec: PreprocessSpec = SMALL) -> tuple[PlannedCase, ...]:
    """Bring a store up to date as the flow does; returns the current rows."""
    writer = create_or_open(url, spec)
    scans, _ = without_forgotten(url, scans)
    known = plans.read_plans(url)
    rows = plans.plan_rows(plans.cases_from_scans(scans), known, spec)
    if rows.news:
        plans.write_plan(url, rows.news, spec.content_digest())
    everything = [*known, *rows.added]
    labelled = plans.datasets_with_labels(everything)
    for dataset, length in plans.rows_by_dataset(everything).items():
        writer.grow(dataset, length, dataset in labelled)
    preprocess_batch(url, [case.model_dump(mode="json") for case in rows.current], token)
    shards.finalise(url, rows.current)
    return rows.current


def scans_of(files: Mapping[str, Path], subject: str, **more: str) -> list[Scan]:
    """Return the catalog rows of one subject's files as they are now."""
    return [scan_of(path, modality, subject, **more) for modality, path in files.items()]


def three_subjects(folder: Path) -> list[Scan]:
    """Write subjects a, b and c, all with labels, and return their catalog rows."""
    return [s for n, name in enumerate("abc") for s in scans_of(write_case(folder, name, n, label=True), name)]


def shard_of(url: str, row: int, name: str = "image", dataset: str = "toy") -> str:
    """Return the URL of a shard."""
    folder = storage.join(url, dataset, name, "c", str(row))
    (path,) = storage.find(folder)
    return storage.join(folder, path)


def texts_of(url: str) -> str:
    """Return everything in a store that may name somebody: all files that are no shards, and all file names."""
    names = sorted(storage.find(url))
    bodies = [storage.read_bytes(storage.join(url, name)).decode("latin-1") for name in names if "/c/" not in name]
    return "\n".join([*bodies, *names])


def catalog_of(folder: Path, scans: Sequence[Scan]) -> str:
    """Write a catalog of some scans into a workspace and return the workspace."""
    nobody = combine([])
    write_catalog(CatalogResult(list(scans), nobody, summarise(scans, nobody)), str(folder))
    return str(folder)
