"""What runs in the process of a spawned rank: it answers jobs until the driver is gone."""

import contextlib
import os
import queue
import shutil
import signal
import threading
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from moekit.ranks.base import Rank, headline


def serve(rank: int, world_size: int, device: str, driver: int, folder: str) -> None:
    """Answer the driver's jobs one by one, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, jobs, driver, folder), daemon=True).start()
    sending = threading.Lock()

    def send(message: bytes) -> None:
        with sending:
            pipe.send_bytes(message)

    def send_report(message: Any) -> None:
        send(cloudpickle.dumps(("report", message)))

    me = Rank(rank, world_size, torch.device(device), send_report=send_report)
    while True:
        send(_answer(me, jobs.get()))


def _listen(pipe: Connection, jobs: queue.SimpleQueue, driver: int, folder: str) -> None:
    """Queue the jobs; end this process when the driver is gone, even while it sits in a collective."""
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == driver:  # a forked child of the driver may hold the pipe open
            if pipe.poll(1.0):
                jobs.put(pipe.recv_bytes())
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _answer(me: Rank, job: bytes) -> bytes:
    """Run one job and pickle what comes of it; nothing of it stays referenced here between calls."""
    try:
        fn, args, kwargs = cloudpickle.loads(job)
        return cloudpickle.dumps(("result", fn(me, *args, **kwargs)))
    except BaseException as error:
        text = f"{headline(error)}\n\n{''.join(traceback.format_exception(error)).strip()}"
        try:
            cloudpickle.loads(cloudpickle.dumps(error))
        except Exception:
            return cloudpickle.dumps(("error", (text, None)))
        return cloudpickle.dumps(("error", (text, error)))


def join(me: Rank, rendezvous: str, timeout: float) -> None:
    """The first job: join the process group. It meets in a file, as a TCP store listens on all addresses."""
    on_gpu = me.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(me.device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(rendezvous, me.world_size),
        rank=me.rank,
        world_size=me.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=me.device if on_gpu else None,
    )
