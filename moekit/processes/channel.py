"""Messages between the driver and a rank: each is its length in 8 bytes, and then that many bytes.

The driver reads and writes only what passes at once, since a rank that is stopped half-way through a message must not
stop the driver, too.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import struct

HEAD = struct.Struct("!Q")

# A message of at most this many bytes is copied, so that one system call sends it with its length.
SMALL = 65_536


def from_standard_input() -> socket.socket:
    """The pipe to the driver that a new process has as its standard input, which is empty from then on.

    Ctrl-C reaches the processes of a terminal all at once; it is the driver's to handle. SIGHUP comes with SIGCONT to a process that
    is stopped while its parent ends: it goes on, finds that out, and cleans up.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pipe = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    return pipe


class Incoming:
    """Puts messages together from the pieces that a socket has."""

    def __init__(self, pipe: socket.socket):
        self._pipe = pipe
        self._expect_head()

    def _expect_head(self) -> None:
        self._is_head, self._buffer = True, bytearray(HEAD.size)
        self._left = memoryview(self._buffer)

    @property
    def large(self) -> bool:
        """Whether a large message is on its way."""
        return len(self._buffer) > SMALL

    def read(self) -> bytearray | None:
        """A message, or None while it is not whole. EOFError when the other end is closed."""
        while True:
            while len(self._left):
                try:
                    count = self._pipe.recv_into(self._left, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return None
                if count == 0:
                    raise EOFError
                self._left = self._left[count:]
            message = self._buffer
            if not self._is_head:
                self._expect_head()
                return message
            self._is_head, self._buffer = False, bytearray(*HEAD.unpack(message))
            self._left = memoryview(self._buffer)


class Outgoing:
    """A message on its way; :meth:`write` sends what passes at once."""

    def __init__(self, pipe: socket.socket, message: bytes):
        self._pipe = pipe
        self._left = [memoryview(HEAD.pack(len(message))), memoryview(message)]

    def write(self) -> bool:
        """Send what passes; whether all is sent. OSError when the other end is closed."""
        while self._left:
            try:
                count = self._pipe.send(self._left[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            self._left[0] = self._left[0][count:]
            if not len(self._left[0]):
                del self._left[0]
        return True


def send(pipe: socket.socket, message: bytes) -> None:
    """Send a whole message, however long the other end takes."""
    if len(message) < SMALL:
        pipe.sendall(HEAD.pack(len(message)) + message)
    else:
        pipe.sendall(HEAD.pack(len(message)))
        pipe.sendall(message)


def readable(pipe: socket.socket, seconds: float = 0.0) -> bool:
    """Whether there is something to read, or the other end is closed, within this many seconds."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(math.ceil(seconds * 1000)))
