"""Ctrl-C, wherever it arrives.

Python raises KeyboardInterrupt in whatever runs. While an extension is imported it becomes an ImportError, and in the
callbacks of garbage collection, such as JAX's, it is dropped.
"""

import os
import signal
import sys
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Timer, current_thread, main_thread
from typing import Any, NoReturn

STATUS = 130
"""Exit status of an interrupted command."""

AGAIN_SECONDS = 0.2
"""Time after which a dropped KeyboardInterrupt is raised again."""

_asked = Event()


def asked() -> bool:
    """Whether the user has pressed Ctrl-C since `raising` began."""
    return _asked.is_set()


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the process at once: for imports, which leave nothing behind."""

    def end(*_: Any) -> None:
        tell(resumes=False)
        leave()

    with _handling(end):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, and again where Python has dropped it."""
    _asked.clear()
    report = sys.unraisablehook

    def remember(*_: Any) -> None:
        _asked.set()
        raise KeyboardInterrupt

    def raise_again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Later: here it would be dropped too.
            timer = Timer(AGAIN_SECONDS, interrupt_main)
            timer.daemon = True
            timer.start()
        else:
            report(unraisable)

    with _handling(remember):
        sys.unraisablehook = raise_again
        try:
            yield
        finally:
            sys.unraisablehook = report


@contextmanager
def _handling(handler: Callable[..., None]) -> Iterator[None]:
    """Handles Ctrl-C, unless it is ignored, as in the background, or threads other than the main one run this."""
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tell(*, resumes: bool) -> None:
    """Says on standard error that the command was interrupted, and whether the same command resumes its work."""
    print(f"interrupted{', the same command resumes' * resumes}", file=sys.stderr, flush=True)


def leave() -> NoReturn:
    """Ends the process; an ordinary exit would fail where JAX's threads still compute, and may wait for them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # closed, as by `head`
            stream.flush()
    os._exit(STATUS)
