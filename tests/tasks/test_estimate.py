from __future__ import annotations

from pathlib import Path

import pytest
from layouts import LAYOUTS
from nifti_files import FIXED, SMALL

from models.records import Scan
from models.spec import SPECS
from tasks.catalog_estimate import estimate_catalog
from tasks.estimate import (
    RESAMPLED_SECONDS_PER_MVOXEL,
    SECONDS_PER_CASE,
    SECONDS_PER_MVOXEL,
    Measured,
    estimate_preprocess,
    human_bytes,
    human_seconds,
)
from tasks.plan import BASE_BYTES, CaseKey


def todo(cases: int, folder: str = "/data", edge: int = 20, spacing_mm: float = 1.0) -> dict[CaseKey, list[Scan]]:
    return {
        ("d", f"s{n}"): [
            Scan(
                dataset="d",
                subject=f"s{n}",
                case=f"s{n}",
                modality=modality,
                path=f"{folder}/s{n}_{modality}.nii.gz",
                size_bytes=1000,
                shape=(edge, 20, 20),
                spacing_mm=(spacing_mm,) * 3,
            )
            for modality in ("t1", "t2", "label")
        ]
        for n in range(cases)
    }


LIMIT = 2 * BASE_BYTES


def test_without_a_store_the_rates_of_the_documents_are_used() -> None:
    one = estimate_preprocess(todo(10), 12, SMALL, 2, LIMIT, "/store")
    assert (one.cases, one.todo, one.refused, one.scans, one.read_bytes, one.requests) == (12, 10, 0, 30, 30_000, 0)
    assert one.seconds == pytest.approx((10 * SECONDS_PER_CASE + 10 * 3 * 0.008 * SECONDS_PER_MVOXEL) / 2)
    assert one.disk_bytes == 10 * 8000 * (2 * 2 + 1)
    text = one.text()
    assert "10 to preprocess of 12: 30 files, 30.0 kB to read" in text
    assert "at the rates of docs/speed.md" in text
    assert "at most: the grids without crop and compression" in text
    assert text.endswith("Nothing was started.")
    slower = estimate_preprocess(todo(10, spacing_mm=2.0), 12, SMALL, 2, LIMIT, "/store")
    assert slower.seconds > one.seconds
    assert estimate_preprocess(todo(1), 1, FIXED, 8, LIMIT, "/store").seconds == pytest.approx(
        SECONDS_PER_CASE + 3 * 0.008 * RESAMPLED_SECONDS_PER_MVOXEL
    )


def test_a_store_with_cases_says_what_they_cost() -> None:
    measured = Measured(cases=5, seconds=10.0, voxels=5 * 24_000, stored_bytes=5_000)
    one = estimate_preprocess(todo(10), 15, SMALL, 2, LIMIT, "/store", measured)
    assert (one.seconds, one.disk_bytes) == (pytest.approx(10.0), 10_000)
    assert "5 stored cases took 83.333 s per million voxels" in one.text()
    assert "5 stored cases take 1.0 kB each" in one.text()


def test_cases_that_do_not_fit_a_worker_are_counted_out() -> None:
    cases = todo(2) | {("d", "big"): todo(1, edge=2_000_000)["d", "s0"]}
    one = estimate_preprocess(cases, 3, SMALL, 2, LIMIT, "/store")
    assert (one.todo, one.refused, one.scans) == (3, 1, 6)
    assert BASE_BYTES < one.memory_bytes < LIMIT
    assert "1 cases above it are refused" in one.text()


def test_requests_are_counted_by_place() -> None:
    assert estimate_preprocess(todo(10, "s3://b"), 10, SMALL, 2, LIMIT, "/store").requests == 30
    assert estimate_preprocess(todo(10), 10, SMALL, 2, LIMIT, "s3://b/s.zarr").requests == 70
    assert estimate_preprocess(todo(10, "s3://b"), 10, SMALL, 2, LIMIT, "s3://b/s.zarr").requests == 100


def test_nothing_to_do() -> None:
    text = estimate_preprocess({}, 7, SMALL, 2, LIMIT, "/store").text()
    assert text == "nothing to do: all 7 cases are in the store or in quarantine"


def test_words() -> None:
    assert [human_bytes(n) for n in (0, 999, 1500, 3_200_000_000_000_000)] == ["0 B", "999 B", "1.5 kB", "3200.0 TB"]
    assert [human_seconds(n) for n in (0.1, 89, 600, 12_000)] == ["1 s", "89 s", "10 min", "3 h 20 min"]


@pytest.mark.parametrize("checksums", [False, True])
def test_a_catalog_is_estimated_without_writing(tmp_path: Path, checksums: bool) -> None:
    sources = [LAYOUTS[name](tmp_path / name) for name in ("tree", "dicom")]
    before = sorted(tmp_path.rglob("*"))
    text = estimate_catalog(sources, str(tmp_path / "ws"), checksums)
    assert sorted(tmp_path.rglob("*")) == before
    assert "demo (tree): 7 files, " in text
    assert f"from reading 7 {'checksums' if checksums else 'headers'} with" in text
    assert "demo (dicom): 7 series to convert, " in text
    assert "S3 requests  0 (nothing lies on S3)" in text
    assert text.endswith("Nothing was started.")


@pytest.mark.full
def test_requests_of_a_catalog_on_s3(tmp_path: Path, s3_url: str) -> None:
    from infra import storage

    source = LAYOUTS["tree"](tmp_path)
    for path in tmp_path.rglob("*.*"):
        storage.write_bytes(storage.join(s3_url, str(path.relative_to(tmp_path))), path.read_bytes())
    text = estimate_catalog([source.replace(root=s3_url)], str(tmp_path / "ws"))
    assert "S3 requests  8\n" in text


def test_functional_files_cost_only_where_connectomes_are_made_of_them():
    bold = Scan(
        dataset="d", subject="s", case="s", modality="bold", path="s3://b/bold.nii.gz", size_bytes=10**8,
        shape=(97, 115, 97, 200), spacing_mm=(2.0, 2.0, 2.0), dtype="int16",
    )  # fmt: skip
    spec = SPECS["cinp_tiny"]

    def estimate(settings):
        return estimate_preprocess({("d", "s"): [bold]}, 1, settings, 1, 8 << 30, "s3://b/s.zarr")

    made, plain = estimate(spec), estimate(spec.replace(connectome=None))
    assert made.seconds > 5
    assert made.disk_bytes == 4 * 68**2
    assert made.requests == plain.requests + 2
    assert (plain.scans, plain.read_bytes, plain.disk_bytes) == (0, 0, 0)
    assert plain.seconds < 1
