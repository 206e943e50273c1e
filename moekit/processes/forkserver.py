"""A process that has imported torch, and from which the processes of ranks are forked: they start in milliseconds.

The server runs one thread, computes nothing and never touches a GPU: a fork of it is like a fresh process. Every rank
gets its own environment, folder, pipe and log. The server ends with its driver, however that ends, and some seconds after
its last rank; its ranks end with it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import pickle
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from moekit.interrupts import hold_interrupts
from moekit.processes.channel import from_standard_input, readable
from moekit.processes.system import LOOK, STOPPED, Process, exit_code

# Seconds for the server to start.
START_LIMIT = 120.0

# Seconds for a fork.
FORK_LIMIT = 20.0

# Seconds without a rank after which the server ends; in a notebook, a person reads between one cell and the next.
IDLE = 5.0
IDLE_IN_NOTEBOOK = 600.0

# The module whose ``serve`` is a rank. It is named and not imported, since it imports torch.
SERVING = "moekit.ranks.server"

# What a rank on a GPU needs besides; each takes a while to import.
FOR_GPUS = (
    "moekit.nn.kernels.operations",
    "moekit.nn.kernels.peer_dispatch",
    "torch.distributed._symmetric_memory",
)

# Bytes of a request.
LARGEST = 1 << 20

# Variables that no library of a rank reads at its import; fairseq's imports set the two of KMP, and torch the last one when
# it first uses a GPU.
PASSING = {
    "_",
    "COLUMNS",
    "LINES",
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "CUDA_MODULE_LOADING",
}


class Unavailable(Exception):
    """There is no server, and ranks have to be started without it."""


def in_notebook() -> bool:
    """Whether this process is a kernel of Jupyter's, and not one that has only imported its package."""
    app = sys.modules.get("ipykernel.kernelapp")
    return app is not None and app.IPKernelApp.initialized()


def available() -> bool:
    return sys.platform == "linux" and hasattr(os, "pidfd_open") and os.environ.get("MOEKIT_FORK", "1") != "0"


# ------------------------------------------------------------------------------------------ in the driver

_starting = threading.Lock()

_server: Server | None = None


def _after_fork() -> None:
    """A fork of the driver has no server, and a lock that another thread held would stay locked in it."""
    global _starting, _server
    _starting, _server = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)


def prepare() -> Server:
    """The server of this process and environment; started, not awaited, if there is none."""
    global _server
    # A lock that an interrupt leaves locked would be waited for in vain.
    with hold_interrupts(), _starting:
        if _server is None or not _server.fits():
            if _server is not None:
                _server.retire()
            _server = Server()
        return _server


def prepare_if_possible() -> None:
    """Let a server start, where there can be one; whoever needs it finds out what was wrong."""
    if available():
        with contextlib.suppress(OSError):
            prepare()


def _lasting() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in PASSING}


