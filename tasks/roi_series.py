"""ROI time series from text files: a column per region, a line per frame; cleaned by whoever made them.

Understood: `rois_*.1D` of the Preprocessed Connectomes Project (header `#1 #2 ...`, values of the label image), the
output of AFNI's 3dROIstats as the Athena pipeline ships it for ADHD-200 (`File`, `Sub-brick`, `Mean_1`, ...), tables
with the names of the regions, and plain numbers. Separated by tabs, commas or blanks; `n/a` is a missing value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from models.connectomes import ConnectomeSpec
from models.reasons import Reason
from tasks.affines import BadScanError
from tasks.connectome import Doubles, Series, listed
from tasks.headers import MAX_TEXT_BYTES

AFNI_COLUMNS = ("File", "Sub-brick")
"""Columns of 3dROIstats that are no signals."""
_VALUE = re.compile(r"#?(?:Mean_)?(\d+)")


@dataclass(frozen=True)
class _Table:
    """The parts of a file."""

    header: list[str] | None
    """Names of the columns, without AFNI's own."""
    lines: list[tuple[int, str]]
    """Number in the file (from 1) and text of every line with numbers."""
    delimiter: str | None
    skipped: int = 0
    """Columns at the left that are no signals."""


def parse_series(raw: bytes, name: str, spec: ConnectomeSpec) -> Series:
    """Return the signals of a text file in the order of the spec's regions; raises BadScanError with line and value.

    A header decides which column is which region, by its value in the label image or by its name; columns may come in
    any order. Regions that it lacks have no signal, as far as the spec allows missing ones; other columns are refused.
    Without a header the number of columns must be right. A column without any number is a region without signal.
    """
    table = _split(raw, name)
    values = _numbers(table, name)
    places = np.array(_places(table.header, values.shape[1], spec, name))
    values = np.where(places < 0, np.nan, values[:, places])
    _check_finite(values, table, spec, name)
    return Series(values, name, len(values))


def header_of(raw: bytes, name: str) -> list[str] | None:
    """Return the names of a file's columns, values of the label image as plain numbers; None when it has no header."""
    header = _split(raw, name).header
    if header is None:
        return None
    return [str(value) for value in found] if (found := _values(header)) else header


