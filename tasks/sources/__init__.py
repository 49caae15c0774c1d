"""Where scans come from: one adapter per layout, each yielding catalog rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tasks.sources import bids, datalist
from tasks.sources.base import Found
from tasks.sources.bids import BidsSource
from tasks.sources.datalist import DatalistSource

SourceConfig = Annotated[BidsSource | DatalistSource, Field(discriminator="kind")]
"""One dataset at its place; `kind` says the layout."""

__all__ = ["BidsSource", "DatalistSource", "Found", "SourceConfig", "find_scans"]


def find_scans(source: SourceConfig) -> Found:
    """Return what a source yields, by its kind; raises FileNotFoundError or ValueError for a wrong config."""
    if isinstance(source, BidsSource):
        return bids.find_scans(source)
    return datalist.find_scans(source)
