"""Names that come from outside: paths that stay below a root, ids that can name a case, text that can be stored."""

from __future__ import annotations

import os
from pathlib import Path

from infra import storage
from models.records import Reason

MAX_PATH = 1024
"""Characters of a path below a root; S3's keys end there too."""
MAX_ID = 128


class OutsideRootError(ValueError):
    """A path of a manifest or a link in a tree leaves the root of its source."""


def check_link(root: str, relative: str) -> None:
    """Refuse a local file whose links lead out of the resolved root; raises OutsideRootError. S3 has no links."""
    if not storage.is_local(root):
        return
    path = f"{root}/{relative}"
    try:
        target = os.path.realpath(path, strict=False)
        # An endless circle of links is left as it is by realpath.
        circular = Path(target).is_symlink()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutsideRootError(f"{shorten(relative, 200)!r} cannot be resolved: {error}") from None
    if circular:
        raise OutsideRootError(f"{relative!r} cannot be resolved: its links run in a circle")
    if not target.startswith(root.rstrip("/") + "/"):
        raise OutsideRootError(f"{path} links to {target}, outside the root {root}; copy the file into the root")


def check_relative(name: str) -> str:
    """Return a manifest's path without a leading `./`; raises OutsideRootError when it could leave the root."""
    if len(name) > MAX_PATH:
        raise OutsideRootError(f"path {name[:40]!r}... has {len(name):,} characters, {MAX_PATH:,} are allowed")
    if not name or not is_text(name) or "\\" in name or "://" in name or name.startswith(("/", "~")):
        raise OutsideRootError(f"path {name!r} is not relative to the root; write it with / and without a drive or URL")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise OutsideRootError(f"path {name!r} leaves the root through '..'; write it relative to the root")
    return "/".join(parts)


def is_text(name: str) -> bool:
    """Return whether a name is free of control characters and can be written as UTF-8."""
    return (name.isascii() and name.isprintable()) or not any(_is_odd(character) for character in name)


def _is_odd(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff"


def bad_id(subject: str, session: str) -> tuple[Reason, str] | None:
    """Return why a subject or session cannot name a case, or None."""
    for kind, name in (("subject", subject), ("session", session)):
        if not name and kind == "session":
            continue
        if not name or len(name) > MAX_ID or not is_text(name) or set(name) & set("/\\"):
            shown = shorten(name, 40)
            return Reason.BAD_ID, f"{kind} {shown!r}: write 1 to {MAX_ID} characters without / and control characters"
    return None


def shorten(text: str, limit: int) -> str:
    """Return a text that UTF-8 can hold, with its middle left out beyond a number of characters."""
    text = text if is_text(text) else text.encode("unicode_escape", "backslashreplace").decode("ascii")
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-16:]}"


def case_id(subject: str, session: str) -> str:
    """Return `<subject>` or `<subject>_<session>`."""
    return f"{subject}_{session}" if session else subject
