"""Ctrl-C and SIGTERM, held back until a step is whole."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

_SECONDS = 2.0  # Ctrl-C under torchrun comes twice at once: from the terminal, and from torchrun


class Interrupts:
    """While it is entered, SIGINT and SIGTERM wait: an exception in the middle of an optimizer's step would leave a
    state that is neither the old nor the new one.

    A signal that Python code does not handle (SIGTERM, unless the command line or a caller has set a handler) is left
    as it is, and so are all outside the main thread. A second signal, two seconds later or more, does not wait.

    Attributes:
        pending: whether one waits.
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
        """Raise what the signal's own handler raises, with a note; of one that came to another process, Ctrl-C's."""
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
            if signal.getsignal(number) == self._hold:  # else the handler that has been called has set another one
                signal.signal(number, handler)
        if self.pending and error is None and self._first is not None:
            self._before[self._first](self._first, None)
