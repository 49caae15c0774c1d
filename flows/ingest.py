"""Ingest: catalog, then preprocess; what a nightly schedule runs."""

from __future__ import annotations

from typing import Any, Self

from prefect import flow, runtime
from pydantic import ConfigDict, Field, model_validator

from flows.catalog import CatalogParams, catalog
from flows.catalog import dry_run as catalog_dry_run
from flows.forms import Form
from flows.news import tell_news
from flows.preprocess import dry_run as preprocess_dry_run
from flows.preprocess import preprocess
from flows.preprocess_params import PreprocessParams, check_store
from flows.start import start
from infra import storage
from tasks.catalog import catalog_url
from tasks.estimate import NOTHING_STARTED


class IngestParams(Form):
    """What to ingest, and where to."""

    model_config = ConfigDict(title="Ingest")

    catalog: CatalogParams = Field(title="Catalog", description="Where the scans are.")
    preprocess: PreprocessParams = Field(title="Preprocess", description="How they become voxels in the store.")

    @model_validator(mode="after")
    def _one_catalog(self) -> Self:
        written, read = catalog_url(self.catalog.workspace), catalog_url(self.preprocess.catalog)
        if _place(written) != _place(read):
            raise ValueError(
                f"preprocess.catalog is {self.preprocess.catalog!r}, but the catalog is written to catalog.workspace "
                f"{self.catalog.workspace!r}: what was found would not be preprocessed; name the same place in both"
            )
        return self


def _place(url: str) -> str:
    return str(storage.local_path(url).resolve()) if storage.is_local(url) else url


def _run_name() -> str:
    params = runtime.flow_run.parameters["params"]
    store = params["preprocess"]["store"] if isinstance(params, dict) else params.preprocess.store
    return f"ingest into {str(store).rstrip('/').rsplit('/', 1)[-1]}"


@flow(name="ingest", flow_run_name=_run_name)
def ingest(params: IngestParams) -> dict[str, Any]:
    """Find new scans and preprocess what is missing or changed; with nothing to do it takes seconds."""
    found = start(catalog, params=params.catalog)
    stored = start(preprocess, params=params.preprocess)
    tell_news(params.preprocess.store, stored)
    return {"catalog": found, "preprocess": stored}


def dry_run(params: IngestParams) -> str:
    """Return what both flows would cost, in lines; starts and writes nothing. Raises what either refuses to begin.

    Cases are known only once there is a catalog: without one preprocessing is checked as far as its store and spec.
    """
    found = catalog_dry_run(params.catalog).removesuffix(f"\n{NOTHING_STARTED}")
    url = catalog_url(params.preprocess.catalog)
    if storage.exists(url):
        title, stored = f"preprocess, by the catalog that is at {url} now", preprocess_dry_run(params.preprocess)
    else:
        check_store(params.preprocess)
        title = f"preprocess cannot be estimated before there is a catalog at {url}"
        stored = NOTHING_STARTED
    return f"catalog\n{found}\n\n{title}\n{stored}"
