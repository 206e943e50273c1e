"""What runs in the process of a spawned rank: it answers jobs until the driver is gone."""

import collections
import contextlib
import os
import queue
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import PurePath
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from moekit.headlines import headline
from moekit.processes import channel
from moekit.ranks import links
from moekit.ranks.base import Rank
from moekit.ranks.streams import arguments, following
from moekit.ranks.watch import BEAT

# Frames of the main thread that a beat tells.
FRAMES = 6


def serve(
    rank: int,
    world_size: int,
    device: str,
    *,
    parent: int,
    folder: str,
    machines: tuple[int, ...] | None = None,
    sharing: int | None = None,
    node: str | None = None,
    launched: bool = False,
) -> None:
    """Answer the driver's jobs one by one, until the pipe closes; ``parent`` is the process that started this one.

    ``folder`` goes with this process; ``machines``, ``sharing`` and ``node`` are a :class:`Rank`'s. ``launched`` by another program than the
    driver, the process ends alone, without its group, and with status 0 if the driver says that this is the end.
    """
    pipe = channel.from_standard_input()
    jobs: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    voice = Voice(pipe)
    threading.Thread(
        target=_listen, args=(pipe, jobs, parent, folder, launched), name="listen", daemon=True
    ).start()
    threading.Thread(target=voice.beat, name="beat", daemon=True).start()
    me = Rank(rank, world_size, torch.device(device), machines=machines, sharing=sharing)
    me.node = node or me.node
    me.send_report = lambda message: voice.say("report", message)
    torch.set_num_threads(me.cores)
    voice.say("beat", ((), 0.0))
    while True:
        job = jobs.get()
        voice.at_work = True
        voice.answer(_answer(me, job, following(jobs, voice.say)))
        del job


class Voice:
    """What a rank sends to its driver: reports, answers, and a beat every second while a job runs."""

    def __init__(self, pipe: socket.socket):
        self._pipe, self._sending = pipe, threading.Lock()
        self.at_work = False

    def say(self, kind: str, content: Any) -> None:
        message = cloudpickle.dumps((kind, content))
        with self._sending:
            channel.send(self._pipe, message)

    def answer(self, message: bytes) -> None:
        """Send the last message of a job. Between calls no beat is sent, since the driver reads none."""
        with self._sending:
            self.at_work = False
            channel.send(self._pipe, message)

    def beat(self) -> None:
        """Tell every second where the main thread is, and how much processor time the others have used."""
        while True:
            time.sleep(BEAT)
            used = time.process_time() - time.thread_time()
            message = cloudpickle.dumps(("beat", (_frames(), used)))
            with (
                self._sending,
                contextlib.suppress(OSError),
            ):
                # The driver is gone, and this process is about to end.
                if self.at_work:
                    channel.send(self._pipe, message)


def _frames() -> tuple[str, ...]:
    """The innermost frames of the main thread. No source line is read: that file may be what hangs."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    found = []
    while frame is not None and len(found) < FRAMES and frame.f_code is not _answer.__code__:
        place = "/".join(PurePath(frame.f_code.co_filename).parts[-3:])
        found.append(f"{place}:{frame.f_lineno} in {frame.f_code.co_qualname}")
        frame = frame.f_back
    return tuple(found)


def _listen(pipe: socket.socket, jobs: queue.SimpleQueue, parent: int, folder: str, launched: bool) -> None:
    """Queue the jobs; end this process when the driver is gone, even while it sits in a collective."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    incoming = channel.Incoming(pipe)
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            # A forked child of the driver may hold the pipe open.
            if poll.poll(1000) and (job := incoming.read()) is not None:
                if not job:
                    shutil.rmtree(folder, ignore_errors=True)
                    os._exit(0)
                jobs.put(job)
    shutil.rmtree(folder, ignore_errors=True)
    if launched:
        os._exit(1)
    os.killpg(0, signal.SIGKILL)


def _answer(me: Rank, job: bytearray, stream: Iterator[Any]) -> bytes:
    """Run one job and pickle what comes of it; nothing of it stays referenced here between calls.

    ``stream`` gives the items of a job that has some.
    """
    try:
        fn, args, kwargs, follows = arguments(job, stream)
        result = fn(me, *args, **kwargs)
        if follows:
            # Items that the function left are no jobs.
            collections.deque(stream, maxlen=0)
        return cloudpickle.dumps(("result", result))
    except BaseException as error:
        text = f"{headline(error)}\n\n{''.join(traceback.format_exception(error)).strip()}"
        try:
            cloudpickle.loads(cloudpickle.dumps(error))
        except Exception:
            return cloudpickle.dumps(("error", (text, None)))
        return cloudpickle.dumps(("error", (text, error)))


def join(me: Rank, rendezvous: str, timeout: float) -> None:
    """The first job on one machine: join the process group. It meets in a file, so that nothing listens."""
    _init(me, dist.FileStore(rendezvous, me.world_size), timeout)


# The store that this process keeps for the other ranks; torch closes one that nobody refers to.
_kept: list[dist.Store] = []


def keep_store(me: Rank, host: str) -> int | None:
    """The first job on several machines: rank 0 keeps a store for all, and returns its port.

    Torch's own would listen on all addresses of the machine; this one listens on ``host`` alone.
    """
    if me.rank != 0:
        return None
    listener = links.listen(host, me.world_size)
    port = listener.getsockname()[1]
    descriptor = listener.detach()
    _kept[:] = [
        dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
    ]
    return port


def join_at(me: Rank, host: str, port: int, seconds: float, timeout: float) -> None:
    """The second job on several machines: join the process group at rank 0's store, reached within ``seconds``."""
    try:
        store = dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
    except RuntimeError as error:
        over = os.environ.get("GLOO_SOCKET_IFNAME", "any interface")
        raise RuntimeError(
            f"node {me.node} cannot reach rank 0 at {host}:{port} over {over} ({headline(error, 200)}): see what "
            "separates the nodes, or name another network with RayRanks(interface=...)"
        ) from error
    _init(me, store, timeout)


def _init(me: Rank, store: dist.Store, timeout: float) -> None:
    """Join the process group. ``timeout`` is in seconds, of a collective.

    NCCL connects the GPUs at the first collective, which takes a second and is not needed where ranks exchange rows
    through one another's memory.
    """
    on_gpu = me.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(me.device)
        # The GPU's context takes a while, in which the driver reads the checkpoint's headers.
        torch.empty(1, device=me.device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=me.rank,
        world_size=me.world_size,
        timeout=timedelta(seconds=timeout),
    )
