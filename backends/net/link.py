"""Frames over two byte streams: one thread reads one of them, one thread writes the other.

An OpenSSL connection must not be read and written by two threads at once, so a link has a
connection for each direction. Frames go out whole and in order. What comes in is bounded before it
is kept: a header that announces more than `frame_max` ends the link, and a body takes memory only
as its bytes arrive.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from protocol.errors import ProtocolError
from protocol.messages import HEADER_BYTES, Frame, LocalFrame, announced_bytes

_READ_BYTES = 1 << 20
"""Asked of the socket at once: TLS gives one record of 16 KiB at most, plain TCP what there is."""
_QUEUED_FRAMES_MAX = 4096


class Link:
    """Two connected sockets as one link for frames.

    incoming, outgoing  connected, blocking sockets (TLS or not); the link closes them
    frame_max           bytes of the largest frame that is taken
    on_frame            is told of every frame, on the reading thread
    on_end              is told once that the link has ended, and why
    """

    def __init__(
        self,
        name: str,
        incoming: Any,
        outgoing: Any,
        frame_max: int,
        on_frame: Callable[[bytearray], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._frame_max = frame_max
        self._on_frame, self._on_end = on_frame, on_end
        self._queue: queue.Queue[Frame | None] = queue.Queue()
        self._ending = threading.Lock()
        self._ended = False
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
        self._queue.put(frame)

    @property
    def idle(self) -> bool:
        """Whether every frame that was queued has been handed to the system."""
        return not self._queue.unfinished_tasks

    def close(self, why: str) -> None:
        """End the link. Frames that wait are lost. Harmless the second time."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
        self._queue.put(None)
        for connection in (self._incoming, self._outgoing):
            # Wakes a thread that is blocked in it; TLS's own closing exchange would wait.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._on_end(why)

    def _read(self) -> None:
        try:
            while self._read_frame():
                pass
            self.close("the other side closed the connection")
        except ProtocolError as error:
            self.close(str(error))
        except OSError as error:
            self.close(f"connection lost ({type(error).__name__})")
        finally:
            self._incoming.close()

    def _read_frame(self) -> bool:
        """Hand over one frame; False where the stream ended before its first byte."""
        header = bytearray(HEADER_BYTES)
        if not self._fill(header, 0):
            return False
        size = HEADER_BYTES + announced_bytes(header)
        if size > self._frame_max:
            raise ProtocolError(f"a frame of {size} bytes; at most {self._frame_max} can be right")
        frame = bytearray(size)
        frame[:HEADER_BYTES] = header
        self._fill(frame, HEADER_BYTES)
        self._on_frame(frame)
        return True

    def _fill(self, frame: bytearray, place: int) -> bool:
        """Read the rest of a frame; False where the stream ended before the frame began."""
        view = memoryview(frame)
        while place < len(frame):
            got = self._incoming.recv_into(view[place : place + _READ_BYTES])
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
                self._queue.task_done()
        except OSError as error:
            self.close(f"connection lost ({type(error).__name__})")
        finally:
            self._outgoing.close()
