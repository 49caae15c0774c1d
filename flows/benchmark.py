"""Benchmark: the whole chain, from raw NIfTI to the table; each link is a flow of its own and skips what is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prefect import flow, runtime
from pydantic import BaseModel, ConfigDict, Field

from flows.catalog import CatalogParams, catalog
from flows.evaluate import evaluate
from flows.evaluate_params import BenchmarkName, EvaluateParams
from flows.phantom import PhantomParams, phantom
from flows.preprocess import PreprocessParams, preprocess
from flows.pretrain import PretrainParams, pretrain
from flows.start import start
from models.spec import SPECS
from models.store import open_store
from tasks.benchmarks import PHANTOM_BENCHMARKS
from tasks.phantom import DEMO, TINY, PhantomConfig
from tasks.phantom.sources import phantom_sources
from tasks.sources import SourceConfig
from tasks.splits import people_of, workspace_split


class BenchmarkParams(BaseModel):
    """The whole chain: where the scans are, how to train, what to compare."""

    model_config = ConfigDict(extra="forbid", title="Benchmark")

    name: str = Field("benchmark", title="Name", description="Shown in the name of the flow run.", min_length=1)
    workspace: str = Field(
        "./state/demo",
        title="Workspace",
        description="Folder that receives everything: catalog, store, splits, trainings, tables, report.",
        min_length=1,
    )
    phantom: PhantomConfig | None = Field(
        None, title="Phantom cohort", description="Write this cohort below the workspace first; empty: only `sources`."
    )
    sources: list[SourceConfig] = Field(
        default_factory=list, title="Sources", description="Datasets to ingest besides the phantoms; may be empty."
    )
    spec: str = Field(
        "brainmvp",
        title="Preprocessing spec",
        description=f"One of: {', '.join(SPECS)}.",
        json_schema_extra={"enum": list(SPECS)},
    )
    max_quarantined_share: float = Field(
        0.05, ge=0, le=1, title="Allowed share in quarantine", description="From 0 to 1."
    )
    split_shares: tuple[float, float, float] = Field(
        (0.7, 0.1, 0.2),
        title="Split shares",
        description="Shares of subjects for train, val and test; they sum to 1.",
    )
    recipe: Literal["brainmvp_tiny", "brainmvp", "brainmvp_unet_tiny", "brainmvp_unet"] = Field(
        "brainmvp_tiny", title="Recipe", description="Of the pre-training."
    )
    epochs: int | None = Field(
        None, ge=1, title="Epochs", description="Of the pre-training, at least 1; empty: as the recipe says."
    )
    benchmarks: list[BenchmarkName] = Field(
        default=list(PHANTOM_BENCHMARKS), title="Benchmarks", description="At least one.", min_length=1
    )
    seeds: int = Field(3, ge=1, le=20, title="Seeds", description="Fine-tunings of each row, from 1 to 20.")
    finetune_epochs: int | None = Field(
        None, ge=1, title="Fine-tuning epochs", description="At least 1; empty: as the recipe says."
    )
    template_mix: bool = Field(
        False,
        title="Template mix",
        description="Fine-tune a third row at the same budget: learned templates mixed into the channels.",
    )
    missing_modalities: bool = Field(
        False,
        title="Missing modalities",
        description="Predict segmentations again without each modality: zeros against the learned template.",
    )
    workers: int = Field(2, ge=1, le=256, title="Workers", description="Processes on this host, from 1 to 256.")


def demo_params(workspace: Path) -> BenchmarkParams:
    """Return the `demo` preset: at most 10 minutes on two cores."""
    return BenchmarkParams(
        name="demo",
        workspace=str(workspace),
        phantom=DEMO,
        spec="demo",
        max_quarantined_share=0.1,  # the broken files are there on purpose
        split_shares=(0.55, 0.1, 0.35),
    )


def tiny_params(workspace: Path) -> BenchmarkParams:
    """Return the `tiny` preset: every link of the chain on a handful of subjects; its numbers mean nothing."""
    return BenchmarkParams(
        name="tiny",
        workspace=str(workspace),
        phantom=TINY.replace(bids_subjects=16, datalist_subjects=6, broken=True),
        spec="demo",
        max_quarantined_share=0.5,
        split_shares=(0.5, 0.15, 0.35),
        epochs=4,
        benchmarks=["phantom-tumour", "phantom-control"],
        seeds=1,
        finetune_epochs=1,
    )


PRESETS: dict[str, Callable[[Path], BenchmarkParams]] = {"demo": demo_params, "tiny": tiny_params}


def _run_name() -> str:
    params = runtime.flow_run.parameters["params"]
    return f"benchmark {params['name'] if isinstance(params, dict) else params.name}"


@flow(name="benchmark", flow_run_name=_run_name)
def benchmark(params: BenchmarkParams) -> dict[str, Any]:
    """Run the chain; started again after any interruption it completes and gives the same digests."""
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
    _write_split(workspace, store, params.split_shares)
    trained = start(
        pretrain, params=PretrainParams(workspace=str(workspace), recipe=params.recipe, epochs=params.epochs)
    )
    tables = start(
        evaluate,
        params=EvaluateParams(
            workspace=str(workspace),
            pretrained=trained["training"],
            benchmarks=params.benchmarks,
            seeds=params.seeds,
            epochs=params.finetune_epochs,
            template_mix=params.template_mix,
            missing_modalities=params.missing_modalities,
            lanes=params.workers,
        ),
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


def _write_split(workspace: Path, store: Path, shares: tuple[float, float, float]) -> None:
    """Fix who trains, validates and tests before anything is trained."""
    people = people_of(open_store(str(store)).cases().to_pandas(), workspace)
    workspace_split(workspace, "default", str(store), people, shares)


def _phantom_sources(params: BenchmarkParams, workspace: Path) -> list[SourceConfig]:
    """Write the phantom cohort, when one is wanted, and return its two datasets as sources."""
    if params.phantom is None:
        return []
    root = workspace / "sources"
    start(phantom, params=PhantomParams(cohort=params.phantom, root=str(root), processes=params.workers))
    return phantom_sources(params.phantom, root)
