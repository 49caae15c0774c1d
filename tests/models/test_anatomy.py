import json

import numpy as np
import pytest
from anatomy_files import regional
from pydantic import ValidationError

from models.anatomy import (
    ATLASES,
    DESIKAN_KILLIANY,
    DESTRIEUX,
    MEASURES,
    PLAUSIBLE,
    DescriptorError,
    canonical_region,
    check_values,
)
from models.reasons import Reason
from models.records import DescriptorTable, digest_of
from models.spec import SPECS, PreprocessSpec

CT, GMV, SA = MEASURES


def test_the_tables_of_names():
    assert (len(DESIKAN_KILLIANY), len(DESTRIEUX)) == (68, 148)
    assert (DESIKAN_KILLIANY[0], DESIKAN_KILLIANY[33], DESIKAN_KILLIANY[34]) == (
        "lh_bankssts",
        "lh_insula",
        "rh_bankssts",
    )
    for names in ATLASES.values():
        assert len(set(names)) == len(names)
        assert [n[3:] for n in names if n.startswith("lh")] == [n[3:] for n in names if n.startswith("rh")]
    assert set(PLAUSIBLE) == set(MEASURES)


@pytest.mark.parametrize(
    ("name", "atlas", "side", "ours"),
    [
        ("lh-bankssts", "desikan_killiany", "", "lh_bankssts"),
        ("bankssts", "desikan_killiany", "rh", "rh_bankssts"),
        ("ctx-rh-Insula", "desikan_killiany", "", "rh_insula"),
        ("G&S_cingul-Ant", "destrieux", "lh", "lh_G_and_S_cingul-Ant"),
        ("rh-S_oc-temp_med&Lingual", "destrieux", "", "rh_S_oc-temp_med_and_Lingual"),
        ("Medial_wall", "destrieux", "lh", ""),
        ("unknown", "desikan_killiany", "lh", ""),
    ],
)
def test_spellings_of_regions(name, atlas, side, ours):
    assert canonical_region(name, atlas, side) == ours


@pytest.mark.parametrize("name", ["bankssts", "lh-hippocampus", "xh_insula", ""])
def test_a_region_of_another_atlas_is_refused(name):
    with pytest.raises(
        DescriptorError, match=r"is none of atlas desikan_killiany, whose names are lh_bankssts \.\.\. rh_"
    ):
        canonical_region(name, "desikan_killiany")


def changed(measure=CT, **places):
    values = {name: list(row) for name, row in regional().items()}
    for place, value in places.items():
        values[measure][int(place[1:])] = value
    return values


@pytest.mark.parametrize(
    ("values", "reason", "text"),
    [
        ({}, Reason.DESCRIPTOR_MEASURES, "no measure; use some of cortical_thickness_mm"),
        ({"thickness": [2.0] * 68}, Reason.DESCRIPTOR_MEASURES, "unknown measure 'thickness'; use some of"),
        ({CT: [2.0] * 60}, Reason.DESCRIPTOR_REGIONS, "60 regions, atlas desikan_killiany has 68"),
        (changed(_3=None), Reason.DESCRIPTOR_REGIONS, r"1 of 68 regions are missing \(lh_cuneus\), 0 may be; measure"),
        (changed(_3=float("nan")), Reason.DESCRIPTOR_VALUES, "of lh_cuneus is nan; it must be a positive number"),
        (changed(SA, _3=-4.0), Reason.DESCRIPTOR_VALUES, "surface_area_mm2 of lh_cuneus is -4; it must be a positive"),
        (changed(GMV, _3=0.0), Reason.DESCRIPTOR_VALUES, "grey_matter_volume_mm3 of lh_cuneus is 0"),
        (changed(_3=0.25), Reason.DESCRIPTOR_UNITS, "lh_cuneus is 0.25, plausible are 0.5 to 6; are units mixed"),
        (changed(_3=25.0), Reason.DESCRIPTOR_UNITS, "lh_cuneus is 25, plausible are 0.5 to 6"),
        (
            {CT: [0.25] * 68},
            Reason.DESCRIPTOR_UNITS,
            "median of cortical_thickness_mm is 0.25, .* centimetres; give it",
        ),
        ({GMV: [5.0] * 68}, Reason.DESCRIPTOR_UNITS, "plausible are 200 to 50000; it looks like centimetres"),
        ({SA: [15.0] * 68}, Reason.DESCRIPTOR_UNITS, "plausible are 80 to 20000; it looks like centimetres"),
        ({SA: [1e6] * 68}, Reason.DESCRIPTOR_UNITS, r"is 1e\+06, plausible are 80 to 20000; give it"),
    ],
)
def test_values_that_cannot_be(values, reason, text):
    with pytest.raises(DescriptorError, match=text) as error:
        check_values(values, "desikan_killiany")
    assert error.value.reason == reason


