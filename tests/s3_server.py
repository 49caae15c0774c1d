"""A real S3 server (SeaweedFS) on loopback that may be killed and started again, and a proxy that disturbs it."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

BUCKET = "brainloom"
START_TIMEOUT_S = 60.0


class S3Server:
    """SeaweedFS with one bucket; what is written survives `kill` and `start`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        key, secret = secrets.token_hex(8), secrets.token_hex(16)
        identity = {"name": "tests", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.environment = {
            "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3']}",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it takes data; raises RuntimeError with the end of its log."""
        command = [Path(sys.executable).with_name("weed"), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}.port={port}" for name, port in self.ports.items()]
        command += [f"-{name}.port.grpc={port + 10000}" for name, port in self.ports.items()]
        command += [f"-dir={self.folder}", "-s3", f"-s3.config={self.folder / 's3.json'}"]
        command += ["-master.telemetry=false", "-volume.max=20", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"SeaweedFS did not come up; its log ends with:\n{tail}")
            time.sleep(0.2)

    def kill(self) -> None:
        """End the server with SIGKILL: an orderly end takes 15 s, and a disturbance is not orderly."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.folder / "weed.log"

    def _answers(self) -> bool:
        """Say whether the bucket is there and takes an object; a bucket exists before the volume server is ready."""
        config = Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
        client = get_session().create_client(
            "s3",
            endpoint_url=self.environment["FSSPEC_S3_ENDPOINT_URL"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            config=config,
        )
        try:
            if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
        except (ClientError, BotoCoreError):
            return False
        return True


class Answer(NamedTuple):
    """What the proxy does with a request instead of passing it on."""

    status: int = 0
    """HTTP status of an error; 0: the connection is closed without an answer."""
    code: str = ""
    """S3's name of the error."""
    after: bool = False
    """The request is passed on first, and its answer is lost."""


Fault = Callable[[str, str], Answer | None]
"""Method and path of a request -> what happens to it; None: it is passed on. Called in many threads."""


class S3Proxy(ThreadingHTTPServer):
    """Stands between clients and an S3 server on loopback; a context manager. Signatures hold: `Host` is passed on."""

    daemon_threads = True

    def __init__(self, server: S3Server, fault: Fault | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = ("127.0.0.1", server.ports["s3"])
        self.fault: Fault = fault or (lambda method, path: None)
        self.environment = {**server.environment, "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}"}
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: broken connections are what it is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Proxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.fault(self.command, self.path)
        if answer is not None and not answer.after:
            self._refuse(answer)
            return
        try:
            response, content = self._forward(body)
        except OSError:
            answer = Answer()
        if answer is not None:
            self._refuse(answer)
            return
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in {"transfer-encoding", "connection", "content-length", "date", "server"}:
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - the base class looks for them

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(*self.server.backend, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"expect", "connection"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def _refuse(self, answer: Answer) -> None:
        self.close_connection = True
        if not answer.status:
            self.connection.close()
            return
        text = f"<Error><Code>{answer.code}</Code><Message>{answer.code} said the test</Message></Error>".encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free, and free again 10,000 above (for gRPC).

    All below 32768, where Linux begins to hand out ports to connections.
    """
    found: list[int] = []
    while len(found) < count:
        port = 11000 + secrets.randbelow(11000)
        if port not in found and is_free(port) and is_free(port + 10000):
            found.append(port)
    return found


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
