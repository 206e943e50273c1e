"""What the system tells of a process, of its log and of the cores. Python's own library suffices, so that any machine can ask."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from moekit import locks

# Bytes of a rank's log that go into an error.
LOG_TAIL = 4000

# Seconds between two looks at a process that others wait for.
LOOK = 0.1

# Looks in a row at which a process is stopped that end a wait for it. A process may be stopped for a moment. Looks are counted in
# place of time, since a driver that was stopped together with its ranks may go on before they do.
STOPPED = 5

STATES = {
    "T": "is stopped",
    "t": "is stopped by a debugger",
    "D": "waits for a device or a file system",
    "Z": "has ended",
    "R": "runs",
    "S": "sleeps",
}


@dataclass(frozen=True)
class Process:
    """The state of a process (a letter of ``ps``) and the seconds of processor time that it has used."""

    state: str
    seconds: float

    @classmethod
    def of(cls, pid: int | str) -> Process | None:
        """Of a process, or of its thread ``pid/task/tid``; None where the system does not tell."""
        try:
            fields = _fields(pid)
            return cls(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        except (OSError, IndexError, ValueError):
            return None

    @property
    def stopped(self) -> bool:
        """Whether a signal has stopped it; what a debugger has stopped is not meant."""
        return self.state == "T"

    @property
    def ready(self) -> bool:
        """Whether its main thread runs, or could if others had not the processor."""
        return self.state == "R"

    def __str__(self) -> str:
        return f"its process {STATES.get(self.state, 'is in an unknown state')}: state {self.state}"


def exit_code(pid: int) -> int | None:
    """That of a process that has ended and that its parent has not taken leave of, negative for a signal; None where it runs, or
    where the system does not tell."""
    try:
        fields = _fields(pid)
        return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else None
    except (OSError, IndexError, ValueError):
        return None


def _fields(pid: int | str) -> list[str]:
    """What the system tells of a process or a thread, behind its name: the first one is its state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def pid_space() -> str | None:
    """What all processes have in common that know one another by the same numbers; None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def temporary_folder() -> Path:
    """A new temporary folder, for ranks. A process that is killed leaves its own, which goes when another one is made.

    The name tells the process that made it, where processes know one another by their numbers.
    """
    space, name = pid_space(), "moekit-ranks-"
    if space is not None:
        name += f"{zlib.crc32(space.encode()):08x}-"
        for place in Path(tempfile.gettempdir()).glob(f"{name}*"):
            pid = place.name.removeprefix(name).partition("-")[0]
            if pid.isdecimal() and locks.has_ended(int(pid)):
                shutil.rmtree(place, ignore_errors=True)
        name += f"{os.getpid()}-"
    return Path(tempfile.mkdtemp(prefix=name))


def any_ready(pid: int) -> bool:
    """Whether a thread of a process runs or could."""
    threads = []
    with contextlib.suppress(OSError):
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    return any((found := Process.of(f"{pid}/task/{thread.name}")) and found.ready for thread in threads)


def end_of(log: Path) -> bytes:
    """The last bytes of a log; nothing where it is gone, as after a cleaning of the temporary folder."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
        return file.read()
    return b""


def usable_cores() -> int:
    """The cores that this process may use: its affinity, within the limit of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        # Without the file, or with "max" in it, there is no limit.
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores
