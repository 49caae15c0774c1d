from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.records import MODALITY_ALIASES, Reason, canonical_modality
from tasks.sources import DatalistSource, find_scans
from tasks.sources.base import OutsideRootError, check_relative
from tasks.sources.datalist import parse_datalist, parse_name

BRAINMVP_LISTS = {
    "BraTS2021": ("flair", "t1", "t1ce", "t2"),
    "BraTS2023_SSA": ("t1c", "t1n", "t2f", "t2w"),
    "BraTS2023_MEN": ("t1c", "t1n", "t2f", "t2w"),
    "UCSF_upright_sir24": ("ADC", "DWI", "FLAIR", "T1", "T1c", "T2"),
    "BrainAtlas_registration_sir24": ("MRA", "PD", "T1", "T2"),
    "ISLES22": ("flair", "dwi", "adc"),
}


def scans(root, content, **fields):
    (root / "dataset.json").write_text(json.dumps(content))
    return find_scans(DatalistSource(dataset="demo", root=str(root), **fields)).scans


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("BraTS2021_00000/BraTS2021_00000_flair.nii.gz", ("BraTS2021_00000", "", "flair")),
        ("x/BraTS-GLI-00001-000-t1ce.nii.gz", ("BraTS-GLI-00001", "000", "t1ce")),
        ("BraTS-MEN-01234-001-t2f.nii.gz", ("BraTS-MEN-01234", "001", "t2f")),
        ("UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1c.nii.gz", ("UCSF-PDGM-0004", "", "T1c")),
        ("UCSF-PDGM-0429_FU003d_FLAIR.nii.gz", ("UCSF-PDGM-0429", "FU003d", "FLAIR")),
        ("IXI002-Guys-0828-MRA.nii.gz", ("IXI002-Guys-0828", "", "MRA")),
        ("a|b|PD.nii", ("a|b", "", "PD")),
        ("sub-strokecase0001_ses-0001_adc.nii.gz", ("sub-strokecase0001", "ses-0001", "adc")),
        ("set/case7/T1.nii.gz", ("case7", "", "T1")),
        ("T1.nii.gz", ("T1", "", "T1")),
    ],
)
def test_names(path, parts):
    name = parse_name(path)
    assert (name.subject, name.session, name.token) == parts


piece = st.text("abcXYZ0123456789", min_size=1, max_size=6)


@given(
    st.lists(st.tuples(piece, st.sampled_from("-_|")), min_size=1, max_size=4),
    st.sampled_from(sorted(MODALITY_ALIASES)),
)
def test_any_case_name_and_token_come_apart(pieces, token):
    case = "".join(text + separator for text, separator in pieces)
    name = parse_name(f"folder/{case}{token}.nii.gz")
    assert name.token == token
    assert name.subject + (case[len(name.subject)] + name.session if name.session else "") == case[:-1]


@given(st.text(max_size=30))
def test_any_text_is_a_name(text):
    name = parse_name(text)
    assert not set(name.token) & set("-_|")


@pytest.mark.parametrize("tokens", BRAINMVP_LISTS.values(), ids=BRAINMVP_LISTS)
def test_every_token_of_every_list_resolves(tokens):
    assert len({canonical_modality(token) for token in tokens}) == len(tokens)


@pytest.mark.parametrize("token", ["T1C", "T1Gd", "T1GD", "adc"])
def test_the_gaps_of_the_reference_are_closed(token):
    assert canonical_modality(token) == ("adc" if token == "adc" else "t1c")


def test_sections_labels_and_sessions(tmp_path):
    found = scans(
        tmp_path,
        {
            "name": "demo",
            "training": [
                {"image": ["a/P1_t1.nii.gz", "./a/P1_flair.nii.gz"], "label": "a/P1_seg.nii.gz"},
                {"image": "BraTS-GLI-00001-000-t1ce.nii.gz"},
            ],
            "validation": [{"image": ["P2_T1c.nii.gz"], "label": "elsewhere/mask.nii.gz"}],
            "test": ["P3_dwi.nii.gz"],
        },
        label_scheme="brats2021",
    )
    assert [(scan.case, scan.session, scan.modality, scan.split) for scan in found] == [
        ("P1", "", "t1", "training"),
        ("P1", "", "flair", "training"),
        ("P1", "", "label", "training"),
        ("BraTS-GLI-00001_000", "000", "t1c", "training"),
        ("P2", "", "t1c", "validation"),
        ("P2", "", "label", "validation"),
        ("P3", "", "dwi", "test"),
    ]
    assert found[1].path == f"{tmp_path.resolve()}/a/P1_flair.nii.gz"
    assert {scan.label_scheme for scan in found} == {"brats2021"}


