"""Ctrl-C and SIGTERM, held back until a step is complete."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

_SECONDS = 2.0  # under torchrun Ctrl-C arrives twice at once: from the terminal, and from torchrun


class Interrupts:
    """A context manager that holds back SIGINT and SIGTERM: an exception in the middle of an optimizer's step would
    leave a state that is neither the old nor the new one.

    A signal without a Python handler (SIGTERM, unless the command line or a caller has set one) is left alone, and
    outside the main thread all signals are. A second signal, two seconds later or more, is not held back.

    Attributes:
        pending: whether a signal is held back.
    """

    def __enter__(self) -> Interrupts:
        self.pending = False
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._first: int | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):
                    self._before[number] = handler
                    signal.signal(number, self._hold)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.pending and time.monotonic() > self._since + _SECONDS:
            self._before[number](number, frame)
        elif not self.pending:
            self.pending, self._first, self._since = True, number, time.monotonic()

    def end(self, note: str) -> NoReturn:
        """Raise what the signal's own handler raises, with a note; KeyboardInterrupt if another process got it."""
        number, self.pending = self._first, False
        try:
            if number is not None:
                self._before[number](number, None)
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            error.add_note(note)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._hold:  # else the handler, once called, has set another
                signal.signal(number, handler)
        if self.pending and error is None and self._first is not None:
            self._before[self._first](self._first, None)
