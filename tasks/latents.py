"""The truth behind the subjects of a phantom, for whoever scores methods: without what writes phantoms."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

LATENTS_FILE = "latents.parquet"
"""In the folder of a phantom's data set: true causes and volumes by subject."""


def read_latents(root: Path, datasets: Iterable[str]) -> pd.DataFrame | None:
    """Return the true latents of datasets below a folder, with a column `dataset`; None when none is a phantom."""
    found = []
    for name in datasets:
        path = root / name / LATENTS_FILE
        if path.exists():
            table = pd.read_parquet(path)
            found.append(table if "dataset" in table else table.assign(dataset=name))
    return pd.concat(found, ignore_index=True) if found else None
