"""The peer: the MONAI dictionary chain that the reference code runs for every training sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from models.spec import PreprocessSpec


def monai_chain(paths: Sequence[Path], spec: PreprocessSpec) -> Callable[[], np.ndarray]:
    """Return a function that reads, orients, resamples, crops and scales one case: (M, x, y, z) float32 in [0, 1].

    M counts the files, in their order. Source: the input pipeline of BrainMVP, without its random crop.
    """
    from monai.transforms import (
        Compose,
        CropForegroundd,
        EnsureChannelFirstd,
        LoadImaged,
        Orientationd,
        ScaleIntensityRangePercentilesd,
        Spacingd,
    )

    low, high = spec.percentiles
    keys = ["image"]
    run = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            Spacingd(keys, pixdim=(spec.spacing_mm,) * 3, mode="bilinear"),
            CropForegroundd(keys, source_key="image", allow_smaller=True),
            ScaleIntensityRangePercentilesd(keys, low, high, 0.0, 1.0, clip=True, channel_wise=True),
        ]
    )
    names = [str(path) for path in paths]
    return lambda: np.asarray(run({"image": list(names)})["image"])
