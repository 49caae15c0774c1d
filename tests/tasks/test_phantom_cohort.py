"""A cohort on disk: layouts, determinism, resume after any interruption, broken files."""

import gzip
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest

from models.records import Reason
from tasks.phantom import DEMO, TINY, DifferentCohortError, write_cohort
from tasks.phantom.cohort import list_jobs, read_marker, write_subject
from tasks.phantom.faults import list_faults
from tasks.phantom.picture import draw_picture

CONFIG = TINY.replace(bids_subjects=4, datalist_subjects=4, spacing_mm=7.0, broken=True)
BIDS_NAME = re.compile(r"^sub-[a-zA-Z0-9]+(_[a-z]+-[a-zA-Z0-9]+)*_(T1w|T2w|FLAIR|PDw|angio|dwi|dseg)\.nii\.gz$")

KILL_AFTER = """
import os, signal, sys
from pathlib import Path
from tasks.phantom import PhantomConfig, write_cohort

def progress(done, total):
    print(done, flush=True)
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    config = PhantomConfig.model_validate_json(Path(sys.argv[1]).read_text())
    write_cohort(config, sys.argv[2], progress, processes=int(sys.argv[4]))
"""


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def times(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cohort")
    write_cohort(CONFIG, root)
    return root


def killed_run(root: Path, work: Path, after: int, processes: int) -> None:
    script, config = work / "run.py", work / "config.json"
    script.write_text(KILL_AFTER)
    config.write_text(CONFIG.model_dump_json())
    command = [sys.executable, str(script), str(config), str(root), str(after), str(processes)]
    done = subprocess.run(command, check=False, capture_output=True, cwd=work)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_progress_counts_subjects_and_a_second_call_writes_nothing(cohort: Path) -> None:
    before = times(cohort)
    seen: list[tuple[int, int]] = []
    write_cohort(CONFIG, cohort, lambda done, total: seen.append((done, total)))
    assert seen == [(13, 13)]
    assert times(cohort) == before


def test_killed_and_resumed_is_identical_and_rewrites_nothing(cohort: Path, tmp_path: Path) -> None:
    root = tmp_path / "killed"
    killed_run(root, tmp_path, after=5, processes=1)
    assert not (root / "cohort.json").exists()
    # As if the kill had struck inside a subject: some files, no marker, a temporary file.
    half = list_jobs(CONFIG)[0].place
    (root / half.marker).unlink()
    (root / half.scan("t2")).unlink()
    (root / half.scan("t2")).with_name(".sub-0001_T2w.nii.gz.abc.tmp").write_bytes(b"half")
    before = times(root)
    write_cohort(CONFIG, root)
    assert contents(root) == contents(cohort)
    after = times(root)
    assert {name: after[name] for name in before if name in after} == {
        name: value for name, value in before.items() if not name.endswith(".tmp")
    }


def test_the_number_of_processes_changes_nothing(cohort: Path, tmp_path: Path) -> None:
    write_cohort(CONFIG, tmp_path, processes=2)
    assert contents(tmp_path) == contents(cohort)


@pytest.mark.full
def test_workers_die_with_a_killed_parent_and_the_rest_is_completed(cohort: Path, tmp_path: Path) -> None:
    root = tmp_path / "killed"
    killed_run(root, tmp_path, after=4, processes=2)
    marker = str(tmp_path / "run.py")
    mine = [p for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or [])]
    _, alive = psutil.wait_procs(mine, timeout=30)
    assert not alive
    write_cohort(CONFIG, root, processes=2)
    assert contents(root) == contents(cohort)


def test_a_subject_does_not_depend_on_the_others(cohort: Path, tmp_path: Path) -> None:
    job = list_jobs(CONFIG.replace(bids_subjects=40, broken=False))[2]
    write_subject(CONFIG, tmp_path, job)
    for path in read_marker(tmp_path, job.place)["images"]:
        assert (tmp_path / path).read_bytes() == (cohort / path).read_bytes()


