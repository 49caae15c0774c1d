"""The command line: verbs, bad input, a quiet terminal. What the verbs do is tested where it is done."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nifti_files import SMALL
from pydantic import BaseModel
from training_phantoms import write_blobs
from typer.testing import CliRunner

import brainloom
from brainloom import cli, terminal
from brainloom.cli import FLOWS, app, main
from models.store import create_or_open, store_digest

PHANTOMS = ("phantom", "phantom-anat", "phantom-connect")
VERBS = (*FLOWS, *PHANTOMS, "demo", "store", "weights", "up", "down", "deploy", "doctor", "version")


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bad input must be refused before a server is started."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr("infra.server.ensure_server", started)
    monkeypatch.setattr("infra.server.connect", started)
    # In these tests Prefect stays as the session set it.
    monkeypatch.setattr(cli, "prepare_prefect", lambda settings: None)
    monkeypatch.chdir(tmp_path)


def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the entry point as the shell does; return the exit code and all that was written, in one line."""
    monkeypatch.setattr(sys, "argv", ["brainloom", *arguments])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        main()
    written = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else int(code is not None)), " ".join((written.out + written.err).split())


def test_every_verb_has_help() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    assert "not for clinical use" in done.output
    for verb in VERBS:
        assert re.search(rf"\b{verb} +\S", done.output), verb
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, brainloom.cli; "
        "heavy = {'torch', 'prefect', 'dask', 'monai', 'zarr', 'nilearn'}; "
        "print(*heavy.intersection(name.split('.')[0] for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize("how", ["version", "--version"])
