"""One node's share of a training's ranks: what launch `pool` starts once per node, on the workers of a work pool."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from pydantic import ConfigDict, Field

from flows.forms import Form, params_of
from infra.settings import Settings
from tasks.launch import launch
from tasks.meeting import meet


class NodeParams(Form):
    """Which training, and which node of how many this is. `pretrain` fills it in; nobody needs to."""

    model_config = ConfigDict(title="A node of a training")

    folders: list[str] = Field(
        min_length=1, title="Folders", description="Training folders with a run.json, on a disk that all nodes share."
    )
    ranks: int = Field(ge=1, title="Ranks", description="Of all nodes, at least 1; the nodes must divide them.")
    nodes: int = Field(ge=1, title="Nodes", description="How many nodes share the ranks, at least 1.")
    node: int = Field(ge=0, title="Node", description="Number of this node, from 0.")
    run_id: str = Field(
        title="Attempt", description="Same for all nodes, another for each attempt.", pattern=r"^[A-Za-z0-9-]+$"
    )
    stall_seconds: int = Field(
        600, ge=30, le=86_400, title="Stall time", description="Seconds without a sign of life, from 30 to 86400."
    )


def _run_name() -> str:
    params = params_of(NodeParams)
    return f"node {params.node} of {Path(params.folders[0]).name}"


@flow(name="train-node", flow_run_name=_run_name)
def train_node(params: NodeParams) -> None:
    """Run this node's ranks to the end of the trainings; raises TrainingFailed as `tasks.launch.launch` does.

    Ranks are not started again here: whoever started the nodes starts all of them.
    """
    folders = [Path(folder) for folder in params.folders]
    rendezvous = meet(
        folders[0],
        params.run_id,
        nodes=params.nodes,
        node=params.node,
        address=Settings().node_address,
        wait_seconds=params.stall_seconds,
    )
    launch(folders, params.ranks, restarts=0, stall_seconds=params.stall_seconds, rendezvous=rendezvous)
