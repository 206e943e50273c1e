"""Machines of network namespaces on this host, for the tests of several machines; :class:`Machines` have a Ray node each."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
MINIMAL = str(Path(__file__).parent / "minimal_ray")
CLONE_NEWNET = 0x40000000


def possible() -> bool:
    """Whether this user may make network namespaces here."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"moekit-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


class Network:
    """``count`` machines, numbered from 0, at 10.77.0.1 and on, with a folder ``temp`` for what they run."""

    def __init__(self, count: int):
        self.count = count
        self._prefix = f"mk{os.getpid()}"
        # Sockets have their paths in here, and those have a limit of 107 characters.
        self.temp = Path(tempfile.mkdtemp(prefix="mk-", dir="/tmp"))
        try:
            self._wire()
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Start what runs on the machines."""

    def _wire(self) -> None:
        """A namespace for each machine, with a cable to one switch."""
        self._ip("netns", "add", self._name("switch"))
        self._in("switch", "ip", "link", "add", "br0", "type", "bridge")
        self._in("switch", "ip", "link", "set", "br0", "up")
        for number in range(self.count):
            name = self._name(number)
            self._ip("netns", "add", name)
            self._in(
                "switch",
                "ip",
                "link",
                "add",
                f"port{number}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            self._in("switch", "ip", "link", "set", f"port{number}", "master", "br0", "up")
            self._in(number, "ip", "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            self._in(number, "ip", "link", "set", "eth0", "up")
            self._in(number, "ip", "link", "set", "lo", "up")

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def _name(self, number: int | str) -> str:
        return f"{self._prefix}-{number}"

    def _ip(self, *command: str) -> None:
        subprocess.run(["ip", *command], check=True, capture_output=True)

    def _in(self, number: int | str, *command: str) -> None:
        self._ip("netns", "exec", self._name(number), *command)

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[None]:
        """In this block, this thread and the processes that it starts are on a machine."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{self._name(number)}") as there:
            assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(before.fileno(), CLONE_NEWNET) == 0

    def interface(self, name: str) -> None:
        """Give every machine one more interface, from which no cable leads to the others."""
        for number in range(self.count):
            self._in(number, "ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
            self._in(number, "ip", "addr", "add", f"10.99.{number}.1/24", "dev", name)
            for end in (name, f"{name}-end"):
                self._in(number, "ip", "link", "set", end, "up")

    @contextlib.contextmanager
    def cut_off(self, number: int) -> Iterator[None]:
        """In this block a machine's cable is out."""
        self._in("switch", "ip", "link", "set", f"port{number}", "down")
        try:
            yield
        finally:
            self._in("switch", "ip", "link", "set", f"port{number}", "up")

    @contextlib.contextmanager
    def apart(self, one: int, other: int) -> Iterator[None]:
        """In this block two machines do not hear each other, and the others hear both."""
        pairs = ((one, other), (other, one))
        for here, there in pairs:
            self._in(here, "ip", "route", "add", "blackhole", f"{self.address(there)}/32")
        try:
            yield
        finally:
            for here, there in pairs:
                self._in(here, "ip", "route", "del", "blackhole", f"{self.address(there)}/32")

    def sent(self, number: int) -> int:
        """Bytes that a machine has sent to others."""
        said = subprocess.run(
            ["ip", "netns", "exec", self._name(number), "cat", "/proc/net/dev"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        line = next(line for line in said.splitlines() if line.strip().startswith("eth0:"))
        return int(line.split(":")[1].split()[8])

    def processes(self, number: int) -> list[psutil.Process]:
        said = subprocess.run(
            ["ip", "netns", "pids", self._name(number)], capture_output=True, text=True
        ).stdout
        found = []
        for pid in said.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return [process for process in found if process.pid != os.getpid()]

    def kill(self, number: int, name: str = "") -> None:
        """Kill a machine's processes, or those of one name."""
        for process in self.processes(number):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in process.name():
                    process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        for number in range(self.count):
            self.kill(number)
        time.sleep(0.2)
        for number in (*range(self.count), "switch"):
            subprocess.run(["ip", "netns", "del", self._name(number)], capture_output=True)
        shutil.rmtree(self.temp, ignore_errors=True)


class Machines(Network):
    """With a Ray node each, whose head is on the first; ``hidden`` is a folder that the second sees empty."""

    def __init__(self, count: int, cores: int = 2, hidden: Path | None = None):
        self.cores, self._hidden = cores, hidden
        super().__init__(count)

    def _begin(self) -> None:
        self.head = f"{self.address(0)}:6379"
        self._start(0, "--head", "--port=6379", "--include-dashboard=false")
        with ThreadPoolExecutor() as others:
            # Results are asked for, since they may be errors.
            list(others.map(self._start_other, range(1, self.count)))

    def _start_other(self, number: int) -> None:
        self._start(number, f"--address={self.head}", hidden=self._hidden if number == 1 else None)

    def _popen(self, number: int, *options: str, hidden: Path | None = None) -> subprocess.Popen:
        command = [
            str(RAY), "start", *options, f"--node-ip-address={self.address(number)}", f"--num-cpus={self.cores}",
            "--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats",
        ]  # fmt: skip
        command.append("--include-log-monitor=false")
        if number == 0:
            command += ["--no-monitor", f"--temp-dir={self.temp}"]
        if hidden is not None:
            # This machine sees an empty folder there.
            covered = f'mount -t tmpfs none "{hidden}" && exec "$@"'
            command = ["unshare", "--mount", "bash", "-c", covered, "bash", *command]
        path = [MINIMAL, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            # Every new driver would have its node start a worker for each core.
            "RAY_prestart_worker_first_driver": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self._name(number), *command], env=environment, stdout=subprocess.DEVNULL
        )

    def _start(self, number: int, *options: str, hidden: Path | None = None) -> None:
        """A node gives up if its agents take more than 15 s to start, as on a busy host: it is tried again."""
        for _ in range(3):
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._popen(number, *options, hidden=hidden).wait(timeout=100) == 0:
                    return
            self.kill(number)
        raise RuntimeError(f"Ray's node {number} does not start: is the host busy?")

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[None]:
        address = os.environ.get("RAY_ADDRESS")
        with super().on(number):
            os.environ["RAY_ADDRESS"] = self.head
            try:
                yield
            finally:
                os.environ.pop("RAY_ADDRESS") if address is None else os.environ.update(RAY_ADDRESS=address)
