"""`brainloom atlas ...`: what it prints can be pasted into a spec, and what cannot be an atlas is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import nilearn.datasets
import numpy as np
import pytest
import yaml
from connectome_files import AFFINE, NAMES, VALUES, athena_text, pcp_text, write_atlas
from typer.testing import CliRunner

from brainloom.cli import app
from models.anatomy import DESIKAN_KILLIANY
from models.connectomes import KNOWN_ATLASES, ConnectomeSpec
from tasks.atlas_image import read_labels, require_atlas, values_in

COLOURS = "# colours\n 0 Unknown 0 0 0 0\n" + "".join(
    f"{value:5d} {name:12s} 70 {n} 180 0\n" for n, (value, name) in enumerate(zip(VALUES, NAMES, strict=True))
)
TABLES = {
    "lut.txt": COLOURS,
    "names.tsv": "index\tname\tcolor\n"
    + "".join(f"{v}\tthe {n}\t#ff0000\n" for v, n in zip(VALUES, NAMES, strict=True)),
    "names.csv": "id,label\n" + "".join(f'{v},"the {n}"\n' for v, n in zip(VALUES, NAMES, strict=True)),
    "names_first.csv": "name,value\n" + "".join(f"the {n},{v}\n" for v, n in zip(VALUES, NAMES, strict=True)),
}


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["atlas", *arguments], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return 2, str(done.exception)
    return done.exit_code, done.output


def shown(*arguments: str) -> ConnectomeSpec:
    code, text = run(*arguments)
    assert code == 0, text
    return ConnectomeSpec.model_validate(yaml.safe_load(text)["connectome"])


def test_the_known_ones_are_listed() -> None:
    code, text = run("list")
    assert code == 0
    assert all(name in text for name in KNOWN_ATLASES)
    assert shown("show", "cc200") == ConnectomeSpec(atlas="cc200")


@pytest.mark.parametrize("table", TABLES)
def test_an_own_atlas_gets_names_from_a_table(tmp_path: Path, table: str) -> None:
    image = tmp_path / "My-Six.nii.gz"
    where = write_atlas(image)
    (tmp_path / table).write_text(TABLES[table])
    found = shown("show", str(image), "--labels", str(tmp_path / table))
    assert (found.atlas, found.values, found.atlas_sha256) == ("my_six", VALUES, where["atlas_sha256"])
    assert [name.removeprefix("the ") for name in found.regions] == list(NAMES)
    require_atlas(found)


def test_without_a_table_regions_are_numbered(tmp_path: Path) -> None:
    write_atlas(tmp_path / "six.nii.gz")
    found = shown("show", str(tmp_path / "six.nii.gz"), "--name", "blocks")
    assert found.regions == tuple(f"blocks_{value:03d}" for value in VALUES)


def test_series_say_their_regions(tmp_path: Path) -> None:
    series = np.zeros((3, len(VALUES)))
    for name, raw in (("rois_six.1D", pcp_text(series)), ("x_six_TCs.1D", athena_text(series))):
        (tmp_path / name).write_bytes(raw)
        assert shown("show", str(tmp_path / name), "--name", "six").values == VALUES
    (tmp_path / "names.csv").write_text(",".join(NAMES) + "\n" + ",".join("1.5" for _ in NAMES))
    assert shown("show", str(tmp_path / "names.csv")).regions == NAMES
    wide = np.zeros((2, 200))
    (tmp_path / "rois_cc200.1D").write_bytes(pcp_text(wide, ConnectomeSpec(atlas="cc200").values))
    assert shown("show", str(tmp_path / "rois_cc200.1D"), "--name", "cc200") == ConnectomeSpec(atlas="cc200")


def test_what_is_no_atlas_is_refused(tmp_path: Path) -> None:
    image, table = tmp_path / "six.nii.gz", tmp_path / "t.tsv"
    write_atlas(image)
    assert run("show", "nothing") == (
        2, f"nothing is no file and no known atlas; known are {', '.join(KNOWN_ATLASES)}",
    )  # fmt: skip
    table.write_text("index\tname\n3\tcalm\n")
    assert run("show", str(image), "--labels", str(table)) == (
        2, f"{table} has no name for 5 of 6 values: 5, 8, 13, 21, 34",
    )  # fmt: skip
    table.write_text("3\tcalm\n3\twild\n")
    text = f"{table}: line 2 names the value 3 again (calm, wild)"
    assert run("show", str(image), "--labels", str(table)) == (2, text)
    table.write_text("only words\n")
    assert run("show", str(image), "--labels", str(table)) == (2, f"{table}: no line has a whole number and a name")
    table.write_text("".join(f"{value}\tsame\n" for value in VALUES))
    assert "each named once" in run("show", str(image), "--labels", str(table))[1]
    (tmp_path / "plain.1D").write_text("1.5 2.5 3.5\n")
    assert run("show", str(tmp_path / "plain.1D"))[1].endswith("nothing says which column is which region")


def test_the_atlas_that_ships_is_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "dk.nii.gz"
    found = shown("make", "desikan_killiany", str(out))
    assert found.atlas == "desikan_killiany"
    assert found.regions == DESIKAN_KILLIANY
    assert found.atlas_sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    require_atlas(found)
    labels, affine, _ = read_labels(str(out))
    assert values_in(labels) == list(range(1, 69))
    precuneus = np.argwhere(labels == 1 + DESIKAN_KILLIANY.index("rh_precuneus"))
    centre = (affine @ [*precuneus.mean(axis=0), 1])[:3]
    np.testing.assert_allclose(centre, [12, -57, 38], atol=6)
    assert run("make", "desikan_killiany", str(out)) == (2, f"{out} exists; choose another name")
    assert "'cc200' is not installed, desikan_killiany is" in run("make", "cc200", str(out))[1]
    assert "a label image ends in .nii.gz or .nii" in run("make", "desikan_killiany", str(tmp_path / "dk.png"))[1]


def test_an_atlas_is_fetched_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def fetcher(count: int) -> object:
        def fetch(**options: object) -> SimpleNamespace:
            asked.append(options)
            path = tmp_path / "downloaded.nii.gz"
            labels = np.arange(1000, dtype=np.int16).reshape(10, 10, 10) % (count + 1)
            nib.save(nib.Nifti1Image(labels, AFFINE), path)
            return SimpleNamespace(maps=str(path))

        return fetch

    monkeypatch.setattr(nilearn.datasets, "fetch_atlas_schaefer_2018", fetcher(100))
    found = shown("fetch", "schaefer_100", "--to", str(tmp_path / "atlases"))
    assert (found.atlas, len(found.regions)) == ("schaefer_100", 100)
    assert found.atlas_image == str(tmp_path / "atlases" / "schaefer_100.nii.gz")
    require_atlas(found)
    assert asked[0]["n_rois"] == 100
    monkeypatch.setattr(nilearn.datasets, "fetch_atlas_aal", fetcher(116))
    code, text = run("fetch", "aal116", "--to", str(tmp_path / "atlases"))
    assert (code, "that nilearn fetched has 116 values, 116 others were expected" in text) == (2, True)
    assert not (tmp_path / "atlases" / "aal116.nii.gz").exists()
    assert "'cc200' cannot be fetched; nilearn has aal116, schaefer_100" in run("fetch", "cc200", "--to", "x")[1]
