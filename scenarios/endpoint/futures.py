"""The queue of work, and results until they are asked for: one thread computes, many ask."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from backends.errors import UserError
from backends.net.owner import RemoteLinearError
from scenarios.endpoint.fields import RequestError

Answer = bytes | dict[str, Any]
"""A binary message, or a JSON object."""

_WAITING_MAX = 512
_WAITING_BYTES_MAX = 256 << 20
_DONE_MAX, _DONE_BYTES_MAX = 1024, 256 << 20


@dataclass
class Job:
    """Some work: what does it, and what came of it.

    size   bytes that it holds until it is done
    asked  whether anybody may ask what came of it
    """

    work: Callable[[], Answer]
    size: int = 0
    asked: bool = True
    done: threading.Event = field(default_factory=threading.Event)
    answer: Answer = field(default_factory=dict)


class Queue:
    """Jobs in the order in which they came.

    check  is called before and after each; what it raises is the job's result
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: deque[Job] = deque()
        self._undone = self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False

    def add(self, name: str, work: Callable[[], Answer], size: int = 0) -> None:
        """Put work in the queue, unless it is there already: whoever asks twice gets one result.

        Raises RequestError as `promise` does.
        """
        if not self.knows(name):
            self.promise(name, size)
            self.begin(name, work)

    def promise(self, name: str, size: int) -> None:
        """From now on who asks for this result waits for it; `begin` is to follow.

        size  bytes that it holds until it is done

        Raises RequestError (429, which the client takes for a reason to wait) when too much is
        waiting.
        """
        with self._changed:
            if self._undone >= _WAITING_MAX or self._bytes + size > _WAITING_BYTES_MAX:
                raise RequestError("too much is waiting here already; wait for some of it", 429)
            self._jobs[name] = Job(dict, size)
            self._undone += 1
            self._bytes += size

    def begin(self, name: str, work: Callable[[], Answer]) -> None:
        """Put the work of a result that was promised in the queue."""
        with self._changed:
            job = self._jobs[name]
            job.work = work
            self._waiting.append(job)
            self._changed.notify_all()

    def tidy(self, work: Callable[[], Answer]) -> None:
        """Put work in the queue that nobody asks for: it counts for nothing, and leaves nothing."""
        with self._changed:
            self._waiting.append(Job(work, asked=False))
            self._changed.notify_all()

    def knows(self, name: str) -> bool:
        """Whether a result of this name is here, or will be."""
        with self._changed:
            return name in self._jobs

    def find(self, name: str) -> Job:
        """Raises RequestError for one that is not here any more, or never was."""
        with self._changed:
            job = self._jobs.get(name)
        if job is None:
            raise RequestError(
                f"there is no such request; results of the last {_DONE_MAX} are kept", 404
            )
        return job

    def work(self) -> None:
        """Do what comes until `close`. To be called from one thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.popleft()
            job.answer = self._answer(job)
            if not job.asked:
                continue
            with self._changed:
                self._undone -= 1
                self._bytes -= job.size
                job.work = dict
                job.done.set()
                self._forget()

    def close(self) -> None:
        """End `work` after the job in hand."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _forget(self) -> None:
        """The oldest results, when there are too many, or too much."""
        count = size = 0
        for name, job in reversed(list(self._jobs.items())):
            if job.done.is_set():
                count += 1
                size += len(job.answer)
                if count > _DONE_MAX or (size > _DONE_BYTES_MAX and count > 1):
                    del self._jobs[name]

    def _answer(self, job: Job) -> Answer:
        try:
            self._check()
            found = job.work()
            self._check()
            return found
        except RequestError as error:
            return {"error": str(error), "category": "user"}
        except (UserError, RemoteLinearError, FloatingPointError) as error:
            return {"error": " ".join(str(error).split()), "category": "server"}
        except Exception as error:  # of any model's own code: the others go on
            # Where, and not what: a message may quote what it was given.
            where = "".join(traceback.format_tb(error.__traceback__))
            print(f"{where}{type(error).__name__}", file=sys.stderr)
            told = f"a defect ({type(error).__name__}); the endpoint's terminal says where"
            return {"error": told, "category": "server"}
