from __future__ import annotations

from contextlib import suppress

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.records import MODALITIES, Reason, UnknownModalityError
from tasks.sources import BidsSource, find_scans
from tasks.sources.bids_names import BidsName, mask_kind, parse_name
from tasks.sources.bids_names import modality_of as modality_in


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.int16), np.eye(4)), path)


PLAIN = BidsSource(dataset="demo", root=".")


def modality_of(name: BidsName) -> str:
    return modality_in(name, PLAIN)


def rows(root, **fields):
    found = find_scans(BidsSource(dataset="demo", root=str(root), **fields))
    return [(scan.case, scan.modality, scan.path.rsplit("/", 1)[-1]) for scan in found.scans if scan.status == "ok"]


def outcasts(root):
    scans = find_scans(BidsSource(dataset="demo", root=str(root))).scans
    return [(scan.reason, scan.detail) for scan in scans if scan.status != "ok"]


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("sub-1_T1w.nii.gz", "t1"),
        ("sub-1_ses-2_run-1_T2w.nii", "t2"),
        ("sub-1_FLAIR.nii.gz", "flair"),
        ("sub-1_PDw.nii.gz", "pd"),
        ("sub-1_angio.nii.gz", "mra"),
        ("sub-1_dwi.nii.gz", "dwi"),
        ("sub-1_ADC.nii.gz", "adc"),
        ("sub-1_adc.nii.gz", "adc"),
        ("sub-1_desc-adc_dwi.nii.gz", "adc"),
        ("sub-1_desc-ADC_dwi.nii.gz", "adc"),
        ("sub-1_ce-gadolinium_T1w.nii.gz", "t1c"),
        ("sub-1_ce-gd_part-mag_T1w.nii.gz", "t1c"),
    ],
)
def test_suffixes(name, modality):
    assert modality_of(parse_name(name)) == modality


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sub-1_T2starw.nii.gz", "unknown modality token 'T2starw'; known tokens: "),
        ("sub-1_ce-gd_FLAIR.nii.gz", r"contrast-enhanced FLAIR \(ce-gd\) has no modality of its own"),
        ("sub-1_part-phase_T1w.nii.gz", "part-phase is not a magnitude image"),
    ],
)
def test_unknown_suffixes(name, text):
    with pytest.raises(UnknownModalityError, match=text):
        modality_of(parse_name(name))


label = st.text("abcxyzABC0123456789", min_size=1, max_size=8)


@given(
    st.dictionaries(st.sampled_from(["sub", "ses", "acq", "run", "rec", "desc"]), label),
    st.sampled_from(["T1w", "T2w", "FLAIR", "PDw", "angio", "dwi", "ADC"]),
)
def test_names_come_apart_as_they_were_put_together(entities, suffix):
    text = "_".join([*(f"{key}-{value}" for key, value in entities.items()), suffix])
    name = parse_name(f"sub-x/anat/{text}.nii.gz")
    assert (name.entities, name.suffix) == (entities, suffix)
    assert modality_of(name) in MODALITIES


@given(st.text(max_size=40))
def test_any_name_has_a_modality_or_a_reason(text):
    with suppress(UnknownModalityError):
        assert modality_of(parse_name(text)) in (*MODALITIES, "bold", "gm")


def test_a_tree(tmp_path):
    put(
        tmp_path,
        "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz",
        "sub-01/anat/sub-01_T1w.nii",
        "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz",
        "sub-01/dwi/sub-01_dwi.nii.gz",
        "sub-01/func/sub-01_task-rest_bold.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
        "derivatives/masks/sub-01/anat/sub-01_label-lesion_mask.nii.gz",
        "derivatives/masks/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
        "derivatives/other/sub-02/ses-a/anat/sub-02_ses-a_dseg.nii.gz",
        "derivatives/other/sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz",
    )
    (tmp_path / "sub-01/anat/sub-01_T1w.json").write_text("{}")
    (tmp_path / "sub-01/anat/.DS_Store").write_text("")
    assert sorted(rows(tmp_path)) == [
        ("sub-01", "brain_mask", "sub-01_desc-brain_mask.nii.gz"),
        ("sub-01", "dwi", "sub-01_dwi.nii.gz"),
        ("sub-01", "label", "sub-01_label-lesion_mask.nii.gz"),
        ("sub-01", "t1", "sub-01_T1w.nii"),
        ("sub-01", "t1c", "sub-01_ce-gadolinium_T1w.nii.gz"),
        ("sub-02_ses-a", "label", "sub-02_ses-a_dseg.nii.gz"),
        ("sub-02_ses-a", "t1", "sub-02_ses-a_T1w.nii.gz"),
        ("sub-02_ses-b", "t1", "sub-02_ses-b_T1w.nii.gz"),
    ]
    assert outcasts(tmp_path) == []
    assert "label" not in [modality for _, modality, _ in rows(tmp_path, derivatives="")]
    assert ("sub-01", "bold", "sub-01_task-rest_bold.nii.gz") in rows(tmp_path, datatypes=("func",))


