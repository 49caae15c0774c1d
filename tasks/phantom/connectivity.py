"""The connectivity cohort: T1s and resting-state signals of people whose cortex and connectome share hidden traits.

For CINP: what the image shows and what the connectome says follow from the same traits of seven networks and one of the
whole cortex (tasks.phantom.effects_connectivity). Everybody has a T1 in MNI space in a BIDS tree and time series of the
Desikan-Killiany regions as the Preprocessed Connectomes Project ships them; some have BOLD images as of fMRIPrep.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from models.anatomy import DESIKAN_KILLIANY
from models.records import Record
from tasks.latents import LATENTS_FILE
from tasks.phantom import effects_connectivity as effects
from tasks.phantom import fmriprep, tables
from tasks.phantom.connectivity_images import atlas_image, bold_image, brain_mask, t1_image
from tasks.phantom.cortex_t1 import levels
from tasks.phantom.deform import IDENTITY, Warp, draw_waves
from tasks.phantom.effects_connectivity import TRAITS, draw_connectivity_traits
from tasks.phantom.folder import Progress, claim_folder, write_all, write_changed, write_new
from tasks.phantom.layout import Place
from tasks.phantom.signals import Recording, exact_series, network_means, record, true_correlations

PHENOTYPES: dict[str, tuple[str, str]] = {
    "age": ("Age, 18 to 60", "year"),
    "sex": ("Sex: M or F; sets the mean area of the cortex", ""),
    "site": ("Site A, B or C: scanner of the T1, noise of the signals", ""),
    "diagnosis": ("control, hypoconnected or hyperconnected: connectivity of some networks is lower or higher", ""),
    "mean_fd": ("Mean framewise displacement, measured; patients move more", "mm"),
}
SERIES_FOLDER = "derivatives/cpac/filt_noglobal/rois_dk"
"""Below the data set's folder, named as in the Preprocessed Connectomes Project."""
BOLD_SPACING_MM = 4.0
ATLAS_SPACING_MM = 2.0


class ConnectivityConfig(Record):
    """Size and seed of the cohort. Effect sizes are not here on purpose: see `tasks.phantom.effects_connectivity`."""

    seed: int = Field(0, ge=0)
    name: str = "phantom-connect"
    """Of the data set and of its folder."""
    subjects: int = Field(200, ge=1)
    patients: bool = True
    """A third each is hypoconnected and hyperconnected. False: all are controls."""
    frames: int = Field(200, ge=100)
    """Of the resting-state signals; more than there are regions."""
    tr_s: float = Field(2.0, gt=0, allow_inf_nan=False)
    """Seconds from one frame to the next."""
    t1_spacing_mm: float = Field(6.0, ge=1, le=6)
    """Voxel size of the T1s; at 6 mm they lie on the grid of spec `cinp_tiny`."""
    bold_subjects: int = Field(0, ge=0)
    """The first so many also have BOLD images of 4 mm with confounds, as fMRIPrep writes them."""
    clean: bool = False
    """No residual warp, noise or artefact; correlations of the series are exactly the true ones. For tests."""


@dataclass(frozen=True)
class ConnectivityPaths:
    """Where the cohort's parts are."""

    root: Path
    """Root of the BIDS tree with the T1s."""
    series: Path
    """`<subject>_rois_dk.1D`: a column per region, named by its value in the atlas's label image, a line per frame."""
    fmriprep: Path
    """Root of fMRIPrep's derivatives; absent when nobody has BOLD images."""
    atlas: Path
    """Label image of the regions, which BOLD images need; absent with them."""
    participants: Path
    latents: Path
    """Traits and true connectivity of everybody (Parquet)."""
    cohort: Path
    """Written last: config and its digest."""


def connectivity_paths(config: ConnectivityConfig, folder: Path) -> ConnectivityPaths:
    """Return the paths of a cohort below a folder."""
    root = folder / config.name
    return ConnectivityPaths(
        root=root,
        series=root / SERIES_FOLDER,
        fmriprep=folder / f"{config.name}-fmriprep",
        atlas=folder / "desikan_killiany.nii.gz",
        participants=root / "participants.tsv",
        latents=root / LATENTS_FILE,
        cohort=folder / "cohort.json",
    )


def write_connectivity_cohort(
    config: ConnectivityConfig, folder: str | Path, progress: Progress | None = None, processes: int = 1
) -> ConnectivityPaths:
    """Write what is missing of a cohort below a local folder and return where everything is.

    progress(done, total) counts subjects. A subject is a function of the config and its number: neither the number of
    subjects nor of processes changes a byte of its files. Raises DifferentCohortError when the folder holds a cohort of
    another config, AtlasError when the atlas is not installed, ValueError for processes < 1.
    """
    levels()  # a missing atlas is told before anything is written
    root = claim_folder(config, folder)
    todo = [number for number in range(config.subjects) if not _is_written(config, root, number)]
    write_all(partial(write_connectivity_subject, config, root), todo, processes, config.subjects, progress)
    paths = connectivity_paths(config, root)
    markers = [json.loads((root / _place(config, number).marker).read_bytes()) for number in range(config.subjects)]
    people = _participants(markers)
    files = {
        paths.root / "dataset_description.json": tables.dataset_description(config.name, config.seed),
        paths.root / "README": tables.README.encode(),
        paths.root / "participants.json": tables.participants_sidecar(PHENOTYPES),
        paths.participants: people,
        paths.latents: _latents(markers),
    }
    if config.bold_subjects:
        files |= {
            paths.fmriprep / "dataset_description.json": fmriprep.description(config.seed),
            paths.fmriprep / "participants.tsv": people,
            paths.atlas: atlas_image(ATLAS_SPACING_MM).to_bytes(),
        }
    summary = {"config_digest": config.content_digest(), "config": config.model_dump(mode="json")}
    write_changed(files | {paths.cohort: tables.as_json(summary)})
    return paths


