"""Where files lie: the names of a BIDS tree and of the folders and datalist of BrainMVP-16k."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.latents import LATENTS_FILE
from tasks.phantom.config import PhantomConfig

Group = Literal["bids", "brats", "ucsf", "ixi"]

DATALIST_GROUPS: tuple[Group, Group, Group] = ("brats", "ucsf", "ixi")
"""Turn by turn along the subjects of the datalist data set."""
TOKENS: dict[Group, dict[str, str]] = {
    "brats": {"flair": "flair", "t1": "t1", "t1c": "t1ce", "t2": "t2"},
    "ucsf": {"adc": "ADC", "dwi": "DWI", "flair": "FLAIR", "t1": "T1", "t1c": "T1c", "t2": "T2"},
    "ixi": {"mra": "MRA", "pd": "PD", "t1": "T1", "t2": "T2"},
}
"""Canonical modality -> token in the file name, by group, as in the lists of BrainMVP-16k."""
BIDS_NAMES: dict[str, str] = {
    "t1": "anat/{}_T1w",
    "t1c": "anat/{}_ce-gadolinium_T1w",
    "t2": "anat/{}_T2w",
    "flair": "anat/{}_FLAIR",
    "pd": "anat/{}_PDw",
    "mra": "anat/{}_angio",
    "dwi": "dwi/{}_dwi",
    "adc": "dwi/{}_desc-adc_dwi",
}
TISSUE = "tissues"
"""Kind of mask that holds the tissues of the whole brain, not a lesion. (BIDS readers pass over `desc-tissue`.)"""
DATALIST_FILE = "dataset.json"
VALIDATION_EVERY = 7
"""Every 7th subject of the datalist data set is in its list `validation`."""
BROKEN_FROM = 9000
"""Numbers of the subjects with a broken file start here: more healthy ones do not move them."""


@dataclass(frozen=True)
class Place:
    """A subject's number and names; paths are relative to the cohort's root."""

    dataset: int
    """0: BIDS, 1: datalist."""
    folder: str
    """Data set's folder."""
    number: int
    group: Group

    @property
    def subject(self) -> str:
        """The id that a reader of the layout finds, and the participants table lists."""
        if self.group == "bids":
            return f"sub-{self.number + 1:04d}"
        if self.group == "brats":
            return f"BraTS2021_{self.number:05d}"
        return (
            f"UCSF-PDGM-{self.number:04d}"
            if self.group == "ucsf"
            else f"IXI{self.number:03d}-Phantom-{self.number:04d}"
        )

    def scan(self, modality: str) -> str:
        """Path of a scan; raises KeyError for a modality that the layout has no name for."""
        if self.group == "bids":
            return f"{self.folder}/{self.subject}/{BIDS_NAMES[modality].format(self.subject)}.nii.gz"
        separator = "-" if self.group == "ixi" else "_"
        return f"{self._case_folder}/{self.subject}{separator}{TOKENS[self.group][modality]}.nii.gz"

    def mask(self, kind: str) -> str:
        """Path of a lesion's mask, or of the labels of tissue (kind TISSUE), which only the BIDS tree has.

        Tumours are the labels of both data sets. Masks of the other lesions have labels of their own (1), and tissue
        has, so they lie where a reader of the tumour labels does not look: `sourcedata/` of the BIDS tree, and beside
        the scans but outside the list.
        """
        if self.group != "bids":
            return f"{self._case_folder}/{self.subject}_{'seg' if kind == 'tumour' else kind}.nii.gz"
        home = "derivatives/masks" if kind == "tumour" else f"sourcedata/masks-{kind}"
        name = f"{self.subject}_space-orig_desc-{kind}_dseg.nii.gz"
        return f"{self.folder}/{home}/{self.subject}/anat/{name}"

    @property
    def marker(self) -> str:
        """Path of the file that is written when all others of the subject are complete."""
        return f".phantom/{self.folder}/{self.subject}.json"

    @property
    def section(self) -> str:
        """List of the datalist."""
        return "validation" if self.number % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "training"

    @property
    def _case_folder(self) -> str:
        parent = {"brats": "BraTS2021", "ucsf": "UCSF_upright_sir24", "ixi": "BrainAtlas_registration_sir24"}[
            self.group
        ]
        return f"{self.folder}/{parent}/{self.subject}"


def bids_place(config: PhantomConfig, number: int) -> Place:
    """Return the place of a subject of the BIDS data set."""
    return Place(0, config.bids_name, number, "bids")


def datalist_place(config: PhantomConfig, number: int, group: Group | None = None) -> Place:
    """Return the place of a subject of the datalist data set; groups alternate unless one is named."""
    return Place(1, config.datalist_name, number, group or DATALIST_GROUPS[number % len(DATALIST_GROUPS)])


@dataclass(frozen=True)
class CohortPaths:
    """Where a cohort's parts are."""

    root: Path
    bids: Path
    """Root of the BIDS tree."""
    datalist_root: Path
    """Root of the datalist data set."""
    datalist: Path
    """Its list of cases."""
    participants: dict[str, Path]
    """Phenotype table by data set."""
    latents: dict[str, Path]
    """True causes and volumes by data set (Parquet)."""
    broken: Path
    """JSON list of the deliberately broken files with the expected reasons."""
    cohort: Path
    """Written last: config, its digest, counts."""


def cohort_paths(config: PhantomConfig, root: Path) -> CohortPaths:
    """Return the paths of a cohort below a root."""
    names = (config.bids_name, config.datalist_name)
    return CohortPaths(
        root=root,
        bids=root / config.bids_name,
        datalist_root=root / config.datalist_name,
        datalist=root / config.datalist_name / DATALIST_FILE,
        participants={name: root / name / "participants.tsv" for name in names},
        latents={name: root / name / LATENTS_FILE for name in names},
        broken=root / "broken.json",
        cohort=root / "cohort.json",
    )
