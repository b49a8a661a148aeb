"""The Ray that the demo starts belongs to one user of one host: nobody else reaches it, or what it unpacks and runs."""

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import psutil

from expunge.jobs.local_ray import PREFIX, sweep
from tests.integration.nights import Nights
from tests.watching import processes, with_children


def test_it_listens_on_the_loopback_interface_alone(nights: Nights) -> None:
    ours = {process.pid for process in with_children(processes(nights.home))}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    hosts = [c.laddr.ip for c in listening if c.laddr]
    assert len(hosts) > 3, "a head has several servers"
    assert not [host for host in hosts if not _is_loopback(host)]


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def test_nobody_else_can_enter_its_folder(nights: Nights) -> None:
    [folder] = {
        Path(word.removeprefix("--temp-dir=")).parent
        for process in with_children(processes(nights.home))
        for word in process.cmdline()
        if word.startswith("--temp-dir=")
    }
    assert folder.name.startswith(PREFIX)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "ray").is_dir()


def test_what_a_killed_demo_has_left_is_cleared_away(tmp_path: Path) -> None:
    [gone, living, stranger] = [Path(f"/tmp/{PREFIX}test-{os.getpid()}-{name}") for name in "abc"]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    try:
        for folder, pids in ((gone, f"{ended.pid} {ended.pid}"), (living, f"{os.getpid()} {ended.pid}")):
            folder.mkdir(mode=0o700)
            (folder / "pids").write_text(pids)
        stranger.symlink_to(tmp_path)
        (tmp_path / "pids").write_text(f"{ended.pid} {ended.pid}")
        sweep()
        assert [folder.exists() for folder in (gone, living, stranger)] == [False, True, True]
        assert (tmp_path / "pids").exists()
    finally:
        for folder in (gone, living):
            if folder.exists():
                (folder / "pids").unlink()
                folder.rmdir()
        stranger.unlink(missing_ok=True)
