"""Propose a pre-training: wait for a person to approve it in the UI, then start it. Nothing trains before that.

An ingest with news emits an event, and an automation starts this flow with it (infra.automations). The flow run is
suspended: no process waits, no place of a worker is held, and the UI shows a form behind `Resume`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Cancelled, Completed
from pydantic import ConfigDict, Field

from flows.artifacts import publish_markdown
from flows.forms import Form, form_schema, params_of
from flows.news import IngestNews
from flows.pretrain_params import PretrainParams, RecipeName, training_name
from flows.start import schedule
from models.export import DONE

DAY_S = 86_400
FLOW = "propose-pretraining"


class ProposeParams(Form):
    """Which pre-training is proposed."""

    model_config = ConfigDict(title="Propose a pre-training")

    deployment: str = Field(
        "pretrain/pretrain",
        title="Deployment",
        description="Started after the approval, `<flow>/<deployment>`.",
        pattern=r"^[^/]+/[^/]+$",
    )
    training: PretrainParams = Field(
        default_factory=lambda: PretrainParams(workspace="./state/ingest"),
        title="Training",
        description="Its parameters. Store and name are replaced by those of the news.",
    )
    days: int = Field(
        7,
        ge=1,
        le=365,
        title="Days",
        description="So long it waits for a person, from 1 to 365; then it fails.",
    )


class Approval(RunInput):
    """What a person answers."""

    model_config = ConfigDict(json_schema_extra=form_schema)

    decision: Literal["approve", "decline"] = Field(
        title="Decision", description="approve starts the pre-training; decline ends the proposal."
    )
    recipe: RecipeName = Field(title="Recipe", description="As proposed, or another one; see the form of pretrain.")
    name: str = Field(
        title="Name", description="Folder of the training: letters, digits, - and _.", pattern=r"^[A-Za-z0-9_-]+$"
    )
    epochs: int | None = Field(None, ge=1, title="Epochs", description="At least 1; empty: as the recipe says.")


def proposed(params: ProposeParams, news: IngestNews) -> PretrainParams:
    """Return the parameters of the training: on the store of the news, named by its digest."""
    training = params.training
    suffix = f"-{news.digest[:8]}" if news.digest else ""
    changed = {"store": news.store or training.store, "name": f"{training_name(training)}{suffix}"}
    return PretrainParams.model_validate({**training.model_dump(), **changed})


def approved(training: PretrainParams, answer: Approval) -> PretrainParams:
    """Return the parameters with what the person chose; raises ValueError when they do not fit."""
    chosen = {"recipe": answer.recipe, "name": answer.name, "epochs": answer.epochs}
    return PretrainParams.model_validate({**training.model_dump(), **chosen})


def page(params: ProposeParams, news: IngestNews, training: PretrainParams) -> str:
    """Return the Markdown that the page of the flow run shows."""
    how = f"Press **Resume** on the page of this flow run to approve or to decline, within {params.days} days."
    return f"{question(params, news, training)}\n\n{how}"


def question(params: ProposeParams, news: IngestNews, training: PretrainParams) -> str:
    """Return the Markdown that a person reads above the form of the decision."""
    return "\n".join(
        [
            f"**{news.preprocessed}** cases are new or changed; the store holds **{news.stored}** cases, "
            f"{news.quarantined} are in quarantine.",
            "",
            f"- store `{training.store or training.workspace}`, digest `{news.digest[:16] or 'unknown'}`",
            f"- training `{training.name}`, recipe `{training.recipe}`, started as `{params.deployment}`",
        ]
    )


def _run_name() -> str:
    news = runtime.flow_run.parameters.get("news")  # absent when a person starts the flow
    return f"proposal {proposed(params_of(ProposeParams), IngestNews.model_validate(news or {})).name}"


@flow(name=FLOW, flow_run_name=_run_name, persist_result=False)
def propose_pretraining(params: ProposeParams, news: IngestNews | None = None) -> State[Any]:
    """Wait for a person to approve a pre-training, then start its deployment without waiting for it.

    Ends as `Approved`, `Declined` or `Trained already`; fails when nobody answered in time.
    """
    news = news or IngestNews()
    training = proposed(params, news)
    if (Path(training.workspace).resolve() / "trainings" / training.name / DONE).exists():
        return Completed(name="Trained already", message=f"training {training.name} is finished")
    if runtime.flow_run.run_count <= 1:
        _supersede(training.store)
        publish_markdown("proposal", page(params, news, training), "A pre-training waits for approval")
    form = Approval.with_initial_data(
        description=question(params, news, training),
        recipe=training.recipe,
        name=training.name,
        epochs=training.epochs,
    )
    answer = suspend_flow_run(wait_for_input=form, timeout=params.days * DAY_S, key="approval")
    if answer.decision != "approve":
        return Completed(name="Declined", message=f"training {answer.name} was declined")
    started = schedule(params.deployment, str(runtime.flow_run.id), params=approved(training, answer))
    publish_markdown("proposal", f"Approved: flow run `{started.name}` of `{params.deployment}`.", "Approved")
    return Completed(name="Approved", message=f"flow run {started.name} ({started.id}) of {params.deployment}")


def _supersede(store: str) -> None:
    """Cancel older proposals for the same store that nobody answered: they name an older state of it."""
    waiting = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])), flow_run_filter=waiting
        ):
            told = (run.parameters.get("news") or {}).get("store", "")
            if str(run.id) != str(runtime.flow_run.id) and told == store:
                message = f"superseded by {runtime.flow_run.name!r}: the store has changed since"
                client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
