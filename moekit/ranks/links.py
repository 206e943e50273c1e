"""Connections between machines: who is at the other end, whether the link still stands, and over which interface it goes.

Python's own library suffices, so that a node runs this code without importing moekit.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

# Seconds for the other end of a new connection to say who it is.
GREETING = 10.0

# The most seconds between two probes of a connection, and the greatest int of the system's, which counts milliseconds.
LONGEST, MOST = 32_767, 2**31 - 1

# Bytes of what each end of a connection makes up, and of its answer to the other's.
NONCE, ANSWER = 16, 32


def keep_alive(link: socket.socket, seconds: float) -> None:
    """End a connection whose other machine has not answered for ``seconds``, though nothing is sent."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    each = max(1, round(min(seconds / 4, LONGEST)))
    for name, value in (
        ("TCP_KEEPIDLE", each),
        ("TCP_KEEPINTVL", each),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", round(min(seconds * 1000, MOST))),
    ):
        # Systems other than Linux have some of these, under other names.
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen(host: str, backlog: int | None = None) -> socket.socket:
    """A socket that listens on one address of this machine, at a free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=backlog)


def greet(link: socket.socket, secret: bytes, rank: int) -> None:
    """Tell the driver which rank this is, and check that it knows ``secret``, too. OSError if it does not."""
    theirs, mine = receive(link, NONCE), os.urandom(NONCE)
    link.sendall(struct.pack("!I", rank) + mine + _answer(secret, b"rank", rank, theirs, mine))
    if not hmac.compare_digest(receive(link, ANSWER), _answer(secret, b"driver", rank, mine, theirs)):
        raise OSError("what listens at the driver's address is not the driver")


def connect(
    driver: tuple[str, int], secret: bytes, rank: int, silence: float, seconds: float
) -> socket.socket:
    """This rank's connection to the driver, made within ``seconds`` and kept alive with ``silence`` seconds."""
    link = socket.create_connection(driver, timeout=seconds)
    greet(link, secret, rank)
    link.settimeout(None)
    keep_alive(link, silence)
    return link


def accept(listener: socket.socket, secret: bytes) -> tuple[socket.socket, int] | None:
    """A rank's connection and its number; None if what came was no rank that knows ``secret``."""
    link, _ = listener.accept()
    try:
        link.settimeout(GREETING)
        mine = os.urandom(NONCE)
        link.sendall(mine)
        (rank,) = struct.unpack("!I", receive(link, 4))
        theirs, answer = receive(link, NONCE), receive(link, ANSWER)
        if hmac.compare_digest(answer, _answer(secret, b"rank", rank, mine, theirs)):
            link.sendall(_answer(secret, b"driver", rank, theirs, mine))
            link.settimeout(None)
            return link, rank
    except OSError:
        pass
    link.close()
    return None


def accept_all(
    listener: socket.socket,
    secret: bytes,
    ranks: list[int],
    silence: float,
    seconds: float,
    meanwhile: Callable[[set[int]], None] = lambda missing: None,
) -> dict[int, socket.socket]:
    """The connection of each of ``ranks``, kept alive with ``silence`` seconds (:func:`keep_alive`).

    ``meanwhile`` is called often with those that are missing, and may raise.

    Raises:
        TimeoutError: one has not come in ``seconds``.
    """
    came: dict[int, socket.socket] = {}
    end = time.monotonic() + seconds
    # Unlike select.select, it takes a descriptor of any number.
    coming = select.poll()
    coming.register(listener, select.POLLIN)
    try:
        while missing := set(ranks) - set(came):
            if coming.poll(100) and (found := accept(listener, secret)):
                came[found[1]] = found[0]
            meanwhile(missing)
            if time.monotonic() > end:
                at = "{}:{}".format(*listener.getsockname()[:2])
                raise TimeoutError(
                    f"ranks {sorted(missing)} have not connected to the driver at {at} in {seconds:g} s: see what separates "
                    "their machines from this one"
                )
        for link in came.values():
            keep_alive(link, silence)
    except BaseException:
        for link in came.values():
            link.close()
        raise
    return came


def _answer(secret: bytes, who: bytes, rank: int, theirs: bytes, mine: bytes) -> bytes:
    return hmac.digest(secret, b"%s %d " % (who, rank) + theirs + mine, hashlib.sha256)


def receive(link: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes."""
    got = b""
    while len(got) < count:
        part = link.recv(count - len(got))
        if not part:
            raise OSError("the other end closed the connection")
        got += part
    return got


def reach(addresses: list[tuple[str, int]], seconds: float) -> list[str | None]:
    """Connect to all of these at once: why one cannot be reached within ``seconds``, None for one that can be."""
    found: list[str | None] = ["no answer"] * len(addresses)

    def one(number: int) -> None:
        try:
            socket.create_connection(addresses[number], timeout=seconds).close()
            found[number] = None
        except OSError as error:
            found[number] = error.strerror or str(error)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(addresses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return found


def interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one; {} on systems that tell it otherwise."""
    found = {}
    with (
        contextlib.suppress(ImportError, OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket,
    ):
        import fcntl

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                # SIOCGIFADDR of netdevice(7): the address is in the last 4 bytes of a sockaddr_in of 8.
                said = fcntl.ioctl(any_socket.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(said[20:24])
    return found
