"""What a trial's numbers depend on beside its parameters, read from its tags, and where a sweep's trials differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loragrid.formatting import count_of

if TYPE_CHECKING:  # workers name their tags after this module, and read no comparison
    from loragrid.comparison.table import Comparison
from loragrid.trials.tags import CHANGES_TAG, DEVICE_TAG, DIRTY_TAG

Bearing = Literal["results", "speed", "neither"]
"""What differs where a part does: losses and scores (and with them everything), times and memory alone, or nothing."""
BEFORE_PREFIX = "loragrid.before."
"""Before a part's tag: its value under which a trial began, where it went on under another."""


@dataclass(frozen=True, kw_only=True)
class FingerprintPart:
    """One thing that identifies how numbers came about.

    name: in the words of a sentence, "ran with <name> <value>". given_by: sections of an experiment that may change it
    on purpose: trials are only held against those that have equal axes there.
    """

    tag: str
    name: str
    bearing: Bearing
    given_by: tuple[str, ...] = ()


# Which differences matter. `results`: other kernels, other arithmetic, other code, other inputs. `speed`: a driver and
# an engine choose when kernels run, cores and threads how long they take: losses move by rounding at most. `neither`:
# what only carries things about (rows are identified by their digest, whatever library read them).
PARTS: tuple[FingerprintPart, ...] = (
    FingerprintPart(tag="mlflow.source.git.commit", name="commit", bearing="results"),
    FingerprintPart(tag=CHANGES_TAG, name="uncommitted changes", bearing="results"),
    FingerprintPart(tag="loragrid.version.loragrid", name="loragrid", bearing="results"),
    FingerprintPart(tag="loragrid.version.torch", name="torch", bearing="results"),
    FingerprintPart(tag="loragrid.version.cuda", name="CUDA", bearing="results"),
    FingerprintPart(tag="loragrid.version.transformers", name="transformers", bearing="results"),
    FingerprintPart(tag=DEVICE_TAG, name="device", bearing="results"),
    FingerprintPart(tag="loragrid.gpu.capability", name="compute capability", bearing="results"),
    FingerprintPart(tag="loragrid.precision.float32_matmul", name="float32 matmul precision", bearing="results"),
    FingerprintPart(tag="loragrid.precision.tf32", name="tf32", bearing="results"),
    FingerprintPart(tag="loragrid.precision.reduced_bfloat16_sums", name="reduced bfloat16 sums", bearing="results"),
    FingerprintPart(tag="loragrid.deterministic", name="deterministic algorithms", bearing="results"),
    FingerprintPart(tag="loragrid.workers", name="workers", bearing="results"),
    FingerprintPart(tag="loragrid.model.revision", name="model revision", bearing="results", given_by=("model.",)),
    FingerprintPart(tag="loragrid.model.weights", name="weights", bearing="results", given_by=("model.",)),
    FingerprintPart(tag="loragrid.model.dtype", name="dtype", bearing="results", given_by=("model.",)),
    FingerprintPart(tag="loragrid.data.digest", name="rows", bearing="results", given_by=("model.", "data.")),
    FingerprintPart(tag="loragrid.engine", name="engine", bearing="speed"),
    FingerprintPart(tag="loragrid.gpu.driver", name="driver", bearing="speed"),
    FingerprintPart(tag="loragrid.cpu.num_cores", name="cores", bearing="speed"),
    FingerprintPart(tag="loragrid.threads", name="threads", bearing="speed"),
    FingerprintPart(tag="loragrid.version.python", name="Python", bearing="speed"),
    FingerprintPart(tag="loragrid.version.ray", name="Ray", bearing="neither"),
    FingerprintPart(tag="loragrid.version.mlflow", name="MLflow", bearing="neither"),
    FingerprintPart(tag="loragrid.version.datasets", name="datasets", bearing="neither"),
    FingerprintPart(tag="loragrid.system", name="system", bearing="neither"),
    FingerprintPart(tag="loragrid.gpu", name="GPUs beside the sweep's program", bearing="neither"),
)
DECODING_PREFIX = "loragrid.decoding"
"""How answers are generated, a tag or several: every one decides on results."""

NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True)
class FingerprintRow:
    """One part of a sweep's fingerprint: value -> its trials, the value of most trials first; "" where none has it.

    minority: trial id -> (its value, that of most trials it is held against).
    """

    part: FingerprintPart
    values: Mapping[str, tuple[str, ...]]
    minority: Mapping[str, tuple[str, str]]

    @property
    def is_mixed(self) -> bool:
        """Whether trials differ that should not."""
        return bool(self.minority)


