"""SLURM's job script: checked by bash and by its content, and run with stand-ins for SLURM's programs."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from infra.settings import Settings
from tasks import launch_slurm as module
from tasks.launch import TrainingFailed
from tasks.launch_slurm import launch_slurm, slurm_script

PROGRAMS = {
    # As sbatch --wait: says the job's number, runs the script, and ends with its exit code.
    "sbatch": "for last; do :; done\necho 1234\n"
    'export SLURM_JOB_ID=1234 SLURM_JOB_NODELIST="node[0-1]"\n'
    'exec bash "$last" >> "$TRAIN_LOG" 2>&1\n',
    "scontrol": 'if [ "$1" = show ]; then echo node0; echo node1; else echo "$@" >> "$CALLS"; fi\n',
    # The option of srun is dropped; what it runs says its number to scancel.
    "srun": 'shift\necho $$ > "$STEP"\nexec "$@"\n',
    "scancel": 'echo "scancel $*" >> "$CALLS"\n[ "$1" != --signal=TERM ] || kill -TERM "$(cat "$STEP")"\n',
    "squeue": "echo PENDING\n",
}
RANKS = 'echo "$@"\necho key=${AWS_SECRET_ACCESS_KEY:-none} file=${BRAINLOOM_S3_SECRET_KEY_FILE:-none}\n'


def slurm(**values: object) -> Settings:
    return Settings.model_validate({"launch": "slurm", "slurm_time": "02:00:00", **values})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a training's folder; stand-ins for SLURM's programs are on the path."""
    programs, training = tmp_path / "bin", tmp_path / "a"
    programs.mkdir()
    training.mkdir()
    (training / "run.json").write_text(json.dumps({"threads": 2}))
    for name, body in PROGRAMS.items():
        program(programs / name, body)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, path in {
        "TRAIN_LOG": training / "train.log",
        "CALLS": tmp_path / "calls",
        "STEP": tmp_path / "s",
    }.items():
        monkeypatch.setenv(name, str(path))
    return training


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_script_asks_for_nodes_time_and_a_signal_and_meets_on_the_first_node(tmp_path: Path) -> None:
    settings = slurm(
        nodes=2,
        node_gpus=4,
        slurm_partition="gpu",
        slurm_account="brain",
        slurm_options=["--constraint=a100"],
        slurm_setup=["module load cuda"],
        slurm_signal_s=240,
    )
    script = slurm_script([tmp_path / "a", tmp_path / "b"], 8, 3, settings)
    directives = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    assert directives == [
        "job-name=brainloom-a",
        "nodes=2",
        "ntasks-per-node=1",
        "cpus-per-task=12",
        "gpus-per-node=4",
        "time=02:00:00",
        "partition=gpu",
        "account=brain",
        "signal=B:USR1@240",
        f"output={tmp_path}/a/train.log",
        "open-mode=append",
        f"chdir={tmp_path}/a",
        "export=NONE",
        "requeue",
        "constraint=a100",
    ]
    assert script.index("#SBATCH --constraint") < script.index("set -u") < script.index("module load cuda")
    assert "-m torch.distributed.run --nnodes 2 --nproc-per-node 4" in script
    assert '--rdzv-backend c10d --rdzv-endpoint "$endpoint"' in script
    assert f"-m models.train --config {tmp_path}/a/run.json --config {tmp_path}/b/run.json" in script
    assert "export PYTHONSAFEPATH=1" in script
    assert "export OMP_NUM_THREADS=3" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_script_has_no_secret_but_the_names_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("planted-secret")
    monkeypatch.setenv("BRAINLOOM_S3_ACCESS_KEY", "planted-key")
    monkeypatch.setenv("BRAINLOOM_S3_SECRET_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("AWS_SESSION_TOKEN", "planted-token")
    script = slurm_script([tmp_path / "a"], 1, 1, slurm(s3_endpoint="http://s3:8333"))
    assert f"export BRAINLOOM_S3_SECRET_KEY_FILE={tmp_path}/key" in script
    assert "export AWS_ENDPOINT_URL=http://s3:8333" in script
    assert "planted" not in script


@pytest.mark.parametrize(
    ("values", "ranks", "name", "text"),
    [
        ({"nodes": 2}, 3, "a", "3 ranks cannot be dealt to 2 nodes"),
        ({"node_gpus": 2}, 4, "a", "4 ranks on a node need as many GPUs, BRAINLOOM_NODE_GPUS is 2; raise it"),
        ({}, 1, "a b%j", "SLURM cannot log into .*a b%j: use letters, digits"),
    ],
)
def test_what_slurm_cannot_do_is_refused(
    values: dict[str, int], ranks: int, name: str, text: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=text):
        slurm_script([tmp_path / name], ranks, 1, slurm(**values))


def test_a_job_is_followed_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = '{"kind": "train", "step": 1}'
    ranks = program(folder.parent / "python", f"{RANKS}echo '{metrics}' > metrics.jsonl\n")
    monkeypatch.setattr(module.sys, "executable", str(ranks))
    monkeypatch.setattr(module, "run_tied", _run)
    monkeypatch.chdir(folder)
    seen: list[dict[str, object]] = []
    launch_slurm([folder], 2, seen.append, settings=slurm(nodes=2))
    assert [line["step"] for line in seen] == [1]
    log = (folder / "train.log").read_text()
    assert "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint node0:29634 --rdzv-id 1234-0" in log
    assert f"-m models.train --config {folder}/run.json" in log


def _run(command: list[str], **options: object) -> int:
    """As run_tied, whose own Python is a stand-in in these tests."""
    with Path(str(options["log_file"])).open("ab") as log:
        return subprocess.run(command, stdout=log, check=False).returncode


def test_a_job_that_fails_is_submitted_again_and_then_says_its_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sys, "executable", str(program(folder.parent / "python", "echo lost; exit 7\n")))
    monkeypatch.setattr(module, "run_tied", _run)
    with pytest.raises(TrainingFailed, match=r"training failed \(a\): exit code 7\. .*\n.*lost\nlost"):
        launch_slurm([folder], 1, settings=slurm(), restarts=1)
    (folder.parent / "python").write_text(
        '#!/bin/bash\necho \'{"type": "ValueError", "message": "no"}\' > failure.json; exit 1\n'
    )
    monkeypatch.chdir(folder)
    with pytest.raises(TrainingFailed, match=r"training failed \(a\): a: ValueError: no"):
        launch_slurm([folder], 1, settings=slurm(), restarts=1)


def test_an_interrupted_launch_cancels_its_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], **options: object) -> int:
        Path(str(options["log_file"])).write_text("1234\n")
        assert options["poll"]() is True  # type: ignore[operator]  # it waits in the queue
        assert options["poll"]() is False  # type: ignore[operator]  # asked a moment ago
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_tied", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch_slurm([folder], 1, settings=slurm())
    assert (folder.parent / "calls").read_text() == "scancel 1234\n"


def test_before_the_time_limit_the_ranks_stop_and_the_job_queues_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM sends USR1 to the script; here the stand-in of the ranks asks for it once it is ready."""
    body = "trap 'echo checkpoint; exit 1' TERM\nkill -USR1 $PPID\nwhile :; do read -t 0.1 <> <(:); done\n"
    monkeypatch.setattr(module.sys, "executable", str(program(folder.parent / "python", body)))
    script = folder / "train.sbatch"
    script.write_text(slurm_script([folder], 1, 1, slurm()))
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (folder / "train.log").read_text().split("\n")[-2] == "checkpoint"
    assert (folder.parent / "calls").read_text().splitlines() == ["scancel --signal=TERM 1234", "requeue 1234"]
