"""SIGINT (Ctrl-C), SIGTERM and SIGHUP (its terminal is closed): the step is finished and saved; a second signal ends at once.

In:  signals.  Out: `StopSignals.number`, which a run looks at between steps; anywhere else, `Stopped`, which ends the process
     with one line and the exit status of shells, 128 + the signal's number: 130, 143 and 129.
"""

import os
import signal
import stat
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
STOPPING = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))
ECHO = 3.0  # seconds in which torchrun passes on the signal that its ranks have got already, as from a terminal


class Stopped(SystemExit):
    """A signal that ends the process."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


def stop_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    if number == HANGUP:
        leave_terminal()
    raise Stopped(number)


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does: with what stands in `finally`, and one line."""
    for number in answered():
        if number != signal.SIGINT:
            signal.signal(number, stop_at_once)


def answered() -> list[signal.Signals]:
    """The signals that this thread answers. SIGHUP is not among them under nohup, where the run goes on without a terminal."""
    return [number for number in STOPPING if in_main_thread() and not (
        number == HANGUP and signal.getsignal(number) == signal.SIG_IGN)]


def leave_terminal() -> None:
    """Write to nowhere in the place of a terminal: a closed one answers everything with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)


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
        self.before = {one: signal.signal(one, self.remember) for one in answered()}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def remember(self, number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            leave_terminal()
        if not self.number:
            self.number, self.came = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nfinishing this step, then saving; a second signal ends at once\n")  # print may be at work
        elif number != HANGUP and (not self.several or time.monotonic() - self.came > ECHO):  # shells pass SIGHUP on, too
            stop_at_once(number)