class Server:
    """The driver's end of a server."""

    def __init__(self) -> None:
        self._owner, self._environment = os.getpid(), _lasting()
        # The garbage collector may end a pool, which listens, while its thread listens already.
        self._lock = threading.RLock()
        # Answers to requests to fork: a pid, or a negative number for an error.
        self._answers: list[int] = []
        # Exit codes by pid.
        self._codes: dict[int, int] = {}
        self._ready = self._gone = False
        # Whether it was waited for in vain: it is asked for no other ranks, and those that it has may live.
        self._given_up = False
        path = [os.path.abspath(entry) for entry in sys.path]
        code = (
            f"import sys; sys.path[:] = {path!r}; from moekit.processes.forkserver import main; "
            f"main({self._owner}, {IDLE_IN_NOTEBOOK if in_notebook() else IDLE!r})"
        )
        # Threads of a BLAS that starts with its library would be lost in a fork.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._pipe, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A server that is stopped reads nothing.
        self._pipe.setblocking(False)
        try:
            with theirs, tempfile.TemporaryFile() as log:
                process = subprocess.Popen(
                    [sys.executable, "-u", "-X", "faulthandler", "-c", code],
                    stdin=theirs,
                    stdout=log,
                    stderr=log,
                    env=os.environ | single | {"MPLBACKEND": "agg"},
                    process_group=0,
                )
        except BaseException:
            self._pipe.close()
            raise
        self.process = process
        # With the last one that can ask it, the server ends.
        weakref.finalize(self, self._pipe.close)
        # Its end is waited for, so that no zombie stays.
        threading.Thread(target=process.wait, name="forkserver", daemon=True).start()

    def fits(self) -> bool:
        """Whether this server is this process's, alive and not stopped, and libraries read the same environment there as here."""
        if self._owner != os.getpid():
            return False
        self.listen()
        lives = not (self._gone or self._given_up or self._stopped())
        return lives and self._environment == _lasting()

    @property
    def ready(self) -> bool:
        """Whether it can fork now."""
        self.listen()
        return self._ready and not self._gone

    def retire(self) -> None:
        """Let the server end once its ranks have ended; it is asked for no others."""
        if self._owner == os.getpid():
            with contextlib.suppress(OSError):
                self._pipe.send(pickle.dumps(("retire",)))

    def listen(self, seconds: float = 0.0) -> None:
        """Read the server's messages, waiting for them at most this many seconds."""
        readable(self._pipe, seconds)
        # An interrupt would lose a message that is read.
        with self._lock, hold_interrupts():
            while not self._gone:
                try:
                    message = self._pipe.recv(LARGEST)
                except BlockingIOError:
                    return
                except OSError:
                    message = b""
                if not message:
                    self._gone = True
                    return
                kind, *content = pickle.loads(message)
                if kind == "ready":
                    self._ready = True
                elif kind == "forked" and self._given_up:
                    # Nobody waits for this one any more. Its pipe is closed, and so it ends.
                    self.release(content[0])
                elif kind == "forked":
                    # A number is used again.
                    self._codes.pop(content[0], None)
                    self._answers.append(content[0])
                else:
                    self._codes[content[0]] = content[1]

    def wait_ready(self) -> None:
        """Return once it can fork; raises as :meth:`_await`."""
        self._await(lambda: self._ready, START_LIMIT)

    def _await(self, come: Callable[[], bool], seconds: float) -> None:
        """Listen until ``come()``.

        Raises:
            Unavailable: the server is gone.
            TimeoutError: it is stopped, or says nothing for this many seconds. The next start makes another server.
        """
        end, stopped = time.monotonic() + seconds, 0
        while not come():
            if self._gone:
                raise Unavailable
            stopped = stopped + 1 if self._stopped() else 0
            if stopped == STOPPED or time.monotonic() > end:
                self._given_up = True
                how = "has been stopped by a signal" if stopped else f"has not answered for {seconds:g} s"
                raise TimeoutError(
                    errno.ETIMEDOUT, f"process {self.process.pid}, from which ranks are forked, {how}"
                )
            self.listen(LOOK)

    def _stopped(self) -> bool:
        """Whether a signal has stopped it."""
        process = Process.of(self.process.pid)
        return process is not None and process.stopped

    def fork(self, order: dict[str, Any], pipe: int, log: int) -> Forked:
        """A rank, forked: ``pipe`` is its stdin, ``log`` its stdout and stderr.

        Raises:
            Unavailable: the server is gone.
            TimeoutError: it is stopped, or does not answer.
            OSError: it cannot fork.
        """
        with _starting:
            # One request at a time, as an answer does not name its request.
            self._answers.clear()
            try:
                socket.send_fds(self._pipe, [pickle.dumps(("fork", order))], [pipe, log])
            except OSError as error:
                raise Unavailable from error
            self._await(lambda: bool(self._answers), FORK_LIMIT)
            if (pid := self._answers.pop()) < 0:
                raise OSError(-pid, os.strerror(-pid))
            return Forked(self, pid)

    def took(self, pid: int) -> bool:
        """Whether it has ended without a word of the end of ``pid``: ranks end with their server."""
        return self._gone and pid not in self._codes

    def code(self, pid: int) -> int | None:
        self.listen()
        if self.took(pid):
            return -signal.SIGKILL
        # A server that is stopped does not tell, and the system does.
        if pid not in self._codes and (self._given_up or self._stopped()):
            return exit_code(pid)
        return self._codes.get(pid)

    def release(self, pid: int) -> None:
        """Let the system use ``pid`` again."""
        self._codes.pop(pid, None)
        with contextlib.suppress(OSError):
            self._pipe.send(pickle.dumps(("release", pid)))


