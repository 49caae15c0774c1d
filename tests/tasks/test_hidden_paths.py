"""A store that hides paths: nothing in it tells where its sources lie, and all that is done with it still works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nifti_files import SMALL, write_case
from store_builds import catalog_of, scans_of
from typer.testing import CliRunner

from brainloom.cli import app
from flows.preprocess import plan_work
from flows.preprocess_params import PreprocessParams, check_store, rows_to_repair
from infra import storage
from infra.settings import Settings
from models.records import Reason, Scan, SelectedCase
from models.spec import SPECS
from models.store import StoreError, create_or_open, open_store, store_digest
from tasks import hidden_paths, receipts, shards
from tasks.catalog import left_out, mark_duplicates, rows_digest
from tasks.export_nifti import export_cases
from tasks.forget import forget
from tasks.native_truth import SourceLabels
from tasks.preprocess import preprocess_batch
from tasks.qc import quarantine_table
from tasks.qc_content import gather
from tasks.qc_report import qc_page, report_urls, write_qc
from tasks.scores import ScoreError
from tasks.verify import verify

KEY = "a key that nobody guesses"
PLANTED = ("doe^jane", "mrn4711", "ward7", "smith^john", "mrn0815")
"""Pieces of folders and file names that must be nowhere."""


@pytest.fixture
def scans(tmp_path: Path) -> list[Scan]:
    """Return the catalog of three cases with labels, whose folders and names tell too much; one is broken."""
    found = []
    for number, name in enumerate("abc"):
        folder = tmp_path / "ward7" / f"doe^jane-{name}"
        for modality, path in write_case(tmp_path / "plain", name, number, label=True).items():
            moved = folder / f"mrn4711_{name}_{modality}.nii.gz"
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
            if (name, modality) == ("c", "t1"):
                moved.write_bytes(moved.read_bytes()[:-20])
            found += scans_of({modality: moved}, name)
    return found


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scans: list[Scan]) -> PreprocessParams:
    monkeypatch.setenv("BRAINLOOM_PATH_KEY", KEY)
    monkeypatch.setitem(SPECS, "small", SMALL)
    store, catalog = str(tmp_path / "hidden.zarr"), catalog_of(tmp_path / "ws", scans)
    return PreprocessParams(catalog=catalog, store=store, spec="small", hide_paths=True)


def outs(first: Scan) -> list[Scan]:
    """Return what a catalog left out: a file of the same case as the first scan, which its words name, and others."""
    again = first.replace(path=str(Path(first.path).parents[1] / "smith^john" / "mrn0815_t1.nii.gz"))
    relative = "/".join(Path(again.path).parts[-3:])
    odd = again.replace(case="ward7", subject="ward7", modality="")
    return [
        left_out(first.replace(modality="t2"), Reason.UNREADABLE, f"{first.path} is cut"),
        *mark_duplicates([first, again.replace(modality=first.modality)])[1:],
        left_out(again.replace(modality="mrn0815"), Reason.UNKNOWN_MODALITY, f"{relative}: unknown token mrn0815"),
        left_out(odd, Reason.UNMATCHED, f"{relative} matches none of: {{subject}}/{{modality}}.nii.gz"),
        left_out(odd, Reason.OUTSIDE_ROOT, f"ward7 links to {again.path}, outside the root"),
        left_out(odd, Reason.BAD_ID, "subject 'doe^jane/x': write 1 to 64 characters"),
    ]


def build(params: PreprocessParams, scans: list[Scan], token: str = "t") -> int:
    """Bring the store up to date as the flow does, without Dask; return how many cases there were to do."""
    url, spec = check_store(params)
    key = {"path_key": hidden_paths.key_name(KEY)} if params.hide_paths else None
    work = plan_work(create_or_open(url, spec, key), scans, {}, params)
    preprocess_batch(url, [case.model_dump(mode="json") for case in work.todo], token)
    shards.finalise(url, work.current, work.repaired)
    return len(work.todo)


def everything(url: str) -> str:
    """Return all bytes below a store's folder and beside it that belong to it, and all names."""
    quality = [storage.read_bytes(one).decode("latin-1") for one in report_urls(url)]
    names = sorted(storage.find(url))
    return "\n".join([*names, *quality, *(storage.read_bytes(f"{url}/{name}").decode("latin-1") for name in names)])


def test_nothing_in_a_store_tells_where_its_sources_lie(params: PreprocessParams, scans: list[Scan]) -> None:
    assert build(params, scans) == 3
    table = quarantine_table(params.store, [*scans, *outs(scans[0])])
    assert [(row["case"], row["file"], row["reason"], row["detail"]) for row in table[:-1]] == [
        ("a", "the t2 file", Reason.UNREADABLE, "see the catalog"),
        ("a", "the t1 file", Reason.DUPLICATE_SCAN, "see the catalog"),
        ("a", "a file", Reason.UNKNOWN_MODALITY, "see the catalog"),
        ("", "a file", Reason.UNMATCHED, "see the catalog"),
        ("", "a file", Reason.OUTSIDE_ROOT, "see the catalog"),
        ("", "a file", Reason.BAD_ID, "see the catalog"),
    ]
    assert (table[-1]["case"], table[-1]["file"], table[-1]["reason"]) == ("c", "the t1 file", "unreadable")
    assert "truncated" in table[-1]["detail"]
    quality = gather(params.store, table)
    page = qc_page(quality, write_qc(params.store, quality)[0])
    found = everything(params.store) + page + json.dumps(table)
    assert [piece for piece in PLANTED if piece in found] == []
    assert "hmac-sha256:" in found
    assert KEY not in found
    assert verify(params.store, deep=True) == []


def test_a_plan_gives_no_means_to_try_guesses_of_paths(params: PreprocessParams, scans: list[Scan]) -> None:
    build(params, scans)
    (name,) = [name for name in storage.find(params.store) if name.startswith("_build/plan-")]
    said = storage.read_json(f"{params.store}/{name}")["catalog_digest"]
    assert said == hidden_paths.alias_of(rows_digest(scans), KEY)
    assert rows_digest(scans) not in everything_but_quality(params.store)


def test_voxels_and_digest_are_those_of_the_plain_store(params: PreprocessParams, scans: list[Scan]) -> None:
    plain = params.model_copy(update={"store": params.store.replace("hidden", "plain"), "hide_paths": False})
    build(params, scans)
    build(plain, scans)
    assert store_digest(params.store) == store_digest(plain.store)
    assert "doe^jane" in storage.read_bytes(receipts.receipt_url(plain.store, "toy", 0)).decode()


def test_moved_changed_and_damaged_sources_are_told_apart(params: PreprocessParams, scans: list[Scan]) -> None:
    build(params, scans)
    assert build(params, scans) == 0
    plans = [name for name in storage.find(params.store) if name.startswith("_build/plan-")]
    moved = [scan.replace(path=scan.path.replace("mrn4711", "other")) for scan in scans]
    assert build(params, moved) == 0
    assert len([n for n in storage.find(params.store) if n.startswith("_build/plan-")]) == len(plans) + 1

    storage.delete(f"{params.store}/toy/image/c/1")
    assert rows_to_repair(params.store, repair=True) == {("toy", 1)}
    assert build(params.model_copy(update={"repair": True}), scans, "again") == 1
    assert verify(params.store, deep=True) == []

    changed = [scan.replace(etag="new") if (scan.case, scan.modality) == ("a", "t1") else scan for scan in scans]
    assert build(params, changed, "changed") == 1
    assert open_store(params.store).dataset("toy").rows == [1, 3]
    assert "mrn4711" not in everything_but_quality(params.store)


def everything_but_quality(url: str) -> str:
    return "\n".join(storage.read_bytes(f"{url}/{name}").decode("latin-1") for name in storage.find(url))


