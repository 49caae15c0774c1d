import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra import storage
from tasks import lease as leases
from tasks.lease import Lease, LeaseError, is_dead


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


def held_by(pid, host=None):
    """Return the body of a lease that a process of this host, or one elsewhere, holds."""
    return {"host": host or leases.host_id(), "pid": pid, "started": leases._started(pid), "owner": "other"}


def test_a_killed_holder_that_nobody_has_reaped_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    held = held_by(child.pid)
    assert not is_dead(held, 0)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the process table
    assert is_dead(held, 0)
    child.communicate()
    assert is_dead(held, 0)


def test_a_holder_on_another_host_is_dead_after_minutes_only():
    held = held_by(1, host="elsewhere")
    assert not is_dead(held, leases.STALE_SECONDS - 1)
    assert is_dead(held, leases.STALE_SECONDS + 1)


def test_a_process_that_slept_on_this_host_still_holds_its_lease():
    assert not is_dead(held_by(os.getpid()), 10 * leases.STALE_SECONDS)


def test_a_reused_pid_is_another_process():
    assert is_dead({**held_by(os.getpid()), "started": leases._started(os.getpid()) + "1"}, 0)


HOURS = 3 * 3600


@pytest.mark.parametrize("skew", [-HOURS, HOURS])
def test_clocks_that_are_hours_off_decide_nothing(root_url, monkeypatch, skew):
    """The holder's clock and ours may be wrong: only the storage's own times count."""
    monkeypatch.setattr(time, "time", lambda: 1e9 + skew)
    url, body = f"{root_url}/s.zarr", {**held_by(1, host="elsewhere"), "renewed": 1e9 + skew, "released": False}
    target = storage.join(url, "_build", "lease-1.json")
    storage.write_bytes(target, json.dumps(body).encode())
    with pytest.raises(LeaseError, match=r"is being written by 'other' \(pid 1 on elsewhere, renewed [0-5] s ago\)"):
        Lease(url, "ours").__enter__()
    assert storage.listdir(storage.join(url, "_build")) == ["lease-1.json"]
    monkeypatch.setattr(leases, "STALE_SECONDS", -1)  # as if minutes had passed for the storage
    with Lease(url, "ours") as lease:
        assert lease.took_over


def test_a_lease_that_was_not_written_for_minutes_is_taken_over(url):
    target = storage.join(url, "_build", "lease-1.json")
    storage.write_bytes(target, json.dumps({**held_by(1, host="elsewhere"), "released": False}).encode())
    past = Path(target).stat().st_mtime - leases.STALE_SECONDS - 1
    os.utime(target, (past, past))
    with Lease(url, "ours") as lease:
        assert lease.took_over


def test_who_lost_the_lease_publishes_nothing(url):
    with Lease(url, "slow") as lease:
        body = {"owner": "fast", "token": "x", "released": False}
        storage.write_bytes(storage.join(url, "_build", "lease-2.json"), json.dumps(body).encode())
        with pytest.raises(LeaseError, match="lease 2 replaced ours"):
            lease.check()
    assert read(url, 2)["owner"] == "fast"
    assert not read(url, 1)["released"]


def test_renewal_writes_the_lease_again(url, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    target = Path(url, "_build", "lease-1.json")
    with Lease(url, "a"):
        before, deadline = target.stat().st_ino, time.monotonic() + 60
        while target.stat().st_ino == before:
            assert time.monotonic() < deadline, "it was not renewed"


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


RACER = """
import sys
from tasks.lease import Lease, LeaseError
sys.stdin.readline()  # all start together
try:
    with Lease(sys.argv[1], sys.argv[2]):
        print("won", flush=True)
        sys.stdin.readline()
except LeaseError as error:
    print("refused:", error, flush=True)
"""


def race_for(url, racers):
    """Start processes that want the lease at the same moment; return what each says while the winner holds it."""
    children = [
        subprocess.Popen([sys.executable, "-c", RACER, url, f"flow {n}"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for n in range(racers)
    ]  # fmt: skip
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    answers = [child.stdout.readline() for child in children]
    for child in children:
        child.communicate("\n")
    return answers


def check_race(url):
    answers = race_for(url, 4)
    assert sum(answer == "won\n" for answer in answers) <= 1
    assert all(answer.startswith(("won", "refused: ")) for answer in answers)
    # When two collide both may step back; whoever comes alone always wins.
    assert race_for(url, 1) == ["won\n"]


def test_of_flows_that_start_at_the_same_moment_at_most_one_writes(url):
    check_race(url)


@pytest.mark.full
def test_of_flows_that_start_at_the_same_moment_at_most_one_writes_on_s3(s3_url):
    check_race(storage.join(s3_url, "s.zarr"))
