"""Ingest: catalog, then preprocess; what a nightly schedule runs."""

from __future__ import annotations

from typing import Any

from prefect import flow, runtime
from pydantic import BaseModel, ConfigDict, Field

from flows.catalog import CatalogParams, catalog
from flows.preprocess import PreprocessParams, preprocess
from flows.start import start


class IngestParams(BaseModel):
    """What to ingest, and where to."""

    model_config = ConfigDict(extra="forbid", title="Ingest")

    catalog: CatalogParams = Field(title="Catalog", description="Where the scans are.")
    preprocess: PreprocessParams = Field(title="Preprocess", description="How they become voxels in the store.")


def _run_name() -> str:
    params = runtime.flow_run.parameters["params"]
    store = params["preprocess"]["store"] if isinstance(params, dict) else params.preprocess.store
    return f"ingest into {str(store).rstrip('/').rsplit('/', 1)[-1]}"


@flow(name="ingest", flow_run_name=_run_name)
def ingest(params: IngestParams) -> dict[str, Any]:
    """Find new scans and preprocess what is missing or changed; with nothing to do it takes seconds."""
    found = start(catalog, params=params.catalog)
    stored = start(preprocess, params=params.preprocess)
    return {"catalog": found, "preprocess": stored}
