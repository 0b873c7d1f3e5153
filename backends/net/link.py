"""Frames over two byte streams: one thread reads one of them, one thread writes the other.

An OpenSSL connection must not be read and written by two threads at once, so a link has a
connection for each direction. Frames go out whole and in order. What comes in is bounded before it
is kept: a header that announces more than `frame_max` ends the link, and a body takes memory only
as its bytes arrive. `hold_back` lets a side that is flooded stop reading, and so the other side's
writing.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from protocol.errors import ProtocolError
from protocol.messages import HEADER_BYTES, Frame, LocalFrame, announced_bytes

_READ_BYTES = 1 << 20
"""Asked of the socket at once: TLS gives one record of 16 KiB at most, plain TCP what there is."""
_QUEUED_FRAMES_MAX = 4096
_HELD_BACK_S = 0.005
"""Between two looks whether reading may go on."""


class Link:
    """Two connected sockets as one link for frames.

    incoming, outgoing  connected, blocking sockets (TLS or not); the link closes them
    frame_max           bytes of the largest frame that is taken
    on_frame            is told of every frame, on the reading thread
    on_end              is told once, on the reading thread, that the link has ended, and why; no
                        frame comes after that
    hold_back           asked before each frame is read, with the bytes that wait to be sent; while
                        it says True nothing is read
    """

    def __init__(
        self,
        name: str,
        incoming: Any,
        outgoing: Any,
        frame_max: int,
        on_frame: Callable[[memoryview], None],
        on_end: Callable[[str], None],
        hold_back: Callable[[int], bool] = lambda unsent: False,
    ) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._frame_max = frame_max
        self._on_frame, self._on_end, self._hold_back = on_frame, on_end, hold_back
        self._queue: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unsent = 0
        self._ended = threading.Event()
        self._why = ""
        self._threads = [
            threading.Thread(target=run, name=f"{name}-{role}", daemon=True)
            for role, run in (("reader", self._read), ("writer", self._write))
        ]

    def start(self) -> None:
        """Begin to carry frames."""
        for thread in self._threads:
            thread.start()

    def send(self, frame: Frame) -> None:
        """Queue a frame; never blocks. One that the link ends before sending is lost."""
        if self._queue.qsize() >= _QUEUED_FRAMES_MAX:
            self.close("the other side does not read")
            return
        with self._lock:
            self._unsent += len(frame)
        self._queue.put(frame)

    @property
    def unsent(self) -> int:
        """Bytes of frames that were queued and have not been handed to the system."""
        return self._unsent

    def close(self, why: str) -> None:
        """End the link. Frames that wait are lost. Harmless the second time."""
        with self._lock:
            if self._ended.is_set():
                return
            self._why = why
            self._ended.set()
        self._queue.put(None)
        for connection in (self._incoming, self._outgoing):
            # Wakes a thread that is blocked in it; TLS's own closing exchange would wait. Of the
            # socket, not of TLS: after SSLSocket.shutdown that object would go on in plain text.
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _read(self) -> None:
        why = "it cannot be read"
        try:
            while self._may_read() and self._read_frame():
                pass
            why = "the other side closed the connection"
        except ProtocolError as error:
            why = str(error)
        except OSError as error:
            why = f"connection lost ({type(error).__name__})"
        finally:
            self.close(why)
            self._incoming.close()
            self._on_end(self._why)

    def _may_read(self) -> bool:
        """Wait until it is time for the next frame; False where the link has ended."""
        while self._hold_back(self._unsent):
            if self._ended.wait(_HELD_BACK_S):
                return False
        return not self._ended.is_set()

    def _read_frame(self) -> bool:
        """Hand over one frame; False where the stream or the link ended before it."""
        header = memoryview(bytearray(HEADER_BYTES))
        if not self._fill(header, 0):
            return False
        size = HEADER_BYTES + announced_bytes(header)
        if size > self._frame_max:
            raise ProtocolError(f"a frame of {size} bytes; at most {self._frame_max} can be right")
        # Not a bytearray, which would be filled with zeros, and so take its memory, at once.
        frame = np.empty(size, np.uint8).data
        frame[:HEADER_BYTES] = header
        self._fill(frame, HEADER_BYTES)
        if self._ended.is_set():  # what its socket still holds of a link that was given up
            return False
        self._on_frame(frame)
        return True

    def _fill(self, frame: memoryview, place: int) -> bool:
        """Read the rest of a frame; False where the stream ended before the frame began."""
        while place < len(frame):
            got = self._incoming.recv_into(frame[place : place + _READ_BYTES])
            if not got and place == 0:
                return False
            if not got:
                raise ProtocolError("the connection ended within a frame")
            place += got
        return True

    def _write(self) -> None:
        try:
            while (frame := self._queue.get()) is not None:
                if isinstance(frame, LocalFrame):
                    raise TypeError("a payload on a device cannot leave the process")
                self._outgoing.sendall(frame)
                with self._lock:
                    self._unsent -= len(frame)
        except OSError as error:
            self.close(f"connection lost ({type(error).__name__})")
        finally:
            self._outgoing.close()
