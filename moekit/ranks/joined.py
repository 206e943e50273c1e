"""Ranks that a launcher has started, such as torchrun or srun: each process finds its rank in its environment.

The process of rank 0 is the driver. The others connect to it, run what it asks for, and end with it; rank 0 itself is a child
of the driver, so that the driver can watch it like the others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from moekit.headlines import headline
from moekit.interrupts import hold_interrupts
from moekit.processes import channel
from moekit.processes.system import Process, any_ready, pid_space, temporary_folder
from moekit.ranks import links
from moekit.ranks.base import Rank
from moekit.ranks.launch import launch
from moekit.ranks.piped import Member, PipedRanks
from moekit.ranks.server import serve
from moekit.ranks.spawned import Child, end_processes
from moekit.ranks.watch import silence_limit, time_limit

# Seconds for all processes of the launcher to come, and for a rank to reach rank 0's store.
COME_LIMIT, STORE_LIMIT = 300.0, 30.0


@dataclass(frozen=True)
class Launch:
    """What a launcher told this process: its rank, of how many, and its number on its machine."""

    rank: int
    world_size: int
    local_rank: int
    master: str

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Launch | None:
        """From ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``MASTER_ADDR``; None without a launcher, or with one rank.

        Raises:
            ValueError: one of them is missing or is no number.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        found = []
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            said = environment.get(name, "0" if name == "LOCAL_RANK" else "")
            if not said.isdecimal():
                raise ValueError(f"{name}={said!r} in the environment: expected the launcher's whole number")
            found.append(int(said))
        if found[1] <= 1:
            return None
        if found[0] >= found[1]:
            raise ValueError(f"RANK={found[0]} in the environment: expected less than WORLD_SIZE={found[1]}")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise ValueError(
                    f"{name} is missing in the environment, where the launcher says how ranks meet"
                )
        return cls(*found, environment["MASTER_ADDR"])

    def check(self, option: str, world_size: int) -> None:
        """That an ``option`` of the command line agrees. fairseq's default of it is the number of GPUs."""
        if world_size not in (self.world_size, max(1, torch.cuda.device_count())):
            raise ValueError(
                f"{option} {world_size}, and the launcher started {self.world_size} processes: leave the option out"
            )

    def device(self, kind: str) -> torch.device:
        """This rank's device: "cpu", or the GPU with its number on the machine if there are GPUs."""
        if kind == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={self.local_rank} needs as many GPUs, and torch sees {torch.cuda.device_count()}: start fewer "
                "ranks a machine, or use the CPU"
            )
        return torch.device("cuda", self.local_rank)

    def ranks(self, kind: str) -> JoinedRanks:
        """The pool of all ranks, in the process of rank 0; any other process is a rank from here on, and ends as one."""
        device = self.device(kind)
        if self.rank > 0:
            attend(self, device)
        return JoinedRanks(self, device)

    def store(self) -> dist.Store:
        """The launcher's store, in which ranks leave word for one another."""
        limit = timedelta(seconds=COME_LIMIT)
        store, _, _ = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=limit))
        return dist.PrefixStore("moekit", store)


@dataclass(frozen=True)
class Word:
    """What the process of a rank tells: its machine, its device, its cores, the address of ``MASTER_ADDR`` from there, and its
    number, ``pid``, among the processes of ``space``."""

    host: str
    device: str
    cores: frozenset[int]
    master: str
    pid: int
    space: str | None

    @classmethod
    def of(cls, launch: Launch, device: torch.device) -> Word:
        """ValueError if the name in ``MASTER_ADDR`` is none here."""
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
        try:
            master = socket.gethostbyname(launch.master)
        except OSError as error:
            raise ValueError(
                f"MASTER_ADDR={launch.master} is unknown on {socket.gethostname()} ({error.strerror}); expected the name or "
                "address of the machine of rank 0"
            ) from error
        return cls(socket.gethostname(), str(device), frozenset(cores), master, os.getpid(), pid_space())


