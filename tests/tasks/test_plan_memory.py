"""What a case really takes stays below its projection; in a process of its own, whose peak can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from connectome_files import AFFINE, EDGE, own_spec, store_spec, write_atlas, write_bold
from nifti_files import oblique, scan_of, write_nifti

from models.records import BOLD, Scan
from models.spec import SPECS, PreprocessSpec
from tasks.plan import projected_bytes

MEASURE = """
import json, sys
from pathlib import Path
import torch
from models.records import Scan
from models.spec import PreprocessSpec
from tasks.plan import cases_from_scans
from tasks.prepare import prepare_case

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
spec = PreprocessSpec.model_validate_json(sys.argv[1])
tiny, case = (cases_from_scans([Scan.model_validate(line) for line in lines]) for lines in json.loads(sys.argv[2]))
prepare_case(tiny[0], spec)  # what is imported and loaded once is not the case's
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
prepare_case(case[0], spec, 1 << 40)
print(status("VmHWM") - before)
"""
GENERIC, MNI = SPECS["generic"], SPECS["t1_mni"].replace(space="any")
MODALITIES = ("t1", "t2", "flair")


def write_case(folder: Path, edge: int, zoom: float, dtype: type, spec: PreprocessSpec) -> list[Scan]:
    """Write noise without a margin of air, the dearest content; turned against the world's axes.

    One modality and something like a head where antspyx works on it for long.
    """
    quick = spec.bias_correction == spec.registration == "none"
    inside = 1 if quick else np.sum(np.square(np.mgrid[(slice(-1.3, 1.3, edge * 1j),) * 3]), axis=0) < 1
    names = [*(MODALITIES if quick else MODALITIES[:1]), *(["brain_mask"] if spec.brain_mask == "file" else [])]
    rng = np.random.default_rng(0)
    affine = oblique((edge,) * 3, (zoom,) * 3, 8)
    scans = []
    for modality in names:
        high = 2 if modality == "brain_mask" else 900
        voxels = (inside * rng.integers(1, high, (edge,) * 3)).astype(np.uint8 if modality == "brain_mask" else dtype)
        path = write_nifti(folder / f"{edge}_{modality}.nii", voxels, affine)
        scans.append(scan_of(path, modality).replace(dtype=str(voxels.dtype)))
    return scans


@pytest.mark.full
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (GENERIC, np.int16),
        (GENERIC, np.float64),
        (GENERIC.replace(spacing_mm=0.75), np.int16),
        (GENERIC.replace(brain_mask="file"), np.int16),
        (MNI, np.float32),
        (GENERIC.replace(bias_correction="n4"), np.int16),
        (MNI.replace(registration="rigid"), np.int16),
    ],
    ids=["integers", "float64", "finer", "brain mask", "template", "n4", "registration"],
)
def test_a_case_stays_below_its_projection(tmp_path: Path, spec: PreprocessSpec, dtype: type) -> None:
    check(spec, [write_case(tmp_path, edge, zoom, dtype, spec) for edge, zoom in ((40, 4.0), (128, 1.25))])


@pytest.mark.full
@pytest.mark.parametrize(("edge", "frames"), [(16, 900), (96, 40), (192, 14)], ids=["long", "usual", "fine"])
def test_a_bold_image_stays_below_its_projection(tmp_path: Path, edge: int, frames: int) -> None:
    spec = store_spec(own_spec(**write_atlas(tmp_path / "six.nii.gz"), confounds=[], min_frames=10, min_kept_share=0))
    cases = []
    for count, parts in ((120, 1), (frames, edge // EDGE)):
        rng = np.random.default_rng(0)
        shape = (EDGE * parts,) * 3
        data = rng.integers(0, 4000, (*shape, count), dtype=np.int16)
        affine = AFFINE @ np.diag([1 / parts, 1 / parts, 1 / parts, 1])
        scan = scan_of(write_bold(tmp_path / f"{count}.nii", data, affine=affine), BOLD)
        cases.append([scan.replace(dtype="int16")])
    check(spec, cases)


def check(spec: PreprocessSpec, cases: list[list[Scan]]) -> None:
    """Preprocess the second case in a process that has done the first, and compare its peak with the projection."""
    text = json.dumps([[scan.model_dump(mode="json") for scan in scans] for scans in cases])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, spec.model_dump_json(), text], capture_output=True, text=True, check=True
    )
    taken, projected = int(done.stdout.split()[-1]), projected_bytes(cases[1], spec)
    assert taken < projected, f"{taken >> 20} MiB taken, {projected >> 20} MiB projected"
    assert projected < 6 * taken + (400 << 20), f"{taken >> 20} MiB taken, {projected >> 20} MiB projected"
