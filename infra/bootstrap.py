"""What a new installation needs before its first flow run: bucket, work pools, deployments and automations."""

from __future__ import annotations

from infra.deploy import deploy
from infra.server import connect
from infra.settings import Settings
from infra.storage import StorageError, explained, filesystem


class BootstrapError(RuntimeError):
    """The installation could not be prepared."""


def bootstrap(settings: Settings) -> list[str]:
    """Create what is missing and update the rest; return a line for each thing that is there now.

    Doing it again changes nothing. Raises BootstrapError when the bucket can neither be found nor made, and as
    `infra.server.connect` and `infra.deploy.deploy` do.
    """
    connect(settings)
    bucket = [f"bucket: {ensure_bucket(settings.s3_bucket)}"] if settings.s3_bucket else []
    return [*bucket, *(f"deployment: {name}" for name in deploy(settings))]


def ensure_bucket(name: str) -> str:
    """Return the URL of a bucket, created when it is missing; raises BootstrapError with the server's words."""
    url = f"s3://{name}"
    try:
        with explained("create", url):
            fs, path = filesystem(url)
            if not fs.exists(path):
                fs.mkdir(path)
    except (StorageError, OSError, ValueError) as error:
        raise BootstrapError(f"the bucket {name!r} is not there and cannot be made: {error}") from error
    return url
