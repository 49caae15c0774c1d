"""Dask on SLURM and Kubernetes: the job script and the specification that their packages make. Neither is run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.clusters import DASK_CONFIG, cluster_options, describe_cluster
from infra.remote_clusters import NANNY_BYTES, ExtraMissingError, dask_environment, worker_variables
from infra.settings import Settings

needs_slurm = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="needs the extra slurm (dask-jobqueue)"
)
needs_kubernetes = pytest.mark.skipif(
    importlib.util.find_spec("dask_kubernetes") is None, reason="needs the extra kubernetes (dask-kubernetes)"
)
KEYS = {"s3_endpoint": "http://s3:8333", "s3_access_key": "planted-key", "s3_secret_key": "planted-secret"}


def slurm(state_dir: Path) -> Settings:
    return Settings(
        state_dir=state_dir,
        cluster="slurm",
        workers=3,
        worker_memory="4GiB",
        slurm_time="1-02:00:00",
        slurm_partition="cpu",
        slurm_account="brain",
        slurm_options=["--constraint=skylake"],
        slurm_setup=["source /shared/venv/bin/activate"],
        slurm_interface="lo",
        **KEYS,
    )


def kubernetes(state_dir: Path) -> Settings:
    return Settings(
        state_dir=state_dir,
        cluster="kubernetes",
        workers=3,
        worker_memory="4GiB",
        kubernetes_image="registry/brainloom-cpu:0.1.0",
        kubernetes_secret="keys",
        kubernetes_claim="work",
        api_auth="user:planted-auth",
        **KEYS,
    )


@pytest.mark.parametrize(("kind", "module"), [("slurm", "dask_jobqueue"), ("kubernetes", "dask_kubernetes.operator")])
def test_without_its_extra_a_cluster_names_it(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    settings = {"slurm": slurm, "kubernetes": kubernetes}[kind](tmp_path)
    assert describe_cluster(settings) == f"{kind} cluster, 3 workers with 1 thread and 4.0 GiB each"
    with pytest.raises(ExtraMissingError, match=rf"needs the extra '{kind}' \(pip install 'brainloom\[{kind}\]'\)"):
        cluster_options(settings)


def test_the_configuration_of_dask_as_variables_is_read_back_by_dask() -> None:
    from dask.config import collect_env, get

    found = collect_env(dask_environment(DASK_CONFIG))
    for key, value in DASK_CONFIG.items():
        if ".pre-spawn-environ." not in key:
            assert get(key, config=found) == value
    assert dask_environment(DASK_CONFIG)["MALLOC_TRIM_THRESHOLD_"] == str(1 << 30)


def test_workers_elsewhere_get_no_secret_from_us(tmp_path: Path) -> None:
    variables = worker_variables(slurm(tmp_path), DASK_CONFIG)
    assert variables["AWS_ENDPOINT_URL"] == "http://s3:8333"
    assert variables["PYTHONSAFEPATH"] == "1"
    assert "planted" not in json.dumps(variables)


@needs_slurm
def test_the_job_script_of_slurm(tmp_path: Path) -> None:
    from dask_jobqueue import SLURMCluster

    options = cluster_options(slurm(tmp_path))
    assert json.loads(json.dumps(options)) == options
    assert options["cluster_kwargs"]["n_workers"] == 3
    with SLURMCluster(**{**options["cluster_kwargs"], "n_workers": 0}) as cluster:
        script = cluster.job_script()
        assert cluster.scheduler_address.startswith("tls://")
    for line in ("-t 1-02:00:00", "-p cpu", "-A brain", "--mem=4G"):
        assert f"#SBATCH {line}" in script
    assert "#SBATCH --constraint=skylake" in script
    assert script.index("source /shared/venv/bin/activate") < script.index("distributed.cli.dask_worker tls://")
    assert "--nthreads 1 --memory-limit 4.00GiB" in script
    assert "export DASK_DISTRIBUTED__WORKER__PRELOAD=" in script
    assert f"--tls-ca-file {tmp_path}/dask/" in script
    assert "planted" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@needs_kubernetes
def test_the_specification_for_kubernetes(tmp_path: Path) -> None:
    settings = kubernetes(tmp_path)
    options = cluster_options(settings)
    assert json.loads(json.dumps(options)) == options
    spec = options["cluster_kwargs"]["custom_cluster_spec"]
    assert (spec["apiVersion"], spec["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    assert spec["spec"]["worker"]["replicas"] == 3
    worker, scheduler = (spec["spec"][part]["spec"] for part in ("worker", "scheduler"))
    container = worker["containers"][0]
    assert container["args"][:6] == ["dask", "worker", "--nthreads", "1", "--memory-limit", str(4 * 2**30)]
    assert scheduler["containers"][0]["args"][:2] == ["dask", "scheduler"]
    assert container["resources"]["limits"] == {"memory": str(4 * 2**30 + NANNY_BYTES)}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert container["volumeMounts"] == [{"name": "work", "mountPath": str(tmp_path)}]
    assert worker["volumes"] == [{"name": "work", "persistentVolumeClaim": {"claimName": "work"}}]
    for pod in (worker, scheduler):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod["containers"][0]["image"] == "registry/brainloom-cpu:0.1.0"
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["BRAINLOOM_STATE_DIR"] == str(tmp_path)
    assert "planted" not in json.dumps(spec)
    another = cluster_options(settings)["cluster_kwargs"]["custom_cluster_spec"]["metadata"]["name"]
    assert another != spec["metadata"]["name"]
