"""SIGINT (Ctrl-C) and SIGTERM: the step is finished and saved, and a second signal ends the process at once.

In:  signals.  Out: `StopSignals.number`, which a run looks at between steps; anywhere else, `Stopped`, which ends the process
     with one line and the exit status of shells, 128 + the signal's number: 130 and 143.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM)
ECHO = 3.0  # seconds in which torchrun passes on the signal that its ranks have got already, as from a terminal


class Stopped(SystemExit):
    """A signal that ends the process."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


def stop_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    raise Stopped(number)


def end_on_terminate() -> None:
    """Let SIGTERM end the process as Ctrl-C does: with what stands in `finally`, and one line."""
    if in_main_thread():
        signal.signal(signal.SIGTERM, stop_at_once)


def in_main_thread() -> bool:
    """Whether this thread may say what a signal does."""
    return threading.current_thread() is threading.main_thread()


def hide_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What is printed of an error that nothing has caught: of Ctrl-C one word, of a bug all that Python knows."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


class StopSignals:
    """While it is entered, the first signal is only remembered in `number` (0: none came).

    several   whether this is one of several ranks, which may get the same signal twice
    """

    def __init__(self, several: bool):
        self.several, self.number, self.came = several, 0, 0.0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if in_main_thread():
            self.before = {one: signal.signal(one, self.remember) for one in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def remember(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.came = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nfinishing this step, then saving; a second signal ends at once\n")  # print may be at work
        elif not self.several or time.monotonic() - self.came > ECHO:
            stop_at_once(number)
