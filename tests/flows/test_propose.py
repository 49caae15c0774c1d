from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows import news as of_news
from flows.news import IngestNews, tell_news
from flows.pretrain_params import PretrainParams
from flows.propose import Approval, ProposeParams, approved, page, proposed

RESULT: dict[str, Any] = {
    "store": "x",
    "digest": "0123456789abcdef",
    "cases": 5,
    "stored": 4,
    "quarantined": 1,
    "without_usable_image": 0,
    "preprocessed": 2,
    "forgotten": 0,
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(of_news, "emit_event", lambda event, **more: events.append({"event": event, **more}))
    return events


def test_an_ingest_with_news_tells_counts_and_no_more(told: list[dict[str, Any]], tmp_path: Path) -> None:
    store = str(tmp_path / "store.zarr")
    assert tell_news(store, RESULT) is True
    (event,) = told
    assert event["event"] == "brainloom.ingest.news"
    assert event["resource"]["prefect.resource.id"].startswith("brainloom.store.")
    news = IngestNews.model_validate(event["payload"])
    assert (news.store, news.preprocessed, news.stored) == (store, 2, 4)


def test_an_ingest_without_news_tells_nothing(told: list[dict[str, Any]]) -> None:
    assert tell_news("s.zarr", {**RESULT, "preprocessed": 0}) is False
    assert told == []


def test_what_is_proposed_names_store_and_digest() -> None:
    params = ProposeParams(training=PretrainParams(workspace="./ws", recipe="brainmvp_tiny", seed=3))
    news = IngestNews(store="/s/store.zarr", digest="0123456789abcdef", preprocessed=2, stored=4)
    training = proposed(params, news)
    assert (training.store, training.name, training.seed) == ("/s/store.zarr", "brainmvp_tiny-01234567", 3)
    text = page(params, news, training)
    assert "**2** cases are new or changed; the store holds **4** cases" in text
    assert "Press **Resume**" in text
    assert proposed(params, IngestNews()).name == "brainmvp_tiny"


def test_a_person_may_change_recipe_name_and_epochs() -> None:
    training = PretrainParams(workspace="./ws", name="n", seed=3)
    answer = Approval(decision="approve", recipe="brainmvp", name="mine", epochs=7)
    chosen = approved(training, answer)
    assert (chosen.recipe, chosen.name, chosen.epochs, chosen.seed) == ("brainmvp", "mine", 7, 3)
    code = PretrainParams(workspace="./ws", preset="code")
    answer = Approval(decision="approve", recipe="cinp", name="mine")
    with pytest.raises(ValidationError, match="no code of CINP was released"):
        approved(code, answer)


def test_nothing_is_approved_by_default() -> None:
    with pytest.raises(ValidationError, match=r"(?s)decision\n +Field required"):
        Approval.model_validate({"recipe": "brainmvp", "name": "mine"})
