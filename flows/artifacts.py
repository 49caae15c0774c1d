"""Artifacts of the running flow: Markdown, tables and pictures, private by default.

Artifacts of a Prefect server are seen by everybody who can reach it. Pictures and subject ids therefore go into them
only when the API is on loopback or on a private address, or after the opt-in `BRAINLOOM_ALLOW_PICTURES=true`.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import logging
import math
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import numpy as np
from PIL import Image
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings

from flows.fitting import fit_cell, fit_markdown
from infra.settings import Settings
from tasks.markdown_text import alt_text

PICTURE_BYTES_MAX = 300_000
"""Size of one `data:` URI that the UI still shows well."""
SUBJECT_COLUMNS = frozenset(
    {"subject", "session", "case", "path", "file", "files", "source", "detail"}
    | {f"{column}_{side}" for column in ("subject", "case") for side in "ab"}
)
"""Table columns that can name a person; left out where pictures are."""
HIDDEN = "*left out: the Prefect API is not on a private address (BRAINLOOM_ALLOW_PICTURES=true allows it)*"
NAMES_SHOWN = 20
"""Cases or files that one error text names; tables and the catalog have all."""
_PICTURE = re.compile(r"!\[[^\]]*\]\(data:image/[^)]*\)")
_log = logging.getLogger(__name__)


def publish_markdown(key: str, markdown: str, description: str = "", *, names_subjects: bool = False) -> bool:
    """Publish a Markdown artifact for the running flow or task; False when there is none or the server refused.

    Pictures are cut out, and a page with `names_subjects` is left out, where they are not allowed.
    """
    return create_markdown(key, allowed_markdown(markdown, names_subjects), description) is not None


def publish_table(key: str, rows: list[dict[str, Any]], description: str = "") -> bool:
    """Publish a table artifact, one dict a row; False when no flow or task is running or the server refused.

    NaN and infinities become empty cells: Prefect writes them as invalid JSON and the page dies. Columns that can
    name a person are left out where they are not allowed.
    """
    return create_table(key, allowed_table(rows), description) is not None


def allowed_markdown(markdown: str, names_subjects: bool = False) -> str:
    """Return what may be published of a page where the current Prefect API is."""
    if pictures_allowed():
        return markdown
    return HIDDEN if names_subjects else _PICTURE.sub(HIDDEN, markdown)


def allowed_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a table's columns that may be published where the current Prefect API is, cells as finite JSON."""
    hidden = frozenset() if pictures_allowed() else SUBJECT_COLUMNS
    return [{str(name): plain(cell) for name, cell in row.items() if name not in hidden} for row in rows]


def create_markdown(key: str, markdown: str, description: str = "") -> UUID | None:
    """Publish Markdown, tables fitted to the page, and return the artifact's id; None if there is no run."""
    page = fit_markdown(markdown)
    return _publish(lambda: create_markdown_artifact(page, key=artifact_key(key), description=description or None))


def create_table(key: str, table: list[dict[str, Any]], description: str = "") -> UUID | None:
    """Publish a table, long cells broken, and return the artifact's id; None as `publish_table` returns False."""
    rows = [{name: fit_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items()} for row in table]
    told = description if rows else f"{description}: none".removeprefix(": ")
    return _publish(lambda: create_table_artifact(rows, key=artifact_key(key), description=told or None))


def png_markdown(png: bytes, alt: str) -> str:
    """Return Markdown that shows a PNG as a `data:` URI below 300 kB, made smaller when it is larger.

    Where pictures are not allowed a note stands in its place.
    """
    if not pictures_allowed():
        return HIDDEN
    uri = _data_uri(png)
    while len(uri) > PICTURE_BYTES_MAX:
        png = _smaller(png, share=max(0.3, 0.95 * math.sqrt(PICTURE_BYTES_MAX / len(uri))))
        uri = _data_uri(png)
    return f"![{alt_text(alt)}]({uri})"


def pictures_allowed() -> bool:
    """Say whether pictures and subject ids may go into artifacts of the current Prefect API."""
    return Settings().allow_pictures or is_private(get_current_settings().api.url)


def shown_names(named: Sequence[str], hidden: Sequence[str]) -> list[str]:
    """Return the first of some lines for an error text, which Prefect shows as the state of a run, and how many follow.

    named: lines that may name subjects; hidden: what stands in their place where subject ids are not allowed.
    """
    lines = named if pictures_allowed() else hidden
    more = [f"... and {len(lines) - NAMES_SHOWN} more"] if len(lines) > NAMES_SHOWN else []
    return [*lines[:NAMES_SHOWN], *more]


def counted(reasons: Iterable[str]) -> list[str]:
    """Return `<count> <reason>` for every reason, by name."""
    return [f"{count} {reason}" for reason, count in sorted(Counter(reasons).items())]


def is_private(api_url: str | None) -> bool:
    """Say whether every address of an API's host is loopback or private.

    None stands for Prefect's temporary server, on loopback. A host that cannot be resolved is not private.
    """
    if api_url is None:
        return True
    host = urlsplit(api_url).hostname or ""
    try:
        found = {str(entry[4][0]).split("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    addresses = [ipaddress.ip_address(address) for address in found]
    return bool(addresses) and all(address.is_loopback or address.is_private for address in addresses)


def artifact_key(text: str) -> str:
    """Return a key of lower-case letters, digits and single dashes; raises ValueError when nothing is left."""
    key = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not key:
        raise ValueError(f"an artifact key needs a letter or digit, got {text!r}")
    return key


def plain(value: Any) -> Any:
    """Return a table cell as finite JSON: numpy scalars as Python's, non-finite numbers as None, others as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(str(plain(item)) for item in value)
    return str(value)


def in_run() -> bool:
    """Say whether a flow or task run is active here."""
    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def _publish(create: Callable[[], Any]) -> UUID | None:
    if not in_run():
        return None
    try:
        return UUID(str(create()))
    except (PrefectHTTPStatusError, httpx.HTTPError) as error:
        # An artifact is what people see, not what the work needs: hours of it must not be lost for a picture.
        _log.warning("artifact not published: %s: %s", type(error).__name__, error)
        return None


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _smaller(png: bytes, share: float) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        size = (max(1, int(image.width * share)), max(1, int(image.height * share)))
        resized = image.convert("RGB" if image.mode == "P" else image.mode).resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    resized.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
