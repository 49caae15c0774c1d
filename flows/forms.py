"""What the flows' forms share: fields, the parameters of a flow run, and names that stay short."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from prefect import runtime
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from infra import storage

NAMED = 3
"""Names in a flow run's name before the rest is counted."""

Params = TypeVar("Params", bound=BaseModel)
KINDS = {"integer": "number", "number": "number", "string": "text", "null": "empty"}
"""What the form calls the kinds of a value that may be left empty; of itself it says `int`, `str` and `None`."""


def _place(url: str) -> str:
    """Return a path or URL as it is; raises ValueError for another scheme, and for a user before the bucket."""
    storage.is_local(url)
    return url


Place = Annotated[str, AfterValidator(_place), Field(json_schema_extra={"pattern": r"^(?!\w+://[^/]*@)"})]
"""A path or URL. The server keeps parameters for all to see, so it refuses credentials by the pattern, before them."""


def form_schema(schema: dict[str, Any]) -> None:
    """Add to the JSON schema of a model, in place, what the UI's form needs to be clear; what is accepted stays.

    The alternatives of a value that may be left empty get words. In a list of one of several models, for which the form
    has only a box of JSON, an added item begins as the example.
    """
    for field in schema.get("properties", {}).values():
        if "oneOf" in field.get("items", {}) and field.get("examples"):
            field["items"]["default"] = field["examples"][0][0]
        for kind in field.get("anyOf", ()):
            if kind.get("type") in KINDS:
                kind.setdefault("title", "choice" if "enum" in kind else KINDS[kind["type"]])


class Form(BaseModel):
    """Base of what the form of a deployment shows: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=form_schema)


def workspace_field(description: str) -> Any:
    """Return the field of a workspace that is there already."""
    return Field("./state/demo", title="Workspace", description=description, min_length=1, examples=["./state/demo"])


def store_field() -> Any:
    """Return the field of a store that may lie outside the workspace."""
    return Field(
        "",
        title="Store",
        description="Path or URL of the Zarr store, on disk or s3://; empty: `<workspace>/store.zarr`.",
    )


def store_in(workspace: str, store: str) -> str:
    """Return the URL of `store`, or of the workspace's own; a local one is absolute, for processes elsewhere."""
    url = store or str(Path(workspace) / "store.zarr")
    return str(storage.local_path(url).resolve()) if storage.is_local(url) else url


def params_of(model: type[Params]) -> Params:
    """Return the parameters of the present flow run, which a deployment gives as plain values."""
    given = runtime.flow_run.parameters["params"]
    return given if isinstance(given, model) else model.model_validate(given)


def few(names: Iterable[str], separator: str = ", ") -> str:
    """Return distinct names, shortened after three."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - NAMED} more" if len(distinct) > NAMED else ""
    return separator.join(distinct[:NAMED]) + more
