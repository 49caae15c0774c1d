"""Quality control of grey-matter maps: a wrong one stands out for the right reason, and pictures show the atlas."""

from __future__ import annotations

import io

import numpy as np
import pytest
from nifti_files import scan_of, write_nifti
from PIL import Image
from store_builds import ingest

from models.spec import SPECS
from models.store import open_store
from tasks.atlas import lobes_on
from tasks.mosaic import LABEL_COLOURS, mosaic
from tasks.phantom.cortex import draw_residual, grey_template, modulated_map, scanned_map
from tasks.phantom.effects_cortex import draw_cortical_traits
from tasks.qc import mean_map
from tasks.qc_content import StoreQuality, gather

CASES = 14


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Maps of a dataset of which the last is upside down, and of one without any map."""
    folder = tmp_path_factory.mktemp("maps")
    template = grey_template("vbm_tiny")
    scans = []
    for number in range(CASES):
        rng = np.random.default_rng(number)
        own = modulated_map(draw_cortical_traits(0, number, False), template, draw_residual(rng))
        values = scanned_map(own, "A", rng)
        if number == CASES - 1:
            values = values[:, :, ::-1]
        path = write_nifti(folder / f"s{number:02d}.nii.gz", np.ascontiguousarray(values), template.grid.affine)
        scans.append(scan_of(path, "gm", f"s{number:02d}"))
    url = str(folder / "maps.zarr")
    ingest(url, scans, spec=SPECS["vbm_tiny"])
    return url


@pytest.fixture(scope="module")
def found(store: str) -> StoreQuality:
    return gather(store, [], mosaics=1)


def test_a_map_that_is_turned_stands_out_for_that(found: StoreQuality) -> None:
    assert [case["case"] for case in found.outliers] == [f"s{CASES - 1}"]
    assert found.outliers[0]["why"][0].startswith("correlation with MNI152 grey matter is")
    numbers = found.datasets[0].cases[-1]["numbers"]
    assert 400 < numbers["grey-matter volume"] < 1000
    assert numbers["correlation with MNI152 grey matter"] > 0.85


def test_the_mean_map_comes_first_and_lobes_are_outlined(found: StoreQuality, store: str) -> None:
    pictures = found.datasets[0].pictures
    assert [picture.alt for picture in pictures] == ["toy mean map", f"toy s{CASES - 1}"]
    assert pictures[0].caption == f"mean grey matter of {CASES} cases"
    colours = {
        tuple(colour) for colour in np.asarray(Image.open(io.BytesIO(pictures[0].png)).convert("RGB")).reshape(-1, 3)
    }
    assert set(LABEL_COLOURS) <= colours
    opened = open_store(store)
    assert mean_map(opened, "toy", []) is None


def test_a_legend_has_the_names_that_are_given() -> None:
    template = grey_template("vbm_tiny")
    image = np.asarray(template.parts.sum(axis=0)).reshape(1, *template.grid.shape)
    lobes = lobes_on(template.grid)
    plain = mosaic(image, template.grid.affine, lobes, frame="none")
    named = mosaic(image, template.grid.affine, lobes, frame="none", label_names={1: "frontal"})
    assert plain != named
    tall, flat = (Image.open(io.BytesIO(png)) for png in (named, plain))
    assert tall.height == flat.height + 18  # long names have a line of their own
    assert tall.width == flat.width
