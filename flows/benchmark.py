"""Benchmark: the whole chain, from raw NIfTI to the table; each link is a flow of its own and skips what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.context import FlowRunContext
from pydantic import BaseModel

from flows.benchmark_params import BenchmarkParams
from flows.benchmark_runs import compare_runs
from flows.catalog import CatalogParams, catalog
from flows.evaluate import evaluate
from flows.evaluate_report import read_kept
from flows.forms import few, params_of
from flows.phantom import PhantomParams, phantom
from flows.prediction_rows import check_folders
from flows.preprocess import PreprocessParams, preprocess
from flows.pretrain import PretrainParams, pretrain
from flows.pretrain_params import training_name
from flows.start import start
from infra.deploy import QUEUES
from infra.settings import Settings
from models.store import open_store, store_digest
from tasks.finetune import read_json
from tasks.phantom.sources import phantom_sources
from tasks.sources import SourceConfig
from tasks.splits import people_of, workspace_split

DEPLOYMENTS = {name: f"{name}/{name}" for name in ("catalog", "preprocess", "pretrain", "evaluate")}
"""Of the links, by flow. Phantoms are written where the chain runs: they have no deployment."""


class PlaceError(RuntimeError):
    """A chain of deployments was started where its links would wait for the chain itself."""


def _run_name() -> str:
    params = params_of(BenchmarkParams)
    return f"benchmark {few(run.name for run in params.runs) if params.runs else params.name}"


@flow(name="benchmark", flow_run_name=_run_name)
def benchmark(params: BenchmarkParams) -> dict[str, Any]:
    """Run the chain, or with `runs` its last link; started again it completes and gives the same digests."""
    workspace = Path(params.workspace).resolve()
    check_folders(params.predictions, workspace if params.deployed else None)
    if params.runs:
        return compare_runs(params)
    if params.deployed:
        _check_place()
    store = workspace / "store.zarr"
    sources = [*_phantom_sources(params, workspace), *params.sources]
    _link(catalog, params.deployed, CatalogParams(sources=sources, workspace=str(workspace)))
    stored = PreprocessParams(
        catalog=str(workspace / "catalog.parquet"),
        store=str(store),
        spec=params.spec,
        workers=params.workers,
        max_quarantined_share=params.max_quarantined_share,
    )
    _link(preprocess, params.deployed, stored)
    _write_split(workspace, store, params.split, params.split_shares)
    trained = PretrainParams(workspace=str(workspace), split=params.split, recipe=params.recipe, epochs=params.epochs)
    _link(pretrain, params.deployed, trained)
    name = training_name(trained)
    placed = {"workspace": str(workspace), "predictions": [row.absolute for row in params.predictions]}
    _link(evaluate, params.deployed, params.evaluate_params(name).model_copy(update=placed))
    return _made(workspace, name)


def _link(link: Flow[..., Any], deployed: bool, params: BaseModel) -> None:
    """Run a link of the chain to its end; what it made is in the workspace, wherever it ran."""
    start(link, DEPLOYMENTS[link.name] if deployed else None, params=params)


def _made(workspace: Path, training: str) -> dict[str, Any]:
    """Return what the chain left in the workspace."""
    store, folder = str(workspace / "store.zarr"), workspace / "trainings" / training
    done, tables = read_json(folder / "done.json") or {}, read_kept(workspace)
    return {
        "store": store,
        "store_digest": store_digest(store),
        "weights": str(folder / "weights.safetensors"),
        "weights_digest": done["weights_digest"],
        "reconstruction": done["metrics"],
        "tables": [str(workspace / "tables" / f"{name}.md") for name in tables["digests"]],
        "report": str(workspace / "report" / "index.html"),
    }


def _check_place() -> None:
    """Raise PlaceError in a flow run that holds the place of which its links need another one."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None:
        return
    if run.work_queue_name in QUEUES:
        raise PlaceError(
            f"this flow run holds the only place of the queue {run.work_queue_name!r}, for which its links would wait; "
            "start the deployment benchmark/chain, or set `deployed` to false"
        )
    if Settings().flow_runs < 2:
        raise PlaceError(
            "the worker runs one flow run at a time (BRAINLOOM_FLOW_RUNS=1), and this one would wait for its links; "
            "start the worker with 2 or more, or set `deployed` to false"
        )


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
