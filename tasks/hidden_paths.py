"""Stores that do not say where their sources lie: a keyed hash stands in place of each path (HMAC-SHA256).

The key comes from BRAINLOOM_PATH_KEY alone and is in no store; who has neither it nor the catalog can neither read a
path nor try out guesses. The attribute `path_key` of a store names its key by a hash, so that no other one is mixed in.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from infra import storage
from models.records import PlannedCase, Scan, SourceFile
from models.store import read_cases
from models.store_layout import StoreError
from models.store_writer import read_attributes

PREFIX = "hmac-sha256:"
ATTRIBUTE = "path_key"
SHORTEST_NAME = 3
"""Characters of a part of a file name that is looked for in texts; a shorter one would stand for words (`a`)."""
_NAMED = b"brainloom: the name of this key"


def key_name(key: str) -> str:
    """Return what names a key and does not tell it: 16 hexadecimal digits."""
    return hmac.new(key.encode(), _NAMED, hashlib.sha256).hexdigest()[:16]


def alias_of(path: str, key: str) -> str:
    """Return what is written in place of a path: HMAC-SHA256 of its UTF-8 text under the key."""
    return PREFIX + hmac.new(key.encode(), path.encode(), hashlib.sha256).hexdigest()


def digest_under(key: str, digest: str) -> str:
    """Return what is written in place of a digest over paths, which would confirm guesses; itself without a key."""
    return alias_of(digest, key) if key else digest


def is_alias(path: str) -> bool:
    """Say whether a recorded path is a hash of one."""
    return path.startswith(PREFIX)


def hides_paths(url: str) -> bool:
    """Say whether a store hides the paths of its sources; False where there is no store."""
    return storage.exists(storage.join(url, "zarr.json")) and ATTRIBUTE in read_attributes(url)


def check_paths(url: str, key: str) -> None:
    """Raise StoreError when a store is to be continued the other way than it was begun.

    key: the key of this flow run, empty when paths are not to be hidden. A place without a store is fine.
    """
    if not storage.exists(storage.join(url, "zarr.json")):
        return
    held = read_attributes(url).get(ATTRIBUTE, "")
    if held and not key:
        raise StoreError(f"{url} hides the paths of its sources; set hide_paths, and BRAINLOOM_PATH_KEY to its key")
    if key and not held:
        raise StoreError(
            f"{url} was begun with plain paths, which are in its plans and receipts; hide_paths needs a new store"
        )
    if held and held != key_name(key):
        raise StoreError(
            f"{url} hides the paths of its sources under another key: BRAINLOOM_PATH_KEY is key {key_name(key)}, the "
            f"store was made with key {held}; set that one"
        )


def hidden(case: PlannedCase, key: str) -> PlannedCase:
    """Return a case whose files know what is written in place of their paths; as it is with an empty key."""
    if not key:
        return case
    return case.replace(files=[{**file.model_dump(), "alias": alias_of(file.path, key)} for file in case.files])


def told(text: str, files: Iterable[SourceFile]) -> str:
    """Return a text that may name files without any of those whose path is hidden: `the t1 file` in its place."""
    return without_names(text, [(file.path, file.modality) for file in files if file.alias])


def without_names(text: str, files: Iterable[tuple[str, str]]) -> str:
    """Return a text without the paths, folders and names of some files, given with their modalities.

    Found are whole paths and their ends, and a name up to any of its dots, of SHORTEST_NAME characters or more; a part
    that is no more than the modality stays.
    """
    said: dict[str, str] = {}
    for path, modality in files:
        folder, _, name = path.rpartition("/")
        said |= dict.fromkeys((end for end in _ends(folder) if "/" in end), "its folder")
        beginnings = (name[: dot.start()] for dot in re.finditer(r"\.", name))
        said |= dict.fromkeys({*_ends(path), *beginnings} - {modality}, file_of(modality))
    parts = sorted((part for part in said if len(part) >= SHORTEST_NAME), key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(part)}(?!\w)" for part in parts)
    return re.sub(pattern, lambda found: said[found[0]], text) if parts else text


def _ends(path: str) -> list[str]:
    """Return a path, and what is left of it below each of its folders."""
    return [path, *(path[slash.end() :] for slash in re.finditer("/", path))]


def file_of(modality: str) -> str:
    """Return what a text calls a file whose name it must not tell."""
    return f"the {modality} file" if modality else "a file"


def blamed_name(file: Mapping[str, Any]) -> str:
    """Return what a detail calls a file of cases.parquet: its name, or its modality when the path is hidden."""
    path = str(file["path"])
    return file_of(str(file["modality"])) if is_alias(path) else path.rsplit("/", 1)[-1]


def identified(url: str, scans: Iterable[Scan]) -> list[dict[str, str]]:
    """Return where the sources of a store's rows lie by a catalog: dataset, row, case, modality, path, found.

    Nothing but the catalog is needed: a file is known by its case, modality, size and ETag. `found` is `same`,
    `changed` (the catalog has another file there by now; its path is given), or `not in the catalog` (no path).
    """
    there: dict[tuple[str, str, str], Scan] = {(scan.dataset, scan.case, scan.modality): scan for scan in scans}
    rows = []
    for line in read_cases(url, ["dataset", "row", "case", "files"]).to_pylist():
        for file in json.loads(line["files"] or "[]"):
            scan = there.get((line["dataset"], line["case"], file["modality"]))
            same = scan is not None and (scan.size_bytes, scan.etag) == (file["size_bytes"], file["etag"])
            found = "not in the catalog" if scan is None else "same" if same else "changed"
            rows.append(
                {
                    "dataset": line["dataset"],
                    "row": str(line["row"]),
                    "case": line["case"],
                    "modality": file["modality"],
                    "path": scan.path if scan else "",
                    "found": found,
                }
            )
    return rows
