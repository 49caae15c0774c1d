"""Verify: are stores what their tables say? What a weekly schedule runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow
from pydantic import ConfigDict, Field

from flows.artifacts import counted, publish_markdown, publish_table, shown_names
from flows.forms import Form, Place, few, params_of
from flows.progress import Progress
from infra import storage
from tasks.verify import verify as verify_store

SHOWN = 500
"""Problems of one store in the UI; `brainloom store verify --json` has all."""
_ROW = re.compile(r"^(?P<dataset>[^/]+)/.* \(row (?P<row>\d+)\): (?P<what>.*)$", re.DOTALL)


class VerifyParams(Form):
    """Which stores to verify."""

    model_config = ConfigDict(title="Verify")

    stores: list[Place] = Field(
        default=["./state/ingest/store.zarr"],
        title="Stores",
        description="Paths or URLs of Zarr stores, on disk or s3://; at least one.",
        min_length=1,
        examples=[["./state/ingest/store.zarr"]],
    )
    deep: bool = Field(
        True,
        title="Deep",
        description="Read every voxel again and recompute the digests; without it tables, receipts and metadata.",
    )


class VerifyError(RuntimeError):
    """A store is not what its tables say, or cannot be read."""


def _run_name() -> str:
    params = params_of(VerifyParams)
    return f"verify {few(_short(store) for store in params.stores)}"


def _short(store: str) -> str:
    return store.rstrip("/").rsplit("/", 1)[-1]


@flow(name="verify", flow_run_name=_run_name)
def verify(params: VerifyParams) -> dict[str, Any]:
    """Check receipts, tables, arrays and digests of every store; all are read before a problem ends the flow run.

    Raises VerifyError naming the stores with problems, and those that cannot be read.
    """
    problems: dict[str, list[str]] = {}
    with Progress("verify", len(params.stores), "stores") as progress:
        for done, store in enumerate(params.stores, start=1):
            problems[store] = _problems(storage.resolved(store), params.deep)
            progress.update(done)
    publish_markdown("verify", summary(problems, params.deep), "Are the stores what their tables say?")
    rows = [{"store": store, "detail": text} for store, found in problems.items() for text in found[:SHOWN]]
    publish_table("verify-problems", rows, "What is wrong, at most 500 of each store")
    refuse(problems)
    return {"stores": list(problems), "deep": params.deep, "problems": 0}


def _problems(url: str, deep: bool) -> list[str]:
    """Return the problems of a store; one that cannot be opened has one, and the others are still read."""
    try:
        return verify_store(url, deep=deep)
    except (OSError, ValueError, RuntimeError) as error:
        return [f"the store cannot be read: {error}"]


def summary(problems: Mapping[str, Sequence[str]], deep: bool) -> str:
    """Return a Markdown table with a line per store; it names no case."""
    lines = [f"- `{store}`: {f'**{len(found)} problems**' if found else 'sound'}" for store, found in problems.items()]
    how = "Every voxel was read and every digest recomputed." if deep else "Tables, receipts and metadata were read."
    return "\n".join([how, "", *lines])


def refuse(problems: Mapping[str, Sequence[str]]) -> None:
    """Raise VerifyError when a store has problems. Cases are named only where subject ids are allowed."""
    wrong = {store: found for store, found in problems.items() if found}
    if not wrong:
        return
    total = sum(map(len, wrong.values()))
    named = [f"{store}: {text}" for store, found in wrong.items() for text in found]
    hidden = counted(f"in {store}: {kind_of(text)}" for store, found in wrong.items() for text in found)
    first = (
        f"{total} problems in {len(wrong)} of {len(problems)} stores, 0 are allowed; run preprocess with repair: true, "
        "or take the store from its backup:"
    )
    raise VerifyError("\n  ".join([first, *shown_names(named, hidden)]))


def kind_of(problem: str) -> str:
    """Return the kind of a problem without the case that it names: its rule, e.g. `digest of the voxels is`."""
    found = _ROW.match(problem)
    text = found["what"] if found else problem
    return re.split(r"[:;,]| [0-9a-f]{8,}|\d", text, maxsplit=1)[0].strip()[:60]
