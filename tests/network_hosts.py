"""Hosts in network namespaces of this machine: each has its own network stack, all share the disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Hosts:
    """Names of namespaces on one switch; host n has the address `10.77.0.<n + 1>`."""

    names: tuple[str, ...]
    switch: str

    def address(self, host: int) -> str:
        """Return the address of a host."""
        return f"10.77.0.{host + 1}"

    def on(self, host: int) -> list[str]:
        """Return the words before a command that runs it on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def cut_off(self, host: int) -> None:
        """Pull the cable of a host: nobody is told, packets are lost."""
        _ip("-n", self.switch, "link", "set", f"port{host}", "down")

    def connect(self, host: int) -> None:
        """Put the cable back."""
        _ip("-n", self.switch, "link", "set", f"port{host}", "up")


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Give some hosts on one switch, which is a namespace too, so nothing is left but by its name.

    Skips the test where namespaces are not permitted.
    """
    made = Hosts(tuple(f"brainloom-{os.getpid()}-{host}" for host in range(count)), f"brainloom-{os.getpid()}-switch")
    try:
        _make(made)
        yield made
    finally:
        for name in (*made.names, made.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _make(made: Hosts) -> None:
    try:
        for name in (made.switch, *made.names):
            _ip("netns", "add", name)
        _ip("-n", made.switch, "link", "add", "bridge0", "type", "bridge")
    except FileNotFoundError:
        pytest.skip("needs the command ip (Debian's iproute2)")
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        pytest.skip(f"needs network namespaces: {why}")
    _ip("-n", made.switch, "link", "set", "bridge0", "up")
    for host, name in enumerate(made.names):
        port = f"port{host}"
        _ip("-n", made.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", made.switch, "link", "set", port, "master", "bridge0", "up")
        _ip("-n", name, "addr", "add", f"{made.address(host)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=30)
