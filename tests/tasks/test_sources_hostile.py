"""Hostile inputs of the catalog: each is refused or left out with a reason, and the catalog of the rest is written."""

from __future__ import annotations

import gzip
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from connectome_layouts import SPACE, series, write, write_abide, write_adhd, write_anatomy, write_bold

from models.records import Reason
from tasks.catalog import build_catalog, read_catalog, write_catalog
from tasks.headers import HeaderError, parse_header
from tasks.sources import (
    AbidePcpSource,
    Adhd200PcpSource,
    DatalistSource,
    FmriprepSource,
    RoiSeriesSource,
    SourceConfig,
    TableSource,
    TreeSource,
    find_scans,
)
from tasks.sources.datalist import parse_datalist
from tasks.sources.names import MAX_ID, MAX_PATH
from tasks.table_files import read_table

LONG = "x" * 100_000
PATHS = {
    "parent": "../x_t1.nii.gz",
    "parent in the middle": "a/../../x_t1.nii.gz",
    "parent at the end": "a/..",
    "absolute": "/etc/passwd",
    "home": "~root/x_t1.nii.gz",
    "URL": "s3://other/x_t1.nii.gz",
    "file URL": "file:///etc/passwd",
    "http URL": "http://169.254.169.254/latest_t1.nii.gz",
    "chained URL": "zip://x_t1.nii.gz::s3://other/y.zip",
    "drive": "C:\\x_t1.nii.gz",
    "share": "\\\\host\\x_t1.nii.gz",
    "NUL": "x\x00_t1.nii.gz",
    "line break": "x\n_t1.nii.gz",
    "escape": "x\x1b[2J_t1.nii.gz",
    "lone surrogate": "x\ud800_t1.nii.gz",
    "long": f"{LONG}_t1.nii.gz",
    "long folders": f"{'a/' * 60_000}x_t1.nii.gz",
    "only dots": "./././.",
    "link to a folder outside": "out/x_t1.nii.gz",
    "link to a file outside": "leak_t1.nii.gz",
    "circle of links": "circle_t1.nii.gz",
}
NAMES = {
    "empty": "",
    "slash": "a/b",
    "parent": "../../b",
    "backslash": "a\\b",
    "line break": "a\nb",
    "escape": "a\x1b[31mb",
    "lone surrogate": "a\udfffb",
    "long": LONG,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with one good scan and links that lead astray."""
    folder, outside = tmp_path / "root", tmp_path / "outside"
    for path in (folder / "ok_t1.nii.gz", outside / "x_t1.nii.gz"):
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.int16), np.eye(4)), path)
    (folder / "out").symlink_to(outside)
    (folder / "leak_t1.nii.gz").symlink_to(outside / "x_t1.nii.gz")
    (folder / "circle_t1.nii.gz").symlink_to("circle_t1.nii.gz")
    return folder


def catalogued(source: DatalistSource | TableSource | TreeSource, tmp_path: Path) -> list[tuple[str, str]]:
    """Build and write a catalog; returns the reasons and details of what was left out."""
    result = build_catalog([source])
    write_catalog(result, str(tmp_path / "ws"))
    scans = read_catalog(str(tmp_path / "ws"))
    assert [Path(scan.path).name for scan in scans if scan.status == "ok"] == ["ok_t1.nii.gz"]
    assert all(len(scan.detail) <= 600 and len(scan.path) <= 2 * MAX_PATH for scan in scans)
    assert all(len(text) <= MAX_ID for scan in scans for text in (scan.subject, scan.session, scan.case))
    return [(scan.reason, scan.detail) for scan in scans if scan.status != "ok"]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_paths_of_a_datalist(root: Path, tmp_path: Path, path: str) -> None:
    (root / "dataset.json").write_text(json.dumps({"training": [{"image": ["ok_t1.nii.gz", path]}]}))
    ((reason, detail),) = catalogued(DatalistSource(dataset="d", root=str(root)), tmp_path)
    assert reason == Reason.OUTSIDE_ROOT
    assert detail


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_paths_of_a_table(root: Path, tmp_path: Path, path: str) -> None:
    if "\n" in path or "\x00" in path or not path.isascii():
        cells = {"subject": ["ok", "b"], "t1": ["ok_t1.nii.gz", path.encode("utf-8", "surrogatepass")]}
        pq.write_table(pa.table(cells), root / "t.parquet")
    else:
        pq.write_table(pa.table({"subject": ["ok", "b"], "t1": ["ok_t1.nii.gz", path]}), root / "t.parquet")
    source = TableSource(dataset="d", root=str(root), table="t.parquet", images={"t1": "t1"})
    ((reason, detail),) = catalogued(source, tmp_path)
    assert reason == Reason.OUTSIDE_ROOT
    assert detail


@pytest.mark.parametrize(
    ("column", "name"),
    # A subject may have no session.
    [(column, kind) for column in ("subject", "session") for kind in NAMES if (column, kind) != ("session", "empty")],
)
def test_names_of_a_table(root: Path, tmp_path: Path, column: str, name: str) -> None:
    raw = NAMES[name].encode("utf-8", "surrogatepass")
    other = "session" if column == "subject" else "subject"
    cells = {column: [b"ok", raw], other: ["ok", "b"], "t1": ["ok_t1.nii.gz", "ok_t1.nii.gz"]}
    pq.write_table(pa.table(cells), root / "t.parquet")
    source = TableSource(dataset="d", root=str(root), table="t.parquet", session="session", images={"t1": "t1"})
    ((reason, detail),) = catalogued(source, tmp_path)
    assert reason == Reason.BAD_ID
    assert f"write 1 to {MAX_ID} characters without / and control characters" in detail


LISTS = {
    "no JSON": (b"{", "is not JSON"),
    "empty": (b"", "is not JSON"),
    "invalid UTF-8": (b'{"training": ["\xff\xfe"]}', "is not JSON"),
    "NUL": (b"\x00" * 64, "is not JSON"),
    "deep list": (b"[" * 200_000, "nested too deeply"),
    "deep objects": (b'{"training":' * 100_000, "nested too deeply"),
    "deep image": (
        b'{"training": [{"image": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        r"\.image must be a list of paths, got",
    ),
    "section twice": (b'{"training": [], "training": ["a_t1.nii.gz"]}', "the key 'training' is there twice"),
    "image twice": (b'{"training": [{"image": "a", "image": "b"}]}', "the key 'image' is there twice"),
    "long key twice": (b'{"%b": 1, "%b": 2}' % ((LONG.encode(),) * 2), r"the key 'x{80}' is there twice"),
    "list at the top": (b"[]", "has none of the lists"),
    "number at the top": (b"1e400", "has none of the lists"),
    "object for a list": (b'{"training": {"image": "a"}}', "'training' must be a list, got dict"),
    "text for a list": (b'{"test": "a_t1.nii.gz"}', "'test' must be a list, got str"),
    "number as entry": (b'{"training": [1]}', r"training\[0\] must be an object with a key 'image', got 1"),
    "null as entry": (b'{"training": [null]}', r"training\[0\] must be an object"),
    "null image": (b'{"training": [{"image": null}]}', r"training\[0\]\.image must be a list of paths, got None"),
    "object image": (b'{"training": [{"image": {"t1": "a"}}]}', r"\.image must be a list of paths, got dict"),
    "mixed images": (b'{"training": [{"image": ["a", 7]}]}', r"\.image must be a list of paths, got a list with 7"),
    "label list": (b'{"training": [{"image": "a", "label": ["a"]}]}', r"\.label must be one path, got list"),
    "label number": (b'{"training": [{"image": "a", "label": 3}]}', r"\.label must be one path, got 3"),
    "long entry": (b'{"training": [%s]}' % (b"9" * 4000), r"training\[0\] must be an object with a key 'image', got 9"),
    "huge number": (b'{"training": [%s]}' % (b"9" * 100_000), "is not JSON|must be an object"),
}


@pytest.mark.parametrize(("raw", "text"), LISTS.values(), ids=LISTS)
def test_datalists_that_are_none(raw: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        parse_datalist(raw, "list.json")
    assert str(caught.value).startswith("list.json")
    assert len(str(caught.value)) < 500


TABLES = {
    "empty": ("t.csv", b"", "t.csv is empty; a line of column names is expected"),
    "blank lines": ("t.csv", b"\n\n\n", "is empty"),
    "invalid UTF-8": ("t.csv", b"subject,t1\na,\xff\xfe\n", "is not UTF-8 at byte 13; save it as UTF-8"),
    "UTF-16": ("t.csv", "subject,t1\na,b\n".encode("utf-16"), "is not UTF-8 at byte 0"),
    "NUL": ("t.tsv", b"subject\tt1\na\x00\tb\n", "holds a NUL character at position 12"),
    "column twice": ("t.csv", b"subject,t1,t1\na,b,c\n", "has more than one column 't1'; rename them"),
    "two without a name": ("t.csv", b"subject,,\na,b,c\n", "has more than one column ''"),
    "short row": ("t.csv", b"subject,t1\na\n", "row 2: 1 cells, the first line names 2 columns"),
    "long row": ("t.csv", b"subject,t1\na,b,c\n", "row 2: 3 cells, the first line names 2 columns"),
    "huge cell": ("t.csv", b"subject,t1\na," + b"x" * 200_000, r"line \d: field larger than field limit"),
    "open quote": ("t.csv", b'subject,t1\na,"b\n', "no column 'nothing'|row 2"),
    "a picture": ("t.csv", b"\x89PNG\r\n\x1a\n" + bytes(40), "is not UTF-8 at byte 0"),
    "no table": ("t.xlsx", b"PK\x03\x04", r"is no table: its name must end in \.csv"),
    "no Parquet": ("t.parquet", b"PAR1" + bytes(60) + b"PAR1", "is no readable Parquet file"),
    "cut Parquet": ("t.parquet", b"PAR1", "is no readable Parquet file"),
    "missing column": ("t.csv", b"subject,t1\na,b\n", "has no column 'nothing'; its columns: subject, t1"),
}


@pytest.mark.parametrize(("name", "raw", "text"), TABLES.values(), ids=TABLES)
def test_tables_that_are_none(tmp_path: Path, name: str, raw: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(raw)
    source = TableSource(dataset="d", root=str(tmp_path), table=name, images={"t1": "nothing"})
    with pytest.raises(ValueError, match=text) as caught:
        find_scans(source)
    assert name in str(caught.value)


def test_parquet_bombs_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.parquet"
    ids = pa.DictionaryArray.from_arrays(pa.array(np.zeros(6_000_000, np.int8)), ["a"])
    pq.write_table(pa.table({"subject": ids}), path)
    assert path.stat().st_size < 100_000
    monkeypatch.delattr(pq.ParquetFile, "read")
    with pytest.raises(ValueError, match=r"claims 6,000,000 rows in .* bytes; 5,000,000 rows are allowed"):
        read_table(str(path))


def test_nested_columns_are_not_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"subject": ["a"], "t1": [["x"]]}), tmp_path / "t.parquet")
    assert list(read_table(str(tmp_path / "t.parquet"))) == ["subject"]


def _header(offset: int, data: bytes) -> bytes:
    raw = bytearray(nib.Nifti1Image(np.ones((3, 4, 5), np.int16), np.eye(4)).to_bytes())
    raw[offset : offset + len(data)] = data
    return bytes(raw)


HEADERS = {
    "empty": b"",
    "one byte": b"\x1f",
    "gzip magic alone": b"\x1f\x8b",
    "cut in the gzip header": gzip.compress(_header(0, b""))[:9],
    "cut in the NIfTI header": gzip.compress(_header(0, b"")[:200]),
    "garbage after the magic": b"\x1f\x8b\x08" + bytes(range(200)),
    "gzip of gzip": gzip.compress(gzip.compress(_header(0, b""))),
    "wrong magic": gzip.compress(_header(344, b"ni1\0")),
    "text": b"not an image at all" * 40,
    "HTML": b"<!DOCTYPE html><html>" + b" " * 600,
    "zip": b"PK\x03\x04" + bytes(600),
    "no dimension": gzip.compress(_header(40, struct.pack("<h", 0))),
    "300 dimensions": gzip.compress(_header(40, struct.pack("<h", 300))),
    "negative edge": gzip.compress(_header(42, struct.pack("<h", -3))),
    "zero edge": gzip.compress(_header(42, struct.pack("<h", 0))),
    "32767 cubed": gzip.compress(_header(42, struct.pack("<3h", 32767, 32767, 32767))),
    "1000 cubed in 400 bytes": gzip.compress(_header(42, struct.pack("<3h", 1000, 1000, 1000))),
    "four axes": gzip.compress(_header(40, struct.pack("<5h", 4, 3, 4, 1, 5))),
    "seven axes of nothing": gzip.compress(_header(40, struct.pack("<8h", 7, 1, 1, 1, 1, 1, 1, 60))),
    "unknown data type": gzip.compress(_header(70, struct.pack("<h", 7777))),
    "RGB": gzip.compress(_header(70, struct.pack("<hh", 128, 24))),
    "complex": gzip.compress(_header(70, struct.pack("<hh", 32, 64))),
    "zero affine": gzip.compress(_header(252, struct.pack("<2h", 0, 1) + bytes(24) + bytes(48))),
    "NaN affine": gzip.compress(
        _header(252, struct.pack("<2h", 0, 1) + bytes(24) + struct.pack("<12f", *[float("nan")] * 12))
    ),
    "infinite affine": gzip.compress(
        _header(280, struct.pack("<4f", *[float("inf")] * 4))[:252]
        + struct.pack("<2h", 0, 1)
        + _header(280, struct.pack("<4f", *[float("inf")] * 4))[256:]
    ),
    "voxels far behind the end": _header(108, struct.pack("<f", 1e30)),
    "voxels at NaN": _header(108, struct.pack("<f", float("nan"))),
}
"""Files called b_t1.nii.gz; readers go by the content."""


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS)
def test_header_bombs(root: Path, tmp_path: Path, raw: bytes) -> None:
    (root / "b_t1.nii.gz").write_bytes(raw)
    for link in ("out", "leak_t1.nii.gz", "circle_t1.nii.gz"):
        (root / link).unlink()
    source = TreeSource(dataset="d", root=str(root), patterns=("{subject}_{modality}.nii.gz",))
    ((reason, detail),) = catalogued(source, tmp_path)
    assert reason in (Reason.UNREADABLE, Reason.NOT_3D, Reason.BAD_AFFINE)
    assert detail


def test_header_bombs_cost_no_memory() -> None:
    tracemalloc.start()
    for raw in HEADERS.values():
        with pytest.raises(HeaderError):
            parse_header(raw, len(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


OUTPUTS = "Outputs/cpac/filt_noglobal/rois_cc200"


def write_fmriprep(root: Path) -> None:
    write_anatomy(root, "sub-01")
    write_bold(root, "sub-01")


def write_series(root: Path) -> None:
    write(root / "a.1D")


FUNCTIONAL: dict[str, tuple[Callable[[Path], None], SourceConfig, str]] = {
    "fmriprep": (
        write_fmriprep,
        FmriprepSource(dataset="d", root="."),
        f"sub-02/func/sub-02_task-rest_{SPACE}_desc-preproc_bold.nii.gz",
    ),
    "abide_pcp": (write_abide, AbidePcpSource(dataset="d", root="."), f"{OUTPUTS}/Pitt_0050004_rois_cc200.1D"),
    "adhd200_pcp": (
        write_adhd,
        Adhd200PcpSource(dataset="d", root="."),
        "OHSU/1084283/sfnwmrda1084283_session_1_rest_1_cc200_TCs.1D",
    ),
    "roi_series": (write_series, RoiSeriesSource(dataset="d", root="."), "b.1D"),
}
"""By kind: what writes a good tree, its source, and a file that a link stands for."""


@pytest.mark.parametrize("kind", FUNCTIONAL)
def test_links_of_functional_data_are_not_followed_out_of_the_root(tmp_path: Path, kind: str) -> None:
    make, source, name = FUNCTIONAL[kind]
    make(tmp_path / "root")
    good = {scan.path for scan in find_scans(source.replace(root=str(tmp_path / "root"))).scans}
    outside = write(tmp_path / "outside/secret.txt", "0.1 0.2\n")
    for folder in (tmp_path / "root/out", tmp_path / "root/sub-09"):
        folder.symlink_to(tmp_path / "outside")
    place = tmp_path / "root" / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((outside, "outside the root"), (place, "links run in a circle")):
        place.symlink_to(target)
        result = build_catalog([source.replace(root=str(tmp_path / "root"))])
        place.unlink()
        assert {scan.path for scan in result.scans if scan.status == "ok"} == good - {str(place)}
        lost = [scan for scan in result.scans if scan.reason == Reason.OUTSIDE_ROOT]
        assert {scan.path.removeprefix(f"{tmp_path}/root/") for scan in lost} >= {"out", "sub-09", name}
        assert any(text in scan.detail for scan in lost if scan.path.endswith(name))


@pytest.mark.parametrize("kind", FUNCTIONAL)
def test_a_tree_of_links_out_of_the_root_is_told(tmp_path: Path, kind: str) -> None:
    _, source, _ = FUNCTIONAL[kind]
    write_abide(tmp_path / "release")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/data").symlink_to(tmp_path / "release")
    own = source.replace(root=str(tmp_path / "root"))
    if isinstance(own, AbidePcpSource):
        own = own.replace(phenotypic=str(tmp_path / "release/Phenotypic_V1_0b_preprocessed1.csv"))
    ((reason, detail),) = [(scan.reason, scan.detail) for scan in find_scans(own).scans]
    assert reason == Reason.OUTSIDE_ROOT
    assert "copy the file into the root" in detail


def test_names_in_phenotypes_of_abide_cannot_harm(tmp_path: Path) -> None:
    write_abide(tmp_path)
    table = tmp_path / "Phenotypic_V1_0b_preprocessed1.csv"
    table.write_text(f"SUB_ID,FILE_ID,DX_GROUP\n../../1,Pitt_0050003,1\n{'9' * 4000},Pitt_0050004,{LONG}\n")
    result = build_catalog([AbidePcpSource(dataset="d", root=str(tmp_path))])
    assert {scan.reason for scan in result.scans} == {Reason.UNMATCHED, Reason.BAD_ID}
    told = [issue for issue in result.issues if issue.problem == "bad value"]
    assert all(len(issue.detail) < 300 and len(issue.subject) <= 40 for issue in told)
    assert "row 2: the subject is '../../1'; a number is expected; the row is not read" in told[0].detail


def test_series_cost_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.1D").touch()
    with (tmp_path / "b.1D").open("wb") as file:
        file.truncate(10 << 30)
    write(tmp_path / "c.1D", series())
    tracemalloc.start()
    result = build_catalog([RoiSeriesSource(dataset="d", root=str(tmp_path))])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [scan.status for scan in result.scans] == ["left out", "left out", "ok"]
    assert "10,737,418,240 bytes, 67,108,864 are allowed" in result.scans[1].detail
    assert peak < 5_000_000
