"""What has come together in a spool goes to MLflow in few calls, in order, and nothing is noted that was not taken."""

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
    """Notes what it is given; raises for the runs of `broken`."""

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


def test_points_of_a_run_are_joined_up_to_what_else_is_said_of_it_and_each_run_keeps_its_order() -> None:
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


def test_the_points_of_many_reports_are_one_call_for_each_run(spool: Spool) -> None:
    for step in range(10):
        for run in ("a", "b"):
            spool.append(points(run, step))
    writer = Writer()
    assert deliver_all(spool, writer) == 20  # type: ignore[arg-type]
    assert writer.written == [points("a", *range(10)), points("b", *range(10))]
    assert spool.is_empty()


def test_of_what_was_taken_only_the_front_is_noted_and_the_files_of_the_rest_stay(spool: Spool, tmp_path: Path) -> None:
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
    assert len(told_to_stop) == 1, "nothing is delivered behind what could not be"
    well = Writer()
    assert deliver_all(spool, well) == 3  # type: ignore[arg-type]
    assert well.written == [points("b", 1), points("a", 2), kept]
    assert not spool.files(kept["files"]).exists()


def test_what_is_done_is_noted_at_once_not_at_the_end_of_all_that_waits(spool: Spool) -> None:
    for run in "abc":
        spool.append(tags(run))
    waiting = []

    def take(group: Sequence[Operation]) -> bool:
        waiting.append(spool.num_pending())
        return True

    assert deliver_pending(spool, take) == 3
    assert waiting == [3, 2, 1]


def test_a_delivery_lets_reports_come_together_and_hurries_for_who_waits(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loragrid.tracking.delivery, "SECONDS_BETWEEN_DELIVERIES", 60.0)
    writer = Writer()
    delivery = Delivery(spool, writer, lambda sentence: None)  # type: ignore[arg-type]
    spool.append(tags("a"))
    delivery.wake()
    assert delivery.wait(5.0)
    time.sleep(0.3)  # until it rests again
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
    assert time.monotonic() - begun < 5.0, "neither who waits nor the end of a sweep waits for a minute"


def test_a_close_that_comes_while_the_thread_turns_to_what_is_new_is_heard(spool: Spool) -> None:
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
