"""Describes why a queue's workers were given up: finds the original error inside Ray's wrappers."""

import traceback
from collections.abc import Iterator

from loragrid.sweep.ray_internals import memory_at_kill
from loragrid.training.determinism import name_missing_kernel
from loragrid.trials.outcome import OUT_OF_MEMORY
from loragrid.worker.messages import QueueFailure


def describe_failure(error: BaseException | None) -> QueueFailure:
    """The reason and the traceback of an error raised by Ray's workers or by the Tune trial that started them."""
    causes = list(_causes(error))
    text = "" if error is None else "".join(traceback.format_exception(error))
    memory = next((found for cause in causes if (found := memory_at_kill(str(cause))) is not None), None)
    if memory is not None:
        reason = f"{OUT_OF_MEMORY}: Ray ended the workers, because their machine {memory}"
        return QueueFailure(reason=reason, traceback=text, out_of_memory=True)
    return QueueFailure(reason=_innermost(causes), traceback=text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the causes nested in it, innermost last."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        failures = getattr(error, "worker_failures", None)
        nested = next(iter(failures.values()), None) if failures else None
        error = nested or getattr(error, "cause", None) or error.__cause__


def _innermost(causes: list[BaseException]) -> str:
    """The innermost cause in one line, without Ray's wrapping."""
    for cause in reversed(causes):
        text = str(cause).strip()
        if text:
            # Ray's wrappers hold the remote traceback as text; its last line is the exception itself.
            return name_missing_kernel(text.splitlines()[-1])
    return "unknown"
