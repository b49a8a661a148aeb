"""Hosts in network namespaces of their own, on one bridge: unlike those of one host, they can be cut off."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str

    def start(self, *command: str, environment: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
        with log.open("ab") as file:
            words = ["ip", "netns", "exec", self.namespace, *command]
            return subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def cut(self) -> None:
        """From now on no packet comes or goes, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    @property
    def processes(self) -> list[psutil.Process]:
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found


@contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """So many hosts with an interface `eth0` each. What runs there is killed at the end. Skips without the right."""
    name = f"xp{os.getpid()}"
    hosts = [Host(f"{name}h{i}", f"10.231.7.{i + 1}") for i in range(count)]
    try:
        try:
            _ip("link", "add", name, "type", "bridge")
            _ip("link", "set", name, "up")
            for host in hosts:
                _join(host, name)
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
            pytest.skip(f"needs the right to make network namespaces: {said}")
        yield hosts
    finally:
        for host in hosts:
            with suppress(OSError, subprocess.CalledProcessError):
                _end(host)
                # By itself it would go with the last connection that still waits for an answer, minutes later.
                _ip("link", "del", host.namespace)
                _ip("netns", "del", host.namespace)
        with suppress(OSError, subprocess.CalledProcessError):
            _ip("link", "del", name)


def _join(host: Host, bridge: str) -> None:
    _ip("netns", "add", host.namespace)
    _ip("link", "add", host.namespace, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", host.namespace, "master", bridge, "up")
    _ip("-n", host.namespace, "link", "set", "lo", "up")
    _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.namespace, "link", "set", "eth0", "up")
    # It leads nowhere; Ray asks the routing table for a host's own address.
    _ip("-n", host.namespace, "route", "add", "default", "via", "10.231.7.254")


def _end(host: Host, grace: float = 10) -> None:
    deadline = time.monotonic() + grace
    while (left := host.processes) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
