from __future__ import annotations

import numpy as np
import pytest

from models.spec import SPECS
from tasks.faces import face_mask, foreground_of, frame_of


def voxels(mm, affine):
    return tuple(np.round(np.linalg.inv(affine) @ [*mm, 1])[:3].astype(int))


@pytest.fixture(scope="module")
def grid():
    """A 4 mm grid around the MNI head: affine and (3, X, Y, Z) millimetres."""
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-100, -140, -120)
    index = np.indices((51, 66, 56)).reshape(3, -1)
    return affine, (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, 51, 66, 56)


def ellipsoid(mm, centre, radii):
    return sum(((mm[a] - centre[a]) / radii[a]) ** 2 for a in range(3)) <= 1


def head_at(mm, shift=(0, 0, 0)):
    """Skull and face with the template's measures: 220 mm from back to nose, top at z = 85; moved by a shift in mm."""
    x, y, z = shift
    skull = ellipsoid(mm, (x, y - 15, z + 5), (76, 100, 80))
    jaw = ellipsoid(mm, (x, y + 55, z - 60), (55, 50, 55))
    return (skull | jaw)[None].astype(np.float32)


@pytest.fixture(scope="module")
def head(grid):
    return head_at(grid[1])


EYES = [(-32, 68, -38), (32, 68, -38)]
NOSE, MOUTH = (0, 98, -48), (0, 90, -80)
BRAIN = [(0, 66, -10), (0, 45, -22), (-40, 14, -40), (0, -60, -50), (0, 0, 70), (30, 40, 20)]


@pytest.mark.parametrize("frame", ["template", "image"])
def test_the_face_is_hidden_and_the_brain_is_not(grid, head, frame):
    affine, _ = grid
    hidden = face_mask(head, affine, frame)
    assert all(hidden[voxels(place, affine)] for place in [*EYES, NOSE, MOUTH])
    assert not any(hidden[voxels(place, affine)] for place in BRAIN)


@pytest.mark.parametrize("shift", [(0, 0, 60), (0, -60, 0), (60, 0, 0), (0, 0, 0)])
def test_the_face_is_hidden_in_a_world_that_is_not_mni(shift):
    """On the grid of the demo's spec, which cuts the top of the head off when the world lies 60 mm higher."""
    spec = SPECS["demo"]
    affine, places = np.array(spec.grid_affine), np.indices(spec.grid).reshape(3, -1)
    mm = (affine[:3, :3] @ places + affine[:3, 3:]).reshape(3, *spec.grid)
    image = head_at(mm, shift)
    hidden = face_mask(image, affine, frame_of(spec))
    assert all(hidden[voxels(np.add(place, shift), affine)] for place in [*EYES, NOSE])
    inside = [voxels(np.add(place, shift), affine) for place in BRAIN]
    assert not any(hidden[place] for place in inside if all(n < size for n, size in zip(place, spec.grid, strict=True)))


def test_millimetres_count_only_where_preprocessing_made_sure_of_mni():
    demo, mni = SPECS["demo"], SPECS["t1_mni"]
    assert frame_of(mni) == "template"
    assert frame_of(demo.replace(registration="rigid")) == "template"
    own = demo.replace(registration="affine", template="own.nii.gz", template_sha256="00")
    assert {frame_of(spec) for spec in (demo, own, SPECS["brainmvp"], SPECS["generic"])} == {"image"}


def test_no_voxel_of_the_mni_brain_is_hidden():
    from nilearn.datasets import load_mni152_brain_mask

    brain = load_mni152_brain_mask(resolution=2)
    mask = np.asarray(brain.dataobj) > 0
    assert not (face_mask(mask[None].astype(np.float32), brain.affine, "template") & mask).any()


def test_a_skull_stripped_image_is_left_alone(grid):
    affine, mm = grid
    brain = ellipsoid(mm, (0, -18, 10), (68, 85, 62))[None].astype(np.float32)
    assert not face_mask(brain, affine, "image").any()
    assert not face_mask(np.zeros_like(brain), affine, "image").any()


def test_none_hides_nothing(grid, head):
    assert not face_mask(head, grid[0], "none").any()


def test_orientation_does_not_matter(grid, head):
    affine, _ = grid
    turn = np.diag([1.0, -1.0, 1.0, 1.0])
    turn[1, 3] = head.shape[2] - 1
    flipped = face_mask(head[:, :, ::-1], affine @ turn, "image")
    np.testing.assert_array_equal(flipped[:, ::-1], face_mask(head, affine, "image"))


def test_foreground_ignores_faint_noise():
    image = np.zeros((2, 4, 4, 4), np.float32)
    image[0] = 0.01
    image[0, :2] = 1
    assert foreground_of(image).sum() == 32