def test_runs_come_in_natural_order(tmp_path):
    put(tmp_path, *(f"sub-1/anat/sub-1_run-{run}_T1w.nii.gz" for run in (10, 2, 1)))
    assert [name for *_, name in rows(tmp_path)] == [f"sub-1_run-{run}_T1w.nii.gz" for run in (1, 2, 10)]


def test_an_unknown_suffix_is_reported_with_its_file(tmp_path):
    put(tmp_path, "sub-1/anat/sub-1_T2starw.nii.gz")
    ((reason, detail),) = outcasts(tmp_path)
    assert reason == Reason.UNKNOWN_MODALITY
    assert detail.startswith("sub-1/anat/sub-1_T2starw.nii.gz: unknown modality token 'T2starw'")


def test_links_out_of_the_root_are_refused(tmp_path):
    put(tmp_path, "out/sub-1_T1w.nii.gz", "root/sub-1/anat/sub-1_T2w.nii.gz", "root/.annex/x.nii.gz")
    root = tmp_path / "root"
    (root / "sub-1/anat/sub-1_T1w.nii.gz").symlink_to(tmp_path / "out/sub-1_T1w.nii.gz")
    (root / "sub-1/anat/sub-1_FLAIR.nii.gz").symlink_to("../../.annex/x.nii.gz")
    (root / "sub-2").symlink_to(tmp_path / "out")
    (root / "sub-3").symlink_to("sub-1")
    assert [modality for _, modality, _ in rows(root)] == ["flair", "t2"]
    assert [reason for reason, _ in outcasts(root)] == [Reason.OUTSIDE_ROOT] * 2
    assert all("outside the root" in detail for _, detail in outcasts(root))


def test_a_link_circle_is_refused(tmp_path):
    put(tmp_path, "sub-1/anat/sub-1_T2w.nii.gz")
    (tmp_path / "sub-1/anat/sub-1_T1w.nii.gz").symlink_to("sub-1_T1w.nii.gz")
    assert [modality for _, modality, _ in rows(tmp_path)] == ["t2"]
    assert [reason for reason, _ in outcasts(tmp_path)] == [Reason.OUTSIDE_ROOT]


def test_phenotypes(tmp_path):
    put(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tsex\tgroup\tiq\nsub-1\t61.5\tF\tpatient\t101\nsub-2\t89+\tm\tn/a\tn/a\n"
    )
    table = find_scans(BidsSource(dataset="demo", root=str(tmp_path))).phenotypes
    assert list(table) == ["dataset", "subject", "session", "age", "sex", "site", "diagnosis", "iq"]
    assert table.iloc[0].tolist() == ["demo", "sub-1", "", 61.5, "F", "", "patient", 101.0]
    assert table.loc[1, ["age", "sex", "diagnosis"]].tolist() == [89.0, "M", ""]
    assert np.isnan(table.loc[1, "iq"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sub-1_dseg.nii.gz", "label"),
        ("sub-1_label-lesion_mask.nii.gz", "label"),
        ("sub-1_desc-brain_mask.nii.gz", "brain_mask"),
        ("sub-1_label-brain_mask.nii.gz", "brain_mask"),
        ("sub-1_desc-aseg_dseg.nii.gz", ""),
        ("sub-1_desc-brain_dseg.nii.gz", ""),
        ("sub-1_probseg.nii.gz", ""),
    ],
)
def test_what_a_mask_shows(name, kind):
    assert mask_kind(parse_name(name)) == kind


def test_a_wrong_root_and_wrong_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset demo: the root .*nowhere is not a folder; correct `root`"):
        rows(tmp_path / "nowhere")
    with pytest.raises(ValidationError, match="dataset"):
        BidsSource(dataset="Not A Name", root="x")
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        BidsSource(dataset="demo", root="x", rooot="y")


