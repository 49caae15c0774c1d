"""Grey-matter maps of CAT12: `mwp1*.nii[.gz]`, modulated and in MNI space, wherever they lie below the root.

CAT12 writes them into a folder `mri` beside the image, or into a BIDS derivative; the name is `mwp1` and that of the
image, `mwp1sub-01_ses-1_T1w.nii`. They become modality gm; other files of CAT12 are not listed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.reasons import Reason
from models.records import Scan
from tasks.headers import is_nifti, stem
from tasks.sources.base import Candidate, Found, Root, open_root
from tasks.sources.named import ParticipantsSource


class Cat12Source(ParticipantsSource):
    """A folder of CAT12's results."""

    kind: Literal["cat12"] = "cat12"
    prefix: str = Field(
        "mwp1",
        title="Prefix",
        description="What the names of the maps begin with: mwp1 is grey matter, modulated and normalised; s6mwp1 the "
        "same, smoothed with 6 mm.",
        min_length=1,
        pattern=r"^[A-Za-z0-9]+$",
    )


def find_scans(source: Cat12Source) -> Found:
    """Return the maps and phenotypes below a root; those that cannot be used carry their reason.

    Raises FileNotFoundError when the root is not a folder or lacks the table that it names.
    """
    root = open_root(source, listed=True)
    listing = root.listing or {}
    scans = [scan for name in sorted(listing) if (scan := _scan(root, source, name)) is not None]
    return Found(scans, source.read_people(root, scans), len(listing))


def _scan(root: Root, source: Cat12Source, relative: str) -> Scan | None:
    if "/." in f"/{relative}":
        return None
    name = stem(relative)
    if not is_nifti(relative) or not name.startswith(source.prefix) or name == source.prefix:
        return root.linked_folder(relative)
    image = name.removeprefix(source.prefix)
    owner = source.owner_of(image)
    problem = None if owner else (Reason.UNMATCHED, f"{image!r} of {relative} does not match `owner` {source.owner!r}")
    subject, session = owner or ("", "")
    return root.scan(Candidate(relative, subject, session, "gm", problem))
