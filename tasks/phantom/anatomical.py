"""The anatomical cohort: grey-matter maps, FreeSurfer tables and perhaps T1s of people with known cortices.

For AnatCL: what its image shows and what its descriptors say follow from the same hidden thickness and area of each
region (tasks.phantom.effects_cortex). Written as the programs would: a CAT12 folder, a SUBJECTS_DIR, a BIDS tree.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from models.anatomy import DESIKAN_KILLIANY, HEMISPHERES, MEASURES
from models.records import Record
from tasks.atlas import voxel_mm3
from tasks.latents import LATENTS_FILE
from tasks.phantom import tables
from tasks.phantom.aparc import aparc_stats
from tasks.phantom.cortex import (
    draw_residual,
    grey_template,
    latent_descriptors,
    map_file,
    measured_descriptors,
    modulated_map,
    scanned_map,
)
from tasks.phantom.cortex_t1 import t1_scan
from tasks.phantom.deform import IDENTITY
from tasks.phantom.effects_cortex import draw_cortical_traits
from tasks.phantom.folder import Progress, claim_folder, write_all, write_changed, write_new
from tasks.phantom.layout import Place

PHENOTYPES: dict[str, tuple[str, str]] = {
    "age": ("Age, 6 to 88", "year"),
    "sex": ("Sex: M or F; sets the mean head size", ""),
    "site": ("Site A, B or C: offsets and noise of what is measured", ""),
    "diagnosis": ("control, schizophrenia-like or ad-like; patients have a thinner cortex in some regions", ""),
}


class AnatomicalConfig(Record):
    """Size and seed of the cohort. Effect sizes are not here on purpose: see `tasks.phantom.effects_cortex`."""

    seed: int = Field(0, ge=0)
    name: str = "phantom-anat"
    """Of the data set and of its folder."""
    subjects: int = Field(200, ge=1)
    patients: bool = True
    """A quarter each is schizophrenia-like and ad-like. False: all are controls."""
    spec: Literal["vbm_tiny", "vbm"] = "vbm_tiny"
    """Whose grid the maps are on: 6 mm, or the 1.5 mm of CAT12."""
    t1_spacing_mm: float | None = Field(None, ge=1, le=6)
    """Voxel size of a T1 of each subject in MNI space, for the approximate path; None: no T1s."""
    clean: bool = False
    """No residual warp, site offset or noise: maps and tables say exactly what the latents are. For tests."""


@dataclass(frozen=True)
class AnatomicalPaths:
    """Where the cohort's parts are; those of the T1s are absent when the config has none."""

    root: Path
    """Root of the BIDS tree with the T1s."""
    cat12: Path
    """`<subject>/mri/mwp1<subject>_T1w.nii.gz`."""
    freesurfer: Path
    """SUBJECTS_DIR: `<subject>/stats/lh.aparc.stats` and rh."""
    participants: Path
    latents: Path
    """True values of every region (Parquet)."""
    cohort: Path
    """Written last: config and its digest."""


def anatomical_paths(config: AnatomicalConfig, folder: Path) -> AnatomicalPaths:
    """Return the paths of a cohort below a folder."""
    root = folder / config.name
    return AnatomicalPaths(
        root=root,
        cat12=root / "derivatives" / "CAT12",
        freesurfer=root / "derivatives" / "freesurfer",
        participants=root / "participants.tsv",
        latents=root / LATENTS_FILE,
        cohort=folder / "cohort.json",
    )


def write_anatomical_cohort(
    config: AnatomicalConfig, folder: str | Path, progress: Progress | None = None, processes: int = 1
) -> AnatomicalPaths:
    """Write what is missing of a cohort below a local folder and return where everything is.

    progress(done, total) counts subjects. A subject is a function of the config and its number: neither the number of
    subjects nor of processes changes a byte of its files. Raises DifferentCohortError when the folder holds a cohort of
    another config, AtlasError when the atlas is not installed, ValueError for processes < 1.
    """
    grey_template(config.spec)  # a missing atlas is told before anything is written
    root = claim_folder(config, folder)
    todo = [number for number in range(config.subjects) if not _is_written(config, root, number)]
    write_all(partial(write_anatomical_subject, config, root), todo, processes, config.subjects, progress)
    paths = anatomical_paths(config, root)
    markers = [json.loads((root / _place(config, number).marker).read_bytes()) for number in range(config.subjects)]
    write_changed(
        {
            paths.root / "dataset_description.json": tables.dataset_description(config.name, config.seed),
            paths.root / "README": tables.README.encode(),
            paths.root / "participants.json": tables.participants_sidecar(PHENOTYPES),
            paths.participants: _participants(markers),
            paths.latents: _latents(markers),
            paths.cohort: tables.as_json(
                {"config_digest": config.content_digest(), "config": config.model_dump(mode="json")}
            ),
        }
    )
    return paths


