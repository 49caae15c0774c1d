"""What the benchmark flow is asked for: the form in the UI, and the presets of the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from flows.catalog import KINDS_TOLD, SOURCE_EXAMPLE
from flows.compared import RunRow, TrainingRow
from flows.evaluate_params import EvaluateParams, FinetuneLaunch, MissingModalities, NativeScores, ScratchNetwork
from flows.forms import Form, Place, store_in
from flows.prediction_rows import PredictionRows, check_predictions
from flows.pretrain_params import CropRecipe
from flows.probe import ProbeParams
from flows.prompt import PromptParams
from models.spec import SPECS
from tasks.benchmark_summary import ALL, find_any
from tasks.benchmarks import PHANTOM_BENCHMARKS
from tasks.phantom import DEMO, TINY, PhantomConfig
from tasks.sources import SourceConfig
from tasks.splits import NAME as SPLIT_NAME
from tasks.statistics import REPLICATES

AnyBenchmark = Annotated[str, Field(json_schema_extra={"enum": list(ALL)})]
"""The form offers the registered ones of all protocols."""


class BenchmarkParams(Form):
    """The whole chain: where the scans are, how to train, what to compare; or, with runs, the comparison alone."""

    model_config = ConfigDict(title="Benchmark")

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
        default_factory=list,
        title="Sources",
        description=f"Datasets to ingest besides the phantoms; may be empty. {KINDS_TOLD}",
        examples=[[SOURCE_EXAMPLE]],
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
    recipe: CropRecipe = Field("brainmvp_tiny", title="Recipe", description="Of the pre-training.")
    epochs: int | None = Field(
        None, ge=1, title="Epochs", description="Of the pre-training, at least 1; empty: as the recipe says."
    )
    runs: list[RunRow] = Field(
        default_factory=list,
        title="Runs",
        description="Finished or imported trainings to compare: then nothing is ingested or pre-trained. The first is "
        "tested against every other row. Empty: the whole chain.",
        examples=[[{"training": "brainmvp_tiny", "name": "BrainMVP"}, {"training": "brainmvp_unet_tiny"}]],
    )
    benchmarks: list[AnyBenchmark] = Field(
        default=list(PHANTOM_BENCHMARKS),
        title="Benchmarks",
        description="At least one; with `runs` also probes and prompting tasks, each by its own protocol.",
        min_length=1,
    )
    seeds: int = Field(
        3, ge=1, le=20, title="Seeds", description="Fine-tunings of each row, or of each of its repeats, from 1 to 20."
    )
    finetune_epochs: int | None = Field(
        None, ge=1, title="Fine-tuning epochs", description="At least 1; empty: as the recipe says."
    )
    template_mix: bool = Field(
        False,
        title="Template mix",
        description="Fine-tune a further row at the same budget: learned templates mixed into the channels.",
    )
    missing_modalities: MissingModalities = False
    native_scores: NativeScores = False
    label_shares: list[float] = Field(
        default_factory=list,
        title="Label shares",
        description="Fine-tune also on these shares of the training subjects, each above 0 and below 1.",
        examples=[[0.05, 0.1, 0.2, 0.4, 0.6, 0.8]],
    )
    networks: list[ScratchNetwork] = Field(
        default_factory=list,
        title="Networks",
        description="Networks that segmentations train from scratch as further rows, at the same budget.",
    )
    launch: FinetuneLaunch = "local"
    predictions: PredictionRows = Field(default_factory=list)
    split: str = Field(
        "default",
        title="Split",
        description="Name of the split in `<workspace>/splits`, made when absent by the chain and for fine-tuning; "
        "letters, digits, dashes and underscores.",
        pattern=SPLIT_NAME,
    )
    replicates: int = Field(
        REPLICATES,
        ge=200,
        le=100_000,
        title="Bootstrap replicates",
        description="Of the intervals of fine-tuned rows, from 200 to 100,000.",
    )
    probe_store: Place = Field(
        "",
        title="Store of probes",
        description="Finalised store whose images are probed, such as grey-matter maps for AnatCL; empty: "
        "`<workspace>/store.zarr`.",
    )
    prompt_store: Place = Field(
        "",
        title="Store of prompts",
        description="Finalised store with images and connectomes; empty: `<workspace>/store.zarr`.",
    )
    folds: int = Field(
        5, ge=3, le=20, title="Folds", description="Of the cross-validation of probes and prompts, from 3 to 20."
    )
    knn: bool = Field(
        False, title="Nearest neighbours", description="Probe every encoder a second time, by nearest training cases."
    )
    combat: bool = Field(
        False,
        title="ComBat",
        description="Probe also features that ComBat has harmonised over sites, in tables beside the ordinary ones.",
    )
    with_seen: bool = Field(
        True,
        title="Also with who was seen",
        description="Score probes and prompts once more with the subjects that a pre-training has seen, for the table "
        "of leaks; off: they are listed alone.",
    )
    workers: int = Field(2, ge=1, le=256, title="Workers", description="Processes on this host, from 1 to 256.")
    deployed: bool = Field(
        False,
        title="Through deployments",
        description="Start each link of the chain as a flow run of its own deployment, in its own work pool; off: all "
        "in this flow run. The workspace must be one folder for all workers.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        others = [one for one in map(find_any, self.benchmarks) if one.protocol != "fine-tune"]
        if others and not self.runs:
            raise ValueError(
                f"benchmark {others[0].name!r} is a {others[0].protocol} of finished trainings; name them under `runs`"
            )
        if self.runs and (self.phantom or self.sources):
            raise ValueError("with `runs` nothing is ingested or pre-trained; leave `phantom` and `sources` empty")
        if self.runs and self.deployed:
            raise ValueError("with `runs` there is no chain whose links could be deployed; set `deployed` to false")
        if not self.runs and (self.template_mix or self.missing_modalities) and not self.recipe.startswith("brainmvp"):
            raise ValueError(
                f"template_mix and missing_modalities need learned templates, and {self.recipe} learns none; choose a "
                "BrainMVP recipe, or switch them off"
            )
        check_predictions(self.predictions, self.runs, self.benchmarks)
        for protocol in by_protocol(self.benchmarks) if self.runs else ():
            self.params_of(protocol)
        if not self.runs:
            self.evaluate_params("any")
            if not (self.phantom or self.sources):
                raise ValueError(
                    "there is nothing to work on: name `sources`, a `phantom` cohort, or trainings in `runs`"
                )
        return self

    def params_of(self, protocol: str) -> EvaluateParams | ProbeParams | PromptParams:
        """Return what the flow of a protocol is asked for; raises ValidationError for runs that it cannot name so."""
        if protocol == "fine-tune":
            return self.evaluate_params()
        rows = [TrainingRow(name=run.name, trainings=run.trainings) for run in self.runs]
        benchmarks = by_protocol(self.benchmarks)[protocol]
        if protocol == "prompt":
            return PromptParams(
                workspace=self.workspace,
                store=self.prompt_store,
                rows=rows,
                benchmarks=benchmarks,
                folds=self.folds,
                with_seen=self.with_seen,
            )
        return ProbeParams(
            workspace=self.workspace,
            store=self.probe_store,
            rows=rows,
            benchmarks=benchmarks,
            folds=self.folds,
            knn=self.knn,
            combat=self.combat,
            with_seen=self.with_seen,
        )

    @property
    def stores(self) -> dict[str, str]:
        """The store of each protocol among the benchmarks, and that of fine-tuning."""
        own = {"probe": self.probe_store, "prompt": self.prompt_store}
        asked = ["fine-tune", *(name for name in own if name in by_protocol(self.benchmarks))]
        return {protocol: store_in(self.workspace, own.get(protocol, "")) for protocol in asked}

    def only(self, names: Sequence[str]) -> Self:
        """Return what is asked for of some of the runs."""
        return self.model_copy(update={"runs": [run for run in self.runs if run.name in names]})

    def evaluate_params(self, pretrained: str = "") -> EvaluateParams:
        """Return what `evaluate` is asked for: `runs`, or one pre-training of the chain."""
        return EvaluateParams(
            workspace=self.workspace,
            pretrained=pretrained,
            runs=self.runs,
            networks=self.networks,
            benchmarks=by_protocol(self.benchmarks)["fine-tune"],
            seeds=self.seeds,
            epochs=self.finetune_epochs,
            template_mix=self.template_mix,
            missing_modalities=self.missing_modalities,
            native_scores=self.native_scores,
            label_shares=self.label_shares,
            predictions=self.predictions,
            launch=self.launch,
            split=self.split,
            replicates=self.replicates,
            lanes=self.workers,
        )


def by_protocol(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of benchmarks by their protocol, each once, in their order."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        found.setdefault(find_any(name).protocol, []).append(name)
    return found


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
