"""Keeps Prefect's credentials out of what goes to Dask workers.

prefect-dask puts all of Prefect's settings into every task that it sends, PREFECT_API_AUTH_STRING and the database's
URL among them: they would be in the scheduler's memory and on the wire. Workers have them in their own environment.
"""

from __future__ import annotations

from typing import Any

from prefect.context import SettingsContext, get_settings_context

SECRET_SETTINGS = (("server",), ("api", "auth_string"), ("api", "key"), ("client", "custom_headers"))
"""Paths in Prefect's settings. Workers need nothing of the server's part, which has the database's URL."""


class ShieldedSettings(SettingsContext):
    """Prefect's settings as they are, but their serialised form has no credential.

    A key that is left out is read from the environment where the context is unpacked (prefect 3.8.8), so a worker takes
    its own; nothing changes for API calls of this process.
    """

    def serialize(self, include_secrets: bool = True) -> dict[str, Any]:
        """Return the plain data that go to a worker."""
        data = super().serialize(include_secrets=include_secrets)
        data["profile"] = {**data["profile"], "settings": {}}
        for *parents, name in SECRET_SETTINGS:
            part = data["settings"]
            for parent in parents:
                part = part.get(parent, {})
            part.pop(name, None)
        return data


def shielded_settings() -> ShieldedSettings:
    """Return a context manager in which tasks are submitted without credentials."""
    current = get_settings_context()
    return ShieldedSettings(profile=current.profile, settings=current.settings)