def write_connectivity_subject(config: ConnectivityConfig, folder: Path, number: int) -> None:
    """Make one subject and write those of its files that do not exist yet, its marker last."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # the same sums in the same order on every machine size
        files, marker = make_connectivity_subject(config, number)
    for name, data in files.items():
        write_new(folder / name, data)
    write_new(folder / _place(config, number).marker, tables.as_json(marker))


def make_connectivity_subject(config: ConnectivityConfig, number: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of a subject by path below the cohort's folder, and what is true of it."""
    traits = draw_connectivity_traits(config.seed, number, config.patients)
    correlations = true_correlations(traits, _rng(config, number, 1))
    recording = record(traits, correlations, config.frames, config.tr_s, _rng(config, number, 2))
    series = recording.cleaned()
    if config.clean:
        series = exact_series(correlations, config.frames, _rng(config, number, 2))
    warp = IDENTITY if config.clean else residual_warp(_rng(config, number, 3))
    t1 = t1_image(traits, warp, config.t1_spacing_mm, _rng(config, number, 4), config.clean).to_bytes()
    contents = [t1, series_file(series)]
    if number < config.bold_subjects:
        contents += _fmriprep_files(config, number, t1, recording)
    marker = {
        "dataset": config.name,
        "subject": _place(config, number).subject,
        **traits.model_dump(include={*PHENOTYPES}),
        "mean_fd": round(float(np.nanmean(recording.displacement_mm)), 4),
        **_by_trait("trait", traits.structure),
        **_by_trait("function", traits.function),
        **{f"z.{name}": value for name, value in network_means(correlations).items()},
    }
    return dict(zip(_files(config, number), contents, strict=True)), marker


def residual_warp(rng: np.random.Generator) -> Warp:
    """Draw what the normalisation of a T1 left."""
    return Warp(np.eye(4), *draw_waves(rng, effects.RESIDUAL_MM), 0.0)


def series_file(series_TR: np.ndarray) -> bytes:
    """Return time series (frames, 68) as a .1D file of the Preprocessed Connectomes Project."""
    header = "\t".join(f"#{value}" for value in range(1, len(DESIKAN_KILLIANY) + 1))
    buffer = io.StringIO()
    np.savetxt(buffer, series_TR, fmt="%.6f", delimiter="\t", header=header, comments="")
    return buffer.getvalue().encode()


def _fmriprep_files(config: ConnectivityConfig, number: int, t1: bytes, recording: Recording) -> list[bytes]:
    return [
        t1,
        brain_mask(config.t1_spacing_mm).to_bytes(),
        bold_image(recording, BOLD_SPACING_MM, config.tr_s, _rng(config, number, 5)),
        fmriprep.bold_sidecar(config.tr_s),
        brain_mask(BOLD_SPACING_MM).to_bytes(),
        fmriprep.confounds_table(recording, config.tr_s),
        tables.as_json({}),
    ]


def _by_trait(kind: str, values: tuple[float, ...]) -> dict[str, float]:
    return {f"{kind}.{name}": value for name, value in zip(TRAITS, values, strict=True)}


def _rng(config: ConnectivityConfig, number: int, stream: int) -> np.random.Generator:
    """Independent streams per subject and purpose: one more draw in one place moves nothing elsewhere."""
    return np.random.default_rng([config.seed, 3, number, stream])


def _place(config: ConnectivityConfig, number: int) -> Place:
    return Place(0, config.name, number, "bids")


def _files(config: ConnectivityConfig, number: int) -> list[str]:
    """Return the paths of a subject's files below the cohort's folder."""
    subject = _place(config, number).subject
    files = [
        f"{config.name}/{subject}/anat/{subject}_T1w.nii.gz",
        f"{config.name}/{SERIES_FOLDER}/{subject}_rois_dk.1D",
    ]
    if number < config.bold_subjects:
        files += [f"{config.name}-fmriprep/{name}" for name in fmriprep.file_names(subject)]
    return files


def _is_written(config: ConnectivityConfig, folder: Path, number: int) -> bool:
    marker = folder / _place(config, number).marker
    return marker.exists() and all((folder / name).exists() for name in _files(config, number))


def _participants(markers: list[dict[str, Any]]) -> bytes:
    table = pd.DataFrame(markers)[["subject", *PHENOTYPES]].rename(columns={"subject": "participant_id"})
    return table.to_csv(sep="\t", index=False, lineterminator="\n").encode()


def _latents(markers: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(markers).to_parquet(buffer, index=False)
    return buffer.getvalue()
