from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from store_builds import ingest, shard_of, three_subjects

from flows.verify import VerifyError, VerifyParams, kind_of, summary, verify
from infra import storage
from infra.server import ServerInfo, request_json
from tasks.verify import verify as verify_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return a sound store and one with a flipped bit in the image of case b."""
    folder = tmp_path_factory.mktemp("stores")
    scans = three_subjects(folder)
    sound, broken = str(folder / "sound.zarr"), str(folder / "broken.zarr")
    for url in (sound, broken):
        ingest(url, scans)
    path = shard_of(broken, 1)
    body = bytearray(storage.read_bytes(path))
    body[len(body) // 2] ^= 1
    storage.write_bytes(path, bytes(body))
    return sound, broken


def test_sound_stores_pass_and_a_wrong_digest_fails_after_all_were_read(stores: tuple[str, str]) -> None:
    sound, broken = stores
    assert verify.fn(VerifyParams(stores=[sound])) == {"stores": [sound], "deep": True, "problems": 0}
    assert verify.fn(VerifyParams(stores=[broken], deep=False))["problems"] == 0
    with pytest.raises(
        VerifyError, match=r"(?s)1 problems in 1 of 2 stores, 0 are allowed; run preprocess with repair"
    ):
        verify.fn(VerifyParams(stores=[broken, sound]))


def test_a_store_that_is_not_there_hides_no_other(stores: tuple[str, str], tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.zarr")
    with pytest.raises(VerifyError, match=r"(?s)2 problems in 2 of 2 stores.*absent\.zarr: the store cannot be read"):
        verify.fn(VerifyParams(stores=[absent, stores[1]]))


def test_no_case_is_named_where_subjects_must_not_be(stores: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.artifacts.pictures_allowed", lambda: False)
    with pytest.raises(VerifyError) as refused:
        verify.fn(VerifyParams(stores=[stores[1]]))
    assert "toy/b" not in str(refused.value)
    assert f"1 in {stores[1]}: " in str(refused.value)


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        ("toy/sub-0042 (row 1): digest of the voxels is 0123456789ab, receipt says x", "digest of the voxels is"),
        ("toy/a b (row 12): receipt: it is missing", "receipt"),
        ("store digest: it is 00ff00ff00, but 1 was finalised", "store digest"),
    ],
)
def test_the_kind_of_a_problem_names_no_case(problem: str, kind: str) -> None:
    assert kind_of(problem) == kind


def test_the_page_has_a_line_per_store() -> None:
    page = summary({"a.zarr": [], "b.zarr": ["toy/b (row 1): x"]}, deep=True)
    assert page.endswith("- `a.zarr`: sound\n- `b.zarr`: **1 problems**")
    assert "toy/b" not in page


def test_no_store_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least 1 item"):
        VerifyParams(stores=[])


@pytest.mark.full
def test_a_failed_flow_run_leaves_page_and_table(stores: tuple[str, str], prefect_server: ServerInfo) -> None:
    with pytest.raises(VerifyError):
        verify(VerifyParams(stores=list(stores)))
    api = prefect_server.api_url
    (run,) = request_json(f"{api}/flow_runs/filter", {"flows": {"name": {"any_": ["verify"]}}})
    assert (run["name"], run["state_name"]) == ("verify sound.zarr, broken.zarr", "Failed")
    found = request_json(f"{api}/artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    by_key = {one["key"]: one for one in found}
    assert "**1 problems**" in by_key["verify"]["data"]
    assert verify_store(stores[1], deep=True)[0].split(": ")[0] in by_key["verify-problems"]["data"]
