"""Everything that LoraGrid uses of Ray beyond its public interface, each with its reason.

No other module imports `ray.*._internal` or uses the names below. All of it was tried with Ray 2.60.0. To allow a newer
Ray, run the end-to-end tests of `tests/sweep` with it, then raise `FIRST_UNTRIED_RAY` here and the limit in
`pyproject.toml`. Private modules are imported inside functions; `check_ray_version` can then report an unsupported Ray
before such an import fails.
"""

import logging
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

OLDEST_RAY = (2, 60)
FIRST_UNTRIED_RAY = (2, 61)

STOP_TUNE = signal.SIGUSR1
"""The signal at which Tune stops its trials and returns.

Reason: Tune's own SIGINT handler does not report that it was called, and Tune has no SIGTERM handler. Ray documents
neither fact. If a later Ray drops this signal, an interrupted sweep ends with Python's default for SIGUSR1.
"""

_QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
_FETCH_REPORTS_EVERY_SECONDS = "0.1"
_ENDED_FOR_MEMORY = "due to the node running low on memory"
_MEMORY_USED = re.compile(r"was ([\d.]+ ?GB)(?: used)? / ([\d.]+ ?GB)")


ASK_HEAD = """
import sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
try:
    address = canonicalize_bootstrap_address(sys.argv[1])
    if address is None:
        raise ConnectionError("Could not find any running Ray on this machine")
    GcsClient(address=address)
except Exception as error:
    print(" ".join(str(error).split()))
    sys.exit(1)
"""
"""A program that asks whether the head of a cluster answers at an address.

Reason: `ray.init` waits for minutes for a head that does not answer, and then Ray's C++ code ends the whole process.
The command `ray health-check` does the same as this program, but Ray calls it no public interface either.
"""


def check_ray_version(version: str | None = None) -> None:
    """Refuse a Ray that this file was not tried with. `version`: the installed one by default.

    Raises:
        ValueError: the version is outside the supported range.
    """
    version = version or ray.__version__
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not OLDEST_RAY <= found < FIRST_UNTRIED_RAY:
        oldest, first_untried = (".".join(map(str, limit)) for limit in (OLDEST_RAY, FIRST_UNTRIED_RAY))
        raise ValueError(
            f"ray: version {version} is installed, LoraGrid supports ray>={oldest},<{first_untried}: "
            f'pip install "ray[default,train,tune]>={oldest},<{first_untried}"'
        )


def fetch_reports_often() -> None:
    """Let Train's controller fetch its workers' reports every 0.1 seconds, unless the user has set another interval.

    Reason: a worker waits until its report is fetched, and Ray's own interval of two seconds is longer than a step of
    most packs. Ray documents the variable only as the interval of health checks.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _FETCH_REPORTS_EVERY_SECONDS)


def send_address_to_controller() -> None:
    """Pass this cluster's address to Train's controller, which passes it to Train's cleaner.

    Reason: the cleaner frees the CPUs and GPUs of a stopped queue once the queue's controller is gone. By default it
    connects to the address that the last `ray start` on this machine wrote down. That can be another cluster: if two
    run here, or if the last one was killed. Ray has no setting for this; `ENV_VARS_TO_PROPAGATE` is a global of Ray.
    """
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def placement_release() -> Any:
    """A Train callback that releases the CPUs and GPUs of a queue's workers when its controller ends, however it ends.

    Reason: Train's controller ends its workers first, and releases nothing if that fails. It fails if Ray, on a machine
    short of memory, has also killed the small processes beside the workers. The resources would then be held until the
    whole program ends, and the next queue would wait forever. Ray promises only `UserCallback` in
    `RunConfig(callbacks=...)`, but accepts these two kinds as well. `placement_group_handle` is also private.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    class PlacementRelease(WorkerGroupCallback, ControllerCallback):
        def __init__(self) -> None:
            self._held: list[Any] = []

        def after_worker_group_start(self, worker_group: Any) -> None:
            self._held.append(worker_group.get_worker_group_state().placement_group_handle)

        async def before_controller_shutdown(self) -> None:
            while self._held:
                self._held.pop().shutdown()  # releasing twice is no error

    return PlacementRelease()


def error_of(tune_trial: Any) -> BaseException | None:
    """The exception that a Tune trial raised; None if it raised none.

    Reason: Tune's own accessor reads a copy of the file, which does not exist yet when a callback runs.
    """
    if tune_trial.pickled_error_file is None:
        return None
    error = cloudpickle.loads(Path(tune_trial.pickled_error_file).read_bytes())
    return error if isinstance(error, BaseException) else None


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Inside the `with` block Tune writes no result files, tables or tracebacks, and leaves SIGINT to LoraGrid.

    Reason: MLflow and the live display replace them. Ray promises neither the three variables nor the logger's name. If
    a later Ray drops them, only Tune's output and its own SIGINT handler return.
    """
    before = {name: os.environ.get(name) for name in _QUIET_TUNE}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_QUIET_TUNE)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_ray_command(command: Sequence[str]) -> bool:
    """Whether a process with this command line belongs to Ray.

    Reason: Ray does not list the processes that it starts. A path inside Ray's package identifies them. A process that
    is not recognised has one effect: a sweep ignores it when it checks whether its own Ray is ending too.
    """
    package = f"{Path(ray.__file__).parent}{os.sep}"
    return any(word.startswith(package) for word in command)


def memory_at_kill(message: str) -> str | None:
    """The memory use of a machine, read from Ray's message that it ended processes there; None for other messages.

    Reason: the error that Train passes on has no field for the memory use, only this text.
    """
    if _ENDED_FOR_MEMORY not in message:
        return None
    used = _MEMORY_USED.search(message)
    return f"had {used[1]} of {used[2]} in use" if used else "was nearly full"
