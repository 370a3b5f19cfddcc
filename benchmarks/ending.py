"""How a benchmark ends that is told to: with all that it has started, which would be in the way of the next one."""

import signal
import sys
from types import FrameType


def exit_at_sigterm() -> None:
    """Let SIGTERM, which `timeout` and schedulers send, end the program as an exception does: processes are ended.

    A second one, such as follows where the whole group of processes is meant, does not disturb that.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
