"""One DICOM series becomes one NIfTI file through dcm2niix, kept in the workspace under the identity of the series.

A conversion counts when its `series.json` is there, which is written last: a run that was killed leaves nothing that is
believed, on disk and on S3 alike. What dcm2niix prints is not kept, it may name patients.
"""

from __future__ import annotations

import resource
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from isal import igzip

from infra import storage
from tasks.dicom_series import MissingExtraError, Series

TIMEOUT_S = 900
MEMORY_BYTES = 8 << 30
"""Address space of the converter: a header that claims absurd dimensions ends there."""
OPTIONS = ("-z", "i", "-b", "n", "-f", "image", "-w", "1", "-g", "i", "-x", "n", "-c", "")
"""gzip inside, no sidecar, fixed names, no foreign defaults, no cropping, no comment."""
HEADER_TEXTS = (slice(4, 32), slice(148, 252), slice(328, 344))
"""Where NIfTI-1 has data_type and db_name; descrip and aux_file; intent_name."""
NIFTI_MAGIC = slice(344, 348)
RECEIPT = "series.json"
IMAGE = "image.nii.gz"


class ConversionError(ValueError):
    """dcm2niix gave no single image for a series; the text names no patient and no source path."""


def find_converter() -> tuple[str, str]:
    """Return the path of the binary and its version; raises MissingExtraError."""
    try:
        import dcm2niix
    except ImportError:
        raise MissingExtraError("dcm2niix") from None
    if not Path(dcm2niix.bin).is_file():
        raise MissingExtraError(f"the binary {dcm2niix.bin} of the package dcm2niix, which is not there")
    return str(dcm2niix.bin), version("dcm2niix")


def is_converted(series: Series, listing: Mapping[str, Any]) -> bool:
    """Say whether a listing of the conversions holds the image of a series."""
    return f"{series.key}/{RECEIPT}" in listing


def convert(series: Series, root: str, folder: str, timeout_s: float = TIMEOUT_S) -> None:
    """Convert a series below `root` into `<folder>/<key of the series>/image.nii.gz`.

    Raises ConversionError when dcm2niix fails or gives none or several images, and OSError when a storage fails.
    """
    binary, release = find_converter()
    with tempfile.TemporaryDirectory(prefix="brainloom-dicom-") as name:
        work = Path(name)
        _gather(series, root, work / "in")
        (work / "out").mkdir()
        _run([binary, *OPTIONS, "-o", str(work / "out"), str(work / "in")], work, timeout_s)
        image = _only_image(work / "out")
        target = storage.join(folder, series.key)
        storage.write_bytes(storage.join(target, IMAGE), without_header_texts(image.read_bytes()))
        storage.write_json(
            storage.join(target, RECEIPT),
            {"schema": 1, "converter": f"dcm2niix {release}", "options": list(OPTIONS), "files": len(series.files)},
        )


def without_header_texts(compressed: bytes) -> bytes:
    """Return a gzipped NIfTI-1 file with blank texts in its header; raises ConversionError for another file.

    dcm2niix writes the time of the scan into `descrip`.
    """
    data = bytearray(igzip.decompress(compressed))
    if data[NIFTI_MAGIC] not in (b"n+1\0", b"ni1\0"):
        raise ConversionError("dcm2niix made a file that is no NIfTI-1 image")
    for place in HEADER_TEXTS:
        data[place] = bytes(place.stop - place.start)
    return igzip.compress(bytes(data), mtime=0)


def _gather(series: Series, root: str, folder: Path) -> None:
    """Put the files of a series into one folder under neutral names: by links, or downloaded from S3."""
    folder.mkdir()
    for number, file in enumerate(series.files):
        target = folder / f"{number:06d}.dcm"
        if storage.is_local(root):
            target.symlink_to(Path(root, file.path).resolve())
        else:
            target.write_bytes(storage.read_bytes(storage.join(root, file.path)))


def _run(command: list[str], work: Path, timeout_s: float) -> None:
    quiet = subprocess.DEVNULL
    environment = {"HOME": str(work), "LC_ALL": "C"}
    with subprocess.Popen(command, cwd=work, env=environment, stdin=quiet, stdout=quiet, stderr=quiet) as process:
        try:
            resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            code = process.wait(timeout_s)
        except ProcessLookupError:
            code = process.wait()
        except subprocess.TimeoutExpired:
            process.kill()
            raise ConversionError(f"dcm2niix took more than {timeout_s:g} s and was stopped") from None
        except BaseException:
            process.kill()
            raise
    if code:
        raise ConversionError(f"dcm2niix ended with code {code}; run it on the series to see what it says")


def _only_image(folder: Path) -> Path:
    images = sorted(folder.glob("*.nii.gz"))
    if not images:
        raise ConversionError("dcm2niix made no image of it")
    if len(images) > 1:
        # Its suffixes tell echoes, phases, tilts: which of them is the modality nobody said.
        parts = ", ".join(image.name.removesuffix(".nii.gz").removeprefix("image") or "plain" for image in images)
        raise ConversionError(f"dcm2niix made {len(images)} images of it ({parts}), one is expected; split the series")
    return images[0]
