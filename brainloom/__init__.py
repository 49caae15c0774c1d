"""brainloom: raw multi-modal brain MRI into sharded Zarr stores, pre-trained 3D networks and honest benchmark tables.

The public API is three names: `open_store`, `CaseDataset` and `load_encoder`. They are imported on first use, so that
`import brainloom` stays fast and the command line does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

__version__ = metadata.version("brainloom")
__all__ = ["CaseDataset", "__version__", "load_encoder", "open_store"]

_HOMES = {"open_store": "models.store", "CaseDataset": "models.data", "load_encoder": "models.encoder"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'brainloom' has no attribute {name!r}; public names: {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)
