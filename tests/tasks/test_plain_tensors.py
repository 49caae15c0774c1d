"""No MONAI container and no cache by path lies between a file and its stored voxels."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from nifti_files import blob, write_nifti
from store_builds import ingest, scans_of

from models.store import open_store

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("brainloom", "flows", "tasks", "models", "infra")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_uses_the_containers_transforms_or_caches_of_monai(package: str) -> None:
    """MetaTensor tracking slows every loop, and MONAI's persistent caches go by the path of a file, not its content."""
    for path in sorted((ROOT / package).rglob("*.py")):
        used = {name for name in imported(path) if name.startswith(("monai.data", "monai.transforms"))}
        assert not used, f"{path} imports {', '.join(sorted(used))}"


def test_another_file_at_the_same_path_is_preprocessed_again(tmp_path: Path) -> None:
    url, path = str(tmp_path / "s.zarr"), tmp_path / "a_t1.nii.gz"
    voxels, rows = [], []
    for seed in (0, 1, 1):
        write_nifti(path, blob(seed=seed))
        ingest(url, scans_of({"t1": path}, "a"))
        data = open_store(url).dataset("toy")
        rows.append(data.rows)
        voxels.append(data.read_case(data.rows[0])[0])
    assert rows == [[0], [1], [2]]
    assert not np.array_equal(voxels[0], voxels[1])
    np.testing.assert_array_equal(voxels[1], voxels[2])
