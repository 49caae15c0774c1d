"""The regions of an atlas in the words of a spec, from its label image, a table of names, or a file of time series."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from infra import storage
from models.connectomes import KNOWN_ATLASES, ConnectomeSpec
from tasks.affines import BadScanError
from tasks.atlas_image import AtlasImageError, read_labels, values_in
from tasks.connectome import listed
from tasks.headers import is_nifti
from tasks.roi_series import header_of

MNI = 4
"""Code of sform and qform."""
SCHAEFER = {f"schaefer_{count}": count for count in (100, 200, 400)}
FETCHED = ("aal116", *SCHAEFER)
"""Atlases whose label image nilearn downloads."""


def atlas_block(source: str, labels: str = "", name: str = "") -> str:
    """Return the YAML block `connectome` of a spec for an atlas: a known name, a label image, or a file of series.

    labels: table of the names of the values. name: of the atlas; default: from the file's name. Raises AtlasImageError
    for a file that cannot be used, and ValueError for regions that a connectome cannot have.
    """
    if source in KNOWN_ATLASES and not storage.exists(source):
        settings: dict[str, Any] = {"atlas": source}
    elif is_nifti(source):
        settings = _of_image(source, labels, name)
    else:
        settings = _of_series(source, name)
    spec = ConnectomeSpec.model_validate(settings)
    block = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.model_dump().items()}
    shown = {key: block[key] for key in ("atlas", "atlas_image", "atlas_sha256", "regions", "values") if block[key]}
    return yaml.safe_dump(
        {"connectome": shown}, sort_keys=False, width=116, default_flow_style=None, allow_unicode=True
    )


def read_names(path: str) -> dict[int, str]:
    """Return value -> name from a table: of each line the first whole number and the first word that is no number.

    Tab-, comma- or blank-separated, as BIDS, nilearn, AAL and FreeSurfer's colour tables have them; lines without both
    are headers or comments. Raises AtlasImageError when none has both, or a value comes twice.
    """
    names: dict[int, str] = {}
    for number, line in enumerate(storage.read_bytes(path).decode("utf-8-sig").splitlines(), 1):
        text = line.partition("#")[0].strip()
        mark = next((mark for mark in "\t,;" if mark in text), None)
        cells = [cell.strip(' "') for cell in text.split(mark)]
        value = next((int(cell) for cell in cells if cell.isdigit()), None)
        name = next((cell for cell in cells if cell and not re.fullmatch(r"[-+.\d]+", cell)), "")
        if value is None or not name:
            continue
        if value in names:
            raise AtlasImageError(f"{path}: line {number} names the value {value} again ({names[value]}, {name})")
        names[value] = name
    if not names:
        raise AtlasImageError(f"{path}: no line has a whole number and a name")
    return names


def make_desikan_killiany(out: Path) -> None:
    """Write the label image of `desikan_killiany` that is installed with us, 1 mm in MNI space.

    Raises AtlasError when it is not installed, FileExistsError for a file that is there.
    """
    from tasks.atlas import desikan_killiany_labels  # here: others go without torch

    labels, affine = desikan_killiany_labels()
    image = nib.Nifti1Image(labels.astype(np.uint8), affine)
    image.set_sform(affine, code=MNI)
    image.set_qform(affine, code=MNI)
    _absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, out)


def fetch_atlas(name: str, folder: Path) -> Path:
    """Download the label image of a known atlas into a folder with nilearn; returns the file.

    Raises AtlasImageError for an atlas that cannot be had this way, and when the image has other values than ours.
    """
    if name not in FETCHED:
        raise AtlasImageError(
            f"{name!r} cannot be fetched; nilearn has {', '.join(FETCHED)}, `brainloom atlas make` has "
            "desikan_killiany, and of others show your own label image"
        )
    from nilearn import datasets

    out = folder / f"{name}.nii.gz"
    _absent(out)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="brainloom-atlas-") as cache:
        if name in SCHAEFER:
            found = datasets.fetch_atlas_schaefer_2018(n_rois=SCHAEFER[name], resolution_mm=2, data_dir=cache)
        else:
            found = datasets.fetch_atlas_aal(version="SPM12", data_dir=cache)
        labels, affine, _ = read_labels(str(found.maps))
        if values_in(labels) != sorted(KNOWN_ATLASES[name]):
            raise AtlasImageError(
                f"the label image of {name} that nilearn fetched has {len(values_in(labels))} values, "
                f"{len(KNOWN_ATLASES[name])} others were expected; show it under a name of your own"
            )
        nib.save(nib.Nifti1Image(labels.astype(np.int16), affine), out)
    return out


def _absent(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name")


def _of_image(url: str, labels: str, name: str) -> dict[str, Any]:
    image, _, sha256 = read_labels(url)
    values = values_in(image)
    atlas = name or _plain(url)
    where = {"atlas_image": storage.resolved(url), "atlas_sha256": sha256}
    if not labels:
        known = KNOWN_ATLASES.get(atlas)
        if known is not None and sorted(known) == values:
            return {"atlas": atlas, **where}
        return {"atlas": atlas, **where, "values": values, "regions": _numbered(atlas, values)}
    names = read_names(labels)
    if absent := [value for value in values if value not in names]:
        raise AtlasImageError(f"{labels} has no name for {len(absent)} of {len(values)} values: {listed(absent)}")
    return {"atlas": atlas, **where, "values": values, "regions": [names[value] for value in values]}


def _of_series(url: str, name: str) -> dict[str, Any]:
    try:
        header = header_of(storage.read_bytes(url), url.rsplit("/", 1)[-1])
    except FileNotFoundError:
        raise AtlasImageError(f"{url} is no file and no known atlas; known are {', '.join(KNOWN_ATLASES)}") from None
    except BadScanError as bad:
        raise AtlasImageError(bad.detail) from None
    if header is None:
        raise AtlasImageError(f"{url} has no header: nothing says which column is which region")
    atlas = name or _plain(url)
    if all(column.isdigit() for column in header):
        values = [int(column) for column in header]
        known = KNOWN_ATLASES.get(atlas, {})
        if sorted(known) == sorted(values):
            return {"atlas": atlas}
        return {"atlas": atlas, "values": values, "regions": _numbered(atlas, values)}
    return {"atlas": atlas, "values": list(range(1, len(header) + 1)), "regions": header}


def _numbered(atlas: str, values: Sequence[int]) -> list[str]:
    return [f"{atlas}_{value:03d}" for value in values]


def _plain(url: str) -> str:
    """Return the name of an atlas from that of its file."""
    stem = url.rsplit("/", 1)[-1].split(".")[0].lower()
    return re.sub(r"[^a-z0-9]+", "_", stem).strip("_") or "atlas"
