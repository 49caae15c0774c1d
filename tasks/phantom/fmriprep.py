"""The functional files of a phantom as fMRIPrep names and writes them: BOLD, its mask, its sidecar, its confounds."""

from __future__ import annotations

import io
import math

import numpy as np
import pandas as pd

from tasks.phantom import tables
from tasks.phantom.signals import MOTION, Recording

SPACE = "space-MNI152NLin2009cAsym"
CUTOFF_S = 128.0
"""Longest period that fMRIPrep's cosines do not take."""
TASK = "rest"


def description(seed: int) -> bytes:
    """Return dataset_description.json of the derivatives."""
    return tables.as_json(
        {
            "Name": "fMRIPrep - phantom",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "brainloom phantom", "Description": f"as fMRIPrep writes it, seed {seed}"}],
        }
    )


def file_names(subject: str) -> list[str]:
    """Return the paths of a subject's files below the derivatives' root, in the order of `contents`."""
    anat, func = f"{subject}/anat/{subject}_{SPACE}", f"{subject}/func/{subject}_task-{TASK}"
    return [
        f"{anat}_desc-preproc_T1w.nii.gz",
        f"{anat}_desc-brain_mask.nii.gz",
        f"{func}_{SPACE}_desc-preproc_bold.nii.gz",
        f"{func}_{SPACE}_desc-preproc_bold.json",
        f"{func}_{SPACE}_desc-brain_mask.nii.gz",
        f"{func}_desc-confounds_timeseries.tsv",
        f"{func}_desc-confounds_timeseries.json",
    ]


def bold_sidecar(tr_s: float) -> bytes:
    """Return the JSON beside a BOLD image."""
    return tables.as_json({"RepetitionTime": tr_s, "SkullStripped": False, "TaskName": TASK})


def confounds_table(recording: Recording, tr_s: float) -> bytes:
    """Return the confounds: tissue signals and motion with derivatives and squares, displacement, DVARS, cosines."""
    tissue = recording.tissue
    raw = recording.raw()
    columns = {"global_signal": raw.mean(axis=1), "csf": tissue[:, 0], "white_matter": tissue[:, 1]}
    columns |= dict(zip(MOTION, recording.motion.T, strict=True))
    expanded = {
        name + ending: values for column, series in columns.items() for name, ending, values in _expand(column, series)
    }
    dvars = np.concatenate([[np.nan], np.sqrt((np.diff(raw, axis=0) ** 2).mean(axis=1))])
    quality = {
        "std_dvars": dvars / np.nanmedian(dvars),
        "dvars": dvars,
        "framewise_displacement": recording.displacement_mm,
    }
    table = pd.DataFrame({**expanded, **quality, **_cosines(len(raw), tr_s)})
    buffer = io.StringIO()
    table.to_csv(buffer, sep="\t", index=False, na_rep="n/a", float_format="%.8g", lineterminator="\n")
    return buffer.getvalue().encode()


def _expand(column: str, series: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Return a signal, its difference from frame to frame, and the squares of both."""
    change = np.concatenate([[np.nan], np.diff(series)])
    return [
        (column, "", series),
        (column, "_derivative1", change),
        (column, "_power2", series**2),
        (column, "_derivative1_power2", change**2),
    ]


def _cosines(frames: int, tr_s: float) -> dict[str, np.ndarray]:
    """Return the discrete cosines with periods above CUTOFF_S (as SPM and fMRIPrep make them)."""
    count = math.floor(2 * frames * tr_s / CUTOFF_S)
    place = (np.arange(frames) + 0.5) / frames
    return {f"cosine{n:02d}": np.sqrt(2 / frames) * np.cos(np.pi * (n + 1) * place) for n in range(count)}
