"""A running sweep on the terminal: a live table, or plain lines if there is no terminal."""

import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from loragrid.config.experiment import DataConfig, ModelConfig, TrainingConfig
from loragrid.sweep.progress import PLAIN_LINE_SECONDS, SweepProgress
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack, PackQueue
from loragrid.trials.trial import Trial
from loragrid.worker.messages import PackUpdate
from loragrid_methods import get_method

STEPS = 100


def make_trial(name: str, rank: int) -> Trial:
    return Trial(
        trial_id=f"{name}-{rank:08x}",
        method=get_method(name)(rank=rank),  # type: ignore[call-arg]
        seed=7,
        model=ModelConfig(name="a-model"),
        data=DataConfig(name="rows.jsonl"),
        training=TrainingConfig(steps=STEPS, lr=0.002),
    )


PACK = Pack(pack_id="pack-000", trials=(make_trial("lora", 4), make_trial("lora_plus", 8)))
OTHER = Pack(pack_id="pack-001", trials=(make_trial("vera", 16),))
QUEUE, OTHER_QUEUE = (PackQueue(queue_id=pack.pack_id, packs=(pack,)) for pack in (PACK, OTHER))
FIRST, SECOND = (trial.trial_id for trial in PACK.trials)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def update(phase: str, **fields: Any) -> PackUpdate:
    return PackUpdate(pack_id="pack-000", trial_ids=(FIRST, SECOND), phase=phase, **fields)


def training(completed: int, first: float = 3.0, second: float = 2.0, *, finished: bool = False) -> PackUpdate:
    records = {FIRST: [{"step": completed, "train/loss": first}], SECOND: [{"step": completed, "train/loss": second}]}
    ended = dict.fromkeys((FIRST, SECOND), TrialEnd(status="FINISHED")) if finished else {}
    return update(
        "training",
        completed=completed,
        steps=STEPS,
        records=records if completed else {},
        ended=ended,
        done=finished,
    )


def shown(play: Callable[[SweepProgress, Clock], None], *, terminal: bool, num_trials: int = 3) -> list[str]:
    """The lines of the output; of a terminal's those of the last picture."""
    clock, output = Clock(), StringIO()
    console = Console(file=output, force_terminal=terminal, width=100, no_color=True, legacy_windows=False)
    with SweepProgress(num_trials, console, clock) as progress:
        play(progress, clock)
    text = output.getvalue()
    if terminal:
        # What precedes the last movement back to the picture's first line is an older picture.
        pictures = re.split(r"\r?(?:\x1b\[1A\x1b\[2K)+|\x1b\[\?25[hl]", text)
        text = next(picture for picture in reversed(pictures) if "trials done" in picture)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_plain_lines_show_time_step_losses_and_time_left() -> None:
    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        clock.now += 5
        progress.updated(update("loading the base", steps=STEPS))
        clock.now += 20
        progress.updated(training(0))
        clock.now += 300
        progress.updated(training(1))
        clock.now += 60
        progress.updated(training(21))
        clock.now += 240
        progress.updated(training(STEPS, 1.5, 1.25, finished=True))
        progress.ended(QUEUE)

    assert shown(play, terminal=False) == [
        "starting Ray's workers ...",
        "[ 0m 00s] pack-000: 2 trials, starting workers",
        "[ 0m 05s] pack-000: loading the base",
        "[ 0m 25s] pack-000: training",
        # The five minutes before the first step (compiling) are no measure of the others.
        "[ 5m 25s] pack-000: step 1/100, train loss 2.000 to 3.000",
        "[ 6m 25s] pack-000: step 21/100, train loss 2.000 to 3.000, 3m 57s left",
        "[10m 25s] pack-000: step 100/100, train loss 1.250 to 1.500, 0m 00s left",
        "[10m 25s] pack-000: done (2 of 3 trials)",
    ]


def test_plain_lines_are_rare_within_a_phase() -> None:
    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        progress.updated(training(0))
        for step in range(1, 22):
            clock.now += PLAIN_LINE_SECONDS / 10
            progress.updated(training(step))
        progress.updated(training(STEPS, finished=True))

    steps = [match[1] for line in shown(play, terminal=False) if (match := re.search(r"step (\d+)/", line))]
    assert steps == ["10", "20", "100"]


def test_solo_figures_print_no_line_and_long_times_are_hours() -> None:
    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        clock.now += 2 * 3600 + 5 * 60 + 59
        progress.updated(update("measured", figures={FIRST: {"time/step_seconds": 1.0}}))
        progress.updated(update("training", steps=STEPS))

    assert shown(play, terminal=False)[2:] == ["[ 2h 05m] pack-000: training"]


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "live"])
def test_a_failed_pack_says_why_word_for_word(terminal: bool) -> None:
    reason = "shapes [4, 8] and [/tmp/file] of [bold]x[/bold] at 0x7f :warning:"

    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        progress.failed(QUEUE, reason)

    clock, output = Clock(), StringIO()
    console = Console(file=output, force_terminal=terminal, width=100, no_color=True)
    with SweepProgress(2, console, clock) as progress:
        play(progress, clock)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert f"pack-000 failed: {reason}" in plain


