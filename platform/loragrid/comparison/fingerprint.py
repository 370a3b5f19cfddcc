"""Compares what the trials of a sweep ran on (code, versions, hardware, inputs), as their tags record it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loragrid.formatting import count_of

if TYPE_CHECKING:  # workers import this module for its tags and must not import pandas
    from loragrid.comparison.table import Comparison
from loragrid.trials.tags import CHANGES_TAG, DATA_DIGEST_TAG, DEVICE_TAG, DIRTY_TAG

Bearing = Literal["results", "speed", "neither"]
"""What a different value of a part changes: all results, only times and memory, or nothing."""
BEFORE_PREFIX = "loragrid.before."
"""Prefix of a part's tag. The tag holds the value under which a trial began, if it continued under another value."""


@dataclass(frozen=True, kw_only=True)
class FingerprintPart:
    """One fact that a trial's numbers depend on, apart from its parameters.

    name: completes the sentence "ran with <name> <value>". given_by: sections of an experiment that may change it on
    purpose; trials are compared only if their axes in these sections are equal.
    """

    tag: str
    name: str
    bearing: Bearing
    given_by: tuple[str, ...] = ()


# `results`: other kernels, arithmetic, code or inputs. `speed`: the engine and the driver decide when kernels run,
# cores and threads decide how long they take; losses change by rounding at most. `neither`: libraries that only
# transport data; rows are identified by their digest, whichever library reads them.
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
    FingerprintPart(tag=DATA_DIGEST_TAG, name="rows", bearing="results", given_by=("model.", "data.")),
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
"""Prefix of the tags that describe how answers are generated. All of them change results."""

NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True)
class FingerprintRow:
    """One part of a sweep's fingerprint.

    values: value -> its trials, the most frequent value first; "": not recorded. minority: trial id -> (its value, the
    most frequent value among the trials that it is compared with).
    """

    part: FingerprintPart
    values: Mapping[str, tuple[str, ...]]
    minority: Mapping[str, tuple[str, str]]

    @property
    def is_mixed(self) -> bool:
        """Whether trials differ in this part although they should be equal."""
        return bool(self.minority)


@dataclass(frozen=True, kw_only=True)
class FingerprintReport:
    """The fingerprint of a sweep.

    rows: one per part that any trial has. num_trials: the number of trials that a worker has started. num_dirty: how
    many of them ran code that was not committed.
    """

    rows: tuple[FingerprintRow, ...]
    num_trials: int
    num_dirty: int

    @property
    def mixed(self) -> tuple[FingerprintRow, ...]:
        """The parts that make the trials' results incomparable."""
        return tuple(row for row in self.rows if row.is_mixed and row.part.bearing == "results")

    @property
    def marked(self) -> dict[str, str]:
        """Trial id -> how it differs from most others: "ran with torch 2.11, the others with 2.13"."""
        differences: dict[str, list[str]] = {}
        for row in self.mixed:
            for trial_id, (own, others) in row.minority.items():
                difference = f"{row.part.name} {_short(own)}, the others with {_short(others)}"
                differences.setdefault(trial_id, []).append(difference)
        return {trial_id: f"ran with {'; with '.join(parts)}" for trial_id, parts in differences.items()}

    def marked_together(self) -> dict[str, tuple[str, ...]]:
        """The sentences of `marked` -> the trials that share them."""
        return _by_value(self.marked)

    def sentences(self) -> list[str]:
        """Warnings for a reader of the table; none if all trials agree and all code was committed."""
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
            found.append(f"dirty working tree: {what} ran code that is not committed")
        return found

    def to_dict(self) -> dict[str, object]:
        """The report as JSON can hold it."""
        return {
            "sentences": self.sentences(),
            "marked": self.marked,
            "parts": [
                {"part": row.part.name, "tag": row.part.tag, "bearing": row.part.bearing, "values": row.values}
                for row in self.rows
            ],
        }


def fingerprint_of(comparison: "Comparison") -> FingerprintReport:
    """The fingerprint of a comparison's trials, from their tags. Trials that no worker has started are left out.

    If a finished trial lacks a part that others have, this counts as a difference.
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
    """Refuse a sweep whose trials cannot be compared.

    Raises:
        ValueError: trials differ in a part that changes results; the message names the parts and the trials.
    """
    if not report.mixed:
        return
    marked = "; ".join(f"{trial_id} {what}" for trial_id, what in report.marked.items())
    raise ValueError(
        f"--strict: the sweep mixes fingerprints: {marked}; allowed: a sweep whose trials agree in "
        f"{', '.join(row.part.name for row in report.mixed)} (train these trials again), or no --strict"
    )


def changes_on_the_way(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Tags that keep the values under which a trial began, if it continues under a different fingerprint."""
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
    """Compare the trials of each group with the most frequent value of their group.

    Of equally frequent values, the one of the earliest trial counts as the most frequent.
    """
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
    """The value, with digests and commits cut to twelve digits."""
    if not value:
        return NOT_RECORDED
    words = [word[: len("sha256:") + 12] if word.startswith("sha256:") else word for word in value.split(" ")]
    return " ".join(word[:12] if len(word) == 40 and set(word) <= set("0123456789abcdef") else word for word in words)
