"""The connectome of a case from whichever file it has: time series of regions, or a BOLD image and its confounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra import storage
from models.anatomy import Floats
from models.records import BOLD, CONFOUNDS, SERIES, Reason, SourceFile
from models.spec import PreprocessSpec
from models.stopwatch import step
from tasks.affines import BadScanError
from tasks.connectome import Series, make_connectome
from tasks.nifti import DEFAULT_MEMORY
from tasks.roi_series import parse_series
from tasks.source_files import bytes_of, name_of


@dataclass(frozen=True)
class CaseConnectome:
    """What the functional files of a case became."""

    matrix: Floats
    """(R, R)."""
    qc: dict[str, Any]
    used: frozenset[str]
    """Modalities of the files that it was made of."""


@step("connectome")
def connectome_of(
    files: Mapping[str, SourceFile], spec: PreprocessSpec, memory_bytes: int = DEFAULT_MEMORY
) -> CaseConnectome | None:
    """Return the connectome of a case; None when the spec has none, or the case no file for one.

    Raises BadScanError with the reason for quarantine: a connectome that cannot be made is not left out in silence.
    """
    wanted = spec.connectome
    if wanted is None or not (SERIES in files or BOLD in files):
        return None
    if SERIES in files and BOLD in files:
        raise BadScanError(
            Reason.DUPLICATE_SCAN,
            f"a case has one connectome, this one has {name_of(files[SERIES])} and {name_of(files[BOLD])}; leave one "
            "of them out of the catalog",
        )
    if SERIES in files:
        if wanted.low_pass_hz or wanted.high_pass_hz:
            raise BadScanError(
                Reason.NO_TR,
                f"{name_of(files[SERIES])}: time series of regions do not say their repetition time, and the spec "
                "filters; set low_pass_hz and high_pass_hz to 0",
            )
        series = parse_series(bytes_of(files[SERIES]), name_of(files[SERIES]), wanted)
        used = frozenset({SERIES})
    else:
        series = _from_bold(files, spec, memory_bytes)
        used = frozenset({BOLD, CONFOUNDS})
    matrix_RR, qc = make_connectome(series, wanted)
    return CaseConnectome(matrix_RR, qc, used)


def _from_bold(files: Mapping[str, SourceFile], spec: PreprocessSpec, memory_bytes: int) -> Series:
    from tasks.bold import ConfoundsFile, series_from_bold  # here: it brings nilearn, which few need

    assert spec.connectome is not None
    confounds = None
    if CONFOUNDS in files:
        table = files[CONFOUNDS]
        meta = _beside(table.path) if "compcor" in spec.connectome.confounds else None
        confounds = ConfoundsFile(bytes_of(table), name_of(table), meta)
    bold = files[BOLD]
    raw, name = bytes_of(bold), name_of(bold)
    return series_from_bold(raw, name, confounds, spec.connectome, spec.nan_share_max, memory_bytes)


def _beside(path: str) -> bytes | None:
    """Return the `.json` that fMRIPrep writes beside a table of confounds, None when there is none."""
    try:
        return storage.read_bytes(path.removesuffix(".tsv") + ".json")
    except FileNotFoundError:
        return None