def test_the_live_table_shows_packs_steps_and_trials_losses() -> None:
    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        progress.starting(OTHER_QUEUE)
        progress.updated(training(0))
        evaluated = {trial_id: [{"step": 0, "eval/loss": loss}] for trial_id, loss in ((FIRST, 5.5), (SECOND, 6.5))}
        progress.updated(update("training", steps=STEPS, records=evaluated))
        progress.updated(training(5))
        clock.now += 30
        progress.updated(training(25, 3.14159, 2.71828))

    lines = shown(play, terminal=True)
    assert lines[0] == "0 of 3 trials done, 0m 30s so far"
    assert re.fullmatch(r"pack-000 \S+ +step 25/100 +1m 52s left", lines[1])
    assert lines[2].split() == ["trial", "train", "loss", "eval", "loss"]
    assert re.fullmatch(r" *lora rank 4 lr 0\.002 seed 7 +3\.142 +5\.500", lines[3])
    assert re.fullmatch(r" *lora_plus rank 8 ratio 16 lr 0\.002 seed 7 +2\.718 +6\.500", lines[4])
    assert re.fullmatch(r"pack-001 +starting workers", lines[5])
    assert len(lines) == 6


def test_the_live_table_keeps_a_trial_without_training_loss() -> None:
    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        progress.updated(training(0))
        records = {
            FIRST: [{"step": 0, "eval/loss": 5.5}],
            SECOND: [{"step": 0, "eval/loss": 6.5}, {"step": 1, "train/loss": 4.0}],
        }
        progress.updated(update("training", completed=1, steps=STEPS, records=records))

    lines = shown(play, terminal=True)
    assert re.fullmatch(r" *lora rank 4 lr 0\.002 seed 7 +5\.500", lines[3])
    assert re.fullmatch(r" *lora_plus rank 8 .* +4\.000 +6\.500", lines[4])


def test_the_live_table_counts_an_ended_pack_and_removes_it() -> None:
    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        progress.starting(OTHER_QUEUE)
        progress.ended(QUEUE)
        progress.failed(OTHER_QUEUE, "out of memory")

    assert shown(play, terminal=True) == ["2 of 3 trials done, 0m 00s so far", "starting Ray's workers ..."]


def test_only_trials_that_fail_with_their_queue_are_counted() -> None:
    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        progress.failed(QUEUE, "out of memory", [FIRST])

    assert shown(play, terminal=True) == ["1 of 3 trials done, 0m 00s so far", "starting Ray's workers ..."]


def test_on_a_terminal_nothing_of_the_table_stays_behind() -> None:
    output = StringIO()
    with SweepProgress(1, Console(file=output, force_terminal=True, width=100), Clock()) as progress:
        progress.starting(QUEUE)
    after_the_last_picture = output.getvalue().rpartition("trials done")[2]
    assert "\x1b[2K" in after_the_last_picture


def test_packs_follow_each_other_and_rungs_count_stopped_trials() -> None:
    def play(progress: SweepProgress, clock: Clock) -> None:
        progress.starting(QUEUE)
        progress.updated(replace(training(3), steps=3, done=True))
        behind = TrialEnd(status="KILLED", reason="stopped early at rung 1 (step 3): eval/loss 3 is number 2 of 2")
        progress.updated(update("ended", ended={FIRST: behind}, done=True))
        later: dict[str, Any] = {"pack_id": "pack-000-rung2.0", "trial_ids": (SECOND,)}
        progress.updated(replace(update("training", steps=STEPS), **later))
        progress.updated(replace(training(STEPS, finished=True), ended={SECOND: TrialEnd(status="FINISHED")}, **later))
        progress.ended(QUEUE)

    assert shown(play, terminal=False)[2:] == [
        "[ 0m 00s] pack-000: step 3/3, train loss 2.000 to 3.000",
        "[ 0m 00s] pack-000: at its rung, step 3 (0 of 3 trials)",
        "[ 0m 00s] pack-000: done, 1 trial stopped (1 of 3 trials)",
        "[ 0m 00s] pack-000-rung2.0: 1 trial",
        "[ 0m 00s] pack-000-rung2.0: training",
        "[ 0m 00s] pack-000-rung2.0: step 100/100, train loss 2.000 to 3.000",
        "[ 0m 00s] pack-000-rung2.0: done (2 of 3 trials)",
    ]
