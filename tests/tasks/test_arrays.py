"""Grey-matter maps as NumPy arrays, and intensities that are kept."""

import io

import numpy as np
import pytest
from anatomy_files import AFFINE, empty_array, tiny_map, write_map
from nifti_files import centred, planned, write_nifti

from models.records import Reason
from models.spec import SPECS
from models.store import create_or_open, open_store
from tasks.affines import BadScanError
from tasks.arrays import parse_array, parse_image
from tasks.headers import HeaderError, read_header
from tasks.prepare import prepare_case

SHAPE = (121, 145, 121)


def npy(values, **kwargs):
    stream = io.BytesIO()
    np.save(stream, values, **kwargs)
    return stream.getvalue()


@pytest.fixture(scope="module")
def voxels():
    """A map in which every axis differs, (121, 145, 121) uint8, with zeros around."""
    x, y, z = np.ogrid[0:121, 0:145, 0:121]
    values = (1 + (x * 3 + y * 5 + z * 7) % 199).astype(np.uint8)
    values[:4] = values[-9:] = values[:, :20] = values[:, -11:] = 0
    values[:, :, :6] = values[:, :, -3:] = 0
    return values


@pytest.fixture(scope="module")
def stored(voxels, tmp_path_factory):
    """The map as NIfTI, prepared for `vbm`."""
    path = write_nifti(tmp_path_factory.mktemp("nii") / "mwp1.nii", voxels, AFFINE)
    return prepare_case(planned({"gm": path}), SPECS["vbm"])


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_gives_the_voxels_of_the_same_map_as_nifti(voxels, stored, tmp_path, order):
    path = tmp_path / "sub-1_preproc-cat12vbm_desc-gm_T1w.npy"
    path.write_bytes(npy(np.asarray(voxels[None], order=order)))
    found = prepare_case(planned({"gm": path}), SPECS["vbm"])
    np.testing.assert_array_equal(found.image, stored.image)
    assert found.geometry == stored.geometry
    # Axes are turned to RAS, nothing is interpolated: x runs the other way round.
    np.testing.assert_array_equal(found.image[0], voxels[4:-9, 20:-11, 6:-3][::-1])
    assert found.geometry.origin == (9, 20, 6)


def test_a_transposed_and_reshaped_array_is_another_image(voxels, stored, tmp_path):
    """The extraction of the AnatCL family does that: voxels are scrambled, not turned (methods of EIDOSLAB)."""
    path = tmp_path / "scrambled.npy"
    path.write_bytes(npy(voxels.transpose(2, 0, 1).reshape(1, *SHAPE)))
    found = prepare_case(planned({"gm": path}), SPECS["vbm"])
    whole = np.zeros((2, *SHAPE), np.float16)
    for out, case in zip(whole, (found, stored), strict=True):
        x, y, z = (slice(o, o + n) for o, n in zip(case.geometry.origin, case.extent, strict=True))
        out[x, y, z] = case.image[0]
    assert (whole[0] != whole[1]).mean() > 0.5
    # Ours keeps neighbours neighbours: the same step along z everywhere.
    steps = np.diff(stored.image[0][40, 40].astype(int)) % 199
    assert set(steps.tolist()) == {7}


