"""Time series in every layout give the same connectome; every malformed file is refused with line and value."""

from __future__ import annotations

import numpy as np
import pytest
from connectome_files import NAMES, VALUES, athena_text, correlation_of, own_spec, pcp_text, planted

from models.connectomes import ConnectomeSpec
from models.reasons import Reason
from tasks.affines import BadScanError
from tasks.headers import MAX_TEXT_BYTES
from tasks.roi_series import header_of, parse_series

SPEC = own_spec()
SERIES = planted(correlation_of(1), 90)


def table(mark: str = ",", names: tuple[str, ...] = NAMES, series: np.ndarray = SERIES) -> bytes:
    lines = [mark.join(names)] if names else []
    return "\n".join([*lines, *(mark.join(map(repr, row.tolist())) for row in series)]).encode()


@pytest.mark.parametrize(
    "raw",
    [
        pcp_text(SERIES),
        athena_text(SERIES),
        table(","),
        table("\t", names=tuple(f'"{name}"' for name in NAMES)),
        table(" ", names=()),
        table(",", names=tuple(map(str, VALUES))),
        b"# made by hand\n# and well\n" + table(",", names=()),
        b"\xef\xbb\xbf" + table(",").replace(b"\n", b"\r\n"),
    ],
    ids=["pcp", "athena", "csv", "quoted tsv", "plain", "values", "comments", "windows"],
)
def test_every_layout_is_read(raw: bytes) -> None:
    found = parse_series(raw, "a.1D", SPEC)
    np.testing.assert_array_equal(found.values, SERIES)
    assert (found.frames_all, found.fd_mean_mm, found.lost) == (90, None, 0)


def test_a_header_decides_the_order() -> None:
    order = [3, 1, 0, 5, 2, 4]
    for names, text in ((tuple(VALUES[n] for n in order), pcp_text), (tuple(VALUES[n] for n in order), athena_text)):
        np.testing.assert_array_equal(parse_series(text(SERIES[:, order], names), "a", SPEC).values, SERIES)
    named = table(",", tuple(NAMES[n] for n in order), SERIES[:, order])
    np.testing.assert_array_equal(parse_series(named, "a", SPEC).values, SERIES)


def test_known_atlases_are_read_as_their_projects_write_them() -> None:
    for atlas, count in (("aal116", 116), ("cc200", 200), ("cc400", 392)):
        spec = ConnectomeSpec(atlas=atlas)
        series = np.random.default_rng(0).standard_normal((5, count))
        np.testing.assert_array_equal(parse_series(pcp_text(series, spec.values), "a", spec).values, series)


def test_a_region_without_any_number_has_no_signal() -> None:
    rows = [",".join("n/a" if n == 2 else repr(value) for n, value in enumerate(row.tolist())) for row in SERIES]
    found = parse_series("\n".join([",".join(NAMES), *rows]).encode(), "xcp.csv", SPEC)
    assert np.isnan(found.values[:, 2]).all()
    np.testing.assert_array_equal(np.delete(found.values, 2, axis=1), np.delete(SERIES, 2, axis=1))


def test_a_header_may_lack_as_many_regions_as_the_spec_allows() -> None:
    raw = athena_text(SERIES[:, :5], VALUES[:5])
    found = parse_series(raw, "a", own_spec(missing_regions=1))
    np.testing.assert_array_equal(found.values[:, :5], SERIES[:, :5])
    assert np.isnan(found.values[:, 5]).all()
    text = r"5 columns for 6 regions, of which 1 are missing \(34\) of atlas 'six' \(`brainloom atlas show` prints the"
    with pytest.raises(BadScanError, match=text):
        parse_series(raw, "a", SPEC)


ROWS = [list(map(repr, row)) for row in SERIES[:5].tolist()]


def broken(line: int, column: int, cell: str) -> bytes:
    rows = [list(row) for row in ROWS]
    rows[line][column] = cell
    return "\n".join([",".join(NAMES), *map(",".join, rows)]).encode()


@pytest.mark.parametrize(
    ("raw", "reason", "text"),
    [
        (b"", Reason.UNREADABLE, "a.csv: holds no line of numbers"),
        (b"# only words\n", Reason.UNREADABLE, "holds no line of numbers"),
        (",".join(NAMES).encode(), Reason.UNREADABLE, "holds no line of numbers"),
        (b"\xff\xfe\x00", Reason.UNREADABLE, "no text, byte 0 is none of UTF-8"),
        (b"1" * (MAX_TEXT_BYTES + 1), Reason.UNREADABLE, "67,108,865 bytes, a file of ROI time series has at most"),
        (broken(2, 3, "scanner"), Reason.UNREADABLE, "line 4 holds 'scanner', no number"),
        (broken(2, 3, ""), Reason.UNREADABLE, "line 4 holds '', no number"),
        (broken(2, 3, "1,2"), Reason.UNREADABLE, "line 4 has 7 columns, the first line of numbers 6"),
        (broken(1, 3, "nan"), Reason.NOT_FINITE, r"line 3 holds nan for region right \(1 such values\)"),
        (broken(0, 0, "-inf"), Reason.NOT_FINITE, "line 2 holds -inf for region calm"),
        (table(",", NAMES[:5]), Reason.UNREADABLE, "header names 5 columns, the first line of numbers has 6"),
        (table(",", (), SERIES[:, :5]), Reason.ATLAS, "5 columns without a header, atlas 'six' has 6 regions"),
        (
            pcp_text(SERIES, (3, 5, 8, 13, 21, 35)),
            Reason.ATLAS,
            r"6 columns for 6 regions, of which 1 are missing \(34\); 1 are none \(35\) of atlas 'six'",
        ),
        (athena_text(SERIES, (3, 5, 8, 13, 21, 21)), Reason.ATLAS, r"1 come twice \(21\); 1 are missing \(34\)"),
        (table(",", ("CALM", *NAMES[1:])), Reason.ATLAS, r"1 are missing \(calm\); 1 are none \(CALM\)"),
        (pcp_text(SERIES, tuple(range(6))), Reason.ATLAS, r"4 are missing .*; 4 are none \(0, 1, 2, 4\)"),
        (table(",", tuple("012345")), Reason.ATLAS, "4 are missing"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_line_and_value(raw: bytes, reason: Reason, text: str) -> None:
    with pytest.raises(BadScanError, match=text) as error:
        parse_series(raw, "a.csv", SPEC)
    assert error.value.reason == reason
    assert error.value.detail.startswith("a.csv: ")


def test_headers_are_shown_without_their_decoration() -> None:
    for raw in (pcp_text(SERIES), athena_text(SERIES)):
        assert header_of(raw, "a") == [str(value) for value in VALUES]
    assert header_of(table(","), "a") == list(NAMES)
    assert header_of(table(",", ()), "a") is None
