"""Pictures of a store's cases, those that stand out first, and the table of everything that is not used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra import storage
from models.records import GREY, Reason, Scan
from models.spec import PreprocessSpec
from models.store import Store, StoredCase, StoredDataset, open_store, read_lines
from models.store_layout import CASES
from tasks.catalog import read_catalog
from tasks.catalog_report import left_out_table, short_detail
from tasks.faces import frame_of
from tasks.hidden_paths import blamed_name, file_of, hides_paths
from tasks.mosaic import mosaic
from tasks.qc_connectomes import matrix_picture, side_by_side
from tasks.qc_measures import read_measures
from tasks.qc_outliers import Ranking, rank

MEAN_CASES = 50
"""Of a mean map; each takes some hundredths of a second at 1.5 mm."""
SEE_CATALOG = "see the catalog"
"""Detail of a file that the catalog left out, for a store that hides paths."""
_NO_CASE = (Reason.UNMATCHED, Reason.OUTSIDE_ROOT, Reason.BAD_ID)


def qc_cases(store_url: str, per_dataset: int = 3) -> list[tuple[str, int]]:
    """Return (dataset, row) of the cases to look at: of each dataset those that stand out most."""
    ranking = rank(read_measures(store_url))
    return [(dataset, row) for dataset in ranking.datasets for row in worst_rows(ranking, dataset, per_dataset)]


def worst_rows(ranking: Ranking, dataset: str, count: int) -> list[int]:
    """Return the rows of a dataset that stand out most, the worst first; evenly by case where none could be ranked."""
    cases = ranking.of(dataset)
    rows = [int(row) for row in cases["row"]]
    if cases["score"].notna().any():
        return rows[:count]
    return evenly(rows, count)


def mosaic_of(store: Store, dataset: str, row: int) -> bytes:
    """Return the mosaic of one stored case as PNG, its connectome beside it; one of them when it has only one."""
    return _draw(store, store.dataset(dataset), row)


def mosaics_of(store: Store, chosen: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int, bytes]]:
    """Yield dataset, row and mosaic of stored cases; one case is in memory at a time."""
    cases, name, data = read_lines(store.url), "", None
    for dataset, row in chosen:
        if data is None or dataset != name:
            name, data = dataset, StoredDataset(store.url, dataset, store.spec, cases)
        yield dataset, row, _draw(store, data, row)


def _draw(store: Store, data: StoredDataset, row: int) -> bytes:
    info, spec = data.case_info(row), store.spec
    pictures = [_slices(data, info, spec)] if any(info.present) else []
    if spec.connectome is not None and data.has_connectome(row):
        pictures.append(matrix_picture(data.read_connectome(row), spec.connectome, "" if pictures else info.case))
    return side_by_side(pictures)


def _slices(data: StoredDataset, info: StoredCase, spec: PreprocessSpec) -> bytes:
    image, label = data.read_case(info.row)
    title = f"{data.name}  {info.case}"
    names: dict[int, str] = {}
    if label is None and shows_grey(spec):
        label, names = _lobes(spec)
        label = label[_box_of(info)]
    return mosaic(
        image, info.affine, label, modalities=spec.modalities, title=title, frame=frame_of(spec), label_names=names
    )


def shows_grey(spec: PreprocessSpec) -> bool:
    """Say whether a store's cases are maps of grey matter, which lie in MNI space."""
    return GREY in spec.modalities and spec.frame == "template"


def mean_map(store: Store, dataset: str, rows: Sequence[int]) -> tuple[bytes, int] | None:
    """Return the mosaic of the mean map of grey matter of at most MEAN_CASES cases, and of how many; None without any.

    What a wrong orientation, a shift or another tissue in a part of the cases does to it is seen at a glance.
    """
    data, spec = store.dataset(dataset), store.spec
    channel = spec.modalities.index(GREY)
    total, count = np.zeros(spec.grid, np.float32), 0
    for row in evenly(rows, MEAN_CASES):
        info = data.case_info(row)
        if info.present[channel]:
            total[_box_of(info)] += data.read_case(row)[0][channel]
            count += 1
    if not count:
        return None
    label, names = _lobes(spec)
    title = f"{dataset}  mean of {count} cases"
    affine = np.asarray(spec.grid_affine)
    mean = total[None] / count
    return mosaic(mean, affine, label, modalities=[GREY], title=title, frame="none", label_names=names), count


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """Return at most so many rows, evenly spread."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return [rows[round(place)] for place in places]


def _box_of(info: StoredCase) -> tuple[slice, ...]:
    """Return where a case lies in the template grid."""
    return tuple(slice(o, o + n) for o, n in zip(info.origin, info.extent, strict=True))


def _lobes(spec: PreprocessSpec) -> tuple[np.ndarray, dict[int, str]]:
    """Return the lobes on the grid of a spec and their names."""
    from tasks.atlas import LOBES, lobes_on  # here: not every report needs the atlas
    from tasks.volumes import template_grid

    return lobes_on(template_grid(spec)), dict(enumerate(LOBES, start=1))


def quarantine_table(store: str | pa.Table | None, catalog: str | Sequence[Scan] | None = None) -> list[dict[str, str]]:
    """Return everything that is not used: dataset, case, file, reason, detail.

    What the catalog left out comes first, then the cases that preprocessing quarantined. Files of a store that hides
    paths are called by their modality, and details of the catalog are in the catalog alone.

    Args:
        store: URL of a store (one never finalised has published nothing and adds no row), its cases table, or None.
        catalog: path of catalog.parquet or of the workspace that holds it, its scans, or None.

    Raises FileNotFoundError when there is no catalog at the path, StoreError for a store of another schema.
    """
    scans = read_catalog(catalog) if isinstance(catalog, str) else catalog or ()
    hides = isinstance(store, str) and hides_paths(store)
    rows = left_out_table(map(_unnamed, scans) if hides else scans)
    if isinstance(store, str):
        store = read_lines(open_store(store).url) if storage.exists(storage.join(store, CASES)) else None
    return rows if store is None else rows + quarantined_rows(store)


def _unnamed(scan: Scan) -> Scan:
    """Return a catalog row that tells no name of a file or folder, of whichever file its detail may speak.

    Of a file that nothing could be made of, case and modality may be pieces of its path as well.
    """
    case = "" if scan.reason in _NO_CASE else scan.case
    modality = "" if scan.reason in (*_NO_CASE, Reason.UNKNOWN_MODALITY) else scan.modality
    return scan.replace(case=case, modality=modality, path=file_of(modality), detail=SEE_CATALOG)


def quarantined_rows(cases: pa.Table) -> list[dict[str, str]]:
    """Return one row per case with status quarantined: dataset, case, file, reason, detail."""
    columns = ["dataset", "case", "reason", "detail", "files"]
    found = [
        {
            "dataset": line["dataset"],
            "case": line["case"],
            "file": _blamed_file(line),
            "reason": line["reason"],
            "detail": short_detail(line["detail"], _blamed_file(line)),
        }
        for line in cases.filter(pc.field("status") == "quarantined").select(columns).to_pylist()
    ]
    return sorted(found, key=lambda row: (row["dataset"], row["case"]))


def _blamed_file(line: dict[str, Any]) -> str:
    """Return the file that the detail names, or the only file, or how many files the case has."""
    names = [blamed_name(file) for file in json.loads(line["files"] or "[]")]
    named = [name for name in names if name in line["detail"]]
    if named or len(names) == 1:
        return max(named or names, key=len)
    return f"all {len(names)} files"
