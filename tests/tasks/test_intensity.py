import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import SMALL

from models.records import Reason
from tasks.affines import BadScanError
from tasks.intensity import FEW, intensity_range, noise, percentiles, scale, signal

WANTED = (0.0, 0.5, 5.0, 50.0, 95.0, 99.5, 100.0)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "float32"]))
def test_percentiles_equal_numpy(data, dtype):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    spread = data.draw(st.sampled_from([0, 1, 50, 120]))
    values = (rng.normal(data.draw(st.sampled_from([0, 5])), 1, data.draw(st.integers(1, 400))) * spread).clip(
        -120, 120
    )
    values = (np.abs(values) if dtype == "uint8" else values).astype(dtype)
    zeros = data.draw(st.sampled_from([0, 1, 7, 500]))
    expected = np.percentile(np.r_[values, np.zeros(zeros)].astype(np.float64), WANTED)
    np.testing.assert_allclose(percentiles(torch.from_numpy(values), WANTED, zeros), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "outlier", "many zeros", "two values", "negative"])
@pytest.mark.parametrize("zeros", [0, 70_000])
def test_percentiles_of_many_real_values_equal_numpy(kind, zeros):
    values = np.random.default_rng(1).normal(0, 1, 2 * FEW).astype(np.float32)
    if kind == "outlier":
        values[7] = 1e9
    elif kind == "many zeros":
        values[: FEW + 9] = 0
    elif kind == "two values":
        values = np.where(values > 0.3, np.float32(0.1), np.float32(-7))
    elif kind == "negative":
        values -= 50
    expected = np.percentile(np.r_[values, np.zeros(zeros)].astype(np.float64), WANTED)
    np.testing.assert_allclose(percentiles(torch.from_numpy(values), WANTED, zeros), expected, rtol=1e-9)


def test_range_with_and_without_zeros():
    channel = np.zeros((10, 10, 10), np.float32)
    channel[2:8, 2:8, 2:8] = np.arange(1, 217).reshape(6, 6, 6)
    low, high = np.percentile(channel, (5, 95))
    part = torch.from_numpy(channel[2:8, 2:8, 2:8])
    assert intensity_range(torch.from_numpy(channel), 0, SMALL, "a") == pytest.approx((low, high), rel=1e-6)
    assert intensity_range(part, 784, SMALL, "a") == pytest.approx((low, high), rel=1e-6)
    inside = SMALL.replace(percentile_region="foreground")
    assert intensity_range(part, 784, inside, "a") == pytest.approx((11.75, 205.25))
    with pytest.raises(BadScanError, match="a: percentiles 5 and 95 are both 0") as error:
        intensity_range(torch.ones(1, 1, 1), 999, SMALL, "a")
    assert error.value.reason == Reason.CONSTANT
    with pytest.raises(BadScanError, match="a: no voxel above zero inside the crop") as error:
        intensity_range(-part, 0, inside, "a")
    assert error.value.reason == Reason.EMPTY


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_scale_clips_has_no_minus_zero_and_keeps_the_order_in_memory(order):
    values = torch.tensor([-5, -0.0, 0, 5, 10, 20]).reshape(1, 2, 3).permute(order)
    scaled = scale(values, 0, 10)
    assert scaled.stride() == values.stride()
    np.testing.assert_array_equal(scaled.permute(order).flatten(), [0, 0, 0, 0.5, 1, 1])
    assert not np.signbit(scaled.numpy()).any()
    assert scale(torch.zeros(0, 3, 3), 0, 1).shape == (0, 3, 3)


def test_scale_is_the_same_for_integers_and_their_real_values():
    values = torch.randint(-300, 3000, (70, 90, 110), dtype=torch.int16)
    found = scale(values, 12.5, 2345.25)
    assert torch.equal(found, scale(values.float(), 12.5, 2345.25))
    exact = ((values.double() - 12.5) / (2345.25 - 12.5)).clamp(0, 1)
    np.testing.assert_allclose(found.double(), exact, atol=3e-4)


def test_noise_and_signal():
    rng = np.random.default_rng(0)
    for sigma in (0.02, 0.1):
        noisy = (0.5 + rng.normal(0, sigma, (30, 30, 30))).astype(np.float16)
        assert noise(noisy) == pytest.approx(sigma, rel=0.05)
    nothing = np.zeros((4, 4, 4), np.float16)
    assert noise(nothing) == 0
    nothing[1:3] = 0.25
    assert signal(nothing) == (8.0, 32)
