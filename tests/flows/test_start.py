from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Failed
from pydantic import BaseModel

from flows import start as module
from flows.start import FlowRunError, schedule, start


class Params(BaseModel):
    path: str
    n: int = 2


@flow
def doubled(params: Params) -> int:
    return 2 * params.n


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Pretend a deployment; `state` is how its flow run ends, `seen` and `options` what it got."""
    fake = SimpleNamespace(state=Completed(), seen=None, options=None)

    def run_deployment(name: str, parameters: dict[str, Any], poll_interval: float, **options: Any) -> Any:
        fake.seen, fake.options = parameters, options
        return SimpleNamespace(name="clever-cat", id="run-id", state=fake.state)

    monkeypatch.setattr(module, "run_deployment", run_deployment)
    return fake


@pytest.mark.usefixtures("prefect_server")
def test_inline_returns_the_value() -> None:
    assert start(doubled, params=Params(path="x", n=4)) == 8


def test_a_deployment_gets_plain_parameters(deployed: SimpleNamespace) -> None:
    assert start(doubled, "doubled/demo", params=Params(path="x")) is None
    assert deployed.seen == {"params": {"path": "x", "n": 2}}


def test_a_scheduled_deployment_is_not_waited_for_and_starts_once(deployed: SimpleNamespace) -> None:
    assert schedule("doubled/demo", "of-this-step", params=Params(path="x")).id == "run-id"
    assert deployed.seen == {"params": {"path": "x", "n": 2}}
    assert deployed.options == {"timeout": 0, "as_subflow": False, "idempotency_key": "of-this-step"}


def test_a_failed_flow_run_raises_with_its_message(deployed: SimpleNamespace) -> None:
    deployed.state = Failed(message="disk full")
    with pytest.raises(FlowRunError, match=r"flow run 'clever-cat' \(run-id\) of doubled/demo ended Failed: disk full"):
        start(doubled, "doubled/demo", params=Params(path="x"))


@pytest.mark.usefixtures("deployed")
def test_large_parameters_are_refused() -> None:
    with pytest.raises(FlowRunError, match=r"Prefect takes at most 524288; write them to a file and pass its path"):
        start(doubled, "doubled/demo", params={"scans": ["x" * 100] * 6000})


def test_an_unknown_deployment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ObjectNotFound(http_exc=Exception("404"))

    monkeypatch.setattr(module, "run_deployment", absent)
    with pytest.raises(FlowRunError, match=r"no deployment 'doubled/none' is registered at .*run the flow inline"):
        start(doubled, "doubled/none", params=Params(path="x"))
