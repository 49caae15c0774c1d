"""A phantom BOLD image in MNI space gives the planted connectome; every broken input is refused with its numbers."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from connectome_files import (
    AFFINE,
    FRAMES,
    VALUES,
    atlas_labels,
    bold_of,
    confounds_bytes,
    confounds_of,
    correlation_of,
    fisher,
    own_spec,
    planted,
    write_atlas,
    write_bold,
)

from models.connectomes import ConnectomeSpec
from models.reasons import Reason
from tasks import nifti_frames
from tasks.affines import BadScanError
from tasks.atlas_image import AtlasImageError, require_atlas
from tasks.bold import ConfoundsFile, series_from_bold
from tasks.connectome import make_connectome

SPIKES = (17, 18, 60)
TRUTH = correlation_of(1)
KEPT = np.setdiff1d(np.arange(FRAMES), SPIKES)


def without(values: np.ndarray, *regressors: np.ndarray) -> np.ndarray:
    """Return what a least-squares fit of a line and some regressors leaves of series."""
    frames = len(values)
    design = np.column_stack([np.ones(frames), np.arange(frames), *regressors])
    return np.asarray(values - design @ np.linalg.lstsq(design, values, rcond=None)[0])


def matrix(series: np.ndarray) -> np.ndarray:
    return fisher(np.corrcoef(series.T))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ConnectomeSpec]:
    atlas = write_atlas(tmp_path_factory.mktemp("atlas") / "six.nii.gz")
    return lambda **changes: own_spec(**{**atlas, "confounds": [], **changes})


@pytest.fixture(scope="module")
def series() -> np.ndarray:
    """Series with the planted correlations over the frames without motion, and nonsense in the others."""
    clean = without(planted(TRUTH, len(KEPT)))
    values = np.zeros((FRAMES, len(VALUES)))
    values[KEPT] = clean / clean.std()
    values[list(SPIKES)] = np.random.default_rng(3).standard_normal((len(SPIKES), len(VALUES))) * 50
    return values


@pytest.fixture(scope="module")
def bold(tmp_path_factory: pytest.TempPathFactory, series: np.ndarray) -> bytes:
    return write_bold(tmp_path_factory.mktemp("bold") / "bold.nii.gz", bold_of(series)).read_bytes()


def confounds(table: pd.DataFrame | None = None, **changes: Any) -> ConfoundsFile:
    return ConfoundsFile(confounds_bytes(confounds_of(spikes=SPIKES) if table is None else table), "c.tsv", **changes)


def refused(
    raw: bytes, settings: ConnectomeSpec, reason: Reason, text: str, beside: ConfoundsFile | None = None
) -> None:
    with pytest.raises(BadScanError, match=text) as error:
        series_from_bold(raw, "b.nii.gz", beside, settings)
    assert error.value.reason == reason


def test_scrubbed_frames_leave_the_planted_connectome(bold: bytes, series: np.ndarray, spec: Any) -> None:
    found = series_from_bold(bold, "b.nii.gz", confounds(), spec())
    connectome, qc = make_connectome(found, spec())
    np.testing.assert_allclose(connectome, matrix(series[KEPT]), atol=2e-5)  # voxels are float32
    assert (qc["connectome_frames"], qc["connectome_frames_all"]) == (97, 100)
    assert qc["fd_mean_mm"] == pytest.approx((96 * 0.1 + 3 * 1.5) / 99, abs=1e-4)
    every, _ = make_connectome(series_from_bold(bold, "b.nii.gz", confounds(), spec(fd_threshold_mm=0)), spec())
    assert np.abs(every - connectome).max() > 0.2
    np.testing.assert_allclose(every, matrix(without(series)), atol=2e-5)


def test_confounds_are_regressed_out(bold: bytes, series: np.ndarray, spec: Any) -> None:
    table = confounds_of(spikes=SPIKES)
    settings = spec(confounds=["high_pass", "motion", "wm_csf"], global_signal=True)
    found = series_from_bold(bold, "b.nii.gz", confounds(table), settings)
    stems = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    ends = ("", "_derivative1", "_power2", "_derivative1_power2")
    names = [*(f"{stem}{end}" for stem in stems for end in ends), "csf", "white_matter", "global_signal"]
    used = table[[*names, "cosine00", "cosine01"]].bfill().iloc[KEPT].to_numpy()
    expected = without(series[KEPT], used)
    np.testing.assert_allclose(make_connectome(found, settings)[0], matrix(expected), atol=1e-3)
    assert found.lost == 1 + 29


def test_blocks_of_frames_make_no_difference(bold: bytes, spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = series_from_bold(bold, "b.nii.gz", None, spec())
    monkeypatch.setattr(nifti_frames, "BLOCK_BYTES", 7 * 8 * 16**3)
    np.testing.assert_array_equal(series_from_bold(gzip.decompress(bold), "b.nii", None, spec()).values, whole.values)


def test_the_atlas_may_have_another_grid(tmp_path: Path, series: np.ndarray, spec: Any) -> None:
    fine = np.repeat(np.repeat(np.repeat(bold_of(series), 2, 0), 2, 1), 2, 2)[::-1]
    affine = np.diag([6.0, 6, 6, 1])
    affine[:3, 3] = [90 - 12 * 15 - 3, -126 - 3, -78 - 3]
    raw = write_bold(tmp_path / "fine.nii", fine, affine=affine).read_bytes()
    found = make_connectome(series_from_bold(raw, "fine.nii", confounds(), spec()), spec())[0]
    np.testing.assert_allclose(found, matrix(series[KEPT]), atol=2e-5)


def test_a_filter_needs_the_repetition_time(tmp_path: Path, series: np.ndarray, spec: Any) -> None:
    data, band = bold_of(series), spec(low_pass_hz=0.1, high_pass_hz=0.01)
    in_ms, in_s = (
        series_from_bold(write_bold(tmp_path / f"{unit}.nii", data, tr, unit).read_bytes(), "b", None, band)
        for tr, unit in ((2000.0, "msec"), (2.0, "sec"))
    )
    np.testing.assert_array_equal(in_ms.values, in_s.values)
    assert in_s.lost == pytest.approx(1 + FRAMES * (1 - 0.09 / 0.25))
    power = np.abs(np.fft.rfft(in_s.values, axis=0)) ** 2
    hertz = np.fft.rfftfreq(FRAMES, 2.0)
    assert power[hertz > 0.15].sum() < 0.05 * power.sum()
    for tr, unit, words in ((0.0, "sec", "0 sec"), (2000.0, "unknown", "2000 unknown"), (2.0, "hz", "2 hz")):
        raw = write_bold(tmp_path / "no.nii", data, tr, unit).read_bytes()
        text = f"header gives {words} between frames, and the spec filters from 0.01 to 0.1 Hz; correct pixdim"
        refused(raw, band, Reason.NO_TR, text)
        assert series_from_bold(raw, "b", None, spec()).frames_all == FRAMES
    raw = write_bold(tmp_path / "slow.nii", data, 6.0).read_bytes()
    refused(raw, band, Reason.NO_TR, "a frame every 6 s shows at most 0.0833333 Hz, the spec filters from")


def test_confounds_must_be_there_and_fit(bold: bytes, spec: Any) -> None:
    asked = spec(confounds=["motion"], global_signal=True)
    table = confounds_of(spikes=SPIKES)
    text = "no confounds file, and the spec regresses out motion, global_signal; give the file .* or set confounds: "
    refused(bold, asked, Reason.CONFOUNDS, text)
    short = confounds(table[:-1])
    refused(bold, asked, Reason.CONFOUNDS, "c.tsv: 99 lines, b.nii.gz has 100 frames", short)
    lacking = confounds(table.drop(columns="trans_x"))
    refused(bold, asked, Reason.CONFOUNDS, r"c.tsv: The following .* missing: \['trans_x'\]", lacking)
    nobody = confounds(table.drop(columns="framewise_displacement"))
    refused(bold, spec(), Reason.CONFOUNDS, "c.tsv: has no number in a column framewise_disp", nobody)
    empty = confounds(table.assign(framewise_displacement=np.nan))
    refused(bold, spec(), Reason.CONFOUNDS, "and the spec leaves out frames above 0.5 mm; set fd_threshold_mm", empty)
    assert series_from_bold(bold, "b", nobody, spec(fd_threshold_mm=0)).fd_mean_mm is None
    holed = table.copy()
    holed.loc[5, "rot_y"] = np.nan
    refused(bold, asked, Reason.CONFOUNDS, "c.tsv: values that are not finite in rot_y", confounds(holed))
    words = confounds(table.astype({"rot_y": object}).replace({"rot_y": {table["rot_y"][3]: "fast"}}))
    refused(bold, asked, Reason.CONFOUNDS, "column rot_y holds other things than numbers", words)
    refused(bold, asked, Reason.CONFOUNDS, "c.tsv: no table", ConfoundsFile(b"", "c.tsv"))
    compcor = spec(confounds=["high_pass", "compcor"])
    refused(bold, compcor, Reason.CONFOUNDS, "c.tsv: .*", confounds())


def test_settings_that_cannot_work_are_refused_with_the_spec() -> None:
    with pytest.raises(
        ValueError, match=r"confounds.0\n *Input should be 'high_pass', 'motion', 'wm_csf' or 'compcor'"
    ):
        own_spec(confounds=["scrub"])
    with pytest.raises(ValueError, match="compcor needs high_pass beside it"):
        own_spec(confounds=["compcor"])


def test_frames_that_are_not_steady_and_a_filter_go_together(
    tmp_path: Path, bold: bytes, series: np.ndarray, spec: Any
) -> None:
    table = confounds_of(spikes=(40,)).assign(
        non_steady_state_outlier00=np.arange(FRAMES) == 0, non_steady_state_outlier01=np.arange(FRAMES) == 1
    )
    beside = confounds(table.astype({"non_steady_state_outlier00": float, "non_steady_state_outlier01": float}))
    band = spec(confounds=["motion"], high_pass_hz=0.02, min_frames=10)
    found = series_from_bold(bold, "b", beside, band)
    assert len(found.values) == FRAMES - 3
    assert np.isfinite(found.values).all()
    few = confounds(confounds_of(spikes=tuple(range(3, 88))))
    refused(bold, spec(min_frames=20), Reason.FEW_FRAMES, "b.nii.gz: 15 of 100 frames can be used", few)
    brief = write_bold(tmp_path / "brief.nii", bold_of(series[:14])).read_bytes()
    refused(brief, spec(min_frames=10, low_pass_hz=0.2), Reason.FEW_FRAMES, "b.nii.gz: 14 frames cannot be cleaned")


def test_a_high_pass_without_cosines_is_flagged(bold: bytes, spec: Any) -> None:
    table = confounds_of().drop(columns=["cosine00", "cosine01"])
    found = series_from_bold(bold, "b", confounds(table), spec(confounds=["high_pass"]))
    assert found.flags["high_pass_absent_bold"] is True
    assert "high_pass_absent_bold" not in series_from_bold(bold, "b", confounds(), spec(confounds=["high_pass"])).flags


def test_images_outside_mni_space_are_refused(tmp_path: Path, series: np.ndarray, spec: Any) -> None:
    data = bold_of(series[:12])
    away = AFFINE.copy()
    away[2, 3] += 300
    text = "0 of 6 regions of atlas 'six' lie in the image, at least 50% are expected of one in MNI space"
    refused(write_bold(tmp_path / "a.nii", data, affine=away).read_bytes(), spec(), Reason.NOT_MNI, text)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    raw = write_bold(tmp_path / "t.nii", data, affine=turn @ AFFINE).read_bytes()
    refused(raw, spec(), Reason.NOT_MNI, "axes are turned by 11.5 degrees, at most 2; give the BOLD image that is")


def test_regions_outside_the_view_are_found(tmp_path: Path, series: np.ndarray, spec: Any) -> None:
    data, affine = bold_of(series)[:, :8], AFFINE
    data[atlas_labels()[:, :8] == VALUES[1]] = 500  # constant
    found = series_from_bold(write_bold(tmp_path / "cut.nii", data, affine=affine).read_bytes(), "b", None, spec())
    assert np.isnan(found.values).all(axis=0).tolist() == [False, True, False, True, True, True]


def test_malformed_images_are_refused(tmp_path: Path, bold: bytes, series: np.ndarray, spec: Any) -> None:
    refused(bold[:-2000], spec(), Reason.UNREADABLE, "b.nii.gz: truncated")
    spoiled = bytearray(bold)
    spoiled[-6] ^= 1  # of the checksum
    refused(bytes(spoiled), spec(), Reason.UNREADABLE, "b.nii.gz: corrupt gzip stream")
    plain = gzip.decompress(bold)
    refused(plain[:-9], spec(), Reason.UNREADABLE, "b.nii.gz: header claims .* holds at most")
    refused(plain + bytes(1 << 17), spec(), Reason.UNREADABLE, "goes on after its 100 frames")
    single = write_bold(tmp_path / "one.nii", bold_of(series[:1])).read_bytes()
    refused(single, spec(), Reason.NOT_4D, r"shape \(16, 16, 16, 1\); three axes of two or more voxels and two or more")
    with pytest.raises(BadScanError, match=r"b: a frame of \(16, 16, 16\) needs 144 MiB, the limit is 1 MiB"):
        series_from_bold(bold, "b", None, spec(), memory_bytes=1 << 20)
    holed = bold_of(series)
    holed[atlas_labels() == VALUES[0], :40] = np.nan
    raw = write_bold(tmp_path / "nan.nii", holed).read_bytes()
    refused(
        raw, spec(), Reason.NOT_FINITE, "in a frame 16.7% of the voxels in regions are not finite, at most 1.0% are"
    )
    lost = bold_of(series)
    lost[..., 5] = np.nan  # 1 % of all voxels, but a spike in every region
    raw = write_bold(tmp_path / "frame.nii", lost).read_bytes()
    refused(raw, spec(), Reason.NOT_FINITE, "in a frame 100.0% of the voxels in regions are not finite")
    raw = write_bold(tmp_path / "empty.nii", np.nan_to_num(lost)).read_bytes()
    refused(raw, spec(), Reason.NOT_FINITE, "1 frames, first 5, are empty: all regions have the same value")


def test_the_atlas_image_is_the_one_that_the_spec_names(tmp_path: Path, bold: bytes, spec: Any) -> None:
    text = "a BOLD image needs the label image of atlas 'six'; set atlas_image"
    refused(bold, own_spec(confounds=[]), Reason.NO_ATLAS_IMAGE, text)
    require_atlas(spec())
    with pytest.raises(AtlasImageError, match=r"has the SHA-256 [0-9a-f]{64}, the spec says 00; correct one"):
        require_atlas(spec(atlas_sha256="00"))
    with pytest.raises(AtlasImageError, match=r"has no voxel of 1 of 6 values of the spec: 35"):
        require_atlas(spec(values=[3, 5, 8, 13, 21, 35]))
    with pytest.raises(AtlasImageError, match="does not exist"):
        require_atlas(spec(atlas_image=str(tmp_path / "gone.nii")))
    mean = write_bold(tmp_path / "mean.nii", bold_of(np.zeros((1, 6)))[..., 0])
    with pytest.raises(AtlasImageError, match="is no label image: whole numbers from 0 to 1048575 are needed"):
        require_atlas(spec(atlas_image=str(mean)))
    (tmp_path / "words.nii").write_text("no image")
    with pytest.raises(AtlasImageError, match=r"is no NIfTI label image \(words.nii: no NIfTI file"):
        require_atlas(spec(atlas_image=str(tmp_path / "words.nii")))


def test_the_run_says_what_its_header_says(bold: bytes) -> None:
    run = nifti_frames.open_run(bold, "b")
    assert (run.shape, run.frames, run.tr_s, run.tr_words) == ((16, 16, 16), 100, 2.0, "2 sec")
    assert dataclasses.asdict(run)["name"] == "b"
