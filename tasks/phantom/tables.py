"""The tables and lists around the images: participants, latents, datalist, broken files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from tasks.phantom.faults import Fault
from tasks.phantom.layout import Place

README = """Phantoms made from the MNI152 template by brainloom: no patients, known answers. See docs/phantom.md.
Not for clinical use.
"""
PHENOTYPES: dict[str, tuple[str, str]] = {
    "age": ("Age", "year"),
    "sex": ("Sex: M or F; sets the mean head size", ""),
    "site": ("Scanner A, B or C", ""),
    "diagnosis": ("control or patient; patients have medial temporal atrophy (d = 0.8)", ""),
    "control_group": ("small or large lateral ventricles (d = 3): the positive control", ""),
    "lesion": ("none, tumour, stroke or schwannoma; independent of the diagnosis", ""),
}


def participants(markers: list[dict[str, Any]]) -> bytes:
    """Return participants.tsv: one line a subject, in the order of the markers."""
    rows = [
        {"participant_id": marker["subject"], **{name: marker["traits"][name] for name in PHENOTYPES}}
        for marker in markers
    ]
    table = pd.DataFrame(rows, columns=["participant_id", *PHENOTYPES])
    return table.to_csv(sep="\t", index=False, lineterminator="\n").encode()


def latents(markers: list[dict[str, Any]]) -> bytes:
    """Return latents.parquet: subject, group, broken, phenotypes, hidden traits and realised volumes (ml)."""
    rows = [
        {
            "dataset": marker["dataset"],
            "subject": marker["subject"],
            "group": marker["group"],
            "broken": bool(marker["fault"]),
            **{name: marker["traits"][name] for name in PHENOTYPES},
            **marker["latents"],
        }
        for marker in markers
    ]
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer, index=False)
    return buffer.getvalue()


def datalist(places: list[Place], markers: list[dict[str, Any]]) -> bytes:
    """Return the list of cases: `training` and `validation` arrays of {image: [paths], label: path}."""
    sections: dict[str, list[dict[str, Any]]] = {"training": [], "validation": []}
    for place, marker in zip(places, markers, strict=True):
        entry: dict[str, Any] = {"image": [_inside(place, path) for path in marker["images"]]}
        if marker["label"] and marker["traits"]["lesion"] == "tumour":
            entry["label"] = _inside(place, marker["label"])
        sections[place.section].append(entry)
    return as_json(sections)


def broken(faults: tuple[Fault, ...]) -> bytes:
    """Return broken.json: which file is broken how, and the reason that a reader must give."""
    rows = [
        {
            "dataset": fault.place.folder,
            "subject": fault.place.subject,
            "modality": fault.modality,
            "file": fault.file,
            "fault": fault.name,
            "reason": fault.reason.value,
        }
        for fault in faults
    ]
    return as_json(rows)


def dataset_description(name: str, seed: int) -> bytes:
    """Return the dataset_description.json of a BIDS tree."""
    return as_json(
        {
            "Name": name,
            "BIDSVersion": "1.10.0",
            "DatasetType": "raw",
            "License": "Apache-2.0",
            "GeneratedBy": [{"Name": "brainloom phantom", "Description": f"seed {seed}"}],
        }
    )


def masks_description() -> bytes:
    """Return dataset_description.json of the derivatives: the tumour masks."""
    return as_json(
        {
            "Name": "exact tumour masks",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "brainloom phantom", "Description": "1 necrosis, 2 oedema, 3 enhancing tumour"}],
        }
    )


def participants_sidecar(phenotypes: Mapping[str, tuple[str, str]]) -> bytes:
    """Return participants.json: what the columns mean. phenotypes: description and unit by column."""
    return as_json(
        {name: {"Description": text, **({"Units": unit} if unit else {})} for name, (text, unit) in phenotypes.items()}
    )


def as_json(value: Any) -> bytes:
    """Return indented JSON that is the same for equal values; refuses NaN."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _inside(place: Place, path: str) -> str:
    return path.removeprefix(place.folder + "/")
