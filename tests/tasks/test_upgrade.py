"""A store of every schema is kept or can be made; older ones are upgraded, newer ones refused.

`golden/store_schema1.zip` was written when schema 1 was the newest. A new schema gets a step in models.store_schema, a
store of its own beside it, and the store of schema 1 must still end with the digest below.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from brainloom.cli import app
from models import store_schema
from models.store import StoreError, open_store, open_writer, store_digest
from models.store_layout import SCHEMA
from tasks.lease import Lease, LeaseError
from tasks.upgrade import Upgraded, upgrade
from tasks.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden" / "store_schema1.zip"
DIGEST = "b51baaf5e315e82167cf2fa27c386fc7a74c7b2a02f0f6f3e219f9cf3d4bb857"


@pytest.fixture
def golden(tmp_path: Path) -> str:
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(tmp_path / "s.zarr")
    return str(tmp_path / "s.zarr")


@pytest.fixture
def older(golden: str) -> str:
    """Return the store as schema 0 had it: no array `stored`."""
    shutil.rmtree(Path(golden) / "toy" / "stored")
    write_schema(golden, 0)
    return golden


def write_schema(url: str, schema: object) -> None:
    root = Path(url) / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["brainloom"]["schema"] = schema
    document["consolidated_metadata"]["metadata"].pop("toy/stored", None)
    root.write_text(json.dumps(document))


def test_the_golden_store_of_the_first_schema_reads_as_it_was_written(golden: str) -> None:
    upgrade(golden)
    assert store_digest(golden) == DIGEST
    assert verify(golden, deep=True) == []
    data = open_store(golden).dataset("toy")
    assert [data.case_info(row).case for row in data.rows] == ["a", "b"]
    assert data.read_case(0)[1] is not None


def test_an_older_store_is_refused_until_it_is_upgraded(older: str) -> None:
    words = rf"has store schema 0; this version reads schema {SCHEMA}: run `brainloom store upgrade .*s.zarr`"
    for opened in (open_store, open_writer):
        with pytest.raises(StoreError, match=words):
            opened(older)
    done = CliRunner().invoke(app, ["store", "upgrade", older])
    assert done.output.strip().replace("\n", "").endswith(f"schema 0 -> {SCHEMA}")
    assert store_digest(older) == DIGEST
    assert verify(older, deep=True) == []
    import xarray

    assert xarray.open_zarr(older, group="toy").stored.values.tolist() == [True, True]
    assert upgrade(older) == Upgraded(SCHEMA, SCHEMA)


def test_a_killed_upgrade_is_completed_by_the_next(older: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(url: str) -> None:
        store_schema.add_stored(url)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(store_schema.STEPS, 0, killed)
        with pytest.raises(KeyboardInterrupt):
            upgrade(older)
    with pytest.raises(StoreError, match="has store schema 0"):
        open_store(older)
    with Lease(older, "nightly ingest"), pytest.raises(LeaseError, match="is being written by 'nightly ingest'"):
        upgrade(older)
    assert upgrade(older) == Upgraded(0, SCHEMA)
    assert verify(older, deep=True) == []


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (SCHEMA + 1, "a newer brainloom wrote it; install that version, or preprocess into a new store"),
        (-1, "knows no way from schema -1 to 0; preprocess again"),
        ("1", "a schema is a whole number: restore zarr.json from a backup"),
        (True, "a schema is a whole number"),
        (None, "a schema is a whole number"),
    ],
)
def test_what_this_version_cannot_read_is_refused_and_left(golden: str, schema: object, words: str) -> None:
    write_schema(golden, schema)
    before = (Path(golden) / "zarr.json").read_bytes()
    for refused in (open_store, upgrade):
        with pytest.raises(StoreError, match=words):
            refused(golden)
    assert (Path(golden) / "zarr.json").read_bytes() == before


def test_there_is_a_step_from_every_schema() -> None:
    assert sorted(store_schema.STEPS) == list(range(SCHEMA))
