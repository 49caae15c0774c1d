"""Miniatures of the datasets of the benchmarks, named as they are shipped: `tasks.dataset_cards` must read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from tasks.phantom.config import PhantomConfig
from tasks.phantom.layout import TISSUE, bids_place, datalist_place

SUBJECTS = 6
"""Of each dataset; every other one is of the second class."""
Names = Iterator[str]


def brats2023(letters: str, k: int) -> Names:
    case = f"BraTS-{letters}-{k:05d}-000"
    yield from (f"{case}/{case}-{token}.nii.gz" for token in ("t1c", "t1n", "t2f", "t2w", "seg"))


def isles22(k: int) -> Names:
    subject = f"sub-strokecase{k:04d}"
    case = f"{subject}_ses-0001"
    yield f"{subject}/ses-0001/anat/{case}_FLAIR.nii.gz"
    yield from (f"{subject}/ses-0001/dwi/{case}_{token}.nii.gz" for token in ("dwi", "adc"))
    yield f"derivatives/{subject}/ses-0001/{case}_msk.nii.gz"


def mrbrains13(k: int) -> Names:
    names = ("T1", "T1_1mm", "T1_IR", "T2_FLAIR", "LabelsForTraining", "LabelsForTesting")
    yield from (f"{k}/{name}.nii" for name in names)


def vsseg(k: int) -> Names:
    yield from (f"vs_gk_{k}/vs_gk_{name}.nii.gz" for name in ("t1_refT1", "seg_refT1", "t2_refT2", "seg_refT2"))


def upenn_gbm(k: int) -> Names:
    case = f"UPENN-GBM-{k:05d}_11"
    yield from (f"images_structural/{case}/{case}_{token}.nii.gz" for token in ("T1", "T1GD", "T2", "FLAIR"))
    yield f"images_segm/{case}_segm.nii.gz"
    yield f"automated_segm/{case}_automated_approx_segm.nii.gz"
    yield f"images_structural_unstripped/{case}/{case}_T1_unstripped.nii.gz"


def brats2018(k: int) -> Names:
    case = f"Brats18_{('2013', 'CBICA', 'TCIA03')[k // 2]}_{k}_1"
    tokens = ("t1", "t1ce", "t2", "flair", "seg")
    yield from (f"{('HGG', 'LGG')[k % 2]}/{case}/{case}_{token}.nii.gz" for token in tokens)


def adni(k: int) -> Names:
    yield f"sub-ADNI{k:03d}/ses-M00/anat/sub-ADNI{k:03d}_ses-M00_T1w.nii.gz"


def adhd200(k: int) -> Names:
    case = f"sub-{k + 10001:07d}_ses-1"
    yield f"KKI/sub-{k + 10001:07d}/ses-1/anat/{case}_run-1_T1w.nii.gz"
    yield f"KKI/sub-{k + 10001:07d}/ses-1/func/{case}_task-rest_run-1_bold.nii.gz"


def abide(k: int) -> Names:
    subject = f"sub-{k + 50003:07d}"
    yield f"{('NYU', 'Pitt')[k // 3]}/{subject}/anat/{subject}_T1w.nii.gz"
    yield f"{('NYU', 'Pitt')[k // 3]}/{subject}/func/{subject}_task-rest_run-1_bold.nii.gz"


def phantoms(lesion: str, k: int) -> Names:
    """Name the files of a subject of the BIDS tree and of a UCSF-like one, below the root of the whole cohort."""
    config = PhantomConfig()
    for place, modalities in (
        (bids_place(config, k), config.modalities),
        (datalist_place(config, 3 * k + 1), ("adc", "dwi", "flair", "t1", "t1c", "t2")),
    ):
        yield from (place.scan(modality) for modality in modalities)
        yield place.mask(lesion if k % 2 else "tumour")


def tissue(k: int) -> Names:
    """Name the files of a subject of the BIDS tree, whose labels are of tissue."""
    config, place = PhantomConfig(), bids_place(PhantomConfig(), k)
    yield from (place.scan(modality) for modality in config.modalities)
    yield place.mask(TISSUE)


LAYOUTS: dict[str, tuple[Callable[[int], Names], frozenset[str]]] = {
    "brats2023-ped": (lambda k: brats2023("PED", k), frozenset({"t1", "t1c", "t2", "flair", "label"})),
    "brats2023-met": (lambda k: brats2023("MET", k), frozenset({"t1", "t1c", "t2", "flair", "label"})),
    "isles22": (isles22, frozenset({"flair", "dwi", "adc", "label"})),
    "mrbrains13": (mrbrains13, frozenset({"t1", "t1c", "flair", "label"})),
    "vsseg": (vsseg, frozenset({"t1", "label"})),
    "upenn-gbm": (upenn_gbm, frozenset({"t1", "t1c", "t2", "flair", "label"})),
    "brats2018": (brats2018, frozenset({"t1", "t1c", "t2", "flair", "label"})),
    "adni": (adni, frozenset({"t1"})),
    "adhd-200": (adhd200, frozenset({"t1"})),
    "abide-i": (abide, frozenset({"t1"})),
    "phantom-stroke": (
        lambda k: phantoms("stroke", k), frozenset({"t1", "t1c", "t2", "flair", "dwi", "adc", "label"})
    ),
    "phantom-schwannoma": (
        lambda k: phantoms("schwannoma", k), frozenset({"t1", "t1c", "t2", "flair", "dwi", "adc", "label"})
    ),
    "phantom-tissue": (tissue, frozenset({"t1", "t1c", "t2", "flair", "label"})),
    "phantom-grade": (lambda k: phantoms("stroke", k), frozenset({"t1", "t1c", "t2", "flair", "label"})),
}  # fmt: skip
"""Benchmark -> names of the files of subject k, and the modalities that a catalog must find."""

_TABLES: dict[str, tuple[str, str, Callable[[int], str]]] = {
    "adni": ("participants.tsv", "participant_id\tDX", lambda k: f"sub-ADNI{k:03d}\t{('CN', 'MCI')[k % 2]}"),
    "adhd-200": (
        "adhd200_preprocessed_phenotypics.tsv",
        "ScanDir ID\tSite\tGender\tAge\tDX",
        lambda k: f"{k + 10001}\t3\t{k % 2}\t9.5\t{(0, 3)[k % 2]}",
    ),
    "abide-i": (
        "Phenotypic_V1_0b_preprocessed1.csv",
        "SUB_ID,DX_GROUP,DSM_IV_TR,SEX,AGE_AT_SCAN,SITE_ID",
        lambda k: f"{k + 50003},{k % 2 + 1},0,1,20.5,NYU",
    ),
    "phantom-grade": (
        "phantom-bids/participants.tsv",
        "participant_id\tlesion",
        lambda k: f"sub-{k + 1:04d}\t{('none', 'tumour')[k % 2]}",
    ),
}


def write_miniature(benchmark: str, root: Path) -> None:
    """Write the files of a benchmark's dataset below a folder, images of 3 x 4 x 5 voxels."""
    names, _ = LAYOUTS[benchmark]
    for k in range(SUBJECTS):
        for name in names(k):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.full((3, 4, 5), k + 1, np.uint8), np.eye(4)), path)
    if benchmark in _TABLES:
        name, header, line = _TABLES[benchmark]
        (root / name).write_text("\n".join([header, *map(line, range(SUBJECTS))]) + "\n")
