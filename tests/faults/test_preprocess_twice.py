"""Two flows on one store at the same time: the second is refused and told who writes, the first is not disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from nifti_files import SMALL, write_dataset
from store_builds import catalog_of

from infra.server import ServerInfo
from models.store import store_digest
from tasks.verify import verify

GATE = """
from tasks import prepare
# Dask imports a preload for the nanny and for the worker.
real = getattr(prepare.read_scan, "real", prepare.read_scan)
def read_scan(file, spec, memory_bytes):
    if "/s0_t1" in file.path:
        open({gate!r}).read()  # a pipe: until the test has opened and closed it
    return real(file, spec, memory_bytes)
read_scan.real = real
prepare.read_scan = read_scan
"""
GATED = (
    "import sys; from infra import clusters; clusters.DASK_CONFIG['distributed.worker.preload'] = [sys.argv.pop(1)]; "
    "from brainloom.cli import main; main()"
)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_second_of_two_flows_is_refused(tmp_path: Path, prefect_server: ServerInfo) -> None:
    gate, url, config = tmp_path / "gate", str(tmp_path / "s.zarr"), tmp_path / "preprocess.yaml"
    os.mkfifo(gate)
    (tmp_path / "gate.py").write_text(GATE.format(gate=str(gate)))
    catalog = catalog_of(tmp_path / "ws", write_dataset(tmp_path / "src", 3))
    own = SMALL.model_dump(mode="json")
    config.write_text(yaml.safe_dump({"catalog": catalog, "store": url, "own_spec": own, "workers": 1}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"BRAINLOOM_API_URL": prefect_server.api_url, "BRAINLOOM_STATE_DIR": str(tmp_path / "state")}
    arguments = ["preprocess", "--config", str(config)]
    first = subprocess.Popen(
        [sys.executable, "-c", GATED, str(tmp_path / "gate.py"), *arguments],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with gate.open("w"):  # opens when a worker of the first flow is in the middle of its first case
        command = [str(Path(sys.executable).with_name("brainloom")), *arguments]
        second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    told, _ = first.communicate(timeout=120)
    assert second.returncode == 2
    assert (
        f"s.zarr is being written by 'preprocess toy into s.zarr ({os.uname().nodename}, pid {first.pid})'"
        in second.stderr
    )
    assert "wait for it, cancel it, or start again" in second.stderr
    assert "Traceback" not in second.stderr
    assert "Finished in state" not in second.stderr
    assert first.returncode == 0
    result = json.loads(told)
    assert (result["stored"], result["digest"]) == (3, store_digest(url))
    assert verify(url, deep=True) == []