def attend(launch: Launch, device: torch.device) -> NoReturn:
    """Be a rank other than 0: run what the driver asks for, and end this process with it.

    The exit status is 0 if the driver closed its ranks, and 1 if it went without a word.

    Raises:
        RuntimeError: rank 0 cannot start; OSError: it cannot be reached.
    """
    store = launch.store()
    store.set(f"rank {launch.rank}", pickle.dumps(Word.of(launch, device)))
    answer = pickle.loads(store.get("driver"))
    if isinstance(answer, str):
        raise RuntimeError(f"rank {launch.rank} ends with rank 0: {answer}")
    address, secret, machines, shares = answer
    try:
        pipe = links.connect(address, secret, launch.rank, silence_limit(None), COME_LIMIT)
    except OSError as error:
        raise OSError(
            f"rank {launch.rank} on {socket.gethostname()} cannot reach rank 0 at {address[0]}:{address[1]} ({error}): see "
            f"what separates the two, or give another MASTER_ADDR than {launch.master}"
        ) from error
    _use_interface(pipe.getsockname()[0])
    os.dup2(pipe.fileno(), 0)
    pipe.close()
    # The launcher's store is closed with its last reference.
    folder = temporary_folder()
    try:
        serve(
            launch.rank,
            launch.world_size,
            str(device),
            parent=os.getppid(),
            folder=str(folder),
            machines=machines,
            sharing=shares[launch.rank],
            launched=True,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError("serve returned")


def _use_interface(address: str) -> None:
    """Have the process group talk over the interface with this address, unless the environment names one."""
    name = next((name for name, own in links.interfaces().items() if own == address), None)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


class Launched(Member):
    """The process of a rank that the launcher started; the system tells of it where it is in the driver's ``space``."""

    def __init__(self, node: str, word: Word, space: str | None):
        self.node = node
        self._pid = word.pid if space is not None and word.space == space else None

    def state(self):
        return None if self._pid is None else Process.of(self._pid)

    def any_ready(self):
        return self._pid is not None and any_ready(self._pid)

    def poll(self):
        return None

    def wait(self, timeout):
        raise subprocess.TimeoutExpired("a rank of the launcher", timeout)

    def lost(self, error):
        if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
            return "is lost: its machine does not answer over the network"
        return "closed its connection: see what the launcher says of it"

    def log_tail(self):
        return ""


class JoinedRanks(PipedRanks):
    """The ranks of a launcher, this process being the one of rank 0.

    Raises:
        ValueError: ``MASTER_ADDR`` is not this machine's address, or the ranks of a machine are not next to each other.
        TimeoutError: a process of the launcher does not come.
    """

    def __init__(
        self, launched: Launch, device: torch.device, timeout: float = 1800.0, silence: float | None = None
    ):
        super().__init__([device] * launched.world_size, time_limit(timeout), silence_limit(silence))
        self._children: list[Child] = []
        self._own(_end_all, self._children)
        try:
            self._start(launched)
        except BaseException:
            self.close()
            raise

    def _start(self, launched: Launch) -> None:
        store, others = launched.store(), range(1, launched.world_size)
        words = [Word.of(launched, self.devices[0])]
        words += [pickle.loads(self._word(store, f"rank {rank}")) for rank in others]
        hosts = [word.host for word in words]
        machines = tuple(list(dict.fromkeys(hosts)).index(name) for name in hosts)
        self.devices = [torch.device(word.device) for word in words]
        self.nodes = hosts if machines[-1] else self.nodes
        # A machine may take its own name for an address that is no other's way to it, as Debian's /etc/hosts has it.
        host = words[machines.index(1) if machines[-1] else 0].master
        shares, secret = sharing(words), secrets.token_bytes(32)
        try:
            if list(machines) != sorted(machines):
                raise ValueError(
                    f"ranks of one machine are not next to each other ({hosts}): start them by blocks, such as with srun "
                    "--distribution=block"
                )
            listener = _listen(host, launched.master)
        except ValueError as error:
            store.set("driver", pickle.dumps(str(error)))
            # The store ends with this process.
            time.sleep(1.0)
            raise
        with listener:
            store.set("driver", pickle.dumps((listener.getsockname()[:2], secret, machines, shares)))
            _use_interface(host)
            # Rank 0 is a child with the environment of this process.
            me = Rank(0, launched.world_size, self.devices[0], machines=machines, sharing=shares[0])
            with hold_interrupts():
                ours, theirs = socket.socketpair()
                self._pipes.append(ours)
                path = self._folder / "rank-0.log"
                with theirs, open(path, "wb") as log:
                    process = launch(me, self._folder, theirs, log.fileno(), None, local=False)
                    self._children.append(Child(process, path, self.nodes[0]))
            here = words[0].space
            self._members = [
                *self._children,
                *(Launched(self.nodes[rank], words[rank], here) for rank in others),
            ]
            came = links.accept_all(listener, secret, list(others), self._silence, COME_LIMIT)
            self._pipes += [came[rank] for rank in others]
        self._meet(host, STORE_LIMIT)

    def _word(self, store: dist.Store, name: str) -> bytes:
        try:
            return store.get(name)
        except RuntimeError as error:
            raise TimeoutError(f"{name} of the launcher has not come ({headline(error, 200)})") from error


def sharing(words: list[Word]) -> list[int]:
    """How many ranks share each rank's cores: one where the launcher bound each to its own, else those of the machine."""
    return [
        sum(word.host == other.host and bool(word.cores & other.cores) for other in words) for word in words
    ]


def _listen(host: str, master: str) -> socket.socket:
    try:
        return links.listen(host)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR={master}: rank 0 cannot listen at {host} ({error.strerror}); expected an address of the machine of "
            "rank 0"
        ) from error


def _end_all(owner: int, children: list[Child], pipes: list[socket.socket], folder: Path) -> None:
    """Tell the ranks that this is the end, so that their processes end well, and end rank 0."""
    if os.getpid() != owner:
        return
    for pipe in pipes[1:]:
        with contextlib.suppress(OSError):
            pipe.settimeout(1)
            channel.send(pipe, b"")
    # The launcher may end what is left as soon as one process has gone.
    time.sleep(0.1)
    end_processes(owner, children, pipes, folder)
