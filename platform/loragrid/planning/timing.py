"""How long packs of a shape take, and the file that keeps what was calibrated."""

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
    """Seconds of one pack on one device. source: "calibrated", or the sweep that has shown it.

    mode: how its steps were run, for what "auto" comes to depends on their number. load: of the base. setup: adapters,
    optimizer, batches. startup: beyond later steps, what the first ones took (kernels, compiling). step: one optimizer
    step. evaluation: one pass over all evaluation rows. measure: its members' shapes alone. None: `problem` says why
    there is no time.
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
        """All of a pack but loading and measuring, which packs on the same workers share; None where not known."""
        if self.problem:
            return None
        training, data = pack.trials[0].training, pack.trials[0].data
        tests = data.num_test / data.num_eval
        evaluations = num_evaluations(training.steps, training.eval_every, len(pack.trials), tests)
        return self.setup + self.startup + training.steps * self.step + evaluations * self.evaluation


def num_evaluations(steps: int, every: int | None, num_members: int, test_per_eval_row: float = 0.0) -> float:
    """Passes of all members over the evaluation rows; the bare base's own, at the start, is one member's part.

    The one look at the test rows, after the last step, counts by their number.
    """
    regular = steps // every if every else 0
    at_the_end = 0 if every and steps % every == 0 else 1
    return regular + at_the_end + 1 / num_members + test_per_eval_row


def pack_shape(trials: Sequence[Trial], engine: EngineConfig, num_workers: int = 1, *, shard: bool = False) -> str:
    """Equal for packs that take equally long on equal hardware, whatever their learning rates, seeds and steps.

    engine: how their steps are run. shard: each of the workers holds its share of the base, not the whole.
    """
    first, training = trials[0], trials[0].training
    members = sorted(str((trial.method.stack_key(), trial.method.peft_config().get("r"))) for trial in trials)
    sections = [section.model_dump(mode="json") for section in (first.model, first.data, engine)]
    settings = [training.batch_size, training.micro_batch_size, training.activation_checkpointing]
    settings += [training.measure_steps, num_workers, shard]
    text = json.dumps([sections, settings, members])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_timings(folder: Path, device: str, timings: Mapping[str, PackTiming]) -> None:
    """Keep calibrations, by pack shape, in the storage folder, beside those of other shapes and devices."""
    known = _read(folder)
    known.setdefault(device, {}).update({shape: asdict(timing) for shape, timing in timings.items()})
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=folder, prefix=CALIBRATION_FILE)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(known, file, indent=2)
    Path(unfinished).rename(folder / CALIBRATION_FILE)


def saved_timings(folder: Path, device: str) -> dict[str, PackTiming]:
    """The calibrations of a device (as `device_of` names it), by pack shape; none where another version wrote them."""
    try:
        return {shape: PackTiming(**fields) for shape, fields in _read(folder).get(device, {}).items()}
    except (AttributeError, TypeError, ValueError):
        return {}


def _read(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    file = folder / CALIBRATION_FILE
    known: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return known