class Forked:
    """The process of a rank, with the few methods of :class:`subprocess.Popen` that a pool needs."""

    def __init__(self, server: Server, pid: int):
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.code(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"rank process {self.pid}", timeout)
            self._server.listen(0.05)
        return self.returncode

    def ended_with(self) -> subprocess.Popen | None:
        """The process of its server, if it has ended with that one."""
        return self._server.process if self._server.took(self.pid) else None

    def release(self) -> None:
        self._server.release(self.pid)


# ------------------------------------------------------------------------------------------ in the server


def main(driver: int, idle: float) -> None:
    """Fork ranks for the process ``driver`` until it is gone or has not needed one for ``idle`` seconds."""
    pipe = from_standard_input()
    import torch

    importlib.import_module(SERVING)
    if os.path.exists("/dev/nvidiactl"):
        for module in FOR_GPUS:
            with contextlib.suppress(ImportError):
                # Without Triton there are no kernels.
                importlib.import_module(module)
    with torch.device("meta"):
        # The first tensor without memory imports another part of torch.
        torch.nn.Linear(1, 1)
    if len(os.listdir("/proc/self/task")) > 1 or torch.cuda.is_initialized():
        # Threads and CUDA do not outlive a fork: ranks are started without a server.
        return
    # Where the system forbids this, the OSError comes here and not later.
    os.close(os.pidfd_open(os.getpid()))
    gc.collect()
    # A collection would copy every page.
    gc.freeze()
    pipe.send(pickle.dumps(("ready",)))
    order = _forks(pipe, driver, idle)
    if order is None:
        os._exit(0)
    _become(**order)


def _forks(pipe: socket.socket, driver: int, idle: float) -> dict[str, Any] | None:
    """Fork what is asked for: in a rank its order, in the server None once it is of no more use."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    # The pid of each descriptor that becomes readable when the process ends.
    alive: dict[int, int] = {}
    ended: set[int] = set()
    released: set[int] = set()
    last, retired = time.monotonic(), False
    while os.getppid() == driver:
        for descriptor, _ in poll.poll(1000):
            if descriptor == pipe.fileno():
                message, descriptors, _, _ = socket.recv_fds(pipe, LARGEST, 2)
                if not message:
                    return None
                kind, *content = pickle.loads(message)
                if kind == "fork":
                    try:
                        pid = os.fork()
                    except OSError as error:
                        pid = -error.errno
                    if pid == 0:
                        for other in alive:
                            os.close(other)
                        pipe.close()
                        return content[0] | {"pipe": descriptors[0], "log": descriptors[1]}
                    for one in descriptors:
                        os.close(one)
                    if pid > 0:
                        with contextlib.suppress(OSError):
                            # The rank may have done so itself.
                            os.setpgid(pid, pid)
                        end = os.pidfd_open(pid)
                        alive[end] = pid
                        poll.register(end, select.POLLIN)
                    pipe.send(pickle.dumps(("forked", pid)))
                elif kind == "retire":
                    retired = True
                else:
                    released.add(content[0])
            else:
                pid = alive.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                ended.add(pid)
                how = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                code = how.si_status if how.si_code == os.CLD_EXITED else -how.si_status
                pipe.send(pickle.dumps(("ended", pid, code)))
        for pid in ended & released:
            # Until it is released, the driver may still send signals to this number.
            os.waitpid(pid, 0)
            ended.discard(pid)
            released.discard(pid)
        if alive or ended:
            last = time.monotonic()
        elif retired or time.monotonic() - last > idle:
            return None
    return None


def _become(
    *, environment: dict[str, str], path: list[str], cwd: str, rank: tuple, options: dict, pipe: int, log: int
) -> NoReturn:
    """Turn this fork into a rank."""
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        for source, target in ((pipe, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.close(pipe)
        os.close(log)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        os.chdir(cwd)
        random.seed()
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()
        importlib.import_module(SERVING).serve(*rank, parent=os.getppid(), **options)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
