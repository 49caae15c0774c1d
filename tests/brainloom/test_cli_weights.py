"""`brainloom weights` from the shell: what it prints, and errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from released_files import TINY_UNIFORMER_TABLE, random_state, write_released, write_untrained
from typer.testing import CliRunner

from brainloom.cli import app, main
from brainloom.cli_weights import Format
from tasks.weights_export import FORMATS


def _run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["weights", *map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_formats_are_known_without_torch() -> None:
    assert {form.value for form in Format} == set(FORMATS)


def test_import_info_export(tmp_path: Path) -> None:
    like = write_untrained(tmp_path / "like")
    file = write_released(tmp_path / "BrainMVP_uniformer.pt", random_state(TINY_UNIFORMER_TABLE))
    folder = tmp_path / "trainings" / "released"
    told = _run("import", file, "--to", folder, "--like", like)
    for text in ("brainmvp-uniformer, weights digest", "16 tensors are kept in unused.safetensors: the reference's"):
        assert text in told
    assert "left behind in the file: optimizer" in told
    assert f"licence and data: {folder / 'model_card.md'}" in told
    assert "holds the weights of BrainMVP_uniformer.pt already" in _run("import", file, "--to", folder, "--like", like)
    shown = _run("info", folder)
    for text in (
        "recipe         imported",
        "BrainMVP_uniformer.pt (sha256",
        "--format brainmvp      possible",
        "template",
    ):
        assert text in shown
    assert json.loads(_run("info", folder, "--json"))["parts"]["template"][0] == 1
    out = tmp_path / "back.pt"
    assert _run("export", folder, "--format", "brainmvp", "--out", out).strip() == str(out)
    assert out.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "none.pt", "--to", "a"), "error: none.pt is not a file; give the checkpoint to import"),
        (("import", "text.pt", "--to", "a"), "error: text.pt is not a whole zip archive as torch.save writes it"),
        (("export", ".", "--out", "b"), "has no done.json: it is not finished; run it to its end before using it"),
        (("info", "."), "has no done.json: it is not finished"),
        (
            ("export", ".", "--out", "b", "--format", "onnx"),
            "'onnx' is not one of 'brainmvp', 'anatcl', 'safetensors', ",
        ),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    monkeypatch.setattr(sys, "argv", ["brainloom", "weights", *arguments])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        main()
    written = capsys.readouterr()
    text = " ".join((written.out + written.err).split())
    assert ended.value.code == 2
    assert message in text
    assert "Traceback" not in text
