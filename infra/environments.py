"""What settings mean to the programs that we start: the variables of Prefect, PostgreSQL and S3 clients.

`python -m infra.environments <command>` is the entry point of our images: it reads `BRAINLOOM_*` and the secrets'
files, and becomes the command with these variables. Secrets then stand in no image, command line or compose file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from urllib.parse import quote

from pydantic import SecretStr

from infra.log_lines import log_environment
from infra.settings import Settings, error_text, private_environment

OTHER_ENDPOINTS = ("FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
STANDS_FOR = {
    "AWS_DEFAULT_REGION": "BRAINLOOM_S3_REGION",
    "AWS_ACCESS_KEY_ID": "BRAINLOOM_S3_ACCESS_KEY",
    "AWS_SECRET_ACCESS_KEY": "BRAINLOOM_S3_SECRET_KEY",
    **dict.fromkeys(("AWS_ENDPOINT_URL", *OTHER_ENDPOINTS), "BRAINLOOM_S3_ENDPOINT"),
}
"""Variables of S3 clients -> our setting."""


def server_environment(settings: Settings) -> dict[str, str]:
    """Return what our own Prefect server needs: how it logs, database, user and password that it asks for, metrics."""
    environment = log_environment(settings.log)
    if url := database_url(settings):
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url
    if settings.metrics_port:
        environment["PREFECT_SERVER_METRICS_ENABLED"] = "true"
    if settings.api_auth:
        environment["PREFECT_SERVER_API_AUTH_STRING"] = settings.api_auth.get_secret_value()
    return environment


def database_url(settings: Settings) -> str:
    """Return the database's URL with its password, empty for SQLite."""
    url = _plain(settings.database_url)
    if not settings.database_password:
        return url
    scheme, _, rest = url.partition("://")
    user, _, place = rest.rpartition("@")
    return f"{scheme}://{user}:{quote(_plain(settings.database_password), safe='')}@{place}"


def api_environment(settings: Settings) -> dict[str, str]:
    """Return the user and password that Prefect's clients send, if the server asks for them."""
    return {"PREFECT_API_AUTH_STRING": _plain(settings.api_auth)} if settings.api_auth else {}


def storage_environment(settings: Settings) -> dict[str, str]:
    """Return the variables of S3 clients for the settings `s3_*` that are set."""
    found = {
        "AWS_ENDPOINT_URL": settings.s3_endpoint or "",
        "AWS_DEFAULT_REGION": settings.s3_region or "",
        "AWS_ACCESS_KEY_ID": _plain(settings.s3_access_key),
        "AWS_SECRET_ACCESS_KEY": _plain(settings.s3_secret_key),
    }
    return {name: value for name, value in found.items() if value}


def public_storage_environment(settings: Settings) -> dict[str, str]:
    """Return those variables of S3 clients that are no secret: for scripts and specifications that others may read."""
    secret = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {name: value for name, value in storage_environment(settings).items() if name not in secret}


def export_storage(settings: Settings, environment: MutableMapping[str, str] | None = None) -> None:
    """Set the variables of S3 clients from the settings in this process, whose children inherit them.

    Raises ValueError naming a variable that is there with another value: two answers to where the data are.
    """
    target = os.environ if environment is None else environment
    found = storage_environment(settings)
    others = dict.fromkeys(OTHER_ENDPOINTS, found["AWS_ENDPOINT_URL"]) if "AWS_ENDPOINT_URL" in found else {}
    for name, value in (others | found).items():
        if target.get(name, value) != value:
            raise ValueError(
                f"{name} is set to something else than {STANDS_FOR[name]}, which stands for it; unset one of them"
            )
    target.update(found)


def service_environment(settings: Settings, base: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment of a service: the given one and what the settings mean.

    Without `api_url` the service is the server itself. Raises ValueError as `export_storage` does.
    """
    environment = {**base, **private_environment(), **log_environment(settings.log), **api_environment(settings)}
    if settings.api_url:
        environment["PREFECT_API_URL"] = settings.api_url
    else:
        environment |= server_environment(settings)
    export_storage(settings, environment)
    return environment


def _plain(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret else ""


def main(command: list[str]) -> None:
    """Become the command, in the environment that the settings mean."""
    if not command:
        sys.exit("usage: python -m infra.environments <command> [<argument> ...]")
    try:
        environment = service_environment(Settings(), os.environ)
    except ValueError as error:
        sys.exit(f"brainloom: {error_text(error)}")
    os.execvpe(command[0], command, environment)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
