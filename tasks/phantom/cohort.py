"""Write a cohort: any size, any number of processes, interrupted at any point and started again.

Order of writing: the config, then each subject's files and last its marker, then the tables, and `cohort.json` at the
very end. A file that exists is complete (whole-object writes) and is never written again, so a
second call changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tasks.phantom import tables
from tasks.phantom.config import PhantomConfig
from tasks.phantom.faults import LABEL, Fault, list_faults
from tasks.phantom.folder import Progress, claim_folder, write_all, write_changed, write_new
from tasks.phantom.layout import TISSUE, CohortPaths, Place, bids_place, cohort_paths, datalist_place
from tasks.phantom.subject import Subject, draw_subject_traits, make_subject


@dataclass(frozen=True)
class Job:
    """One subject to write."""

    place: Place
    fault: str = ""
    """Name of its fault, or empty."""


def write_cohort(
    config: PhantomConfig, root: str | Path, progress: Progress | None = None, processes: int = 1
) -> CohortPaths:
    """Write what is missing of a cohort below a local folder and return where everything is.

    progress(done, total) counts subjects. The files do not depend on `processes`. Raises DifferentCohortError when the
    folder holds a cohort of another config, ValueError for processes < 1.
    """
    folder = claim_folder(config, root)
    jobs = list_jobs(config)
    todo = [job for job in jobs if not _is_written(folder, job.place)]
    write_all(partial(write_subject, config, folder), todo, processes, len(jobs), progress)
    _write_tables(config, folder, jobs)
    return cohort_paths(config, folder)


def list_jobs(config: PhantomConfig) -> list[Job]:
    """Return every subject of a cohort, BIDS first, those with a broken file last within their data set."""
    faults = list_faults(config)
    broken = {index: [Job(f.place, f.name) for f in faults if f.place.dataset == index] for index in (0, 1)}
    return [
        *(Job(bids_place(config, number)) for number in range(config.bids_subjects)),
        *broken[0],
        *(Job(datalist_place(config, number)) for number in range(config.datalist_subjects)),
        *broken[1],
    ]


def write_subject(config: PhantomConfig, root: Path, job: Job) -> None:
    """Make one subject and write those of its files that do not exist yet, the marker last."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    fault = next((fault for fault in list_faults(config) if fault.name == job.fault), None)
    traits = draw_subject_traits(config, job.place, **_forced(fault))
    with threadpool_limits(1):  # the same sums in the same order on every machine size
        subject = make_subject(config, job.place, traits, complete=fault is not None)
    absent = []
    for path, data in encode(subject, fault):
        if data is None:
            absent.append(path)
        else:
            write_new(root / path, data)
    write_new(root / job.place.marker, tables.as_json(marker_of(subject, job, absent)))


def encode(subject: Subject, fault: Fault | None = None) -> Iterator[tuple[str, bytes | None]]:
    """Yield (path relative to the root, bytes) of a subject's files; None for the file that a fault leaves out."""
    for modality, volume in subject.scans.items():
        broken = fault is not None and fault.modality == modality
        yield subject.place.scan(modality), fault.breaking(volume) if fault and broken else volume.to_bytes()
    if subject.mask is not None:
        broken = fault is not None and fault.modality == LABEL
        data = fault.breaking(subject.mask) if fault and broken else subject.mask.to_bytes()
        yield subject.place.mask(subject.traits.lesion), data
    if subject.tissue is not None:
        yield subject.place.mask(TISSUE), subject.tissue.to_bytes()


def marker_of(subject: Subject, job: Job, absent: list[str]) -> dict[str, Any]:
    """Return what a subject's marker says: files, traits, latents and the formula of its lesion."""
    place = subject.place
    return {
        "dataset": place.folder,
        "subject": place.subject,
        "group": place.group,
        "fault": job.fault,
        "absent": absent,
        "images": [place.scan(modality) for modality in subject.scans],
        "label": place.mask(subject.traits.lesion) if subject.mask is not None else "",
        "tissue": place.mask(TISSUE) if subject.tissue is not None else "",
        "traits": subject.traits.model_dump(),
        "latents": subject.latents,
        "lesion": [shape.model_dump(mode="json") for shape in subject.shapes],
    }


def read_marker(root: Path, place: Place) -> dict[str, Any]:
    """Return a written subject's marker."""
    content: dict[str, Any] = json.loads((root / place.marker).read_bytes())
    return content


def _forced(fault: Fault | None) -> dict[str, Any]:
    return {"lesion": fault.lesion or "none"} if fault else {}


def _is_written(root: Path, place: Place) -> bool:
    try:
        marker = read_marker(root, place)
    except FileNotFoundError:
        return False
    labels = (marker["label"], marker.get("tissue", ""))  # cohorts of before have no labels of tissue
    files = {*marker["images"], *filter(None, labels)}
    return all((root / path).exists() for path in files.difference(marker["absent"]))


def _write_tables(config: PhantomConfig, root: Path, jobs: list[Job]) -> None:
    paths = cohort_paths(config, root)
    faults = list_faults(config)
    files: dict[Path, bytes] = {
        paths.bids / "dataset_description.json": tables.dataset_description(config.bids_name, config.seed),
        paths.bids / "README": tables.README.encode(),
        paths.bids / "participants.json": tables.participants_sidecar(tables.PHENOTYPES),
        paths.bids / "derivatives/masks/dataset_description.json": tables.masks_description(),
        paths.datalist_root / "README": tables.README.encode(),
        paths.broken: tables.broken(faults),
    }
    for index, name in enumerate((config.bids_name, config.datalist_name)):
        places = [job.place for job in jobs if job.place.dataset == index]
        markers = [read_marker(root, place) for place in places]
        files[paths.participants[name]] = tables.participants(markers)
        files[paths.latents[name]] = tables.latents(markers)
        if index:
            files[paths.datalist] = tables.datalist(places, markers)
    files[paths.cohort] = tables.as_json(
        {
            "config_digest": config.content_digest(),
            "config": config.model_dump(mode="json"),
            "subjects": len(jobs),
            "broken": [fault.file for fault in faults],
        }
    )
    write_changed(files)
