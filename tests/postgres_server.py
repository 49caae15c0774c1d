"""A real PostgreSQL on loopback, from Debian's package `postgresql`."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
"""Debian keeps the server's programs off the path, a folder for each version."""


def program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs, empty when it is not installed."""
    return shutil.which(name, path=os.pathsep.join([*map(str, PLACES), os.environ.get("PATH", "")])) or ""


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
        address = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect"]
        self._run(program("createdb"), *address, "prefect", PGPASSWORD=self.password)

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

    def _run(self, *command: str, **environment: str) -> None:
        subprocess.run(
            command,
            env={**os.environ, **environment},
            user=self._user,
            cwd=self.folder,
            capture_output=True,
            check=True,
            timeout=120,
        )