def test_two_subjects_in_one_entry_are_not_merged(tmp_path):
    found = scans(tmp_path, {"training": [{"image": ["P1_t1.nii.gz", "P2_t2.nii.gz"]}]})
    assert [scan.case for scan in found] == ["P1", "P2"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("../secret_t1.nii.gz", r"path '../secret_t1.nii.gz' leaves the root through '..'"),
        ("a/../../b_t1.nii.gz", "leaves the root through '..'"),
        ("/etc/x_t1.nii.gz", "is not relative to the root"),
        ("s3://other/x_t1.nii.gz", "is not relative to the root"),
        ("C:\\x_t1.nii.gz", "is not relative to the root"),
        ("~/x_t1.nii.gz", "is not relative to the root"),
        ("x\x00_t1.nii.gz", "is not relative to the root"),
        ("link/x_t1.nii.gz", "outside the root"),
    ],
)
def test_paths_that_leave_the_root_are_refused(tmp_path, path, text):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    for entry in ({"image": [path]}, {"image": ["ok_t1.nii.gz"], "label": path}):
        scan = scans(root, {"training": [entry]})[-1]
        assert (scan.status, scan.reason) == ("left out", Reason.OUTSIDE_ROOT)
        assert text in scan.detail


@given(st.text("ab./\\~:\x00", max_size=12))
def test_a_relative_path_stays_below_the_root(path):
    with suppress(OutsideRootError):
        clean = check_relative(path)
        assert not {"", ".", ".."} & set(clean.split("/"))


def test_unknown_tokens_are_reported_with_their_file(tmp_path):
    content = {"training": [{"image": ["a/P1_swi.nii.gz", "a/P1_T1.nii.gz", "a/P1_pd.nii.gz"]}]}
    unknown, *known = scans(tmp_path, content)
    assert unknown.reason == Reason.UNKNOWN_MODALITY
    assert unknown.detail.startswith("a/P1_swi.nii.gz: unknown modality token 'swi'; known tokens: adc,")
    assert {scan.status for scan in known} == {"ok"}
    *_, refused = scans(tmp_path, content, tokens=("swi", "T1"))
    assert refused.detail == "a/P1_pd.nii.gz: token 'pd' is not among the tokens of demo: swi, T1"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "list.json is not JSON"),
        (b"\xff\xfe", "list.json is not JSON"),
        (b"[]", "has none of the lists training, validation, test"),
        (b'{"train": []}', "has none of the lists training, validation, test"),
        (b'{"training": {}}', "'training' must be a list, got dict"),
        (b'{"training": [{"label": "x"}]}', r"training\[0\] must be an object with a key 'image'"),
        (b'{"training": [{"image": []}]}', r"training\[0\]\.image must be a list of paths, got an empty list"),
        (b'{"validation": [{"image": ["a"]}, {"image": [1]}]}', r"validation\[1\]\.image must be a list of paths"),
        (b'{"training": [{"image": "a", "label": ["b"]}]}', r"training\[0\]\.label must be one path"),
    ],
)
def test_lists_that_break_the_schema_are_refused(content, text):
    with pytest.raises(ValueError, match=text):
        parse_datalist(content, "list.json")


def test_an_absent_list_and_root(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_scans(DatalistSource(dataset="demo", root=str(tmp_path), datalist="no.json"))
    with pytest.raises(FileNotFoundError, match="correct `root`"):
        find_scans(DatalistSource(dataset="demo", root=str(tmp_path / "no")))


def test_the_list_may_lie_elsewhere_and_participants_are_read(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "list.json").write_text('{"training": [{"image": ["P1_t1.nii.gz"]}]}')
    (tmp_path / "root/people.csv").write_text("Subject,Age,DX_GROUP\nP1,7,1\n")
    source = DatalistSource(
        dataset="demo", root=str(tmp_path / "root"), datalist=str(tmp_path / "list.json"), participants="people.csv"
    )
    found = find_scans(source)
    assert [scan.case for scan in found.scans] == ["P1"]
    assert found.phenotypes.iloc[0].to_dict() == {
        "dataset": "demo",
        "subject": "P1",
        "session": "",
        "age": 7.0,
        "sex": "",
        "site": "",
        "diagnosis": "1",
    }
