"""Lets SIGTERM end a benchmark with all processes it has started, which would disturb the next benchmark."""

import signal
import sys
from types import FrameType


def exit_at_sigterm() -> None:
    """Let SIGTERM, which `timeout` and schedulers send, end the program like an exception.

    `finally` blocks then end its processes. Meanwhile further SIGTERMs are ignored, such as one that goes to the whole
    group of processes.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