def test_the_catalog_alone_leads_back(params: PreprocessParams, scans: list[Scan], tmp_path: Path) -> None:
    build(params, scans)
    run = CliRunner().invoke(app, ["store", "sources", params.store, "--catalog", params.catalog, "--case", "toy/b"])
    assert run.output.splitlines() == [
        f"toy/b (row 1)  {scan.modality}  {scan.path}"
        for scan in sorted((scan for scan in scans if scan.case == "b"), key=lambda scan: scan.modality)
    ]
    others = [scan.replace(etag="new") for scan in scans if scan.case != "a"]
    found = {row["case"]: row["found"] for row in hidden_paths.identified(params.store, others)}
    assert found == {"a": "not in the catalog", "b": "changed", "c": "changed"}
    (image, *_) = export_cases(params.store, ["toy/a"], tmp_path / "out", native=True)
    assert image.is_file()

    case = SelectedCase(dataset="toy", row=0, case="a", subject="a", digest="", role="test")
    with pytest.raises(ScoreError, match=r"hidden\.zarr hides the paths of its sources \(hide_paths\).*native_scores"):
        SourceLabels(open_store(params.store)).check([case])

    forget(params.store, "toy", "a")
    assert [row["case"] for row in hidden_paths.identified(params.store, scans) if row["case"] == "a"] == []


def test_a_store_is_continued_the_way_it_was_begun(
    params: PreprocessParams, scans: list[Scan], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(params, scans[:4])
    with pytest.raises(StoreError, match="hides the paths of its sources; set hide_paths, and BRAINLOOM_PATH_KEY"):
        check_store(params.model_copy(update={"hide_paths": False}))
    plain = params.model_copy(update={"store": params.store.replace("hidden", "plain"), "hide_paths": False})
    build(plain, scans[:4])
    with pytest.raises(StoreError, match=r"begun with plain paths, .* hide_paths needs a new store"):
        check_store(plain.model_copy(update={"hide_paths": True}))
    monkeypatch.setenv("BRAINLOOM_PATH_KEY", "another key of some length")
    with pytest.raises(StoreError, match=r"under another key: BRAINLOOM_PATH_KEY is key [0-9a-f]{16}, the store was"):
        check_store(params)
    monkeypatch.delenv("BRAINLOOM_PATH_KEY")
    with pytest.raises(ValueError, match="hide_paths needs a key: set BRAINLOOM_PATH_KEY or BRAINLOOM_PATH_KEY_FILE"):
        check_store(params)
    with pytest.raises(ValueError, match="path_key has 5 characters, 16 are needed"):
        Settings(path_key="short")


def test_texts_say_the_modality_in_place_of_a_name() -> None:
    files = [("/w/doe/mrn_t1.nii.gz", "t1"), ("/w/doe/flair.nii.gz", "flair")]
    text = "mrn_t1.nii.gz: cut at 5; mrn_t1 of /w/doe has no flair.nii.gz, only flair; /w/doe/mrn_t1.nii.gz too"
    assert hidden_paths.without_names(text, files) == (
        "the t1 file: cut at 5; the t1 file of its folder has no the flair file, only flair; the t1 file too"
    )
    assert hidden_paths.without_names("cut", []) == "cut"


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        (
            "/w/doe/mrn.4711.t1.nii.gz",
            "mrn.4711.t1: cut; mrn.4711.t1.nii; mrn.4711",
            "the t1 file: cut; the t1 file; the t1 file",
        ),
        ("/w/doe/a.nii.gz", "a.nii.gz: a flat image, in /w/doe", "the t1 file: a flat image, in its folder"),
        ("/w/doe/mrn.nii.gz", "/mnt/w/doe/mrn.nii.gz, w/doe/x.json", "/mnt/the t1 file, its folder/x.json"),
    ],
)
def test_names_with_dots_short_names_and_ends_of_paths_are_found(path: str, text: str, said: str) -> None:
    assert hidden_paths.without_names(text, [(path, "t1")]) == said