def test_both_grids_hold_the_same_voxels(voxels, stored, tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(npy(voxels))
    crop = prepare_case(planned({"gm": path}), SPECS["vbm_128"])
    # 145 planes along y become 128: 8 behind and 9 in front of them are not stored.
    assert (stored.extent[1], crop.extent[1]) == (114, 114)
    assert crop.geometry.origin == (9, 12, 6)
    np.testing.assert_array_equal(crop.image, stored.image)


@pytest.mark.parametrize(
    ("raw", "reason", "text"),
    [
        (
            npy(np.ones((121, 121, 145), np.uint8)),
            Reason.ARRAY_SHAPE,
            r"shape \(121, 121, 145\); an array says not where it lies",
        ),
        (npy(np.ones((2, *SHAPE), np.uint8)), Reason.ARRAY_SHAPE, r"\(121, 145, 121\) is expected \(1.5 mm MNI"),
        (npy(np.ones(3)), Reason.ARRAY_SHAPE, r"shape \(3,\)"),
        (
            npy(np.array([{}, 1], dtype=object), allow_pickle=True),
            Reason.UNREADABLE,
            "pickled objects, which are never",
        ),
        (npy(np.ones(3, complex)), Reason.UNREADABLE, "holds complex128; real numbers are expected"),
        (npy(np.ones(SHAPE, np.uint8))[:-5], Reason.UNREADABLE, "2123068 bytes, its header announces 2123073"),
        (b"\x93NUMPY\x09\x00", Reason.UNREADABLE, r"array format \(9, 0\), known are 1.0 and 2.0"),
        (b"\x93NUMPY\x01\x00\xff\xff{", Reason.UNREADABLE, "no NumPy array"),
        (b"\x93NUMPY\x01\x00\x0b\x00{'descr': (\n", Reason.UNREADABLE, "no NumPy array"),
        (b"\x93NUMPY\x01\x00\x31\x00{'descr':(),'fortran_order':False,'shape':(1,2,3)}", Reason.UNREADABLE, "no NumPy"),
        (b"\x93NUMPY\x01\x00\x10\x27" + b"-" * 10_000, Reason.UNREADABLE, "no NumPy array"),
        (b"not an array at all", Reason.UNREADABLE, "no NumPy array"),
        (b"", Reason.UNREADABLE, "no NumPy array"),
    ],
)
def test_arrays_that_cannot_be_used(raw, reason, text, tmp_path):
    with pytest.raises(BadScanError, match=rf"a\.npy: .*{text}") as error:
        parse_image(raw, "a.npy")
    assert error.value.reason == reason
    path = tmp_path / "a.npy"
    path.write_bytes(raw)
    with pytest.raises(HeaderError) as header:
        read_header(str(path))
    assert header.value.reason == reason


def test_an_array_larger_than_the_memory_is_refused(voxels):
    with pytest.raises(BadScanError, match=r"a: \(121, 145, 121\) of uint8 needs 10 MiB, the limit is 4 MiB") as error:
        parse_array(npy(voxels), "a", 4 << 20)
    assert error.value.reason == Reason.MEMORY


def test_headers_of_arrays_cost_no_voxel(tmp_path):
    header = read_header(str(empty_array(tmp_path / "a.npy")))
    assert (header.shape, header.spacing_mm, header.dtype) == (SHAPE, (1.5, 1.5, 1.5), "float32")
    np.testing.assert_array_equal(header.affine, AFFINE)


def test_kept_intensities_are_those_of_the_file(tmp_path):
    found = prepare_case(planned({"gm": write_map(tmp_path / "mwp1a.nii")}), SPECS["vbm_tiny"])
    values = tiny_map()
    assert values.max() > 1.2  # modulation exceeds 1, and nothing is clipped
    x, y, z = (slice(o, o + n) for o, n in zip(found.geometry.origin, found.extent, strict=True))
    np.testing.assert_array_equal(found.image[0], values[x, y, z].astype(np.float16))
    assert found.geometry.intensity_range == {"gm": (0.0, 1.0)}
    assert found.qc["foreground_share"] == 1.0


def test_negative_values_become_zero_and_are_counted(tmp_path):
    values = tiny_map()
    values[0, 0, :5] = -0.001
    values[15, 18, 15] = -0.0
    path = write_nifti(tmp_path / "a.nii", values, np.array(SPECS["vbm_tiny"].grid_affine))
    found = prepare_case(planned({"gm": path}), SPECS["vbm_tiny"])
    assert found.qc["negative_replaced_gm"] == 5
    assert (found.image == 0).sum() == 1
    assert not np.signbit(found.image).any()  # minus zero would not survive the store


@pytest.mark.parametrize(
    ("factor", "reason", "text"),
    [
        (1e5, Reason.INTENSITIES, r"values up to \d+ are to be kept, the store holds up to 65504"),
        (1e-9, Reason.EMPTY, "no value above 1e-07, the smallest that is kept"),
    ],
)
def test_values_that_the_store_cannot_keep(tmp_path, factor, reason, text):
    path = write_nifti(tmp_path / "a.nii", (tiny_map() * factor).astype(np.float32), centred((31, 37, 31), (6, 6, 6)))
    with pytest.raises(BadScanError, match=text) as error:
        prepare_case(planned({"gm": path}), SPECS["vbm_tiny"])
    assert error.value.reason == reason


def test_a_store_of_maps_is_refused_to_a_spec_that_scales(tmp_path):
    url = str(tmp_path / "s.zarr")
    create_or_open(url, SPECS["vbm_tiny"])
    with pytest.raises(Exception, match="intensity: store 'keep', asked 'percentiles'"):
        create_or_open(url, SPECS["vbm_tiny"].replace(intensity="percentiles"))
    with pytest.raises(Exception, match="never finalised"):
        open_store(url)