def _split(raw: bytes, name: str) -> _Table:
    if len(raw) > MAX_TEXT_BYTES:
        raise BadScanError(
            Reason.UNREADABLE, f"{name}: {len(raw):,} bytes, a file of ROI time series has at most {MAX_TEXT_BYTES:,}"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadScanError(Reason.UNREADABLE, f"{name}: no text, byte {error.start} is none of UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    comments = [line for _, line in lines if line.startswith("#")]
    numbers = [(number, line) for number, line in lines if not line.startswith("#")]
    first = _cells(numbers[0][1]) if numbers else []
    header = first if _is_header(first) else None
    numbers = numbers[1:] if header else numbers
    if not numbers:
        raise BadScanError(Reason.UNREADABLE, f"{name}: holds no line of numbers")
    width = len(_cells(numbers[0][1]))
    if header is None and comments:
        header = _commented(comments[-1], width)
    skipped = len(AFNI_COLUMNS) if header and tuple(header[:2]) == AFNI_COLUMNS else 0
    table = _Table(header[skipped:] if header else None, numbers, _delimiter(numbers[0][1]), skipped)
    _check_widths(table, width, name, len(header or []))
    return table


def _delimiter(line: str) -> str | None:
    return next((mark for mark in (",", "\t") if mark in line), None)


def _cells(line: str) -> list[str]:
    return [cell.strip().strip('"') for cell in line.split(_delimiter(line))]


def _is_header(cells: Sequence[str]) -> bool:
    """A line is a header when a cell is no number, or when it counts: no signal is made of rising whole numbers."""
    if not all(_is_number(cell) for cell in cells):
        return True
    values = [int(cell) for cell in cells if cell.isdigit()]
    return len(values) == len(cells) > 2 and all(a < b for a, b in pairwise(values))


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace("n/a", "nan"))
    except ValueError:
        return False
    return True


def _commented(line: str, width: int) -> list[str] | None:
    """Return the header in a comment line; None when it is a comment."""
    cells = [cell.lstrip("#").strip() for cell in _cells(line.lstrip("#").strip())]
    return cells if len(cells) == width or _values(cells) else None


def _check_widths(table: _Table, width: int, name: str, header: int) -> None:
    if header and header != width:
        raise BadScanError(
            Reason.UNREADABLE, f"{name}: the header names {header} columns, the first line of numbers has {width}"
        )
    for number, line in table.lines:
        if (found := len(line.split(table.delimiter))) != width:
            raise BadScanError(
                Reason.UNREADABLE, f"{name}: line {number} has {found} columns, the first line of numbers {width}"
            )


def _numbers(table: _Table, name: str) -> Doubles:
    """Return all signals (frames, columns)."""
    width = len(table.lines[0][1].split(table.delimiter))
    try:
        return np.loadtxt(
            [line.replace("n/a", "nan") for _, line in table.lines],
            dtype=np.float64,
            comments=None,
            delimiter=table.delimiter,
            usecols=range(table.skipped, width),
            quotechar='"',
            ndmin=2,
        )
    except ValueError:
        cells = ((number, cell) for number, line in table.lines for cell in _cells(line)[table.skipped :])
        number, cell = next((found for found in cells if not _is_number(found[1])), (table.lines[0][0], ""))
        raise BadScanError(Reason.UNREADABLE, f"{name}: line {number} holds {cell[:40]!r}, no number") from None


def _values(header: Sequence[str]) -> list[int]:
    """Return a header as values of a label image; empty when it holds other words."""
    found = [_VALUE.fullmatch(cell) for cell in header]
    return [int(match[1]) for match in found if match] if all(found) else []


def _places(header: Sequence[str] | None, width: int, spec: ConnectomeSpec, name: str) -> list[int]:
    """Return the column of every region of the spec, -1 for one that the header lacks and may lack."""
    if header is None:
        if width != len(spec.regions):
            raise BadScanError(
                Reason.ATLAS,
                f"{name}: {width} columns without a header, atlas {spec.atlas!r} has {len(spec.regions)} regions",
            )
        return list(range(width))
    values = _values(header)
    found: list[object] = [*(values or header)]
    wanted: list[object] = [*(spec.values if values else spec.regions)]
    places = {column: place for place, column in enumerate(found)}
    too_few = len(set(wanted) - set(places)) > spec.missing_regions
    if len(places) < len(found) or set(places) - set(wanted) or too_few:
        raise BadScanError(
            Reason.ATLAS,
            f"{name}: {_difference(found, wanted)} of atlas {spec.atlas!r} (`brainloom atlas show` prints the regions "
            "of a file)",
        )
    return [places.get(region, -1) for region in wanted]


def _difference(found: Sequence[object], wanted: Sequence[object]) -> str:
    twice = sorted({str(column) for column in found if found.count(column) > 1})
    absent = [region for region in wanted if region not in set(found)]
    other = [column for column in found if column not in set(wanted)]
    parts = [
        f"{len(columns)} {words} ({listed(columns)})"
        for columns, words in ((twice, "come twice"), (absent, "are missing"), (other, "are none"))
        if columns
    ]
    return f"the header has {len(found)} columns for {len(wanted)} regions, of which {'; '.join(parts)}"


def _check_finite(values: Doubles, table: _Table, spec: ConnectomeSpec, name: str) -> None:
    bad = ~np.isfinite(values)
    bad[:, np.isnan(values).all(axis=0)] = False  # regions without signal
    if bad.any():
        frame, region = (int(place) for place in np.argwhere(bad)[0])
        raise BadScanError(
            Reason.NOT_FINITE,
            f"{name}: line {table.lines[frame][0]} holds {values[frame, region]} for region {spec.regions[region]} "
            f"({bad.sum()} such values); a region without signal has no number at all",
        )