def test_images_of_a_pipeline_with_the_wanted_entities(tmp_path):
    put(
        tmp_path,
        "sub-1/anat/sub-1_T1w.nii.gz",
        "derivatives/prep/sub-1/anat/sub-1_space-MNI_desc-preproc_T1w.nii.gz",
        "derivatives/prep/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz",
        "derivatives/prep/sub-1/anat/sub-1_space-MNI_desc-brain_mask.nii.gz",
        "derivatives/prep/sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "derivatives/prep/sub-1/anat/sub-1_space-MNI_label-GM_probseg.nii.gz",
        "derivatives/lesions/sub-1/anat/sub-1_space-MNI_label-lesion_mask.nii.gz",
        "derivatives/lesions/sub-1/anat/sub-1_label-lesion_mask.nii.gz",
    )
    wanted = {"space": "MNI", "desc": "preproc"}
    assert sorted(rows(tmp_path, pipeline="prep", entities=wanted)) == [
        ("sub-1", "brain_mask", "sub-1_space-MNI_desc-brain_mask.nii.gz"),
        ("sub-1", "label", "sub-1_space-MNI_label-lesion_mask.nii.gz"),
        ("sub-1", "t1", "sub-1_space-MNI_desc-preproc_T1w.nii.gz"),
    ]
    native = rows(tmp_path, pipeline="prep", entities={"space": ""})
    assert ("sub-1", "t1", "sub-1_desc-preproc_T1w.nii.gz") in native
    assert all("space" not in name for *_, name in native)
    assert [name for _, modality, name in rows(tmp_path) if modality == "t1"] == ["sub-1_T1w.nii.gz"]
    with pytest.raises(FileNotFoundError, match="holds no file below derivatives/preb/; correct `pipeline`"):
        rows(tmp_path, pipeline="preb")
    # The folder of the pipeline is a dataset of its own, too.
    assert sorted(rows(tmp_path / "derivatives/prep", entities=wanted)) == [
        ("sub-1", "brain_mask", "sub-1_space-MNI_desc-brain_mask.nii.gz"),
        ("sub-1", "t1", "sub-1_space-MNI_desc-preproc_T1w.nii.gz"),
    ]


def test_aliases_name_and_ignore_suffixes(tmp_path):
    put(tmp_path, *(f"sub-1/anat/sub-1_{suffix}.nii.gz" for suffix in ("UNIT1", "T2starw", "ce-gd_UNIT1")))
    found = rows(tmp_path, aliases={"unit1": "t1", "t2starw": "ignore"})
    assert [modality for _, modality, _ in found] == ["t1", "t1c"]


def test_phenotypes_of_sessions(tmp_path):
    put(tmp_path, "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tsession_id\tage\n1\ta\t60\nsub-2\tses-a\t70\n")
    (tmp_path / "sub-1/sub-1_sessions.tsv").write_text("session_id\tmmse\tacq_time\nses-a\t29\tn/a\nb\t28\tn/a\n")
    table = find_scans(BidsSource(dataset="demo", root=str(tmp_path))).phenotypes
    keys = table[["subject", "session"]].to_numpy().tolist()
    assert keys == [["sub-1", "ses-a"], ["sub-1", "ses-a"], ["sub-1", "ses-b"], ["sub-2", "ses-a"]]
    assert table["mmse"].fillna(0).tolist() == [0, 29, 28, 0]
    assert table["age"].fillna(0).tolist() == [60, 0, 0, 70]


def test_masks_of_isles_are_labels_and_what_is_not_read_is_reported(tmp_path):
    put(
        tmp_path,
        "sub-1/ses-1/dwi/sub-1_ses-1_dwi.nii.gz",
        "sub-1/ses-1/sub-1_ses-1_T1w.nii.gz",
        "sub-2_T1w.nii.gz",
        "derivatives/sub-1/ses-1/sub-1_ses-1_msk.nii.gz",
        "derivatives/sub-1/ses-1/sub-1_ses-1_lesionmap.nii.gz",
        "derivatives/sub-1/ses-1/sub-1_ses-1_space-MNI_T1w.nii.gz",
        "derivatives/sub-1/ses-1/sub-1_ses-1_task-rest_boldref.nii.gz",
        "derivatives/sub-1/ses-1/sub-1_ses-1_label-GM_probseg.nii.gz",
        "derivatives/atlas.nii.gz",
    )
    assert rows(tmp_path) == [
        ("sub-1_ses-1", "label", "sub-1_ses-1_msk.nii.gz"),
        ("sub-1_ses-1", "dwi", "sub-1_ses-1_dwi.nii.gz"),
    ]
    by_reason = sorted(outcasts(tmp_path), key=lambda line: line[1])
    assert [reason for reason, _ in by_reason] == [Reason.UNMATCHED] * 3
    unknown, homeless, at_the_root = (detail for _, detail in by_reason)
    assert "'lesionmap' is neither a segmentation (dseg, mask, msk) nor an image; name it in `aliases`" in unknown
    assert "lies in no folder of a data type (anat, dwi); move it into one" in homeless
    assert at_the_root.startswith("sub-2_T1w.nii.gz lies in no folder")


def test_aliases_name_the_suffix_of_a_segmentation(tmp_path):
    put(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "derivatives/x/sub-1/sub-1_lesionmap.nii.gz")
    kept = rows(tmp_path, aliases={"lesionmap": "label"})
    assert ("sub-1", "label", "sub-1_lesionmap.nii.gz") in kept
    ignored = find_scans(BidsSource(dataset="demo", root=str(tmp_path), aliases={"lesionmap": "ignore"})).scans
    assert [scan.modality for scan in ignored] == ["t1"]