def write_anatomical_subject(config: AnatomicalConfig, folder: Path, number: int) -> None:
    """Make one subject and write those of its files that do not exist yet, its marker last."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # the same sums in the same order on every machine size
        files, marker = make_anatomical_subject(config, number)
    paths = anatomical_paths(config, folder)
    for name, data in files.items():
        write_new(paths.root / name, data)
    write_new(folder / _place(config, number).marker, tables.as_json(marker))


def make_anatomical_subject(config: AnatomicalConfig, number: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of a subject by path below the data set's folder, and what is true of it."""
    subject = _place(config, number).subject
    traits = draw_cortical_traits(config.seed, number, config.patients)
    template = grey_template(config.spec)
    latent = latent_descriptors(traits, template)
    warp = IDENTITY if config.clean else draw_residual(_rng(config, number, 1))
    own = modulated_map(traits, template, warp)
    measured, shown = latent, own
    if not config.clean:
        measured = measured_descriptors(latent, traits.site, _rng(config, number, 2))
        shown = scanned_map(own, traits.site, _rng(config, number, 3))
    contents = [map_file(shown, template.grid).to_bytes()]
    contents += [aparc_stats(subject, side, measured) for side in HEMISPHERES]
    if config.t1_spacing_mm is not None:
        contents.append(t1_scan(traits, warp, config.t1_spacing_mm, _rng(config, number, 4)).to_bytes())
    files = dict(zip(_files(config, subject), contents, strict=True))
    marker = {
        "dataset": config.name,
        "subject": subject,
        **traits.model_dump(include={*PHENOTYPES, "head_scale", "other_grey"}),
        "grey_ml": float(own.sum(dtype=float)) * voxel_mm3(template.grid) / 1000,
        **{measure: row.tolist() for measure, row in zip(MEASURES, latent, strict=True)},
    }
    return files, marker


def latent_column(measure: str, region: str) -> str:
    """Return the column of latents.parquet that holds the true value of a region."""
    return f"{measure}.{region}"


def _rng(config: AnatomicalConfig, number: int, stream: int) -> np.random.Generator:
    """Independent streams per subject and purpose: one more draw in one place moves nothing elsewhere."""
    return np.random.default_rng([config.seed, 2, number, stream])


def _place(config: AnatomicalConfig, number: int) -> Place:
    return Place(0, config.name, number, "bids")


def _files(config: AnatomicalConfig, subject: str) -> list[str]:
    """Return the paths of a subject's files below the data set's folder: map, tables and, if there are any, the T1."""
    files = [f"derivatives/CAT12/{subject}/mri/mwp1{subject}_T1w.nii.gz"]
    files += [f"derivatives/freesurfer/{subject}/stats/{side}.aparc.stats" for side in HEMISPHERES]
    return files if config.t1_spacing_mm is None else [*files, f"{subject}/anat/{subject}_T1w.nii.gz"]


def _is_written(config: AnatomicalConfig, folder: Path, number: int) -> bool:
    place, root = _place(config, number), anatomical_paths(config, folder).root
    return (folder / place.marker).exists() and all((root / name).exists() for name in _files(config, place.subject))


def _participants(markers: list[dict[str, Any]]) -> bytes:
    table = pd.DataFrame(markers)[["subject", *PHENOTYPES]].rename(columns={"subject": "participant_id"})
    return table.to_csv(sep="\t", index=False, lineterminator="\n").encode()


def _latents(markers: list[dict[str, Any]]) -> bytes:
    plain = pd.DataFrame(markers).drop(columns=list(MEASURES))
    regions = {
        latent_column(measure, region): [marker[measure][n] for marker in markers]
        for measure in MEASURES
        for n, region in enumerate(DESIKAN_KILLIANY)
    }
    buffer = io.BytesIO()
    pd.concat([plain, pd.DataFrame(regions)], axis="columns").to_parquet(buffer, index=False)
    return buffer.getvalue()
