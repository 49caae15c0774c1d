from __future__ import annotations

import base64
import io
import json
import re
from uuid import UUID, uuid4

import numpy as np
import pytest
from PIL import Image

from flows import artifacts
from infra.server import ServerInfo, request_json

REMOTE = "https://8.8.8.8/api"


def png(width: int, height: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height, width), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, str]]:
    """Collect what would be published, as if a flow ran."""
    found: list[tuple[object, str]] = []

    def record(content: object, key: str, description: str | None) -> UUID:
        found.append((content, key))
        return uuid4()

    monkeypatch.setattr(artifacts, "in_run", lambda: True)
    monkeypatch.setattr(artifacts, "create_markdown_artifact", record)
    monkeypatch.setattr(artifacts, "create_table_artifact", record)
    return found


@pytest.fixture
def public_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "is_private", lambda url: False)


def test_nothing_happens_outside_of_a_flow() -> None:
    assert artifacts.publish_markdown("x", "text") is False
    assert artifacts.publish_table("x", [{"a": 1}]) is False


def test_a_small_picture_is_embedded_as_it_is() -> None:
    data = png(32, 16)
    text = artifacts.png_markdown(data, "axial [slice]")
    found = re.fullmatch(r"!\[axial  slice \]\(data:image/png;base64,(.*)\)", text)
    assert found
    assert base64.b64decode(found[1]) == data


def test_a_large_picture_is_made_smaller_and_keeps_its_shape() -> None:
    text = artifacts.png_markdown(png(1200, 600), "noise")
    uri = text.split("(", 1)[1].rstrip(")")
    assert 100_000 < len(uri) <= artifacts.PICTURE_BYTES_MAX
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) as image:
        assert image.width == pytest.approx(2 * image.height, abs=2)


@pytest.mark.usefixtures("public_api")
def test_a_public_api_gets_no_pictures_and_no_subjects(published: list[tuple[object, str]]) -> None:
    assert artifacts.png_markdown(png(8, 8), "x") == artifacts.HIDDEN
    artifacts.publish_markdown("k", "before ![x](data:image/png;base64,AAAA) after")
    artifacts.publish_markdown("k", "sub-01 is here", names_subjects=True)
    artifacts.publish_table("k", [{"subject": "sub-01", "dice": 0.5}])
    assert [content for content, _ in published] == [
        f"before {artifacts.HIDDEN} after",
        artifacts.HIDDEN,
        [{"dice": 0.5}],
    ]


@pytest.mark.usefixtures("public_api")
def test_a_public_api_gets_no_subjects_of_pairs(published: list[tuple[object, str]]) -> None:
    pair = {f"{column}_{side}": "x" for column in ("dataset", "subject", "case") for side in "ab"}
    artifacts.publish_table("duplicates", [{**pair, "similarity": 0.5}])
    assert published == [([{"dataset_a": "x", "dataset_b": "x", "similarity": 0.5}], "duplicates")]


def test_error_texts_name_twenty_at_most() -> None:
    lines = [f"sub-{number}" for number in range(25)]
    assert artifacts.shown_names(lines, []) == [*lines[:20], "... and 5 more"]
    assert artifacts.shown_names(lines[:20], []) == lines[:20]
    assert artifacts.counted(["b", "a", "b"]) == ["1 a", "2 b"]


@pytest.mark.usefixtures("public_api")
def test_error_texts_for_a_public_api_name_nobody() -> None:
    assert artifacts.shown_names(["sub-1"], ["1 missing file"]) == ["1 missing file"]
    assert artifacts.shown_names([], [str(number) for number in range(21)])[-1] == "... and 1 more"


@pytest.mark.usefixtures("public_api")
def test_the_opt_in_allows_them(published: list[tuple[object, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLOOM_ALLOW_PICTURES", "true")
    artifacts.publish_table("k", [{"subject": "sub-01"}])
    assert published == [([{"subject": "sub-01"}], "k")]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (None, True),
        ("http://127.0.0.1:4200/api", True),
        ("http://[::1]:4200/api", True),
        ("http://localhost:4200/api", True),
        ("http://10.1.2.3:4200/api", True),
        (REMOTE, False),
        ("http://no-such-host.invalid:4200/api", False),
    ],
)
def test_private_addresses(url: str | None, expected: bool) -> None:
    assert artifacts.is_private(url) is expected


def test_tables_are_finite_plain_json(published: list[tuple[object, str]]) -> None:
    row = {"n": np.int64(3), "dice": np.float32(0.5), "hd95": float("inf"), "auc": np.nan, "shape": (1, 2), "ok": True}
    assert artifacts.publish_table("Benchmark table: BraTS_2021", [row]) is True
    ((table, key),) = published
    assert key == "benchmark-table-brats-2021"
    text = json.dumps(table, allow_nan=False)
    assert json.loads(text) == [{"n": 3, "dice": 0.5, "hd95": None, "auc": None, "shape": "1, 2", "ok": True}]


def test_a_key_needs_a_character() -> None:
    with pytest.raises(ValueError, match="needs a letter or digit, got '--'"):
        artifacts.artifact_key("--")


def test_a_refusing_server_does_not_stop_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import httpx

    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("server is gone")

    monkeypatch.setattr(artifacts, "in_run", lambda: True)
    monkeypatch.setattr(artifacts, "create_markdown_artifact", refuse)
    assert artifacts.publish_markdown("k", "text") is False
    assert "artifact not published: ConnectError: server is gone" in caplog.text


def test_artifacts_and_progress_reach_a_real_server(prefect_server: ServerInfo) -> None:
    from prefect import flow

    from flows.progress import Progress

    @flow(name="artifact-test")
    def publishing() -> list[bool]:
        with Progress("weave", 4, "cases") as progress:
            progress.update(4, quarantined=1)
        page = "# QC\n" + artifacts.png_markdown(png(16, 16), "case")
        return [artifacts.publish_markdown("qc-page", page), artifacts.publish_table("scores", [{"hd95": np.inf}])]

    assert publishing() == [True, True]
    found = {row["key"]: row for row in request_json(f"{prefect_server.api_url}/artifacts/filter", {})}
    assert "data:image/png;base64," in found["qc-page"]["data"]
    assert json.loads(found["scores"]["data"]) == [{"hd95": None}]
    assert found["progress-weave"]["data"] == 100.0
    assert "4/4 cases, 1 quarantined" in found["progress-weave"]["description"]
