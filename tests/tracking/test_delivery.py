"""The operations of a spool are delivered in order and in few calls, and only delivered ones are marked."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import loragrid.tracking.delivery
from loragrid.tracking.delivery import Delivery, deliver_all, deliver_pending, grouped
from loragrid.tracking.spool import Operation, Spool


def points(run: str, *steps: int) -> dict[str, Any]:
    return {"do": "metrics", "run": run, "points": [["train/loss", 1.0, 0, step] for step in steps]}


def tags(run: str) -> dict[str, Any]:
    return {"do": "tags", "run": run, "tags": {}}


class Writer:
    """Keeps the operations that it is given; raises for the runs in `broken`."""

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.broken, self.written = broken, list[Operation]()

    def write(self, operation: Operation, files: Path | None = None) -> None:
        if operation["run"] in self.broken:
            raise OSError("away")
        assert files is None or files.exists()
        self.written.append(operation)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool", {"experiment": "a"})
    yield made
    made.close()


def test_consecutive_points_are_grouped_and_each_run_stays_ordered() -> None:
    said = [
        tags("a"),
        points("a", 1),
        tags("b"),
        points("b", 1),
        points("a", 2),
        tags("a"),
        points("a", 3),
        points("b", 2),
    ]
    groups = [[operation for _, operation in group] for group in grouped(list(enumerate(said)))]
    assert groups == [
        [tags("a")],
        [points("a", 1), points("a", 2)],
        [tags("b")],
        [points("b", 1), points("b", 2)],
        [tags("a")],
        [points("a", 3)],
    ]


def test_points_of_many_reports_are_one_call_per_run(spool: Spool) -> None:
    for step in range(10):
        for run in ("a", "b"):
            spool.append(points(run, step))
    writer = Writer()
    assert deliver_all(spool, writer) == 20  # type: ignore[arg-type]
    assert writer.written == [points("a", *range(10)), points("b", *range(10))]
    assert spool.is_empty()


def test_only_the_delivered_front_is_noted_and_other_files_stay(spool: Spool, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    kept = {"do": "artifacts", "run": "a", "files": spool.keep_files(tmp_path / "adapter"), "path": ""}
    for operation in (points("a", 1), points("b", 1), points("a", 2), kept):
        spool.append(operation)
    with pytest.raises(OSError, match="away"):
        deliver_all(spool, Writer(broken=["b"]))  # type: ignore[arg-type]
    assert [operation for _, operation in spool.pending()] == [points("b", 1), points("a", 2), kept]

    told_to_stop: list[Sequence[Operation]] = []

    def take(group: Sequence[Operation]) -> bool:
        told_to_stop.append(group)
        return bool(group[0]["run"] == "a")

    assert deliver_pending(spool, take) == 0
    assert len(told_to_stop) == 1, "nothing is sent after an operation that was not delivered"
    well = Writer()
    assert deliver_all(spool, well) == 3  # type: ignore[arg-type]
    assert well.written == [points("b", 1), points("a", 2), kept]
    assert not spool.files(kept["files"]).exists()


def test_each_delivered_operation_is_noted_at_once(spool: Spool) -> None:
    for run in "abc":
        spool.append(tags(run))
    waiting = []

    def take(group: Sequence[Operation]) -> bool:
        waiting.append(spool.num_pending())
        return True

    assert deliver_pending(spool, take) == 3
    assert waiting == [3, 2, 1]


def test_a_delivery_collects_reports_and_hurries_if_awaited(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loragrid.tracking.delivery, "SECONDS_BETWEEN_DELIVERIES", 60.0)
    writer = Writer()
    delivery = Delivery(spool, writer, lambda sentence: None)  # type: ignore[arg-type]
    spool.append(tags("a"))
    delivery.wake()
    assert delivery.wait(5.0)
    time.sleep(0.3)  # until the thread pauses again
    for step in range(50):
        spool.append(points("a", step))
        delivery.wake()
    time.sleep(0.3)
    assert writer.written == [tags("a")]
    begun = time.monotonic()
    assert delivery.wait(5.0)
    assert writer.written == [tags("a"), points("a", *range(50))]
    spool.append(tags("a"))
    delivery.wake()
    delivery.close()
    assert time.monotonic() - begun < 5.0, "neither `wait` nor `close` may take the minute between deliveries"


def test_a_close_during_the_wake_up_is_not_lost(spool: Spool) -> None:
    delivery = Delivery(spool, Writer(), lambda sentence: None)  # type: ignore[arg-type]
    clear = delivery._wake.clear

    def close_has_just_woken() -> None:
        delivery._stop.set()
        delivery._wake.set()
        delivery._hurry.set()
        clear()

    delivery._wake.clear = close_has_just_woken  # type: ignore[method-assign]
    delivery._hurry.set()
    delivery.wake()
    delivery._thread.join(5.0)
    assert not delivery._thread.is_alive()
