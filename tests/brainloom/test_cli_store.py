"""`brainloom store ...`: what the verbs print, write, and return to the shell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from nifti_files import write_case
from store_builds import ingest, scans_of, shard_of, three_subjects
from typer.main import get_command
from typer.testing import CliRunner

from brainloom.cli import app
from brainloom.cli_forget import _listed
from brainloom.cli_store import store_app
from infra import storage
from infra.settings import Settings
from models.store import open_store, store_digest


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = str(tmp_path / "s.zarr")
    ingest(url, three_subjects(tmp_path))
    return url


def run(*arguments: str, answer: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, ["store", *arguments], input=answer, env={"COLUMNS": "300"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return 2, str(done.exception)
    return done.exit_code, done.output


def test_verify_and_its_exit_code(url: str) -> None:
    assert run("verify", url) == (0, f"{url}: no problem found (tables and metadata only)\n")
    assert run("verify", url, "--deep") == (0, f"{url}: no problem found (every voxel read)\n")
    shard = shard_of(url, 1)
    storage.write_bytes(shard, storage.read_bytes(shard)[:50])
    code, text = run("verify", url, "--deep")
    assert code == 1
    assert text.startswith("toy/b (row 1): cannot be decoded: ")
    assert text.endswith("\n1 problems; `brainloom preprocess` with repair: true mends those of stored cases\n")
    code, text = run("verify", url, "--deep", "--json")
    assert code == 1
    assert [p[:16] for p in json.loads(text)["problems"]] == ["toy/b (row 1): c"]


def test_show_writes_the_mosaic(url: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "b.png"
    assert run("show", url, "toy/b", "--out", str(out)) == (0, f"{out}\n")
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["b.jpg", "b", "b.png.gz"])
def test_show_writes_nothing_but_png(url: str, tmp_path: Path, name: str) -> None:
    code, text = run("show", url, "toy/b", "-o", str(tmp_path / name))
    assert code == 2
    assert f"{name}: the mosaic is a PNG; give a name that ends in .png" in text
    assert not (tmp_path / name).exists()


def test_a_case_that_is_not_stored_says_why(tmp_path: Path) -> None:
    url = str(tmp_path / "s.zarr")
    scans = three_subjects(tmp_path)
    broken = Path(scans[0].path)
    broken.write_bytes(broken.read_bytes()[:-20])
    ingest(url, [scan.replace(size_bytes=0) if scan.path == str(broken) else scan for scan in scans])
    assert run("forget", url, "toy/b", "--yes")[0] == 0
    for verb, out in (("show", "a.png"), ("export", "out")):
        code, text = run(verb, url, "toy/a", "-o", str(tmp_path / out))
        assert code == 2
        assert re.search(r"toy/a of .* is quarantined: unreadable \(a_t1\.nii\.gz: .*\); repair its files", text), text
        code, text = run(verb, url, "toy/b", "-o", str(tmp_path / out))
        assert code == 2
        assert re.search(r"toy/b of .* is forgotten: its subject was erased; `store forget --lift`", text), text
        assert "no stored case 'toy/x' in" in run(verb, url, "toy/x", "-o", str(tmp_path / out))[1]
        assert not (tmp_path / out).exists()


def test_qc_writes_the_report(url: str, tmp_path: Path) -> None:
    code, text = run("qc", url, "--out", str(tmp_path / "qc"), "--mosaics", "1")
    assert (code, text) == (0, f"{tmp_path}/qc/s-qc.html\n{tmp_path}/qc/s-qc.csv\n0 of 3 cases stand out\n")
    assert (tmp_path / "qc" / "s-qc.html").read_text().count("<img ") == 1


def test_export(url: str, tmp_path: Path) -> None:
    code, text = run("export", url, "toy/a", "toy/b", "-o", str(tmp_path / "out"), "--native", "--modality", "t1")
    assert code == 0
    assert text.split() == [str(tmp_path / "out" / f"toy_{case}_t1.nii.gz") for case in "ab"]
    assert run("export", url, "toy/a", "-o", str(tmp_path / "out"))[1].endswith("or pass --overwrite")
    code, text = run("export", url, "toy/a", "-o", str(tmp_path / "out"), "--modality", "label")
    assert (code, text) == (0, f"{tmp_path}/out/toy_a_label.nii.gz\n")


def test_compare_and_its_exit_code(url: str, tmp_path: Path) -> None:
    other = str(tmp_path / "o.zarr")
    ingest(other, three_subjects(tmp_path)[:3])
    assert run("compare", url, url) == (0, "3 cases are the same; the stores are equal\n")
    code, text = run("compare", url, other)
    assert code == 1
    assert "cases only in A (2): toy/b, toy/c" in text
    code, text = run("compare", url, other, "--json", "--voxels")
    assert (code, json.loads(text)["cases_only_a"]) == (1, ["toy/b", "toy/c"])


def test_duplicates(url: str) -> None:
    few = "not compared: 3 subjects with t1; at least 12 are needed\n"
    assert run("duplicates", url) == (0, f"{url}: 0 pairs of subjects look alike\n{few}")
    assert run("duplicates", url, "--threshold", "0.3", "--json") == (0, "[]\n")


def test_compact(url: str) -> None:
    code, text = run("compact", url)
    assert code == 0
    assert text == f"{url}: 0 retired rows dropped, 0.0 MB freed; digest {store_digest(url)}\n"


def test_forget_asks_first_and_says_what_it_does_not_reach(url: str) -> None:
    code, text = run("forget", url, "toy/b", answer="n\n")
    assert code == 1
    assert "Erase toy/b from" in text
    assert len(open_store(url).dataset("toy").rows) == 3
    code, text = run("forget", url, "toy/b", "--yes")
    assert code == 0
    assert re.search(r"toy/b is forgotten \(rows 1\); digest [0-9a-f]{64}", text)
    assert "Weights cannot unlearn: trainings that saw it keep theirs and refuse to resume" in text
    assert "Prefect: no server runs here and none was named (--api-url)" in text
    assert "- source files elsewhere, checkpoints, backups" in text
    assert "- events of a Prefect server, whole pages among them: our own drops them after seven days" in text
    assert "- staged copies in any folder: name it with --stage-dir" in text
    assert "- any workspace: name it with --workspace" in text
    assert open_store(url).dataset("toy").rows == [0, 2]
    assert run("forget", url, "toy/b", "--lift") == (0, f"{url}: the next ingest may bring toy/b back\n")
    assert run("forget", url, "toy/b", "--lift")[1].endswith("subject 'b' of 'toy' was never forgotten")
    assert "name the subject as DATASET/SUBJECT" in run("forget", url, "b", "-y")[1]


def test_forget_takes_the_subject_out_of_the_logs_of_server_and_worker(tmp_path: Path) -> None:
    url = str(tmp_path / "s.zarr")
    ingest(url, scans_of(write_case(tmp_path, "sub-77", 0), "sub-77"))
    folder = Settings().server_dir
    folder.mkdir(parents=True, exist_ok=True)
    mine, others = "12:00 | case sub-77_ses-1 is damaged", "12:00 | case sub-777 is damaged"
    logs = [folder / "worker.log", folder / "worker.log.1", folder / "server.log"]
    for log, lines in zip(logs, ([mine, others], [others, mine], [others]), strict=True):
        log.write_text("\n".join(lines) + "\n")
    with logs[0].open("a") as worker:
        _, text = run("forget", url, "toy/sub-77", "--dry-run")
        assert f"lines of it would be erased from {logs[0]}" in text
        assert mine in logs[0].read_text()
        code, text = run("forget", url, "toy/sub-77", "--yes")
        worker.write("the worker goes on\n")
    assert code == 0
    assert [f"lines of it erased from {log}" in text for log in logs] == [True, True, False]
    assert [log.read_text() for log in logs] == [f"{others}\nthe worker goes on\n", *[f"{others}\n"] * 2]


def test_forget_names_what_else_holds_the_subject(url: str, tmp_path: Path) -> None:
    stage, notes = tmp_path / "stage", Path(url).parent / "splits" / "notes.md"
    stage.mkdir()
    notes.parent.mkdir()
    notes.write_text("toy: b was scanned twice")
    code, text = run("forget", url, "toy/b", "--yes", "--stage-dir", str(tmp_path / "none"))
    assert code == 2
    assert "none is not a folder; nothing was erased" in text
    assert "--stage-dir" in text
    code, text = run("forget", url, "toy/b", "--workspace", str(tmp_path / "none"))
    assert code == 2
    assert "Invalid value for --workspace" in text
    assert "Erase" not in text, "folders are looked at before the question"
    assert len(open_store(url).dataset("toy").rows) == 3
    code, text = run("forget", url, "toy/b", "--yes", "--stage-dir", str(stage))
    assert code == 0
    assert f"{stage}: 0 staged copies erased" in text
    assert f"{notes.parent.parent}: 0 files hold it, 0 trainings saw it" in text
    assert "ids of fewer than 4 characters were looked for in columns only" in text
    assert "- staged copies in other folders" in text
    assert "- other workspaces" in text


def test_a_dry_run_of_forget_says_what_would_go_and_changes_nothing(url: str) -> None:
    ws = Path(url).parent
    (ws / "splits").mkdir()
    crosswalk = ws / "crosswalks" / "ids.csv"
    crosswalk.parent.mkdir()
    crosswalk.write_text("person,dataset,subject\np1,toy,b\np1,other,x\n")
    before = {path: path.read_bytes() for path in ws.rglob("*") if path.is_file()}
    code, text = run("forget", url, "toy/b", "--dry-run")
    assert code == 0
    assert f"{url}: rows 1 would be erased" in text
    assert f"  its lines are erased in {crosswalk}" in text
    assert text.endswith("Dry run: nothing was changed\n")
    assert {path: path.read_bytes() for path in ws.rglob("*") if path.is_file()} == before
    run("forget", url, "toy/b", "--yes")
    assert crosswalk.read_text() == "person,dataset,subject\np1,other,x\n"


def test_forget_lists_twenty_of_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    _listed("names it:", [f"file-{n}" for n in range(23)])
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("  names it: file-0", "  names it: ... and 3 more", 21)


def test_the_page_names_every_command_and_option() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `brainloom store ")]
    commands = {name: command.params for name, command in get_command(store_app).commands.items()}
    for name, params in commands.items():
        told = " ".join(line for line in lines if line.startswith(f"| `brainloom store {name} "))
        assert told, f"docs/store.md: no line of `store {name}` in the table of commands"
        for option in (param for param in params if param.param_type_name == "option" and param.name != "as_json"):
            assert {*option.opts} & set(re.split(r"[\s\[\]`|]+", told)), (
                f"docs/store.md: `store {name}` lacks {option.opts}"
            )