def test_another_config_is_refused_with_what_differs(cohort: Path) -> None:
    with pytest.raises(
        DifferentCohortError, match=r"another config \(seed: 7 there, 8 wanted\); choose another folder"
    ):
        write_cohort(CONFIG.replace(seed=8), cohort)
    with pytest.raises(ValueError, match="processes must be 1 or more, got 0"):
        write_cohort(CONFIG, cohort, processes=0)


def test_cohort_json_names_the_config(cohort: Path) -> None:
    content = json.loads((cohort / "cohort.json").read_text())
    assert content["config_digest"] == CONFIG.content_digest()
    assert content["subjects"] == 13


def test_bids_names_parse_and_participants_match_folders(cohort: Path) -> None:
    root = cohort / "phantom-bids"
    for path in root.rglob("*.nii.gz"):
        assert BIDS_NAME.match(path.name), path.name
        assert path.name.startswith(path.parts[-3] + "_"), path
    table = pd.read_csv(root / "participants.tsv", sep="\t")
    assert list(table) == ["participant_id", "age", "sex", "site", "diagnosis", "control_group", "lesion"]
    assert set(table.participant_id) == {path.name for path in root.glob("sub-*")}
    assert set(table.diagnosis) <= {"control", "patient"}
    assert json.loads((root / "dataset_description.json").read_text())["DatasetType"] == "raw"


def test_tumour_masks_and_no_others_are_where_labels_are_looked_for(cohort: Path) -> None:
    table = pd.read_csv(cohort / "phantom-bids/participants.tsv", sep="\t").set_index("participant_id")
    masks = sorted((cohort / "phantom-bids/derivatives").rglob("*_dseg.nii.gz"))
    assert [path.parts[-3] for path in masks] == sorted(table.index[table.lesion == "tumour"])
    others = sorted((cohort / "phantom-bids/sourcedata").rglob("*_dseg.nii.gz"))
    tissues = [path for path in others if path.parts[-4] == "masks-tissues"]
    assert [path.parts[-3] for path in tissues] == sorted(table.index), "of everybody"
    for path in others:
        values = {0, 1, 2, 3} if path in tissues else {0, 1}
        assert set(np.unique(np.asarray(nib.load(path).dataobj))) == values


def test_masks_lie_on_the_grid_of_the_reference_scan(cohort: Path) -> None:
    broken = {row["subject"] for row in json.loads((cohort / "broken.json").read_text())}
    for job in list_jobs(CONFIG):
        marker = read_marker(cohort, job.place)
        if not marker["label"] or job.place.subject in broken:
            continue
        order = [job.place.scan(name) for name in ("t1", "t1c", "flair", "t2") if _named(job.place, name)]
        reference = nib.load(cohort / next(path for path in order if path in marker["images"]))
        mask = nib.load(cohort / marker["label"])
        assert mask.shape == reference.shape
        np.testing.assert_array_equal(mask.affine, reference.affine)


def _named(place: object, modality: str) -> bool:
    try:
        return bool(place.scan(modality))  # type: ignore[attr-defined]
    except KeyError:
        return False


def test_datalist_is_well_formed(cohort: Path) -> None:
    root = cohort / "phantom-16k"
    content = json.loads((root / "dataset.json").read_text())
    assert set(content) == {"training", "validation"}
    entries = content["training"] + content["validation"]
    assert len(entries) == 5
    broken = {row["file"] for row in json.loads((cohort / "broken.json").read_text())}
    for entry in entries:
        for path in [*entry["image"], *([entry["label"]] if "label" in entry else [])]:
            assert not Path(path).is_absolute()
            assert (root / path).exists() == (f"phantom-16k/{path}" not in broken)
    sizes = sorted(len(entry["image"]) for entry in entries)
    assert sizes == [4, 4, 4, 4, 6]
    tokens = {path.removesuffix(".nii.gz").replace("-", "_").rsplit("_", 1)[1] for e in entries for path in e["image"]}
    assert tokens == {"flair", "t1", "t1ce", "t2", "ADC", "DWI", "FLAIR", "T1", "T1c", "T2", "MRA", "PD"}


