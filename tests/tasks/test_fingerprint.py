import numpy as np
from nifti_files import blob

from tasks.fingerprint import EDGE, fingerprint

GRID = (48, 40, 32)


def similarity(a, b):
    return float(np.corrcoef(a, b)[0, 1])


def test_it_has_sixteen_cells_an_axis_and_unit_spread():
    found = np.array(fingerprint(blob() / 250, (5, 4, 3), GRID))
    assert found.shape == (EDGE**3,)
    inside = found[found != 0]
    assert abs(inside.mean()) < 0.01
    assert abs(inside.std() - 1) < 0.02


def test_block_means_are_exact_for_whole_cells():
    channel = np.kron(np.arange(1, 4097, dtype=np.float32).reshape(16, 16, 16), np.ones((3, 2, 2), np.float32))
    found = np.array(fingerprint(channel, (0, 0, 0), (48, 32, 32)))
    values = np.arange(1, 4097)
    np.testing.assert_allclose(found, (values - values.mean()) / values.std(), atol=6e-4)


def test_crop_and_origin_do_not_matter():
    whole = np.pad(blob() / 250, 3)
    a = fingerprint(whole, (2, 1, 0), GRID)
    b = fingerprint(whole[3:-3, 3:-3, 3:-3], (5, 4, 3), GRID)
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_scaled_copies_are_alike_and_other_subjects_less():
    one, other = blob(seed=1) / 250, blob(seed=2)[::-1] / 250
    rescaled = np.clip(one * 0.8 + 0.05 * (one > 0), 0, 1)
    same = similarity(fingerprint(one, (5, 4, 3), GRID), fingerprint(rescaled, (5, 4, 3), GRID))
    assert same > 0.99
    assert similarity(fingerprint(one, (5, 4, 3), GRID), fingerprint(other, (5, 4, 3), GRID)) < same


def test_an_empty_channel_is_all_zero():
    assert set(fingerprint(np.zeros((8, 8, 8)), (0, 0, 0), GRID)) == {0.0}
