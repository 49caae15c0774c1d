"""`brainloom bootstrap`: what a new installation needs before its first flow run."""

from __future__ import annotations

from brainloom.terminal import ApiUrl, console


def bootstrap(api_url: ApiUrl = None) -> None:
    """Create the bucket of BRAINLOOM_S3_BUCKET, work pools, deployments and automations; safe to run again."""
    from infra.bootstrap import bootstrap as prepare  # keeps `--help` fast
    from infra.settings import Settings

    for line in prepare(Settings()):
        console().print(line)
