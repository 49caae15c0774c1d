"""Derivatives of fMRIPrep (20 to 25): the T1 and the BOLD image of a task in MNI space, with brain mask and confounds.

    sub-*/[ses-*/]anat/*_space-<space>_*desc-preproc_T1w.nii.gz          -> t1
    sub-*/[ses-*/]anat/*_space-<space>_*desc-brain_mask.nii.gz           -> brain_mask
    sub-*/[ses-*/]func/*_task-<task>_*space-<space>_*desc-preproc_bold.nii.gz    -> bold
    sub-*/[ses-*/]func/*_task-<task>_*desc-confounds_timeseries.tsv      -> bold_confounds (older: _regressors)

A case has one BOLD image: of several runs the first by number, of several resolutions the one without `res-`, never a
single echo; the others are left out with that reason. An anatomy that fMRIPrep wrote once for all sessions of a subject
is the T1 of each of them. CIFTI and GIFTI files are passed over. Names: fMRIPrep's documentation, "Outputs".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from models.records import BOLD, BRAIN_MASK, CONFOUNDS, T1, Reason, Scan
from tasks.headers import is_nifti, stem
from tasks.sources.base import Candidate, Found, Root, SourceBase, open_root
from tasks.sources.bids_names import BidsName, natural, parse_name

PLACE = re.compile(
    r"(?P<subject>sub-[a-zA-Z0-9]+)/(?:(?P<session>ses-[a-zA-Z0-9]+)/)?(?P<kind>anat|func)/(?P<name>[^/]+)"
)
CONFOUNDS_ENDINGS = ("_desc-confounds_timeseries.tsv", "_desc-confounds_regressors.tsv")
"""Newest first."""
OF_IMAGES = frozenset({"space", "cohort", "res", "desc"})
"""Entities of a BOLD image that its confounds lack."""


class FmriprepSource(SourceBase):
    """A folder that fMRIPrep wrote: it holds `sub-*`."""

    kind: Literal["fmriprep"] = "fmriprep"
    space: str = Field(
        "MNI152NLin2009cAsym",
        title="Space",
        description="MNI space of T1 and BOLD as in the names behind space-; further entities behind colons, as "
        "fMRIPrep's --output-spaces takes them.",
        examples=["MNI152NLin6Asym:res-2", "MNIPediatricAsym:cohort-3"],
        pattern=r"^[a-zA-Z0-9]+(:[a-z]+-[a-zA-Z0-9]+)*$",
    )
    native_t1: bool = Field(
        False,
        title="Native T1",
        description="Take the T1 in its own space, for preprocessing that registers it. BOLD stays in `space`.",
    )
    task: str = Field(
        "rest",
        title="Task",
        description="Whose BOLD images are read, as in the names behind task-; empty: none, T1s alone.",
        pattern=r"^[a-zA-Z0-9]*$",
    )
    run: int = Field(
        0,
        title="Run",
        description="Number of the BOLD run of every session, 1 to 1000; 0: the first that is there. An image without "
        "run- is run 1.",
        ge=0,
        le=1000,
    )

    @property
    def wanted(self) -> dict[str, str]:
        """Entities that images in `space` have."""
        space, *others = self.space.split(":")
        return {"space": space, **dict(other.split("-", 1) for other in others)}


@dataclass(frozen=True)
class _File:
    """One file below a folder `anat` or `func`."""

    path: str
    name: BidsName

    @property
    def run(self) -> int:
        """Number of the run; 1 without one."""
        text = self.name.entities.get("run", "1")
        return int(text) if text.isdecimal() else 1

    @property
    def order(self) -> tuple[object, ...]:
        """First the combined echoes, then the first run, then the resolution without a name."""
        entities = self.name.entities
        return "echo" in entities, self.run, "res" in entities, natural(self.path)

    def is_image(self, suffix: str) -> bool:
        return is_nifti(self.path) and self.name.suffix == suffix and self.name.entities.get("desc") == "preproc"


@dataclass
class _Subject:
    """What one subject has, by session."""

    anat: dict[str, list[_File]] = field(default_factory=lambda: defaultdict(list))
    func: dict[str, list[_File]] = field(default_factory=lambda: defaultdict(list))

    def sessions(self) -> list[str]:
        """Return the sessions that are cases: an anatomy of no session is that of all which have BOLD images."""
        return sorted({*self.func, *(session for session in self.anat if session or not self.func)})

    def anatomy(self, session: str) -> list[_File]:
        """Return the T1s of a session: its own, or those that are the only ones of the subject."""
        if session in self.anat:
            return self.anat[session]
        return self.anat.get("") or (next(iter(self.anat.values())) if len(self.anat) == 1 else [])


def find_scans(source: FmriprepSource) -> Found:
    """Return the images, masks and confounds of the derivatives; files that cannot be used carry their reason.

    Raises FileNotFoundError when the root is not a folder, and ValueError naming what is there when nothing below it is
    in the space, or no BOLD image of the task is.
    """
    root = open_root(source, listed=True)
    links = root.links_out()
    tree = _Tree(root, source)
    subjects = tree.subjects()
    if not links:
        tree.refuse_nothing(subjects.values())
    scans = [scan for subject in sorted(subjects) for scan in tree.scans(subject, subjects[subject])]
    return Found([*scans, *links], listed=len(root.listing or {}))


@dataclass(frozen=True)
class _Tree:
    root: Root
    source: FmriprepSource

    def subjects(self) -> dict[str, _Subject]:
        """Return the wanted T1s and BOLD images of every subject."""
        found: dict[str, _Subject] = defaultdict(_Subject)
        for match, file in self._files():
            session = match["session"] or ""
            if match["kind"] == "anat" and file.is_image("T1w") and self._fits_t1(file.name):
                found[match["subject"]].anat[session].append(file)
            elif match["kind"] == "func" and self._is_bold(file):
                found[match["subject"]].func[session].append(file)
        return found

    def refuse_nothing(self, subjects: Iterable[_Subject]) -> None:
        """Raise ValueError when the space or the task names nothing."""
        found = list(subjects)
        where = f"dataset {self.source.dataset}: {self.root.url} holds"
        images = [file for _, file in self._files() if file.is_image("T1w") or file.is_image("bold")]
        spaces = sorted({file.name.entities.get("space", "native") for file in images})
        if not found:
            raise ValueError(
                f"{where} no preprocessed T1 or BOLD image in space {self.source.space} below sub-*; correct `root` or "
                f"`space`; spaces there are: {', '.join(spaces) or 'none'}"
            )
        if self.source.task and not any(one.func for one in found):
            tasks = sorted({task for file in images if (task := file.name.entities.get("task"))})
            raise ValueError(
                f"{where} no preprocessed BOLD image of task {self.source.task!r} in space {self.source.space}; "
                f"correct `task` or `space`, or leave `task` empty for the T1s alone; there are the tasks "
                f"{', '.join(tasks) or 'none'} and the spaces {', '.join(spaces)}"
            )

    def scans(self, subject: str, files: _Subject) -> list[Scan]:
        """Return the rows of one subject."""
        rows: list[Candidate] = []
        for session in files.sessions():
            rows += self._t1(subject, session, files.anatomy(session))
            rows += self._bold(subject, session, files.func.get(session, []))
        return [self.root.scan(row) for row in rows]

    def _t1(self, subject: str, session: str, files: Sequence[_File]) -> list[Candidate]:
        if not files:
            return []
        first, *others = sorted(files, key=lambda file: file.order)
        ending = first.path[len(first.path.removesuffix(".gz").removesuffix(".nii")) :]
        mask = first.path.removesuffix(f"desc-preproc_T1w{ending}") + f"desc-brain_mask{ending}"
        return [
            Candidate(first.path, subject, session, T1),
            Candidate(mask, subject, session, BRAIN_MASK),
            *(_other(file, _used(first), subject, session, T1) for file in others),
        ]

    def _bold(self, subject: str, session: str, files: Sequence[_File]) -> list[Candidate]:
        ordered = sorted(files, key=lambda file: file.order)
        usable = [file for file in ordered if self.source.run in (0, file.run) and "echo" not in file.name.entities]
        rows = [_other(file, self._why(usable), subject, session, BOLD) for file in ordered if file not in usable[:1]]
        if usable:
            rows.append(Candidate(usable[0].path, subject, session, BOLD))
            rows.append(Candidate(self._confounds(usable[0]), subject, session, CONFOUNDS))
        return rows

    def _why(self, usable: Sequence[_File]) -> str:
        if usable:
            return _used(usable[0])
        return f"wanted is run {self.source.run}" if self.source.run else "wanted is the image of the combined echoes"

    def _confounds(self, bold: _File) -> str:
        """Return the path of the confounds of a BOLD image, or where they ought to be."""
        folder, _, name = bold.path.rpartition("/")
        pieces = [piece for piece in stem(name).split("_")[:-1] if piece.split("-", 1)[0] not in OF_IMAGES]
        # `part-mag` may be dropped with them.
        starts = ["_".join(pieces), "_".join(piece for piece in pieces if not piece.startswith("part-"))]
        places = [f"{folder}/{start}{ending}" for start in starts for ending in CONFOUNDS_ENDINGS]
        return next((place for place in places if place in (self.root.listing or {})), places[0])

    def _files(self) -> Iterable[tuple[re.Match[str], _File]]:
        for name in self.root.listing or {}:
            match = PLACE.fullmatch(name)
            if match and is_nifti(name):
                yield match, _File(name, parse_name(name))

    def _fits_t1(self, name: BidsName) -> bool:
        return name.fits({"space": ""} if self.source.native_t1 else self.source.wanted)

    def _is_bold(self, file: _File) -> bool:
        wanted = {"task": self.source.task, **self.source.wanted}
        return bool(self.source.task) and file.is_image("bold") and file.name.fits(wanted)


def _used(file: _File) -> str:
    return f"used is {file.path.rsplit('/', 1)[-1]}"


def _other(file: _File, why: str, subject: str, session: str, modality: str) -> Candidate:
    """Return the row of an image that is not the one of its case."""
    entities = file.name.entities
    kind = f"run {file.run}" + (f" at resolution {entities['res']}" if "res" in entities else "")
    problem = (Reason.OTHER_RUN, f"{file.path} is {'a single echo' if 'echo' in entities else kind}; {why}")
    return Candidate(file.path, subject, session, modality, problem)
