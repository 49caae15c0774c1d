"""Artifacts that are published only when their content changed: a night with nothing new leaves next to nothing.

A server keeps every artifact twice in its database and once more among its events; a quality page has 1.5 MB.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError

from flows.artifacts import (
    allowed_markdown,
    allowed_table,
    create_markdown,
    create_table,
    in_run,
    publish_markdown,
)
from infra import storage

RECORD = "published.json"
UNCHANGED = "unchanged"
"""Key of the artifact that says where the pages are that are not published again."""
_log = logging.getLogger(__name__)


class Pages:
    """Context manager: publishes what differs from what a server shows already, and links what does not.

    `folder` keeps a record of the digest and the artifact of each page. A page that the server has no longer (deleted
    by `retention` or `store forget`, or another server) is published again, and so is one after which an error was
    raised in here: a refusal leaves no folder behind.
    """

    def __init__(self, folder: str) -> None:
        self._url = storage.join(folder, RECORD)
        self._known: dict[str, dict[str, str]] = {}
        self._changed = False
        self._same: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._known = dict(storage.read_json(self._url))
        except (OSError, ValueError, TypeError) as error:  # without a record everything is published
            _log.debug("no record of published pages at %s: %s", self._url, error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._changed and kind is None:
            try:
                storage.write_json(self._url, self._known)
            except OSError as error:
                _log.warning("the next flow run publishes all pages again, for %s: %s", self._url, error)
        if self._same:
            lines = ["As in an earlier flow run, and not published again:", "", *self._same]
            publish_markdown(UNCHANGED, "\n".join(lines), "Pages that did not change")

    def markdown(self, key: str, markdown: str, description: str, *, names_subjects: bool = False) -> None:
        """Publish a Markdown artifact as `flows.artifacts.publish_markdown` does, if it changed."""
        content = allowed_markdown(markdown, names_subjects)
        self._publish(key, content, description, lambda: create_markdown(key, content, description))

    def table(self, key: str, rows: list[dict[str, Any]], description: str) -> None:
        """Publish a table artifact as `flows.artifacts.publish_table` does, if it changed."""
        content = allowed_table(rows)
        self._publish(key, content, description, lambda: create_table(key, content, description))

    def _publish(self, key: str, content: Any, description: str, create: Callable[[], UUID | None]) -> None:
        if not in_run():
            return
        digest = hashlib.sha256(json.dumps([content, description]).encode()).hexdigest()
        known = self._known.get(key, {})
        if known.get("digest") == digest and is_there(known["artifact"]):
            self._same.append(f"- [{description}](/artifacts/artifact/{known['artifact']}) (`{key}`)")
        elif artifact := create():
            self._known[key] = {"digest": digest, "artifact": str(artifact)}
            self._changed = True


def is_there(artifact: str) -> bool:
    """Say whether the current Prefect server has an artifact, without fetching it; False when it does not answer."""
    try:
        with get_client(sync_client=True) as client:
            body = {"artifacts": {"id": {"any_": [artifact]}}}
            return bool(client.request("POST", "/artifacts/count", json=body).json())
    except (PrefectHTTPStatusError, httpx.HTTPError) as error:
        _log.warning("the server does not say whether it has artifact %s: %s", artifact, error)
        return False
