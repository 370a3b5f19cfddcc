"""Runs an experiment: packs on Ray Tune, as many at once as the cluster can hold, recorded in MLflow as they go."""

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import torch
from ray import tune
from rich.console import Console

from loragrid.callback import RecordingCallback, SweepOutcome
from loragrid.comparison import Comparison, load_comparison
from loragrid.config import DataConfig, Experiment, ModelConfig
from loragrid.data import TokenizedData, load_data
from loragrid.driver import drive_pack
from loragrid.engine_choice import RequestedMode
from loragrid.environment import environment_tags
from loragrid.models import load_tokenizer
from loragrid.placement import Node, Placement, place
from loragrid.planning import Pack, Plan, plan
from loragrid.progress import SweepProgress
from loragrid.tracking import QUESTION_TAG, Recorder, default_tracking_uri

# What a Tune trial's process was seen to hold: Ray, torch and transformers imported, nothing loaded.
TUNE_TRIAL_BYTES = 500 * 2**20

CONNECT_SECONDS = 10.0
_HOST_AND_PORT = re.compile(r"[^:/]+:\d{1,5}")

TokenizedByConfig = Mapping[tuple[ModelConfig, DataConfig], TokenizedData]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A finished sweep: where it is recorded and how its trials ended."""

    plan: Plan
    name: str
    tracking_uri: str
    outcome: SweepOutcome

    @property
    def succeeded(self) -> bool:
        """Whether every trial of the plan finished."""
        return all(self.outcome.statuses.get(trial.trial_id) == "FINISHED" for trial in self.plan.trials)

    def comparison(self) -> Comparison:
        """The sweep as MLflow holds it."""
        return load_comparison(self.plan.experiment.name, self.tracking_uri, self.name)

    def to_pandas(self) -> pd.DataFrame:
        """One row per trial: how it ended, its axes, its figures."""
        return self.comparison().table


def run(
    experiment: Experiment, *, address: str | None = None, name: str | None = None, console: Console | None = None
) -> SweepResult:
    """Run every trial of the experiment and record it; a trial that fails leaves the others alone.

    `address` is a running Ray cluster's ("auto" finds the one of this machine); None uses the cluster this process is
    connected to or was submitted to (`RAY_ADDRESS`), and otherwise starts one for the sweep. `name` is the sweep's; by
    default the experiment's with the next free number.

    Raises:
        ValueError: the request cannot be carried out; nothing was started.
    """
    console = console or Console(quiet=True)
    the_plan = plan(experiment)
    tokenized = tokenize(the_plan, console)
    recorder = open_recorder(experiment)
    name = name or recorder.next_sweep_name()
    with connected_to_ray(address) as is_local:
        placement = place(experiment.workers, cluster_nodes())
        check_placement(experiment, placement, is_local, console)
        warn_of_slow_arithmetic(the_plan, placement, console)
        recorder.start_sweep(name, sweep_parameters(experiment), {QUESTION_TAG: experiment.question})
        packs = {pack.pack_id: pack for pack in the_plan.packs}
        with SweepProgress(len(packs), console) as progress:
            callback = RecordingCallback(
                recorder, lambda config, _: packs[config["pack"]], environment_tags(), progress
            )
            _tune_packs(
                packs, tokenized, placement, experiment.engine.mode, callback, storage_folder(experiment) / "ray", name
            )
    return SweepResult(plan=the_plan, name=name, tracking_uri=recorder.tracking_uri, outcome=callback.outcome)


def _tune_packs(
    packs: Mapping[str, Pack],
    tokenized: TokenizedByConfig,
    placement: Placement,
    engine_mode: RequestedMode,
    callback: RecordingCallback,
    storage: Path,
    name: str,
) -> None:
    # References: what lies in Ray's object store goes from there to the workers, and nowhere else.
    rows = {key: ray.put(data) for key, data in tokenized.items()}

    def train_pack(config: dict[str, Any], packs: Mapping[str, Pack], rows: Mapping[Any, Any]) -> None:
        pack = packs[config["pack"]]
        data = rows[(pack.trials[0].model, pack.trials[0].data)]
        drive_pack(pack, data, placement, str(storage / name), engine_mode=engine_mode)

    try:
        with quiet_tune():
            tune.Tuner(
                lightweight(tune.with_parameters(train_pack, packs=packs, rows=rows)),
                param_space={"pack": tune.grid_search(list(packs))},
                tune_config=tune.TuneConfig(max_concurrent_trials=max(1, placement.num_packs)),
                run_config=tune.RunConfig(name=name, storage_path=str(storage), callbacks=[callback], verbose=0),
            ).fit()
    finally:
        callback.close()


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Within, Tune writes no result files, tables and tracebacks: MLflow and the live display take their place."""
    switches = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    before = {name: os.environ.get(name) for name in switches}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(switches)
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


