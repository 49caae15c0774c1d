"""The same phantom subjects laid out in every format that the catalog reads, and the sources that read them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from models.records import Scan
from tasks.sources import BidsSource, DatalistSource, DicomSource, SourceConfig, TableSource, TreeSource

SCHEME = "brats2021"
SPACING_MM = (1.0, 1.25, 2.0)
TOKENS = {"t1": "T1w", "t1c": "t1ce", "flair": "FLAIR", "label": "seg"}
DESCRIPTIONS = {"t1": "t1_mprage_sag", "t1c": "t1_mprage_sag +Gd", "flair": "T2 FLAIR tra", "label": "tumour mask"}
SERIES = {"*+Gd": "t1c", "*mprage*": "t1", "*FLAIR*": "flair", "tumour mask": "label", "localizer*": "ignore"}


@dataclass(frozen=True)
class Phantom:
    """One session of one subject."""

    subject: str
    session: str
    modalities: tuple[str, ...]
    age: float
    sex: str

    @property
    def case(self) -> str:
        return f"{self.subject}_{self.session}"

    def volume(self, modality: str) -> np.ndarray:
        """Return (X, Y, Z) int16, different for every file."""
        seed = [ord(letter) for letter in f"{self.case}{modality}"]
        values = np.random.default_rng(seed).integers(0, 2 if modality == "label" else 900, (9, 8, 6))
        return values.astype(np.int16)


PHANTOMS = (
    Phantom("sub-01", "ses-1", ("flair", "t1", "t1c", "label"), 61.0, "F"),
    Phantom("sub-01", "ses-2", ("flair", "t1"), 62.5, "F"),
    Phantom("sub-02", "ses-1", ("t1",), 33.0, "M"),
)
AFFINE = np.diag([*SPACING_MM, 1.0])
AFFINE[:3, 3] = (-4.0, -5.0, -6.0)


def write_bids(root: Path) -> SourceConfig:
    names = {"t1": "T1w", "t1c": "ce-gd_T1w", "flair": "FLAIR", "label": "desc-tumour_dseg"}
    for phantom, modality in _files():
        home = root / "derivatives/masks" if modality == "label" else root
        _nifti(
            home / phantom.subject / phantom.session / f"anat/{phantom.case}_{names[modality]}.nii.gz",
            phantom,
            modality,
        )
    _table(root / "participants.tsv", [{"participant_id": p.subject, "sex": p.sex} for p in (PHANTOMS[0], PHANTOMS[2])])
    for subject in {phantom.subject for phantom in PHANTOMS}:
        rows = [{"session_id": p.session, "age": p.age} for p in PHANTOMS if p.subject == subject]
        _table(root / subject / f"{subject}_sessions.tsv", rows)
    return BidsSource(dataset="demo", root=str(root), label_scheme=SCHEME)


def write_datalist(root: Path) -> SourceConfig:
    entries = []
    for phantom in PHANTOMS:
        paths = {m: f"{phantom.subject}/{phantom.case}_{TOKENS[m]}.nii.gz" for m in phantom.modalities}
        for modality, path in paths.items():
            _nifti(root / path, phantom, modality)
        label = {"label": paths["label"]} if "label" in paths else {}
        entries.append({"image": [path for modality, path in paths.items() if modality != "label"], **label})
    (root / "dataset.json").write_text(json.dumps({"training": entries}))
    _table(root / "participants.tsv", _people())
    return DatalistSource(dataset="demo", root=str(root), label_scheme=SCHEME)


def write_rows_of_scans(root: Path) -> SourceConfig:
    rows = []
    for phantom, modality in _files():
        path = f"img/{phantom.case}-{modality}.nii.gz"
        _nifti(root / path, phantom, modality)
        rows.append(
            {"ID": phantom.subject, "visit": phantom.session, "file": path, "seq": TOKENS[modality], "set": "training"}
            | {"Age": phantom.age, "Gender": phantom.sex}
        )
    _table(root / "scans.csv", rows, ",")
    return TableSource(
        dataset="demo",
        root=str(root),
        table="scans.csv",
        subject="ID",
        session="visit",
        path="file",
        modality="seq",
        split="set",
        aliases={"seg": "label"},
        label_scheme=SCHEME,
        phenotype_columns={"age": "Age", "sex": "Gender"},
    )


def write_rows_of_cases(root: Path) -> SourceConfig:
    rows = []
    for phantom in PHANTOMS:
        row = {"subject": phantom.subject, "session": phantom.session, "scheme": SCHEME, "split": "training"}
        for modality in phantom.modalities:
            row[f"{modality}_file"] = f"img/{phantom.case}-{modality}.nii.gz"
            _nifti(root / row[f"{modality}_file"], phantom, modality)
        rows.append(row)
    pd.DataFrame(rows).to_parquet(root / "cases.parquet")
    pd.DataFrame(_people()).to_parquet(root / "people.parquet")
    return TableSource(
        dataset="demo",
        root=str(root),
        table="cases.parquet",
        session="session",
        images={modality: f"{modality}_file" for modality in ("t1", "t1c", "flair")},
        label="label_file",
        label_scheme_column="scheme",
        split="split",
        phenotypes=({"path": "people.parquet"},),
    )


def write_tree(root: Path) -> SourceConfig:
    for phantom, modality in _files():
        name = "masks/tumour" if modality == "label" else TOKENS[modality]
        _nifti(root / phantom.subject / phantom.session / f"{name}.nii.gz", phantom, modality)
    columns = {"subject": "who", "session": "when", "age": "years", "sex": "sex"}
    _table(root / "people.tsv", [{theirs: row[ours] for ours, theirs in columns.items()} for row in _people("subject")])
    return TreeSource(
        dataset="demo",
        root=str(root),
        patterns=("{subject}/{session}/{modality}.nii.gz", "{subject}/{session}/masks/{label}.nii.gz"),
        label_scheme=SCHEME,
        phenotypes=({"path": "people.tsv", "columns": columns},),
    )


def write_dicom(root: Path) -> SourceConfig:
    for phantom, modality in _files():
        write_series(
            root / phantom.subject / phantom.session / modality,
            phantom.volume(modality),
            description=DESCRIPTIONS[modality],
            patient_id=phantom.subject,
        )
    _table(root / "people.csv", _people("id"), ",")
    return DicomSource(
        dataset="demo",
        root=str(root),
        series=SERIES,
        pattern="{subject}/{session}/**",
        label_scheme=SCHEME,
        phenotypes=({"path": "people.csv"},),
    )


LAYOUTS: dict[str, Callable[[Path], SourceConfig]] = {
    "bids": write_bids,
    "datalist": write_datalist,
    "table, rows are scans": write_rows_of_scans,
    "table, rows are cases": write_rows_of_cases,
    "tree": write_tree,
    "dicom": write_dicom,
}


def plain(scans: Iterable[Scan], *without: str) -> list[dict[str, object]]:
    """Return catalog rows without what a layout decides: place, identity, compressed size and split."""
    return [scan.model_dump(exclude={"path", "etag", "size_bytes", "split", *without}) for scan in scans]


def write_series(
    folder: Path,
    volume: np.ndarray,
    *,
    description: str = "t1_mprage",
    patient_id: str = "P1",
    name: str = "",
    study_uid: str = "",
    series_uid: str = "",
    affine: np.ndarray = AFFINE,
) -> list[Path]:
    """Write a volume (X, Y, Z) int16 as one MR series, a file per slice; affine: voxel -> RAS+ mm."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    series_uid, study_uid = series_uid or generate_uid(), study_uid or generate_uid()
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    axes = to_lps[:3, :3] / spacing
    paths = []
    for k in range(volume.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID = study_uid, series_uid
        data.FrameOfReferenceUID = study_uid
        data.Modality, data.Manufacturer, data.SeriesDescription = "MR", "Phantom", description
        data.PatientID, data.PatientName, data.PatientPosition = patient_id, name or patient_id, "HFS"
        data.StudyDate, data.StudyTime, data.SeriesNumber, data.InstanceNumber = "20200101", "120000", 1, k + 1
        data.ImageType = ["ORIGINAL", "PRIMARY", "M"]
        data.EchoTime, data.RepetitionTime, data.EchoNumbers, data.AcquisitionNumber = 3.0, 2000.0, 1, 1
        data.Columns, data.Rows, _ = volume.shape
        data.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        data.SliceThickness = data.SpacingBetweenSlices = float(spacing[2])
        data.ImageOrientationPatient = [float(value) for value in (*axes[:, 0], *axes[:, 1])]
        data.ImagePositionPatient = [float(value) for value in (to_lps @ (0, 0, k, 1))[:3]]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelData = np.ascontiguousarray(volume[:, :, k].T).astype("<i2").tobytes()
        path = folder / f"IM{k:04d}"
        data.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _files() -> list[tuple[Phantom, str]]:
    return [(phantom, modality) for phantom in PHANTOMS for modality in phantom.modalities]


def _people(subject: str = "participant_id") -> list[dict[str, object]]:
    return [{subject: p.subject, "session": p.session, "age": p.age, "sex": p.sex} for p in PHANTOMS]


def _nifti(path: Path, phantom: Phantom, modality: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(phantom.volume(modality), AFFINE), path)


def _table(path: Path, rows: list[dict[str, object]], separator: str = "\t") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
