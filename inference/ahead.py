"""Work ahead: an iterator runs in a thread of its own, a few items before they are needed.

Decoding and preparing pictures leave Python's lock most of the time, so they cost nothing while the
tower works on the chunk before.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

#: How long a thread that has an item too many waits before it looks whether anyone still wants it.
_PATIENCE_SECONDS = 0.1


def ahead(items: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """Yield what ``items`` yields, in order, while a thread already makes the next ones.

    What ``items`` raises is raised here, after everything it yielded before. The thread ends with
    the iteration, also where that is given up before its end.

    Parameters
    ----------
    items : iterated in the thread, and closed there.
    depth : most items that wait; one more may be in the making.
    """
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    given_up = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not given_up.is_set():
            try:
                waiting.put((kind, value), timeout=_PATIENCE_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if not put("item", item):
                    break
            else:
                put("end", None)
        # Whatever it is, it belongs to the one who iterates.
        except BaseException as error:
            put("error", error)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="flexselect-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
            # Not held here while the next one is waited for.
            del value
    finally:
        given_up.set()
        thread.join()