def lightweight(trainable: Any) -> Any:
    """A Tune trial that takes no CPU: it only waits for its `TorchTrainer`, whose workers bring their own resources.

    One that held a CPU could keep its own workers from ever being placed. Tune refuses a trial that takes nothing, so
    it takes the memory that its process uses.
    """
    return tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": TUNE_TRIAL_BYTES}]))


def tokenize(the_plan: Plan, console: Console) -> dict[tuple[ModelConfig, DataConfig], TokenizedData]:
    """The rows of every distinct model and data set of the plan; what was skipped is said."""
    tokenized: dict[tuple[ModelConfig, DataConfig], TokenizedData] = {}
    for trial in the_plan.trials:
        key = (trial.model, trial.data)
        if key in tokenized:
            continue
        data = load_data(trial.data, trial.model, load_tokenizer(trial.model))
        tokenized[key] = data
        skipped = "".join(f"; skipped {count}: {reason}" for reason, count in data.skipped.items() if count)
        console.print(
            f"data {trial.data.name}: {len(data.train)} rows to train on, {len(data.evaluation)} to evaluate{skipped}",
            highlight=False,
        )
    return tokenized


def open_recorder(experiment: Experiment) -> Recorder:
    """The MLflow experiment that this one is recorded in."""
    uri = default_tracking_uri(experiment.storage.path, experiment.tracking.uri)
    return Recorder(experiment.name, uri)


def storage_folder(experiment: Experiment) -> Path:
    """Where checkpoints and results lie, absolute: Ray's processes have working folders of their own."""
    return Path(experiment.storage.path).expanduser().resolve()


def sweep_parameters(experiment: Experiment) -> dict[str, object]:
    """The whole experiment, flat, as the parent run records it."""
    flat: dict[str, object] = {}
    for section, value in experiment.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            flat[section] = value
    return flat


@contextmanager
def connected_to_ray(address: str | None) -> Iterator[bool]:
    """Within, this process is connected to Ray; gives True when the cluster was started for it alone.

    Raises:
        ValueError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address and _HOST_AND_PORT.fullmatch(address):
            # Ray itself would try for ten minutes.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--address {address}: no Ray cluster answers there ({error})") from error
    try:
        yield address is None
    finally:
        ray.shutdown()


def cluster_nodes() -> list[Node]:
    """The machines of the connected cluster that are alive."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [Node(num_cpus=found.get("CPU", 0.0), num_gpus=found.get("GPU", 0.0)) for found in resources]
    return [node for node in nodes if node.num_cpus]


def check_placement(experiment: Experiment, placement: Placement, is_local: bool, console: Console) -> None:
    """Refuse on a fixed machine what it can never hold; on a cluster, which may grow, say that it must.

    Raises:
        ValueError: one pack's workers do not fit on this machine.
    """
    if placement.num_packs:
        return
    kind = "GPU" if placement.use_gpu else "CPU"
    need = f"{placement.num_workers} workers with {placement.cpus_per_worker:g} CPUs" + (
        " and a GPU each" if placement.use_gpu else " each"
    )
    if is_local:
        raise ValueError(
            f"workers: {experiment.workers.num_workers} workers do not fit on this machine: a pack needs {need}; "
            f"allowed: as many as there are {kind}s, or a cluster (--address)"
        )
    console.print(f"waiting for the cluster to grow: a pack needs {need}", style="yellow")


def warn_of_slow_arithmetic(the_plan: Plan, placement: Placement, console: Console) -> None:
    """Say that bfloat16 on a processor without it is many times slower than float32 (backward 47 times, on AVX2)."""
    on_cpu = not placement.use_gpu and any(trial.model.dtype == "bfloat16" for trial in the_plan.trials)
    capability = torch.backends.cpu.get_cpu_capability()
    if on_cpu and not capability.startswith(("AVX512", "SVE")):
        console.print(
            f"model.dtype: this processor ({capability}) has no bfloat16 arithmetic, steps will be many times slower "
            "than in float32; to use that: --set model.dtype=float32",
            style="yellow",
            highlight=False,
        )
