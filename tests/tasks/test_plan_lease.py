import json
import os
import subprocess
import sys

import psutil
import pytest

from infra import storage
from tasks import lease as leases
from tasks.lease import Lease, LeaseError, is_stale


@pytest.fixture
def url(tmp_path):
    return str(tmp_path / "s.zarr")


def read(url, number):
    return storage.read_json(storage.join(url, "_build", f"lease-{number}.json"))


def test_a_second_live_flow_is_refused_by_name(url):
    with Lease(url, "preprocess ixi") as first:
        with pytest.raises(LeaseError, match=rf"is being written by 'preprocess ixi' \(pid {os.getpid()} on "):
            Lease(url, "other").__enter__()
        first.check()
    with Lease(url, "other") as second:
        assert not second.took_over
        assert read(url, 2)["owner"] == "other"
        assert not storage.exists(storage.join(url, "_build", "lease-1.json"))


def test_an_exception_releases_the_lease(url):
    with pytest.raises(KeyboardInterrupt), Lease(url, "a"):
        raise KeyboardInterrupt
    assert read(url, 1)["released"]


def test_a_killed_holder_is_replaced_at_once(url):
    code = (
        "import os, signal, sys; from tasks.lease import Lease; Lease(sys.argv[1], 'killed').__enter__(); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, url], check=False)
    assert killed.returncode == -9
    with Lease(url, "next") as lease:
        assert lease.took_over


def test_a_killed_holder_that_nobody_has_reaped_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    held = {"host": leases.host_id(), "pid": child.pid, "started": process.create_time(), "renewed": 1000.0}
    assert not is_stale(held, now=1001.0)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the process table
    assert is_stale(held, now=1001.0)
    child.communicate()


def test_a_holder_on_another_host_is_stale_after_minutes_only():
    held = {"host": "elsewhere", "pid": 1, "started": 0.0, "renewed": 1000.0}
    assert not is_stale(held, now=1000.0 + leases.STALE_SECONDS - 1)
    assert is_stale(held, now=1000.0 + leases.STALE_SECONDS + 1)


def test_a_reused_pid_is_another_process():
    held = {"host": leases.host_id(), "pid": os.getpid(), "started": 1.0, "renewed": 1000.0}
    assert is_stale(held, now=1001.0)


def test_who_lost_the_lease_publishes_nothing(url):
    with Lease(url, "slow") as lease:
        body = {"owner": "fast", "token": "x", "released": False}
        storage.write_bytes(storage.join(url, "_build", "lease-2.json"), json.dumps(body).encode())
        with pytest.raises(LeaseError, match="lease 2 replaced ours"):
            lease.check()
    assert read(url, 2)["owner"] == "fast"
    assert not read(url, 1)["released"]


def test_renewal_moves_the_time(url, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    with Lease(url, "a"):
        before = read(url, 1)["renewed"]
        for _ in range(2000):
            if read(url, 1)["renewed"] > before:
                break
        assert read(url, 1)["renewed"] > before


def test_the_same_moment(url, monkeypatch):
    # Another flow creates the next number between our look and our creation.
    with Lease(url, "old"):
        pass
    real = storage.create_exclusive

    def beaten(target, data):
        storage.write_bytes(target, json.dumps({"owner": "faster", "token": "x"}).encode())
        return real(target, data)

    monkeypatch.setattr(storage, "create_exclusive", beaten)
    with pytest.raises(LeaseError, match="is being written by 'faster'"):
        Lease(url, "slower").__enter__()
