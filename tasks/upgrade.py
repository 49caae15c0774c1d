"""Upgrading a store in place to the schema that this version reads; see models.store_schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.store_layout import SCHEMA
from models.store_schema import STEPS, refuse_schema
from models.store_writer import read_attributes_of_any, write_attributes
from tasks.lease import Lease


@dataclass(frozen=True)
class Upgraded:
    """What an upgrade did."""

    before: int
    """Schema that was found."""
    now: int


def upgrade(url: str) -> Upgraded:
    """Bring a store to this version's schema, step by step; with nothing to do it writes nothing.

    A killed upgrade is completed by the next one. Raises StoreError for a newer store, and for one without a way here,
    before anything is changed; LeaseError when a flow writes it.
    """
    found = read_attributes_of_any(url).get("schema")
    if not _can_begin(url, found):
        return Upgraded(SCHEMA, SCHEMA)
    with Lease(url, "upgrade") as lease:
        before = int(read_attributes_of_any(url)["schema"])
        for number in range(before, SCHEMA):
            STEPS[number](url)
            lease.check()
            write_attributes(url, {**read_attributes_of_any(url), "schema": number + 1})
    return Upgraded(before, SCHEMA)


def _can_begin(url: str, found: object) -> bool:
    """Say whether there are steps from a schema to ours, or it is ours; raises StoreError otherwise."""
    steps: Sequence[int] = range(found, SCHEMA) if isinstance(found, int) and not isinstance(found, bool) else []
    if steps and all(number in STEPS for number in steps):
        return True
    refuse_schema(url, found)
    return False
