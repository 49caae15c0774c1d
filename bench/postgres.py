"""A real PostgreSQL on loopback, from Debian's package `postgresql`; the tests use it, too."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import psutil

PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
"""Debian keeps the server's programs off the path, a folder for each version."""


def program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs, empty when it is not installed."""
    return shutil.which(name, path=os.pathsep.join([*map(str, PLACES), os.environ.get("PATH", "")])) or ""


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    """Return the processor seconds of processes so far; those that have ended meanwhile count nothing."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class PostgresServer:
    """A database `prefect` of a user `prefect` with a password; what it holds is deleted by `stop`."""

    def __init__(self, port: int, password: str) -> None:
        self.port, self.password = port, password
        # Not below pytest's folders, which root alone may enter: PostgreSQL refuses to run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="brainloom-postgres-"))
        self._user = "nobody" if os.getuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make the database and start the server; raises CalledProcessError when it does not come up."""
        secret = self.folder / "password"
        secret.write_text(self.password)
        if self._user:
            owner = pwd.getpwnam(self._user)
            for path in (self.folder, secret):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        made = ["-D", str(self.folder / "data"), "-U", "prefect", f"--pwfile={secret}", "--auth=scram-sha-256"]
        self._run(program("initdb"), *made)
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(self.folder)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program("postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), *options],
                stdout=log,
                stderr=log,
                user=self._user,
            )

    def make_database(self) -> None:
        """Make the database once the server answers, as the image of PostgreSQL does."""
        self._run(program("createdb"), *self._address, "prefect", PGPASSWORD=self.password)

    @property
    def url(self) -> str:
        """What BRAINLOOM_DATABASE_URL wants; the password is quoted."""
        return f"postgresql+asyncpg://prefect:{quote(self.password, safe='')}@127.0.0.1:{self.port}/prefect"

    def wait(self, seconds: float = 120.0) -> None:
        """Wait until the server takes connections; raises RuntimeError with the end of its log when it does not."""
        deadline = time.monotonic() + seconds
        while subprocess.run([program("pg_isready"), "-q", *self._address], check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not answer after {seconds:g} s:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def query(self, sql: str) -> str:
        """Return the answer to a statement as plain text."""
        return self._run(program("psql"), *self._address, "-tAc", sql, "prefect", PGPASSWORD=self.password).strip()

    @property
    def processor_s(self) -> float:
        """Processor seconds of the server and its connections so far; of those that ended, too."""
        if self._process is None:
            return 0.0
        parent = psutil.Process(self._process.pid)
        ended = parent.cpu_times()
        return processor_seconds([parent, *parent.children()]) + ended.children_user + ended.children_system

    def stop(self) -> None:
        """End the server and delete its folder."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.folder / "postgres.log"

    @property
    def _address(self) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect"]

    def _run(self, *command: str, **environment: str) -> str:
        return subprocess.run(
            command,
            env={**os.environ, **environment},
            user=self._user,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
