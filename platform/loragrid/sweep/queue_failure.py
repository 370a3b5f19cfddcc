"""Why a queue's workers were given up: the cause inside what Ray wraps around it."""

import re
import traceback
from collections.abc import Iterator

from loragrid.training.determinism import name_missing_kernel
from loragrid.trials.outcome import OUT_OF_MEMORY
from loragrid.worker.messages import QueueFailure

# How Ray says that it ended processes because their machine was nearly full; there is no field for it.
_ENDED_FOR_MEMORY = "due to the node running low on memory"
_MEMORY_USED = re.compile(r"was ([\d.]+ ?GB)(?: used)? / ([\d.]+ ?GB)")


def describe_failure(error: BaseException | None) -> QueueFailure:
    """What Ray's workers, or the trial that started them, raised."""
    causes = list(_causes(error))
    text = "" if error is None else "".join(traceback.format_exception(error))
    out_of_memory = next((str(cause) for cause in causes if _ENDED_FOR_MEMORY in str(cause)), None)
    if out_of_memory is not None:
        return QueueFailure(reason=_out_of_memory_reason(out_of_memory), traceback=text, out_of_memory=True)
    return QueueFailure(reason=_innermost(causes), traceback=text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what lies below it, the innermost cause last."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        failures = getattr(error, "worker_failures", None)
        nested = next(iter(failures.values()), None) if failures else None
        error = nested or getattr(error, "cause", None) or error.__cause__


def _innermost(causes: list[BaseException]) -> str:
    """In one line, without Ray's wrapping."""
    for cause in reversed(causes):
        text = str(cause).strip()
        if text:
            # Ray's own wrappers carry the remote traceback as text, whose last line is the exception itself.
            return name_missing_kernel(text.splitlines()[-1])
    return "unknown"


def _out_of_memory_reason(text: str) -> str:
    used = _MEMORY_USED.search(text)
    full = f"had {used[1]} of {used[2]} in use" if used else "was nearly full"
    return f"{OUT_OF_MEMORY}: Ray ended the workers, whose machine {full}"
