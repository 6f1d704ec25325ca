"""Ctrl-C and SIGTERM: the first one is a wish that the loop fulfils between steps, the second one ends the run at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was told to end. `code` is the exit code, 130 after Ctrl-C and 143 after SIGTERM, as shells count.

    The message is what a person should know; it is empty where there is nothing to say.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum

    @staticmethod
    def of(error: KeyboardInterrupt, message: str) -> "Interrupted":
        """`error` with a message, unless it has one."""
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        return Interrupted(signum, str(error) or message)

    @property
    def code(self) -> int:
        """The exit code."""
        return 128 + self.signum


class Stop:
    """Context manager: inside, the first signal sets `asked`, the second raises `Interrupted` wherever the program is."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = _install(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise Interrupted(signum)
        self.asked = signal.Signals(signum)
        # not print(): the program may be in the middle of one
        os.write(2, b"\nstopping after the step under way; a second time stops at once and drops it\n")


class Termination:
    """Context manager: inside, SIGTERM raises `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`: what is half done is cleared up."""

    def __enter__(self) -> Self:
        self._before = _install(_raise, signals=(signal.SIGTERM,))
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._before)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


def _install(handler: Any, signals: tuple[signal.Signals, ...] = _SIGNALS) -> dict[int, Any]:
    """The handlers there were. Other threads than the main one cannot have any, and leave signals as they are."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.signal(signum, handler) for signum in signals}


def _restore(handlers: dict[int, Any]) -> None:
    for signum, handler in handlers.items():
        # None: it was not installed from Python
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)
