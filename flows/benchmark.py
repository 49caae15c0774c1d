"""Benchmark: the whole chain, from raw NIfTI to the table; each link is a flow of its own and skips what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from flows.benchmark_params import BenchmarkParams
from flows.benchmark_runs import compare_runs
from flows.catalog import CatalogParams, catalog
from flows.evaluate import evaluate
from flows.forms import few, params_of
from flows.phantom import PhantomParams, phantom
from flows.preprocess import PreprocessParams, preprocess
from flows.pretrain import PretrainParams, pretrain
from flows.start import start
from models.store import open_store
from tasks.phantom.sources import phantom_sources
from tasks.sources import SourceConfig
from tasks.splits import people_of, workspace_split


def _run_name() -> str:
    params = params_of(BenchmarkParams)
    return f"benchmark {few(run.name for run in params.runs) if params.runs else params.name}"


@flow(name="benchmark", flow_run_name=_run_name)
def benchmark(params: BenchmarkParams) -> dict[str, Any]:
    """Run the chain, or with `runs` its last link; started again it completes and gives the same digests."""
    if params.runs:
        return compare_runs(params)
    workspace = Path(params.workspace).resolve()
    store = workspace / "store.zarr"
    sources = [*_phantom_sources(params, workspace), *params.sources]
    start(catalog, params=CatalogParams(sources=sources, workspace=str(workspace)))
    stored = start(
        preprocess,
        params=PreprocessParams(
            catalog=str(workspace / "catalog.parquet"),
            store=str(store),
            spec=params.spec,
            workers=params.workers,
            max_quarantined_share=params.max_quarantined_share,
        ),
    )
    _write_split(workspace, store, params.split, params.split_shares)
    trained = start(
        pretrain,
        params=PretrainParams(workspace=str(workspace), split=params.split, recipe=params.recipe, epochs=params.epochs),
    )
    tables = start(
        evaluate, params=params.evaluate_params(trained["training"]).model_copy(update={"workspace": str(workspace)})
    )
    return {
        "store": str(store),
        "store_digest": stored["digest"],
        "weights": str(Path(trained["folder"]) / "weights.safetensors"),
        "weights_digest": trained["weights_digest"],
        "reconstruction": trained["metrics"],
        "tables": [str(workspace / "tables" / f"{name}.md") for name in tables["tables"]],
        "report": tables["report"],
    }


def _write_split(workspace: Path, store: Path, split: str, shares: tuple[float, float, float]) -> None:
    """Fix who trains, validates and tests before anything is trained."""
    people = people_of(open_store(str(store)).cases().to_pandas(), workspace)
    workspace_split(workspace, split, str(store), people, shares)


def _phantom_sources(params: BenchmarkParams, workspace: Path) -> list[SourceConfig]:
    """Write the phantom cohort, when one is wanted, and return its two datasets as sources."""
    if params.phantom is None:
        return []
    root = workspace / "sources"
    start(phantom, params=PhantomParams(cohort=params.phantom, root=str(root), processes=params.workers))
    return phantom_sources(params.phantom, root)