def test_latents_have_every_subject_and_the_ceiling_variables(cohort: Path) -> None:
    for name in ("phantom-bids", "phantom-16k"):
        latents = pd.read_parquet(cohort / name / "latents.parquet")
        table = pd.read_csv(cohort / name / "participants.tsv", sep="\t")
        assert list(latents.subject) == list(table.participant_id)
        assert {"ventricle_log", "grey_loss", "medial_temporal_ml", "lesion_ml", "broken"} <= set(latents)
        assert np.isfinite(latents.select_dtypes("number")).all().all()
        assert (latents.jacobian_min > 0).all()


def test_broken_files_are_broken_as_listed(cohort: Path) -> None:
    rows = json.loads((cohort / "broken.json").read_text())
    assert {row["reason"] for row in rows} <= {reason.value for reason in Reason}
    files = {row["fault"]: cohort / row["file"] for row in rows}
    assert len(files) == 5
    with pytest.raises(EOFError), gzip.open(files["truncated gzip"]) as stream:
        stream.read()
    assert nib.load(files["truncated gzip"]).ndim == 3
    values = nib.load(files["NaN voxels"]).get_fdata()
    assert 0.25 < np.isnan(values).mean() < 0.4
    assert nib.load(files["two volumes"]).shape[3:] == (2,)
    assert not files["absent file"].exists()
    mask = files["label of another shape"]
    scan = next((cohort / "phantom-bids" / mask.parts[-3] / "anat").glob("*_T1w.nii.gz"))
    assert nib.load(mask).shape != nib.load(scan).shape


def test_every_other_file_reads_to_its_end(cohort: Path) -> None:
    broken = {cohort / row["file"] for row in json.loads((cohort / "broken.json").read_text())}
    for path in set(cohort.rglob("*.nii.gz")) - broken:
        image = nib.load(path)
        values = image.get_fdata()
        assert values.ndim == 3
        assert np.isfinite(values).all()
        assert values.max() > 0


def test_files_carry_no_time_stamp(cohort: Path) -> None:
    path = next(cohort.rglob("*_T1w.nii.gz"))
    assert path.read_bytes()[4:8] == b"\0\0\0\0"


def test_faults_have_subjects_of_their_own_that_more_subjects_do_not_move() -> None:
    faults = list_faults(DEMO)
    assert len({fault.place.subject for fault in faults}) == 5
    assert [f.file for f in faults] == [f.file for f in list_faults(DEMO.replace(bids_subjects=500))]
    assert list_faults(DEMO.replace(broken=False)) == ()
    jobs = list_jobs(DEMO)
    assert len(jobs) == DEMO.bids_subjects + DEMO.datalist_subjects + 5
    assert len({job.place for job in jobs}) == len(jobs)


def test_the_catalog_sees_what_was_written(cohort: Path) -> None:
    """The layouts are those that the sources of the catalog read: same subjects, modalities and labels."""
    from tasks.sources import BidsSource, DatalistSource, find_scans

    sources: tuple[BidsSource | DatalistSource, ...] = (
        BidsSource(dataset="phantom-bids", root=str(cohort / "phantom-bids"), label_scheme="brats2023"),
        DatalistSource(dataset="phantom-16k", root=str(cohort / "phantom-16k"), label_scheme="brats2021"),
    )
    for index, source in enumerate(sources):
        found = find_scans(source)
        assert {scan.status for scan in found.scans} == {"ok"}
        expected = set()
        for job in list_jobs(CONFIG):
            if job.place.dataset == index:
                marker = read_marker(cohort, job.place)
                tumour = marker["traits"]["lesion"] == "tumour"
                expected |= {str(cohort / path) for path in [*marker["images"], *([marker["label"]] if tumour else [])]}
        assert {scan.path for scan in found.scans} == expected
        assert {scan.subject for scan in found.scans} == set(found.phenotypes.subject)


def test_picture_is_a_png(cohort: Path) -> None:
    assert draw_picture(CONFIG, cohort).startswith(b"\x89PNG")
