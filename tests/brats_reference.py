"""What the official BraTS evaluations answer for a few tiny phantoms: makes tests/golden/brats.json.

    python -m venv brats && brats/bin/pip install brats-evaluation
    PYTHONPATH=<checkout of rachitsaluja/BraTS-2023-Metrics> brats/bin/python tests/brats_reference.py

Run in an environment of its own: `brats-evaluation` 0.0.10 asks for pandas < 3, and its panoptica for numpy < 2.3 and
rich < 14, older than what the lock has; it is AGPL. BraTS 2023's code (commit 0c603fc) is on no index; of it only
`get_lesion_wise_score` and `get_challenge_parameters` are asked, and its surface distances are not kept. This file
needs NumPy and nibabel only; the tests import the phantoms from it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "brats.json"
SHAPE = (40, 32, 24)
CHALLENGES = ("BraTS-PED", "BraTS-MET")
"""Of BraTS 2023, with their own dilation and smallest volume."""

Ball = tuple[tuple[float, float, float], float]
"""Centre and radius of a lesion in voxels."""


def draw(*balls: Ball, enhancing: bool = True) -> np.ndarray:
    """Return a label (X, Y, Z) of BraTS 2023: oedema 2 around enhancing tumour 3 around necrosis 1."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    label = np.zeros(SHAPE, np.uint8)
    for centre, radius in balls:
        away = np.linalg.norm(grid - np.array(centre), axis=-1)
        label[away < radius] = 2
        label[away < 0.7 * radius] = 3 if enhancing else 1
        label[away < 0.35 * radius] = 1
    return label


A, B, C = (9.0, 10.0, 11.0), (28.0, 20.0, 12.0), (30.0, 6.0, 6.0)
PHANTOMS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "perfect": (draw((A, 6), (B, 5)), draw((A, 6), (B, 5))),
    "shifted": (draw((A, 6.5)), draw(((10.0, 11.0, 11.0), 6))),
    "one missed, one false": (draw((A, 6), (B, 5)), draw((A, 5.5), (C, 4))),
    "one prediction over two lesions": (draw((A, 5), ((22.0, 10.0, 11.0), 5)), draw((A, 5), ((15.5, 10.0, 11.0), 7))),
    "two lesions close together": (draw((A, 5), ((20.0, 10.0, 11.0), 5)), draw((A, 4.5), ((20.0, 11.0, 11.0), 4.5))),
    "one small lesion missed": (draw((A, 6), (B, 1.6), (C, 2.5)), draw((A, 6.2))),
    "near but not touching": (draw((A, 4)), draw(((9.0, 19.0, 11.0), 4))),
    "touches the border": (draw(((2.0, 2.0, 2.0), 6), (B, 5)), draw(((3.0, 2.0, 2.0), 5), (B, 4))),
    "nothing enhances": (draw((A, 6), enhancing=False), draw((A, 6))),
    "nothing predicted": (draw((A, 6)), draw()),
    "nothing there": (draw(), draw((A, 6))),
    "both empty": (draw(), draw()),
}
"""Target and prediction by name."""


def _scores(
    name: str, folder: Path, evaluate: Callable[[str, str], Any], older: Callable[[str, str, str, str], Any]
) -> dict[str, Any]:
    paths = []
    for role, label in zip(("target", "prediction"), PHANTOMS[name], strict=True):
        path = folder / f"{role}.nii.gz"
        nib.save(nib.Nifti1Image(label, np.eye(4)), path)
        paths.append(str(path))
    target, prediction = paths
    found = {region: result.to_dict(True) for region, result in evaluate(prediction, target).items()}
    wanted = ("tp", "fp", "fn", "rq", "global_bin_dsc", "global_bin_hd95", "global_bin_nsd")
    lines: dict[str, Any] = {
        "official": {region.upper(): {key: found[region].get(key) for key in wanted} for region in ("et", "tc", "wt")}
    }
    for challenge in CHALLENGES:
        lines[challenge] = {region: older(prediction, target, region, challenge) for region in ("ET", "TC", "WT")}
    return lines


def _lesion_wise(prediction: str, target: str, region: str, challenge: str) -> dict[str, float]:
    """Return the lesion-wise scores of BraTS 2023, put together as its `get_lesion_wise_results` does."""
    from brats_2023_metrics.surface_distance import brats_metrics

    dilation, smallest = brats_metrics.get_challenge_parameters(challenge)
    found = brats_metrics.get_lesion_wise_score(prediction, target, region, dilation)
    counted = [pair for pair in found["metric_pairs"] if pair[2] > smallest]
    false = len(found["fp"])
    total = len(counted) + false
    return {
        "dice": sum(pair[3] for pair in counted) / total if total else 1.0,
        "tp": sum(len(pair[0]) > 0 for pair in counted),
        "fn": sum(len(pair[0]) == 0 for pair in counted),
        "fp": false,
    }


def main() -> None:
    """Write the golden file."""
    from panoptica import Panoptica_Evaluator

    config = files("brats_evaluation").joinpath("configs", "config_gli.yaml")
    evaluator = Panoptica_Evaluator.load_from_config(str(config))
    with tempfile.TemporaryDirectory() as folder:
        found = {name: _scores(name, Path(folder), evaluator.evaluate, _lesion_wise) for name in PHANTOMS}
    versions = {name: version(name) for name in ("brats-evaluation", "panoptica")}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found[name], default=float)}" for name in PHANTOMS)
    text = f'{{\n "versions": {json.dumps(versions)},\n "phantoms": {{\n{lines}\n }}\n}}\n'
    GOLDEN.write_text(text.replace("Infinity", '"inf"').replace("NaN", "null"), encoding="utf-8")


if __name__ == "__main__":
    main()
