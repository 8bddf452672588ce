"""Makes Ctrl-C stop a command at any time, and never with a traceback."""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

STATUS = 130
_MOMENT = 0.01  # seconds, by which the code that passes errors over has returned


def end_at_once() -> None:
    """Let Ctrl-C end the process at once from now on, as no work is in progress that needs a message."""
    if _listens():
        signal.signal(signal.SIGINT, lambda *_: os._exit(STATUS))


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, even if it arrives in code whose errors Python ignores.

    Such code, as callbacks of the garbage collector, prints "Exception ignored" and the work goes on. Here the
    interrupt is sent again until it is heard.

    Raises:
      KeyboardInterrupt: at the end, if it came too late to be raised before.
    """
    if not _listens():
        yield
        return
    pending = False

    def note(*_):
        nonlocal pending
        pending = True
        raise KeyboardInterrupt

    def again(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(_MOMENT, _thread.interrupt_main).start()
        else:
            before_hook(unraisable)

    before, before_hook = signal.signal(signal.SIGINT, note), sys.unraisablehook
    sys.unraisablehook = again
    try:
        yield
        if pending:
            raise KeyboardInterrupt
    finally:
        sys.unraisablehook = before_hook
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C without remembering it, for code that goes on afterwards."""
    if not _listens():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _listens() -> bool:
    """Return whether a handler can be set here, and the process was not started with Ctrl-C switched off."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)