def test_version(how: str) -> None:
    assert CliRunner().invoke(app, [how]).output.strip() == brainloom.__version__


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("verb", list(FLOWS))
class TestConfigs:
    """Every verb that takes a config says what is wrong with it."""

    def refused(self, verb: str, config: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
        code, text = shell(patch, capsys, verb, "--config", str(config))
        assert code == 2
        assert "Traceback" not in text
        return text.replace("│ ", "")

    def test_missing(self, verb: str, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
        text = self.refused(verb, tmp_path / "none.yaml", monkeypatch, capsys)
        assert "Invalid value for --config" in text
        assert "none.yaml is not a file" in text

    def test_not_yaml(self, verb: str, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text("sources: [")
        assert "bad.yaml is not YAML: while parsing" in self.refused(verb, tmp_path / "bad.yaml", monkeypatch, capsys)

    def test_not_text(self, verb: str, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_bytes(b"\x1f\x8b\xff\xfe")
        assert "bad.yaml is not YAML" in self.refused(verb, tmp_path / "bad.yaml", monkeypatch, capsys)

    def test_a_list(self, verb: str, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "list.yaml").write_text("- a\n- b\n")
        text = self.refused(verb, tmp_path / "list.yaml", monkeypatch, capsys)
        assert "list.yaml must hold parameters as `name: value` lines, found a list" in text

    def test_a_key_that_comes_twice(self, verb: str, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "twice.yaml").write_text("sources: [{kind: bids}]\nworkspace: w\nsources: []\n")
        text = self.refused(verb, tmp_path / "twice.yaml", monkeypatch, capsys)
        assert re.search("the key 'sources' comes twice.*line 3", text)

    def test_unknown_key(self, verb: str, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "typo.yaml").write_text("worksapce: here\n")
        text = self.refused(verb, tmp_path / "typo.yaml", monkeypatch, capsys)
        assert "worksapce: Extra inputs are not permitted" in text
        assert "(parameters: " in text


def test_an_unknown_preset_is_refused_and_the_known_ones_are_named(
    no_server: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = shell(monkeypatch, capsys, "demo", "--preset", "huge")
    assert code == 2
    assert "'huge' is not one of 'demo', 'tiny'" in text


@pytest.mark.usefixtures("no_server")
def test_a_good_config_reaches_the_flow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("catalog: c.parquet\nstore: s.zarr\nworkers: 3\n")
    asked: list[Any] = []

    class Info:
        ui_url = "http://127.0.0.1:1"

    monkeypatch.setattr("infra.server.connect", lambda settings: Info)
    monkeypatch.setattr(cli, "run_flow", lambda *given: asked.append(given) or {"digest": "abc"})
    code, text = shell(monkeypatch, capsys, "preprocess", "-c", "c.yaml", "--deployment", "preprocess/preprocess")
    assert code == 0
    assert '{ "digest": "abc" }' in text
    ((verb, params, deployment),) = asked
    assert (verb, params.workers, deployment) == ("preprocess", 3, "preprocess/preprocess")


SERVED = (*FLOWS, "demo", "up", "down", "deploy")
"""Verbs that talk to a server."""


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the command set what it sets; the session's environment comes back after the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return monkeypatch


@pytest.mark.parametrize("verb", SERVED)
def test_every_verb_that_talks_to_a_server_takes_its_address(
    verb: str, own_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = shell(own_environment, capsys, verb, "--api-url", "http://host:4200")
    assert code == 2
    assert "Invalid value for '--api-url'" in text
    assert "the API URL must look like http://host:4200/api, got 'http://host:4200'" in text.replace("│ ", "")
    assert "BRAINLOOM_API_URL" not in os.environ


def test_a_given_server_is_the_one_that_is_asked(
    own_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("catalog: c.parquet\nstore: s.zarr\n")
    own_environment.setattr(cli, "prepare_prefect", lambda settings: None)
    arguments = ("preprocess", "-c", str(tmp_path / "c.yaml"), "--api-url", "http://127.0.0.1:9/api")
    code, text = shell(own_environment, capsys, *arguments)
    assert code == 2
    assert "error: no Prefect server answers at http://127.0.0.1:9/api" in text
    assert os.environ["BRAINLOOM_API_URL"] == "http://127.0.0.1:9/api"


@pytest.mark.parametrize(
    "arguments",
    [
        ("info",),
        ("verify",),
        ("verify", "--deep"),
        ("show", "a/b"),
        ("export", "a/b"),
        ("compare", "b.zarr"),
        ("duplicates",),
        ("compact",),
        ("forget", "a/b", "--yes"),
        ("forget", "a/b", "--lift"),
    ],
)
def test_what_is_no_store_is_said_in_one_line(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    verb, *more = arguments
    code, text = shell(monkeypatch, capsys, "store", verb, str(tmp_path / "none.zarr"), *more)
    assert code in (1, 2)
    assert "Traceback" not in text
    assert "none.zarr" in text
    assert "no store" in text or "not a store" in text, text


@pytest.mark.parametrize("verb", ["info", "verify", "compact", "duplicates"])
def test_a_file_is_no_store(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "s.zarr").write_text("not a folder")
    code, text = shell(monkeypatch, capsys, "store", verb, str(tmp_path / "s.zarr"))
    assert code == 2
    assert "s.zarr is not a store: it has no zarr.json" in text


def test_a_store_never_finalised_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    create_or_open(str(tmp_path / "s.zarr"), SMALL)
    code, text = shell(monkeypatch, capsys, "store", "info", str(tmp_path / "s.zarr"))
    assert code == 2
    assert "error: " in text
    assert "was never finalised" in text


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("cli") / "blobs.zarr")
    write_blobs(url, cases=3)
    return url


def test_store_info(store: str) -> None:
    told = CliRunner().invoke(app, ["store", "info", store, "--json"]).output
    assert json.loads(told)["digest"] == store_digest(store)
    assert json.loads(told)["cases"] == {"blobs/stored": 3}
    shown = CliRunner().invoke(app, ["store", "info", store], env={"COLUMNS": "200"}).output
    assert store_digest(store) in shown
    assert re.search(r"blobs +│ stored +│ 3", shown)


def test_a_case_that_is_not_there_is_refused_with_an_example(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = shell(monkeypatch, capsys, "store", "show", store, "blobs/nobody")
    assert code == 2
    assert "no stored case 'blobs/nobody' in" in text
    assert "for example 'blobs/" in text


@pytest.mark.parametrize("debug", ["", "1"])
def test_our_errors_come_without_a_traceback_unless_asked(
    debug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class RefusedError(RuntimeError):
        __module__ = "models.store_layout"

    def refuse() -> None:
        raise RefusedError("[red] is not a colour here")

    monkeypatch.setattr(cli, "app", refuse)
    monkeypatch.setenv("BRAINLOOM_DEBUG", debug)
    if debug:
        with pytest.raises(RefusedError):
            main()
    else:
        assert shell(monkeypatch, capsys) == (2, "error: [red] is not a colour here")


@pytest.mark.parametrize("options", [[], ["--api-url", "http://127.0.0.1:9/api"]])
def test_a_wrong_setting_is_named_by_its_variable(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BRAINLOOM_API_URL", "")
    monkeypatch.setenv("BRAINLOOM_LOG", "xml")
    code, text = shell(monkeypatch, capsys, "doctor", *options)
    assert (code, text) == (2, "error: BRAINLOOM_LOG: Input should be 'text' or 'json'")


@pytest.mark.parametrize("state", ["/proc/nothing", "file/below"])
def test_a_state_folder_that_cannot_be_made_is_named_by_its_variable(
    state: str, own_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    own_environment.setenv("BRAINLOOM_STATE_DIR", str(tmp_path / state))
    own_environment.delenv("BRAINLOOM_API_URL", raising=False)
    code, text = shell(own_environment, capsys, "up", "--no-worker")
    assert code == 2
    assert text.startswith(f"error: BRAINLOOM_STATE_DIR: {tmp_path / state}")
    assert "can be neither made nor read: N" in text  # no such file, or not a folder


def test_a_workspace_that_cannot_be_made_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Params(BaseModel):
        workspace: str = "/proc/nothing/w"

    def start(*_: object, params: Params, **__: object) -> None:
        Path(params.workspace).mkdir(parents=True)

    monkeypatch.setattr("flows.start.start", start)
    with pytest.raises(ValueError, match=r"^workspace: /proc/nothing can be neither made nor read: No such file"):
        cli.run_flow("verify", Params())


def test_a_file_where_a_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    server, told = tmp_path / "state" / "server", r"^STATE: .*can be neither made nor read: Not a directory"
    with pytest.raises(ValueError, match=told), terminal.folder_of("STATE", server):
        (server / "server.pid").read_text()


def test_other_errors_of_files_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), terminal.folder_of("workspace", tmp_path / "w"):
        tmp_path.read_bytes()
    with pytest.raises(FileNotFoundError), terminal.folder_of("workspace", tmp_path / "w"):
        (tmp_path / "w" / "c.parquet").read_bytes()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda: [][1])
    with pytest.raises(IndexError):
        main()


def test_a_foreign_folder_is_found_by_doctor(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    code = "from infra.doctor import check_packages; print(*check_packages())"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=kept, capture_output=True, text=True, check=True
    )
    assert f"package `models` comes from {tmp_path}, not from " in done.stdout
    assert "set PYTHONSAFEPATH=1" in done.stdout


def test_the_terminal_drops_repeated_tracebacks_and_keeps_warnings() -> None:
    def shown(name: str, level: int, text: str = "text") -> bool:
        return terminal._is_news(logging.LogRecord(name, level, "", 0, text, None, None))

    assert not shown("prefect.flow_runs", logging.ERROR)
    assert not shown("distributed.nanny", logging.WARNING)
    assert shown("prefect.flow_runs", logging.WARNING)
    assert shown("prefect.task_runs", logging.ERROR)
    assert not shown(
        "prefect.task_runs.find scans", logging.ERROR, "Finished in state Failed('Task run encountered ...')"
    )
    assert shown("flows.batches", logging.WARNING)


@pytest.mark.parametrize(("error", "shown"), [(ValueError("no scan was found"), False), (KeyError("a bug"), True)])
def test_the_terminal_shows_the_traceback_of_a_task_only_for_a_bug(error: Exception, shown: bool) -> None:
    record = logging.LogRecord("prefect.task_runs", logging.ERROR, "", 0, "text", None, (type(error), error, None))
    assert terminal._is_news(record) is shown


def test_tables_are_folded_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(
        "## Title\n\n| row | mean Dice |\n| --- | --- |\n"
        "| ours \\| theirs [x] | 0.42 [0.31, 0.53] |\n| majority | 0.1 [no interval] |\n"
        "\n| row | mean HD95 (mm) |\n| --- | --- |\n| ours | 5.0 [4.0, 6.0] |\n"
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "Title"
    assert [word.split() for word in lines[3:6]] == [["ours", "|", "theirs", "0.42"], ["[x]", "[0.31,"], ["0.53]"]]
    assert lines[6].split() == ["majority", "0.1"]
    assert [line.split() for line in lines if "HD95" in line] == [["row", "mean", "HD95", "(mm)"]]
    with pytest.raises(ValueError, match="no Markdown table in: 'nothing'"):
        terminal.markdown_tables("nothing")


QUIET = """
import logging, os, sys
from brainloom.terminal import prepare_prefect
from infra.settings import Settings
prepare_prefect(Settings())
flow_run = logging.getLogger("prefect.flow_runs")
flow_run.handlers.clear()  # it would look for a server
flow_run.info("begun")
flow_run.error("failed")
logging.getLogger("flows.batches").warning("a worker died")
logging.getLogger("distributed.nanny").warning("slow")
print(os.environ["PREFECT_HOME"], os.environ.get("PREFECT_PROFILE"))
"""


def test_prefect_is_quiet_and_apart_from_the_callers(tmp_path: Path) -> None:
    callers = {"BRAINLOOM_STATE_DIR": str(tmp_path), "PREFECT_HOME": "/elsewhere", "PREFECT_PROFILE": "theirs"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", QUIET], env={**kept, **callers}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "server"), "None"]
    (line,) = done.stderr.splitlines()
    assert "WARNING" in line
    assert line.endswith("a worker died")
