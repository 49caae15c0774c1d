from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tasks.mosaic import BACKGROUND, LABEL_COLOURS, LIMIT_BYTES, mosaic


@pytest.fixture
def brain():
    """Three channels, the second absent; bright on the subject's left, with a lesion in front on the right."""
    i, j, k = np.indices((40, 48, 36)).astype(np.float32)
    inside = ((i - 20) / 18) ** 2 + ((j - 24) / 22) ** 2 + ((k - 18) / 16) ** 2 < 1
    image = np.zeros((3, 40, 48, 36), np.float16)
    image[0] = np.where(inside, 0.2 + 0.8 * (i < 20), 0)
    image[2] = np.where(inside, 0.5 + 0.3 * np.sin(j), 0)
    label = (((i - 28) ** 2 + (j - 34) ** 2 + (k - 20) ** 2) < 25).astype(np.uint8) * 4
    return image, np.diag([4.0, 4.0, 4.0, 1.0]), label


def opened(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def test_rows_for_present_modalities_only(brain):
    image, affine, label = brain
    two = opened(mosaic(image, affine, label, modalities=["t1", "t2", "flair"], title="demo case"))
    image[1] = image[0]
    three = opened(mosaic(image, affine, label, modalities=["t1", "t2", "flair"]))
    four = opened(mosaic(np.concatenate([image, image[:1]]), affine, label))
    assert two.width == three.width
    assert three.height > two.height
    assert four.height == two.height
    assert four.width > two.width


def test_it_is_small_also_with_eight_noisy_modalities():
    rng = np.random.default_rng(0)
    png = mosaic(rng.random((8, 96, 96, 80)).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]), frame="none")
    assert len(png) <= LIMIT_BYTES


def test_left_is_left_whatever_the_voxel_order(brain):
    image, affine, _ = brain
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = 39
    as_stored = opened(mosaic(image[:1], affine))
    assert as_stored == opened(mosaic(image[:1, ::-1], affine @ flip))
    swapped = affine[:, [2, 0, 1, 3]]
    assert as_stored == opened(mosaic(image[:1].transpose(0, 3, 1, 2), swapped))
    axial = np.asarray(as_stored.convert("L"), dtype=float)[90:270, 14 : 14 + 150]
    assert axial[:, :60].mean() > 2 * axial[:, -60:].mean()


def test_labels_are_outlined_in_their_colours(brain):
    image, affine, label = brain
    label[label > 0] = 1
    label[28, 34, 18:23] = 2
    pixels = np.asarray(opened(mosaic(image, affine, label))).reshape(-1, 3)
    plain = np.asarray(opened(mosaic(image, affine, np.zeros_like(label)))).reshape(-1, 3)
    for colour in LABEL_COLOURS[:2]:
        assert (pixels == colour).all(axis=1).sum() > 40
        assert not (plain == colour).all(axis=1).any()


def test_the_cuts_pass_through_the_lesion(brain):
    image, affine, _ = brain
    tiny = np.zeros(image.shape[1:], np.uint8)
    tiny[8, 30:33, 10:13] = 1
    pixels = np.asarray(opened(mosaic(image, affine, tiny))).reshape(-1, 3)
    assert (pixels == LABEL_COLOURS[0]).all(axis=1).sum() > 40


def test_air_has_the_colour_of_the_page(brain):
    image, affine, _ = brain
    pixels = np.asarray(opened(mosaic(image, affine)))
    assert tuple(pixels[80, 20]) == BACKGROUND


def test_equal_input_gives_equal_bytes(brain):
    assert mosaic(*brain) == mosaic(*brain)


def test_a_face_is_hidden_and_said_so(brain):
    image, affine, _ = brain
    affine[:3, 3] = (-80, -20, -110)
    assert mosaic(image, affine, frame="template") != mosaic(image, affine, frame="none")


def test_values_that_are_not_finite_do_not_matter(brain):
    image, affine, _ = brain
    broken = image.copy()
    broken[1] = np.nan
    broken[1, 0, 0, 0] = np.inf
    assert mosaic(broken, affine) == mosaic(image, affine)


@pytest.mark.parametrize(
    ("shape", "names", "label"), [((4, 4, 4), [], None), ((2, 4, 4, 4), ["t1"], None), ((1, 4, 4, 4), [], (3, 4, 4))]
)
def test_shapes_that_disagree_are_refused(shape, names, label):
    mask = None if label is None else np.ones(label, np.uint8)
    with pytest.raises(ValueError, match=r"image must be \(M, X, Y, Z\) with M names"):
        mosaic(np.ones(shape, np.float32), np.eye(4), mask, modalities=names)


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="mosaic 'x': no channel has a positive voxel"):
        mosaic(np.zeros((1, 4, 4, 4)), np.eye(4), title="x")