def test_some_regions_may_be_missing_when_it_is_allowed():
    check_values(changed(_3=None), "desikan_killiany", missing_max=1)
    table = DescriptorTable(
        atlas="desikan_killiany", basis="freesurfer", values={CT: changed(_3=None)[CT]}, missing_regions=1
    )
    again = DescriptorTable.model_validate_json(table.model_dump_json())
    assert again == table
    found = again.array()
    assert (found.shape, found.dtype) == ((3, 68), np.float32)
    assert np.isnan(found[0]).sum() == 1
    assert np.isnan(found[1:]).all()


def test_a_table_is_checked():
    with pytest.raises(ValidationError, match="it looks like centimetres"):
        DescriptorTable(atlas="desikan_killiany", basis="freesurfer", values={CT: [0.25] * 68})


DIGESTS = {
    "brainmvp": "4f99f8acf75741a1c167770cbf7092bebc8271ff8c462bdafeacfd40790d4a96",
    "demo": "7c72572bae98fe1d5a14a4eb9576fa0c226ed5a465c6ea9b55474401c2e7f9b3",
    "t1_mni": "9b882d223b488d1924dd0ddc91cde5dd9083c1245fe4383abe712bba244f4357",
    "generic": "704399eb75160c3da595bb03a7af33f770456e363a5b7756945ecb279124c10c",
}
"""Of the specs when the first stores were written: they open for ever."""


def test_fields_that_were_added_later_leave_the_digests_of_old_specs_alone():
    for name, digest in DIGESTS.items():
        assert SPECS[name].content_digest() == digest, name
        assert digest_of(json.loads(json.dumps(SPECS[name].identity()))) == digest
    kept = SPECS["generic"].replace(intensity="keep")
    assert kept.identity()["intensity"] == "keep"
    assert kept.content_digest() != DIGESTS["generic"]


def test_every_field_of_a_spec_changes_the_digest_when_it_is_set():
    before = PreprocessSpec(name="x").content_digest()
    other = {"spacing_mm": 2.0, "codec": "none", "intensity": "keep", "chunk": 64, "nan_share_max": 0.5}
    assert len({PreprocessSpec(name="x", **{key: value}).content_digest() for key, value in other.items()}) == 5
    assert before not in {PreprocessSpec(name="x", **{key: value}).content_digest() for key, value in other.items()}


def test_the_vbm_grids_lie_on_the_voxels_of_cat12():
    whole, crop, tiny = (SPECS[name] for name in ("vbm", "vbm_128", "vbm_tiny"))
    assert (whole.grid, crop.grid, tiny.grid) == ((121, 145, 121), (121, 128, 121), (31, 37, 31))
    ends = [np.array(s.grid_affine) @ [*(n - 1 for n in s.grid), 1] for s in (whole, tiny)]
    np.testing.assert_array_equal(ends, [[90, 90, 108, 1]] * 2)
    shift = np.array(crop.grid_affine)[:3, 3] - np.array(whole.grid_affine)[:3, 3]
    np.testing.assert_array_equal(shift / 1.5, [0, 8, 0])  # 8 planes behind, 9 in front
    assert {spec.modalities for spec in (whole, crop, tiny)} == {("gm",)}
    assert {spec.intensity for spec in (whole, crop, tiny)} == {"keep"}
