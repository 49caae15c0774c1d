"""Scans of a folder tree whose paths follow a pattern with named fields.

    {subject}/{session}/{modality}.nii.gz        every field is a piece of one file or folder name
    {subject}/{subject}_{modality}.nii.gz        a field that comes twice must say the same
    */{subject}_{modality}.nii*                  `*` and `?` as in a shell, `**` for any folders
    labels/{subject}_{label}.nii.gz              a file with a field `label` is a segmentation

Patterns are tried in order; NIfTI files that match none are reported. Hidden folders and files are not looked at. For
what a pattern cannot say, `expressions` are regular expressions with the named groups subject, session, modality and
label, matched against the whole path. Further fields and groups, declared under `path_phenotypes`, are what folders say
about a subject (`{grade}/{subject}/...` of BraTS2018): they become phenotype columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import pandas as pd
from pydantic import Field, ValidationInfo, field_validator, model_validator

from models.records import LABEL, Reason, Scan
from tasks.headers import is_nifti
from tasks.phenotypes import normalise
from tasks.sources.base import IGNORE, Candidate, Found, Root, SourceBase, open_root, resolve_token

FIELDS = ("subject", "session", "modality", "label")
PIECES = re.compile(r"\{(?P<field>[^{}]*)\}|(?P<folders>\*\*/)|(?P<any>\*\*?)|(?P<one>\?)|(?P<text>[^{}*?]+|[{}])")


class TreeSource(SourceBase):
    """A dataset described by the places of its files."""

    kind: Literal["tree"] = "tree"
    path_phenotypes: tuple[str, ...] = Field(
        (),
        title="Phenotypes in paths",
        description="Further fields of patterns and groups of expressions, which become phenotype columns.",
        examples=[["grade"]],
    )
    patterns: tuple[str, ...] = Field(
        (),
        title="Patterns",
        description="Paths below the root with the fields {subject}, {session}, {modality}, {label}, and * ? ** as in "
        "a shell; the first that matches counts.",
        examples=[["{subject}/{session}/{modality}.nii.gz"]],
    )
    expressions: tuple[str, ...] = Field(
        (),
        title="Regular expressions",
        description="Tried after the patterns, against the whole relative path, with the named groups subject, "
        "session, modality, label.",
        examples=[[r"(?P<subject>IXI\d+)-\w+-\d+-(?P<modality>\w+)\.nii\.gz"]],
    )
    modality: str = Field(
        "", title="Modality", description="Modality token of files whose pattern has no field for it.", examples=["t1"]
    )
    skip: tuple[str, ...] = Field(
        (), title="Skip", description="Patterns of files that are not wanted; they are not listed."
    )

    @field_validator("path_phenotypes")
    @classmethod
    def _columns(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name in (*FIELDS, "dataset") or not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(
                    f"path_phenotypes names {name!r}; use lower-case letters, digits and _, and none of "
                    f"{', '.join(FIELDS)}, dataset"
                )
        return names

    @field_validator("patterns", "skip")
    @classmethod
    def _templates(cls, patterns: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for pattern in patterns:
            compile_template(pattern, info.data.get("path_phenotypes", ()))
        return patterns

    @field_validator("expressions")
    @classmethod
    def _expressions(cls, expressions: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = (*FIELDS, *info.data.get("path_phenotypes", ()))
        for expression in expressions:
            try:
                groups = set(re.compile(expression).groupindex)
            except re.error as error:
                raise ValueError(f"{expression!r} is no regular expression: {error}") from None
            if unknown := sorted(groups - set(known)):
                raise ValueError(
                    f"{expression!r} has the groups {', '.join(unknown)}; use {', '.join(known)}, or name a phenotype "
                    "column in `path_phenotypes`"
                )
        return expressions

    @model_validator(mode="after")
    def _fields(self) -> Self:
        if not self.patterns and not self.expressions:
            raise ValueError("give at least one of `patterns` and `expressions`")
        for text, matcher in zip((*self.patterns, *self.expressions), matchers(self), strict=True):
            if "subject" not in matcher.groupindex:
                raise ValueError(f"{text!r} has no field for the subject")
            if not {"modality", "label"} & set(matcher.groupindex) and not self.modality:
                raise ValueError(f"{text!r} has no field for modality or label; add one, or set `modality`")
        return self


def compile_template(template: str, further: Sequence[str] = ()) -> re.Pattern[str]:
    """Return the regular expression of a pattern; raises ValueError for an unknown field or a stray brace.

    further: names of fields beside FIELDS.
    """
    known = (*FIELDS, *further)
    parts: list[str] = []
    seen: set[str] = set()
    for piece in PIECES.finditer(template):
        if (name := piece["field"]) is not None:
            if name not in known:
                raise ValueError(
                    f"pattern {template!r} has the field {{{name}}}; use {', '.join(known)}, or name a phenotype "
                    "column in `path_phenotypes`"
                )
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+)")
            seen.add(name)
        elif piece["text"] in ("{", "}"):
            raise ValueError(f"pattern {template!r} has a brace without its partner at position {piece.start()}")
        else:
            wild = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "**": ".*", "?": "[^/]"}
            parts.append(wild.get(piece[0]) or re.escape(piece[0]))
    return re.compile("".join(parts))


def matchers(source: TreeSource) -> list[re.Pattern[str]]:
    """Return the patterns and expressions of a source in the order in which they are tried."""
    templates = [compile_template(pattern, source.path_phenotypes) for pattern in source.patterns]
    return [*templates, *map(re.compile, source.expressions)]


def find_scans(source: TreeSource) -> Found:
    """Return the scans and labels below a root by pattern; NIfTI files that match none carry that reason.

    What paths say under `path_phenotypes` is a row of phenotypes for each subject and session. Raises FileNotFoundError
    when the root is not a folder.
    """
    root = open_root(source, listed=True)
    skip = [compile_template(pattern, source.path_phenotypes) for pattern in source.skip]
    tree = _Tree(root, source, matchers(source), skip)
    listing = root.listing or {}
    scans = [scan for name in sorted(listing) if (scan := tree.scan(name)) is not None]
    return Found(scans, _phenotypes(source, tree.said), len(listing))


@dataclass(frozen=True)
class _Tree:
    root: Root
    source: TreeSource
    matchers: Sequence[re.Pattern[str]]
    skip: Sequence[re.Pattern[str]]
    said: dict[tuple[str, ...], None] = field(default_factory=dict)
    """Subject, session and `path_phenotypes` of the files that were matched, once each."""

    def scan(self, relative: str) -> Scan | None:
        """Return the row of one file below the root, or None for a file that is no scan or not wanted."""
        if "/." in f"/{relative}" or any(pattern.fullmatch(relative) for pattern in self.skip):
            return None
        if not is_nifti(relative):
            return self.root.linked_folder(relative)
        match = next((match for pattern in self.matchers if (match := pattern.fullmatch(relative))), None)
        if match is None:
            tried = ", ".join((*self.source.patterns, *self.source.expressions))
            problem = (Reason.UNMATCHED, f"{relative} matches none of: {tried}")
            return self.root.scan(Candidate(relative, "", problem=problem))
        return self._matched(relative, {name: text or "" for name, text in match.groupdict().items()})

    def _matched(self, relative: str, fields: dict[str, str]) -> Scan | None:
        subject, session = fields["subject"], fields.get("session", "")
        said = tuple(fields.get(name, "") for name in self.source.path_phenotypes)
        if any(said):
            self.said[subject, session, *said] = None
        if fields.get("label"):
            return self.root.scan(Candidate(relative, subject, session, LABEL))
        token = fields.get("modality") or self.source.modality
        modality, problem = resolve_token(self.source, token, relative)
        if modality == IGNORE and problem is None:
            return None
        return self.root.scan(Candidate(relative, subject, session, modality, problem))


def _phenotypes(source: TreeSource, said: Iterable[tuple[str, ...]]) -> pd.DataFrame:
    """Return what paths say about subjects; two values of one subject are reported when tables are joined."""
    rows = pd.DataFrame(list(said), columns=["subject", "session", *source.path_phenotypes], dtype=object)
    return normalise(rows, source.dataset) if len(rows) else pd.DataFrame()
