"""What an ingest tells: an event for the automation that proposes a pre-training, without any name of a subject."""

from __future__ import annotations

import hashlib
from typing import Any

from prefect.events import emit_event
from pydantic import ConfigDict, Field

from flows.forms import Form, Place
from infra import storage
from infra.automations import NEWS


class IngestNews(Form):
    """What an ingest brought into a store; the payload of its event."""

    model_config = ConfigDict(title="News of an ingest")

    store: Place = Field("", title="Store", description="Path or URL of the store; empty: that of the training.")
    digest: str = Field("", title="Digest", description="Of the store after the ingest.", pattern=r"^[0-9a-f]*$")
    preprocessed: int = Field(0, ge=0, title="Preprocessed", description="Cases that were new or changed, 0 or more.")
    stored: int = Field(0, ge=0, title="Stored", description="Usable cases that the store holds now, 0 or more.")
    quarantined: int = Field(0, ge=0, title="Quarantined", description="Cases in quarantine now, 0 or more.")


def tell_news(store: str, result: dict[str, Any]) -> bool:
    """Emit the event of an ingest that brought something new; False when there was nothing new. No subject is named."""
    if not result["preprocessed"]:
        return False
    url = storage.resolved(store)
    counts = {name: result[name] for name in ("digest", "preprocessed", "stored", "quarantined")}
    news = IngestNews(store=url, **counts)
    resource = {
        "prefect.resource.id": f"brainloom.store.{hashlib.sha256(url.encode()).hexdigest()[:16]}",
        "prefect.resource.name": url.rstrip("/").rsplit("/", 1)[-1],
    }
    emit_event(NEWS, resource=resource, payload=news.model_dump())
    return True
