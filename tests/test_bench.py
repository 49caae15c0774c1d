"""The benchmark runs through on a tiny case, its rivals agree, and its arithmetic is right. No time is asserted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from bench import crops, layouts, nnunet, preprocess, suite
from bench.inputs import DATASET, MODALITIES, centred, contrasts, tight, workplace, write_scans
from bench.kills import Started, kill_after_cases, kill_points, kill_table
from bench.timing import Ratio, Rounds, Target, race, target_table, time_table
from models.spec import PreprocessSpec
from models.store_layout import open_array

GRID = (30, 32, 15)
"""As deep as the brain, like the full-size grid: nothing to crop along the axis that is resampled."""
SPEC = PreprocessSpec(name="bench", grid=GRID)


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    axes = [np.linspace(-end, end, n) for end, n in ((1.1, 20), (1.1, 23), (0.9, 15))]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return centred(np.where(x**2 + y**2 + z**2 < 1, 0.5 + 0.3 * x + 0.1 * y * z, 0).astype(np.float32), GRID)


def test_brain_is_centred_with_equal_margins(brain: np.ndarray) -> None:
    for axis, length in enumerate(GRID):
        hit = np.flatnonzero(brain.any(axis=tuple(a for a in range(3) if a != axis)))
        assert hit[0] == length - 1 - hit[-1]


def test_a_brain_that_does_not_fit_is_refused(brain: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"does not fit a grid of \(8, 8, 8\); use a larger grid"):
        centred(tight(brain), (8, 8, 8))


def test_contrasts_differ_and_are_zero_outside(brain: np.ndarray) -> None:
    images = contrasts(brain)
    assert tuple(images) == MODALITIES
    for image in images.values():
        assert image.dtype == np.int16
        np.testing.assert_array_equal(image > 0, brain > 0)
    assert (images["t1"] != images["t2"]).any()


def test_the_floor_stores_our_voxels(tmp_path: Path, brain: np.ndarray) -> None:
    place = workplace(tmp_path / "ours.zarr", write_scans(tmp_path / "scans", brain), SPEC)
    image = preprocess.prepare_case(place.case, SPEC).image
    preprocess.floor(tmp_path / "floor.zarr", place, SPEC, image, None)()
    x, y, z = image.shape[1:]
    found = open_array(str(tmp_path / "floor.zarr"), f"{DATASET}/image")[0, :, :x, :y, :z]
    np.testing.assert_array_equal(found, image[[SPEC.modalities.index(m) for m in MODALITIES]])


def test_interpolation_of_the_floor_keeps_planes_that_were_read(tmp_path: Path, brain: np.ndarray) -> None:
    (path, *_) = [Path(scan.path) for scan in write_scans(tmp_path, brain, 2)]
    full = preprocess._interpolate(preprocess.isal_zlib.decompress(path.read_bytes(), 31), GRID)[0, 0].numpy()
    np.testing.assert_allclose(full[::2].T, contrasts(brain)["flair"][:, :, ::2], atol=1e-2)


@pytest.mark.full
def test_report_names_every_measure_and_ours_agrees_with_the_chain(tmp_path: Path, brain: np.ndarray) -> None:
    text = "\n".join(suite.report(tmp_path, brain, SPEC, 8, 1, 0.002))
    for words in (
        "ours / floor",
        "chain + write / ours",
        "/ memmap",
        "chain on 4 modalities / store",
        "two workers / one worker",
        "load",
        "catalog of 2",
        "HD95 of three regions, MONAI / ours, poor prediction",
    ):
        assert words in text
    agreements = [line for line in text.splitlines() if line.startswith("Largest difference to the chain")]
    assert len(agreements) == len(suite.INPUTS)
    assert all(line.endswith("(met)") for line in agreements), agreements


def test_step_shares_add_up(tmp_path: Path, brain: np.ndarray) -> None:
    place = workplace(tmp_path / "ours.zarr", write_scans(tmp_path / "scans", brain), SPEC)
    shares = preprocess.step_shares(place, SPEC)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[step] > 0 for step in preprocess.STEPS)


def test_draws_stay_inside_and_repeat() -> None:
    drawn = crops.draws((20, 18, 16), 8)
    assert drawn == crops.draws((20, 18, 16), 8)
    assert all(s.start >= 0 and s.stop <= n for _, w in drawn for s, n in zip(w, (20, 18, 16), strict=True))
    assert all(first != second for (first, second), _ in drawn)
    with pytest.raises(ValueError, match=r"a crop of 96 voxels does not fit an extent of \(20, 18, 16\)"):
        crops.draws((20, 18, 16), 96)


def test_race_runs_rivals_in_turn_and_drops_the_first_round() -> None:
    calls: list[str] = []
    times = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" * 3
    assert [len(r.wall) for r in times.values()] == [2, 2]
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        race({}, 0)


def test_ratio_and_targets() -> None:
    slow, fast = Rounds((4.0, 6.0, 9.0), (4.0, 6.0, 9.0)), Rounds((2.0, 2.0, 3.0), (1.0, 1.0, 1.5))
    ratio = Ratio.of(slow, fast)
    assert str(ratio) == "3.00 (2.00-3.00)"
    assert fast.cores == pytest.approx(0.5)
    assert Target("x", ratio, 3, at_least=True).met
    assert not Target("x", ratio, 2.9, at_least=False).met
    assert "| x | 3.00 (2.00-3.00) | at most 2.9 | **not met** |" in target_table([Target("x", ratio, 2.9, False)])
    assert "| slow | 6.00 s | 3 | 1.00 |" in time_table({"slow": slow})


def test_nnunet_layout_is_what_nnunet_computes() -> None:
    # As nnU-Net's own function answers.
    assert nnunet.layout((4, 144, 180, 155), (96, 96, 96)) == ((4, 16, 8, 8), (4, 80, 32, 32))
    assert nnunet.layout((2, 144, 180, 155), (96, 96, 96)) == ((2, 16, 16, 8), (2, 80, 64, 32))
    assert nnunet.layout((1, 240, 240, 155), (64, 64, 64)) == ((1, 16, 16, 16), (1, 80, 64, 64))
    assert nnunet.layout((1, 20, 20, 20), (128, 128, 128)) == ((1, 20, 20, 16), (1, 20, 20, 20))


def test_nnunet_files_hold_the_voxels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((2, 20, 24, 22)).astype(np.float16)
    path = nnunet.write(tmp_path / "a.b2nd", image, (8, 8, 8))
    window = (slice(3, 11), slice(5, 13), slice(14, 22))
    np.testing.assert_array_equal(nnunet.read(path, window), image[(slice(None), *window)].astype(np.float32))


@pytest.mark.full
def test_the_table_of_layouts(tmp_path: Path) -> None:
    image = np.zeros((3, 40, 36, 30), np.float16)
    image[:2] = np.random.default_rng(0).random((2, 40, 36, 30))
    image = np.concatenate([image, image[:2]])
    spec = PreprocessSpec(name="t", grid=(40, 36, 30))
    lines = list(layouts.table(tmp_path, image, spec, crop=8, rounds=1))
    assert len(lines) == 2 + len(layouts.EDGES) * len(layouts.CODECS)
    assert all(line.endswith(" ms |") for line in lines[2:])


def test_kills_are_spread_over_a_run_and_repeatable() -> None:
    points = kill_points(5, 5000, seed=0)
    assert [point // 1000 for point in points] == [0, 1, 2, 3, 4]
    assert points == kill_points(5, 5000, seed=0)
    assert points != kill_points(5, 5000, seed=1)


def test_a_kill_that_changed_the_store_stands_out() -> None:
    starts = [Started(12.34, 700), Started(50.0, 3755)]
    *_, killed, last = kill_table(starts, 3755, equal=True).splitlines()
    assert killed == "| 1 | 12.3 | 700 of 3,755 |"
    assert last == "| 2 | not killed: done after 50.0 | 3,755 of 3,755, digest equal to the undisturbed run's |"
    assert "**another digest than the undisturbed run's**" in kill_table(starts, 3755, equal=False)


def test_what_ends_before_it_can_be_killed_is_an_error(tmp_path: Path) -> None:
    with (
        subprocess.Popen(["/bin/true"]) as process,
        pytest.raises(RuntimeError, match=r"it ended with 0 before 3 cases of .*s\.zarr were done"),
    ):
        kill_after_cases(process, tmp_path / "s.zarr", 3)
