from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.records import Reason
from tasks.catalog import build_catalog
from tasks.sources import TreeSource, find_scans
from tasks.sources.tree import FIELDS, compile_template


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.int16), np.eye(4)), path)


def rows(root: Path, **fields: object) -> list[tuple[str, str, str]]:
    found = find_scans(TreeSource.model_validate({"dataset": "d", "root": str(root)} | fields))
    return [(scan.case, scan.modality, scan.reason) for scan in found.scans]


@pytest.mark.parametrize(
    ("template", "path", "fields"),
    [
        ("{subject}/{session}/{modality}.nii.gz", "a/1/t1.nii.gz", {"subject": "a", "session": "1", "modality": "t1"}),
        ("{subject}_{modality}.nii.gz", "a_b_t1.nii.gz", {"subject": "a_b", "modality": "t1"}),
        ("{subject}/{subject}_{modality}.nii", "a/a_t1.nii", {"subject": "a", "modality": "t1"}),
        ("{subject}/{subject}_{modality}.nii", "a/b_t1.nii", None),
        ("**/{subject}-{modality}.nii*", "x/y/a-t1.nii.gz", {"subject": "a", "modality": "t1"}),
        ("**/{subject}-{modality}.nii*", "a-t1.nii", {"subject": "a", "modality": "t1"}),
        ("*/{subject}.nii", "x/y/a.nii", None),
        ("{subject}/v?/t1.nii", "a/v2/t1.nii", {"subject": "a"}),
        ("{subject}/v?/t1.nii", "a/v22/t1.nii", None),
        ("{subject}(1)+.nii", "a(1)+.nii", {"subject": "a"}),
        ("{subject}.nii", "a/b.nii", None),
    ],
)
def test_templates(template: str, path: str, fields: dict[str, str] | None) -> None:
    match = compile_template(template).fullmatch(path)
    assert (match.groupdict() if match else None) == fields


@given(st.text("abc{}*?/._", max_size=12))
def test_any_text_is_a_template_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert set(compile_template(text).groupindex) <= set(FIELDS)


def test_what_matches_nothing_is_reported_and_what_is_skipped_is_not(tmp_path: Path) -> None:
    put(tmp_path, "a/t1.nii.gz", "a/swi.nii.gz", "a/asl.nii.gz", "stray.nii", "old/a/t1.nii.gz", ".trash/a/t1.nii.gz")
    (tmp_path / "a/notes.txt").write_text("no scan")
    (tmp_path / "a/._t1.nii.gz").write_text("made by a file manager")
    found = rows(tmp_path, patterns=["{subject}/{modality}.nii.gz"], skip=["old/**"], aliases={"ASL": "ignore"})
    assert found == [("a", "swi", Reason.UNKNOWN_MODALITY), ("a", "t1", ""), ("", "", Reason.UNMATCHED)]


def test_labels_expressions_and_a_fixed_modality(tmp_path: Path) -> None:
    put(tmp_path, "IXI002-Guys-0828-T1.nii.gz", "masks/IXI002_lesion.nii.gz", "vbm/IXI002.nii.gz")
    found = rows(
        tmp_path,
        patterns=["masks/{subject}_{label}.nii.gz", "vbm/{subject}.nii.gz"],
        expressions=[r"(?P<subject>IXI\d+)-\w+-\d+-(?P<modality>\w+)\.nii\.gz"],
        modality="gm",
    )
    assert found == [("IXI002", "t1", ""), ("IXI002", "label", ""), ("IXI002", "gm", "")]


def test_links_out_of_the_root(tmp_path: Path) -> None:
    put(tmp_path, "out/t1.nii.gz", "root/a/t2.nii.gz")
    root = tmp_path / "root"
    (root / "a/t1.nii.gz").symlink_to(tmp_path / "out/t1.nii.gz")
    (root / "b").symlink_to(tmp_path / "out")
    (root / "c").symlink_to("a")
    found = rows(root, patterns=["{subject}/{modality}.nii.gz"])
    assert found == [("a", "t1", Reason.OUTSIDE_ROOT), ("a", "t2", ""), ("b", "", Reason.OUTSIDE_ROOT)]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "give at least one of `patterns` and `expressions`"),
        ({"patterns": ["{modality}.nii"]}, "has no field for the subject"),
        ({"patterns": ["{subject}.nii"]}, "has no field for modality or label; add one, or set `modality`"),
        ({"patterns": ["{patient}.nii"]}, r"has the field \{patient\}; use subject, session, modality, label"),
        ({"patterns": ["{subject.nii"]}, "has a brace without its partner at position 0"),
        ({"expressions": ["(?P<subject>"]}, "is no regular expression"),
        ({"expressions": ["(?P<subject>a)(?P<who>b)"]}, "has the groups who; use subject"),
        ({"patterns": ["{subject}_{modality}"], "aliases": {"A": "t1", "a": "t2"}}, "aliases name a twice"),
        ({"patterns": ["{subject}_{modality}"], "aliases": {"a": "T1"}}, "alias 'a' means 'T1'; use one of flair"),
    ],
)
def test_wrong_configs_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        TreeSource.model_validate({"dataset": "d", "root": "x"} | fields)


def test_paths_say_phenotypes(tmp_path: Path) -> None:
    put(tmp_path, "HGG/a/a_t1.nii.gz", "HGG/a/a_t2.nii.gz", "LGG/b/b_t1.nii.gz", "misc/c/c_t1.nii.gz")
    fields = {"dataset": "d", "root": str(tmp_path), "path_phenotypes": ("grade", "site")}
    by_pattern = TreeSource.model_validate({**fields, "patterns": ("{grade}/{subject}/{subject}_{modality}.nii.gz",)})
    expression = r"(?P<grade>HGG|LGG)?(?:misc)?/(?P<subject>\w)/(?P=subject)_(?P<modality>t[12])\.nii\.gz"
    by_expression = TreeSource.model_validate({**fields, "expressions": (expression,)})
    for source, last in ((by_pattern, "misc"), (by_expression, None)):
        found = find_scans(source)
        assert len(found.scans) == 4
        said = found.phenotypes.set_index("subject")["grade"].to_dict()
        assert said == {"a": "HGG", "b": "LGG"} | ({"c": last} if last else {})


def test_phenotypes_of_paths_must_be_declared_and_have_names_of_columns() -> None:
    plain = {"dataset": "d", "root": "."}
    with pytest.raises(ValidationError, match=r"has the groups grade; use .*, or name a phenotype column in"):
        TreeSource.model_validate({**plain, "expressions": (r"(?P<grade>\w+)/(?P<subject>\w+)_(?P<modality>t1)",)})
    with pytest.raises(ValidationError, match=r"has the field {grade}; use subject, session, modality, label, or name"):
        TreeSource.model_validate({**plain, "patterns": ("{grade}/{subject}_{modality}.nii",)})
    for name in ("subject", "dataset", "Grade", "a b"):
        with pytest.raises(ValidationError, match=f"path_phenotypes names '{name}'; use lower-case letters"):
            TreeSource.model_validate({**plain, "path_phenotypes": (name,), "patterns": ("{subject}_{modality}.nii",)})


def test_a_subject_in_two_folders_of_phenotypes_is_reported(tmp_path: Path) -> None:
    put(tmp_path, "HGG/a_t1.nii.gz", "LGG/a_t2.nii.gz")
    source = TreeSource(
        dataset="d", root=str(tmp_path), path_phenotypes=("grade",), patterns=("{grade}/{subject}_{modality}.nii.gz",)
    )
    result = build_catalog([source])
    assert result.phenotypes["grade"].isna().all()
    assert len(result.issues) == 1