@dataclass(frozen=True, kw_only=True)
class FingerprintReport:
    """The fingerprint of a sweep. rows: of every part that any trial has. num_trials: those that workers have begun."""

    rows: tuple[FingerprintRow, ...]
    num_trials: int
    num_dirty: int

    @property
    def mixed(self) -> tuple[FingerprintRow, ...]:
        """The parts that make the trials' results incomparable."""
        return tuple(row for row in self.rows if row.is_mixed and row.part.bearing == "results")

    @property
    def marked(self) -> dict[str, str]:
        """Trial id -> what sets it apart from most others: "ran with torch 2.11, the others with 2.13"."""
        told: dict[str, list[str]] = {}
        for row in self.mixed:
            for trial_id, (own, others) in row.minority.items():
                told.setdefault(trial_id, []).append(f"{row.part.name} {_short(own)}, the others with {_short(others)}")
        return {trial_id: f"ran with {'; with '.join(parts)}" for trial_id, parts in told.items()}

    def marked_together(self) -> dict[str, tuple[str, ...]]:
        """The sentences of `marked` -> the trials that share them."""
        return _by_value(self.marked)

    def sentences(self) -> list[str]:
        """What a reader must know before the table; nothing of a sweep whose fingerprint is one and clean."""
        found = []
        if self.mixed:
            parts = "; ".join(f"{row.part.name} {_values(row)}" for row in self.mixed)
            found.append(f"mixed fingerprints: trials differ in more than their settings: {parts}")
        speed = [row for row in self.rows if row.is_mixed and row.part.bearing == "speed"]
        if speed:
            parts = "; ".join(f"{row.part.name} {_values(row)}" for row in speed)
            found.append(f"times and memory are not like for like: {parts}")
        if self.num_dirty:
            what = (
                "all trials"
                if self.num_dirty == self.num_trials
                else f"{self.num_dirty} of {count_of(self.num_trials, 'trial')}"
            )
            found.append(f"dirty working tree: {what} ran code that no commit holds")
        return found

    def to_dict(self) -> dict[str, object]:
        """As JSON can hold it."""
        return {
            "sentences": self.sentences(),
            "marked": self.marked,
            "parts": [
                {"part": row.part.name, "tag": row.part.tag, "bearing": row.part.bearing, "values": row.values}
                for row in self.rows
            ],
        }


def fingerprint_of(comparison: "Comparison") -> FingerprintReport:
    """The fingerprint of a comparison's trials, from the tags it has read; trials that no worker began are left out.

    A part that a finished trial lacks while others have it counts as a difference: nothing shows that they agree.
    """
    rows = {
        str(row["trial_id"]): row
        for row in comparison.table.to_dict("records")
        if row["status"] == "FINISHED" or DEVICE_TAG in comparison.tags.get(str(row["trial_id"]), {})
    }
    tags = {trial_id: comparison.tags.get(trial_id, {}) for trial_id in rows}
    decoding = sorted({key for own in tags.values() for key in own if key.startswith(DECODING_PREFIX)})
    extra = [
        FingerprintPart(
            tag=key,
            name=key.removeprefix("loragrid.").replace(".", " "),
            bearing="results",
            given_by=("data.", "model."),
        )
        for key in decoding
    ]
    found = []
    for part in (*PARTS, *extra):
        if any(_value(part, own) for own in tags.values()):
            axes = [name for name, path in comparison.axes.items() if path.startswith(part.given_by)]
            groups: dict[tuple[str, ...], list[str]] = {}
            for trial_id, row in rows.items():
                groups.setdefault(tuple(str(row[name]) for name in axes), []).append(trial_id)
            found.append(_row(part, {trial_id: _value(part, own) for trial_id, own in tags.items()}, groups.values()))
    dirty = sum(own.get(DIRTY_TAG) == "true" for own in tags.values())
    return FingerprintReport(rows=tuple(found), num_trials=len(rows), num_dirty=dirty)


def refuse_mixed(report: FingerprintReport) -> None:
    """Refuse a sweep whose trials' results are not comparable.

    Raises:
        ValueError: they differ in a part of the fingerprint that bears on results; the message names it, with trials.
    """
    if not report.mixed:
        return
    told = "; ".join(f"{trial_id} {what}" for trial_id, what in report.marked.items())
    raise ValueError(
        f"--strict: the sweep mixes fingerprints: {told}; allowed: a sweep whose trials agree in "
        f"{', '.join(row.part.name for row in report.mixed)} (train these trials again), or no --strict"
    )


def changes_on_the_way(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Tags that keep what a trial began under, where workers go on with it under another fingerprint."""
    if DEVICE_TAG not in before:
        return {}
    kept = {}
    for part in PARTS:
        own = before.get(part.tag)
        if part.bearing == "results" and part.tag in now and own not in (None, now[part.tag]):
            key = BEFORE_PREFIX + part.tag
            kept[key] = f"{before[key]}, then {own}" if key in before else str(own)
    return kept


def _value(part: FingerprintPart, tags: Mapping[str, str]) -> str:
    value, before = tags.get(part.tag, ""), tags.get(BEFORE_PREFIX + part.tag)
    if part.tag == CHANGES_TAG and not value:
        value = {"true": "some", "false": "none"}.get(tags.get(DIRTY_TAG, ""), "")
    return value if before is None else f"{before}, then {value}"


def _row(part: FingerprintPart, value_of: Mapping[str, str], groups: Iterable[Sequence[str]]) -> FingerprintRow:
    """The trials by value, most first (of as many, those that were started first); each group has its own majority."""
    minority: dict[str, tuple[str, str]] = {}
    for group in groups:
        by_value = _by_value({trial_id: value_of[trial_id] for trial_id in group})
        most = next(iter(by_value))
        minority |= {trial_id: (value, most) for value, ids in list(by_value.items())[1:] for trial_id in ids}
    return FingerprintRow(part=part, values=_by_value(value_of), minority=minority)


def _by_value(value_of: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for trial_id, value in value_of.items():
        found.setdefault(value, []).append(trial_id)
    ordered = sorted(found.items(), key=lambda entry: -len(entry[1]))
    return {value: tuple(ids) for value, ids in ordered}


def _values(row: FingerprintRow) -> str:
    return ", ".join(f"{_short(value)} ({count_of(len(ids), 'trial')})" for value, ids in row.values.items())


def _short(value: str) -> str:
    """Digests and commits by the digits that tell them apart at a glance."""
    if not value:
        return NOT_RECORDED
    words = [word[: len("sha256:") + 12] if word.startswith("sha256:") else word for word in value.split(" ")]
    return " ".join(word[:12] if len(word) == 40 and set(word) <= set("0123456789abcdef") else word for word in words)
