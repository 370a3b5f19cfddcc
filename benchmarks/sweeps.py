"""Runs a sweep in its own process, on a given number of this machine's GPUs or CPU workers, with a deadline.

Benchmarks call `run_sweep`, which starts the process as `python -m benchmarks.sweeps FOLDER ...`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
import yaml

EXPERIMENT, OUTCOME, STORE = "experiment.yaml", "outcome.json", "store"
POLL_SECONDS = 0.05
_LINE = re.compile(r"\[[^\]]*\] (\S+): (.*)")


class SweepFailedError(RuntimeError):
    """A sweep did not end, or not all of its trials finished."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A sweep whose trials have all finished. Times are seconds since the start of its process.

    lines: (time, pack, text), as `loragrid run` prints them. table: one row per trial, as in `SweepResult.to_pandas`.
    started: the Unix time of the process's start.
    """

    tracking_uri: str
    name: str
    started: float
    seconds: float
    lines: list[tuple[float, str, str]]
    table: list[dict[str, Any]]

    def training(self) -> dict[str, tuple[float, float]]:
        """Pack -> (start, end) of its training, including compilation in the first steps and the work at its end."""
        begun: dict[str, float] = {}
        ended: dict[str, float] = {}
        for seconds, pack, text in self.lines:
            if text == "training":
                begun.setdefault(pack, seconds)
            elif text.startswith("done"):
                ended[pack] = seconds
        return {pack: (start, ended[pack]) for pack, start in begun.items() if pack in ended}

    def training_seconds(self) -> float:
        """Seconds from the first pack's first step to the last pack's end.

        Raises:
            SweepFailedError: no pack reported that it trained.
        """
        spans = self.training().values()
        if not spans:
            raise SweepFailedError("no pack reported when it trained")
        return max(end for _, end in spans) - min(start for start, _ in spans)

    def num_queues(self) -> int:
        """The number of sets of workers that were started."""
        return sum(text.endswith("starting workers") for _, _, text in self.lines)

    def most_at_once(self) -> int:
        """The largest number of packs that trained at the same time."""
        spans = self.training().values()
        return max((sum(start <= begun < end for start, end in spans) for begun, _ in spans), default=0)


def run_sweep(
    experiment: Mapping[str, Any],
    folder: Path,
    *,
    device: str,
    num_places: int,
    cpus_per_place: int,
    timeout_seconds: float,
    watch: Callable[[psutil.Process], None] = lambda process: None,
) -> Outcome:
    """Run an experiment (the contents of its file) with its storage in `folder`, which must not exist yet.

    The process sees `num_places` GPUs (none on a CPU), `num_places * cpus_per_place` CPUs, and an empty cache of
    compiled code. `watch` is called with the process repeatedly while it runs. Afterwards no process is left.

    Raises:
        SweepFailedError: the process did not end in time, or a trial did not finish.
    """
    folder.mkdir(parents=True)
    storage = {"storage": {"path": str(folder / STORE)}}
    (folder / EXPERIMENT).write_text(yaml.safe_dump({**experiment, **storage}), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.sweeps", str(folder), "--device", device]
    command += ["--places", str(num_places), "--cpus", str(cpus_per_place), "--since", str(time.time())]
    root = Path(__file__).parent.parent
    paths = [str(root / "platform"), str(root / "methods"), str(root)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        # Otherwise, of sweeps that are compared, the later ones would find code that the first has compiled.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[:num_places]) if device == "cuda" else "",
    }
    environment.pop("RAY_ADDRESS", None)
    deadline = time.monotonic() + timeout_seconds
    started = subprocess.Popen(command, env=environment, start_new_session=True)
    process = psutil.Process(started.pid)
    try:
        while started.poll() is None:
            if time.monotonic() > deadline:
                raise SweepFailedError(f"not finished after {timeout_seconds:g} s")
            watch(process)
            time.sleep(POLL_SECONDS)
    finally:
        _end(started, process)
    if started.returncode:
        raise SweepFailedError(_reason(folder) or f"its process has ended with code {started.returncode}")
    found = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    found["lines"] = [(seconds, pack, text) for seconds, pack, text in found["lines"]]
    return Outcome(**found)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def check_places(device: str, most: int) -> None:
    """Refuse more GPUs than this machine has.

    Raises:
        ValueError: there are not enough GPUs.
    """
    found = len(visible_gpus()) if device == "cuda" else most
    if most > found:
        raise ValueError(f"{most} GPUs were requested, but this machine has {found}; allowed: at most {found}")


def share_of_cpus(most_places: int) -> int:
    """The CPUs of each place if all places are in use; a single place gets no more, which keeps runs comparable."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    num_cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, num_cpus // most_places)


def _end(started: "subprocess.Popen[bytes]", process: psutil.Process) -> None:
    """Kill the process and everything that it has started, if it still runs."""
    if started.poll() is not None:
        return
    try:
        children = process.children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    for each in [process, *children]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    started.wait()


def _reason(folder: Path) -> str:
    """The reason of the first trial that did not finish; "" if none is known."""
    path = folder / OUTCOME
    if not path.exists():
        return ""
    rows = json.loads(path.read_text(encoding="utf-8"))["table"]
    return next((f"{row['trial_id']}: {row['reason']}" for row in rows if row["status"] != "FINISHED"), "")


class _TimedLines:
    """A text stream that passes on what is written, and records (time, pack, text) of every line about a pack."""

    def __init__(self, stream: TextIO, since: float) -> None:
        self.lines: list[tuple[float, str, str]] = []
        self._stream, self._since, self._rest = stream, since, ""

    def write(self, text: str) -> int:
        now = time.time() - self._since
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if found := _LINE.fullmatch(line.strip()):
                self.lines.append((now, found[1], found[2]))
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


def main() -> None:
    """The sweep's process: run the experiment on its own Ray, and write the outcome into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--places", type=int, required=True)
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--since", type=float, required=True, help="Unix time from which seconds count")
    options = parser.parse_args()

    import logging

    import ray
    from rich.console import Console

    import loragrid as lg

    num_gpus = options.places if options.device == "cuda" else 0
    experiment = lg.load_experiment(options.folder / EXPERIMENT)
    ray.init(
        address="local",
        num_cpus=options.places * options.cpus,
        num_gpus=num_gpus,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    lines = _TimedLines(sys.stdout, options.since)
    console = Console(file=lines, width=200, force_terminal=False)  # type: ignore[arg-type]  # all that it uses is there
    result = lg.run(experiment, console=console)
    table = result.to_pandas()
    outcome = Outcome(
        tracking_uri=result.tracking_uri,
        name=result.name,
        started=options.since,
        seconds=time.time() - options.since,
        lines=lines.lines,
        table=json.loads(table.to_json(orient="records")),
    )
    (options.folder / OUTCOME).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    ray.shutdown()
    sys.exit(0 if result.succeeded else 1)


if __name__ == "__main__":
    main()
