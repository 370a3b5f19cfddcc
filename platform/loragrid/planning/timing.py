"""The measured times of packs by shape, and the file that keeps calibrated times."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loragrid.config.experiment import EngineConfig
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial

SHAPE_TAG = "loragrid.pack.shape"
CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class PackTiming:
    """The times of one pack on one device, in seconds.

    source: "calibrated", or the sweep that measured the times. mode: how the steps were run; "auto" can choose another
    mode for another number of steps. load: loading the base. setup: adapters, optimizer, batches. measure: the solo
    measurements of its members. startup: the time of the first steps beyond that of later ones (kernels, compiling).
    step: one optimizer step. evaluation: one pass over all evaluation rows. problem: why the times are unknown; "" if
    they are known.
    """

    source: str
    mode: str = "eager"
    load: float = 0.0
    setup: float = 0.0
    measure: float = 0.0
    startup: float = 0.0
    step: float = 0.0
    evaluation: float = 0.0
    problem: str = ""

    def seconds(self, pack: Pack) -> float | None:
        """The time of a pack without `load` and `measure`, which packs on the same workers share; None if unknown."""
        if self.problem:
            return None
        training, data = pack.trials[0].training, pack.trials[0].data
        tests = data.num_test / data.num_eval
        evaluations = num_evaluations(training.num_steps, training.eval_every, len(pack.trials), tests)
        return self.setup + self.startup + training.num_steps * self.step + evaluations * self.evaluation


def num_evaluations(steps: int, every: int | None, num_members: int, test_per_eval_row: float = 0.0) -> float:
    """The number of passes of all members over the evaluation rows.

    The evaluation of the bare base at the start counts as one member's share of a pass. The evaluation of the test rows
    after the last step counts by their ratio to the evaluation rows, `test_per_eval_row`.
    """
    regular = steps // every if every else 0
    at_the_end = 0 if every and steps % every == 0 else 1
    return regular + at_the_end + 1 / num_members + test_per_eval_row


def pack_shape(trials: Sequence[Trial], engine: EngineConfig, num_workers: int = 1, *, shard: bool = False) -> str:
    """A digest that is equal for packs with equal times per step on equal hardware.

    It does not depend on learning rates, seeds or the number of steps. engine: how the steps are run. shard: whether
    each worker holds a share of the base instead of the whole base.
    """
    first, training = trials[0], trials[0].training
    members = sorted(str((trial.method.stack_key(), trial.method.peft_config().get("r"))) for trial in trials)
    sections = [section.model_dump(mode="json") for section in (first.model, first.data, engine)]
    settings = [training.batch_size, training.micro_batch_size, training.activation_checkpointing]
    settings += [training.measure_steps, num_workers, shard]
    text = json.dumps([sections, settings, members])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cost_shape(trial: Trial) -> str:
    """A digest that is equal for trials with equal costs on equal hardware, which are measured once.

    LoRA+ and LoRA have one shape, because only their learning rates differ.
    """
    member = str((trial.method.stack_key(), trial.method.peft_config().get("r")))
    sections = [section.model_dump(mode="json") for section in (trial.model, trial.data)]
    training = trial.training
    settings = [training.batch_size, training.micro_batch_size, training.activation_checkpointing]
    return hashlib.sha256(json.dumps([sections, settings, member]).encode()).hexdigest()[:16]


def save_timings(folder: Path, device: str, timings: Mapping[str, PackTiming]) -> None:
    """Add calibrations (by pack shape) to the file in the storage folder; other shapes and devices are kept."""
    known = _read(folder)
    known.setdefault(device, {}).update({shape: asdict(timing) for shape, timing in timings.items()})
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=folder, prefix=CALIBRATION_FILE)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(known, file, indent=2)
    Path(unfinished).rename(folder / CALIBRATION_FILE)


def saved_timings(folder: Path, device: str) -> dict[str, PackTiming]:
    """The calibrations of a device (see `device_of`) by pack shape; empty if another version wrote the file."""
    try:
        return {shape: PackTiming(**fields) for shape, fields in _read(folder).get(device, {}).items()}
    except (AttributeError, TypeError, ValueError):
        return {}


def _read(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    file = folder / CALIBRATION_FILE
    known: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return known
