"""Predicted regions as NIfTI labels on the grids of the source scans, for viewers and for other people's tools.

A training predicts masks of overlapping regions; a file holds one label value a voxel, of the dataset's own scheme.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from models.config import Region, TrainingConfig
from models.export import NotFinishedError
from models.records import SelectedCase
from models.selection import of_role, read_selection
from models.store import open_store
from tasks.export_nifti import label_image
from tasks.finetune import read_json
from tasks.predictions import read_regions


def own_labels(regions: Sequence[Region]) -> list[int]:
    """Return the label value that stands for each region in a file; 0 for one that smaller regions cover wholly.

    It is the smallest value of the region that no smaller region inside it has: oedema for the whole tumour. Where a
    region has more such values than one, nobody can tell them apart from the masks.
    """
    found = []
    for region in regions:
        inside = [other for other in regions if set(other.labels) < set(region.labels)]
        own = set(region.labels).difference(*(other.labels for other in inside))
        found.append(min(own, default=0))
    return found


def to_label(masks: npt.NDArray[np.bool_], regions: Sequence[Region]) -> npt.NDArray[np.uint8]:
    """Return the label (x, y, z) of region masks (R, x, y, z): smaller regions are written over larger ones.

    Gives back every label of a scheme whose regions are nested or apart and tell its values apart.
    """
    out = np.zeros(masks.shape[1:], np.uint8)
    own = own_labels(regions)
    for k in sorted(range(len(regions)), key=lambda k: -len(regions[k].labels)):
        if own[k]:
            out[masks[k]] = own[k]
    return out


def export_predictions(
    training: Path, out: Path, *, cases: Collection[str] = (), native: bool = True, overwrite: bool = False
) -> list[Path]:
    """Write `<dataset>_<case>_prediction.nii.gz` of the test cases of a segmentation, and return the files.

    cases: `dataset/case`, default all. native: on the grid of the case's reference scan, with its affine; otherwise on
    the stored grid. Raises NotFinishedError for a training without done.json, ValueError for a classification or an
    unknown case, FileExistsError for a file that exists unless overwrite.
    """
    if read_json(training / "done.json") is None:
        raise NotFinishedError(f"training {training} is not finished: it has no done.json; run it to its end")
    config = TrainingConfig.model_validate_json((training / "run.json").read_text(encoding="utf-8"))
    if config.objective.kind != "segmentation":
        raise ValueError(
            f"training {config.name} is no segmentation ({config.objective.kind}): it has no masks to write"
        )
    test = {f"{case.dataset}/{case.case}": case for case in of_role(read_selection(config.data.selection), "test")}
    if unknown := sorted(set(cases) - set(test)):
        raise ValueError(f"{unknown[0]!r} is no test case of {config.name}; for example {next(iter(test), 'none')!r}")
    wanted = [case for name, case in test.items() if not cases or name in cases]
    files = [out / f"{case.dataset}_{case.case}_prediction.nii.gz" for case in wanted]
    if not overwrite and (there := [path for path in files if path.exists()]):
        raise FileExistsError(f"{there[0]} exists; choose another folder or pass --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    for case, path in zip(wanted, files, strict=True):
        nib.save(_image(config, training, case, native), path)
    return files


def _image(config: TrainingConfig, training: Path, case: SelectedCase, native: bool) -> nib.Nifti1Image:
    assert config.objective.kind == "segmentation"
    data = open_store(config.data.store).dataset(case.dataset)
    masks = read_regions(training, case, data.case_info(case.row)).astype(bool)
    label = to_label(masks, config.objective.regions)
    return label_image(data, case.row, label, native)
