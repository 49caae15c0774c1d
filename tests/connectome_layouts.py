"""Small trees in the layouts of functional data: fMRIPrep's derivatives, ABIDE I and ADHD-200, plain series."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from tasks.sources import AbidePcpSource, RoiSeriesSource, SourceConfig

SPACE = "space-MNI152NLin2009cAsym"
AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])
SUBJECTS = ("50003", "50004", "51456")
"""Of ABIDE I."""
ABIDE_HEADER = (
    *("", "Unnamed: 0", "SUB_ID", "X", "subject", "SITE_ID", "FILE_ID", "DX_GROUP", "DSM_IV_TR", "AGE_AT_SCAN", "SEX"),
    *("HANDEDNESS_SCORES", "func_mean_fd", "qc_notes_rater_1"),
)
"""A part of the columns, in their order; the first has no name in the release either."""
ABIDE_ROWS = (
    ("0", "1", "50002", "1", "50002", "PITT", "no_filename", "1", "1", "16.77", "1", "", "0.1168", "a, b"),
    ("1", "2", "50003", "2", "50003", "PITT", "Pitt_0050003", "1", "3", "24.45", "1", "-9999", "0.3221", ""),
    ("2", "3", "50004", "3", "50004", "PITT", "Pitt_0050004", "2", "0", "19.09", "2", "", "0.1277", ""),
    ("3", "4", "51456", "4", "51456", "CMU", "CMU_a_0051456", "1", "-9999", "-9999", "1", "", "-9999", ""),
)
ADHD_HEADER = ("ScanDir ID", "Site", "Gender", "Age", "Handedness", "DX", "Secondary Dx ", "QC_Rest_1")
ADHD_ROWS = (
    ("10001", "5", "1", "13.36", "0.4", "3", "", "1"),
    ("1018959", "3", "0", "12.36", "1", "0", "phobia, simple", "0"),
    ("26001", "8", "", "-999", "", "pending", "", ""),
)


def series(seed: int = 0, frames: int = 90, regions: int = 4) -> str:
    """Return a text of tab-separated columns as the Preprocessed Connectomes Project writes it."""
    values = np.random.default_rng(seed).normal(size=(frames, regions))
    lines = ["\t".join(f"#{region}" for region in range(1, regions + 1))]
    return "\n".join([*lines, *("\t".join(f"{value:.5f}" for value in row) for row in values), ""])


def write(path: Path, text: str | None = None) -> Path:
    """Write a text file, by default one with series."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(series() if text is None else text)
    return path


def write_rows(path: Path, header: tuple[str, ...], rows: tuple[tuple[str, ...], ...], separator: str = ",") -> Path:
    """Write a table of text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


def write_image(path: Path, frames: int = 0) -> Path:
    """Write a NIfTI image of 5 x 4 x 3 voxels, of several frames unless there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (5, 4, 3, frames) if frames else (5, 4, 3)
    values = np.random.default_rng(frames).integers(0, 900, shape).astype(np.int16)
    image = nib.Nifti1Image(values, AFFINE)
    if frames:
        image.header.set_zooms((2.0, 2.0, 2.5, 2.0))
    nib.save(image, path)
    return path


def write_anatomy(root: Path, subject: str, session: str = "", space: str = SPACE) -> None:
    """Write T1 and brain mask of fMRIPrep; space: an entity, or empty for the native ones."""
    folder, start = _place(root, subject, session, "anat")
    name = "_".join(piece for piece in (start, space) if piece)
    for ending in ("desc-preproc_T1w", "desc-brain_mask"):
        write_image(folder / f"{name}_{ending}.nii.gz")
    write(folder / f"{name}_desc-preproc_T1w.json", "{}")


def write_bold(root: Path, subject: str, session: str = "", entities: str = "task-rest", **more: str | int) -> None:
    """Write a BOLD image of fMRIPrep with what lies beside it; more: `space`, `confounds` (its ending) and `frames`."""
    folder, start = _place(root, subject, session, "func")
    space, confounds = str(more.get("space", SPACE)), str(more.get("confounds", "timeseries"))
    write_image(folder / f"{start}_{entities}_{space}_desc-preproc_bold.nii.gz", int(more.get("frames", 6)))
    for other in ("boldref", "desc-brain_mask"):
        write_image(folder / f"{start}_{entities}_{space}_{other}.nii.gz")
    write(folder / f"{start}_{entities}_space-fsLR_den-91k_bold.dtseries.nii", "CIFTI")
    write(folder / f"{start}_{entities}_hemi-L_space-fsaverage_bold.func.gii", "GIFTI")
    if confounds:
        write(folder / f"{start}_{entities}_desc-confounds_{confounds}.tsv", "framewise_displacement\nn/a\n0.1\n")


def write_abide(root: Path, inside: str = "Outputs/cpac/filt_noglobal/rois_cc200") -> None:
    """Write the release of ABIDE I with three subjects; inside: folder of the series."""
    write_rows(root / "Phenotypic_V1_0b_preprocessed1.csv", ABIDE_HEADER, ABIDE_ROWS)
    for seed, name in enumerate(("Pitt_0050003", "Pitt_0050004", "CMU_a_0051456")):
        write(root / inside / f"{name}_rois_cc200.1D", series(seed))


def write_adhd(root: Path) -> None:
    """Write the Athena release of ADHD-200 with three subjects."""
    write_rows(root / "adhd200_preprocessed_phenotypics.tsv", ADHD_HEADER, ADHD_ROWS, "\t")
    for site, subject in (("NYU", "0010001"), ("KKI", "1018959"), ("WashU", "0026001")):
        for kind in ("sfnwmrda", "snwmrda"):
            write(root / site / subject / f"{kind}{subject}_session_1_rest_1_cc200_TCs.1D")


def write_own_series(root: Path) -> None:
    """Write the series of the same three subjects in a folder of one's own, and who they are."""
    for seed, subject in enumerate(SUBJECTS):
        write(root / "ts" / f"sub{subject}.1D", series(seed))
    rows = (("50002", "16.77", "M"), ("50003", "24.45", "M"), ("50004", "19.09", "F"), ("51456", "", "M"))
    write_rows(root / "people.csv", ("id", "age", "sex"), rows)


def write_nilearn(root: Path) -> None:
    """Write the release of ABIDE I as nilearn lays it out."""
    write_abide(root, "ABIDE_pcp/cpac/filt_noglobal")


SERIES_LAYOUTS: dict[str, tuple[Callable[[Path], None], Callable[[str], SourceConfig]]] = {
    "abide_pcp": (write_abide, lambda root: AbidePcpSource(dataset="demo", root=root)),
    "abide_pcp of nilearn": (write_nilearn, lambda root: AbidePcpSource(dataset="demo", root=root)),
    "roi_series": (
        write_own_series,
        lambda root: RoiSeriesSource(
            dataset="demo",
            root=root,
            pattern="ts/*",
            owner="sub(?P<subject>.*)",
            phenotypes=({"path": "people.csv"},),
        ),
    ),
}
"""By name: what writes the same series of the same subjects, and the source that reads it."""


def _place(root: Path, subject: str, session: str, kind: str) -> tuple[Path, str]:
    """Return the folder of a session and how its names begin."""
    folder = root / subject / session / kind
    return folder, f"{subject}_{session}" if session else subject
