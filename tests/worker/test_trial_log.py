"""The log of a trial returns each new record once, and can be saved and restored."""

import torch

from loragrid.training.member_state import MemberState
from loragrid.trials.successive_halving import SettingScore
from loragrid.worker.trial_log import TrialLog, TrialLogs

A, B = SettingScore("a", 1.0, 3, False), SettingScore("b", 2.0, 2, True)


def test_only_new_and_changed_tags_are_returned() -> None:
    log = TrialLog()
    assert log.add_tags({"a": "1", "b": "2"}) == {"a": "1", "b": "2"}
    assert log.add_tags({"a": "1", "b": "3"}) == {"b": "3"}
    assert log.tags == {"a": "1", "b": "3"}


def test_repeated_steps_are_not_new_but_latest() -> None:
    log = TrialLog()
    first = [{"step": 0, "eval/loss": 3.0}, {"step": 1, "train/loss": 2.0}]
    assert log.add_records(first) == first
    again = [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": 1.0}]
    assert log.add_records(again) == again[1:]
    assert log.records == [*first, again[1]]
    assert log.last_step == 2
    assert log.add_records(again[:1]) == []
    assert log.latest == {"step": 1, "eval/loss": 3.0, "train/loss": 2.5}


def test_a_saved_log_comes_back_with_its_latest_values() -> None:
    log = TrialLog(figures={"time/step_seconds": 0.1}, rankings={1: [A, B]})
    log.add_records([{"step": 1, "train/loss": 2.0}])
    log.add_seconds({"train": 1.0})
    log.add_seconds({"train": 0.5, "eval": 2.0})
    state = MemberState(completed=1, active=True, tensors={"w": torch.ones(2)})
    found = TrialLog.of(log.saved_with(state))
    assert found == log
    assert found.seconds == {"train": 1.5, "eval": 2.0}
    assert found.is_measured
    assert not found.has_ended


def test_logs_answer_for_trials_that_have_a_value() -> None:
    logs = TrialLogs()
    logs["a"].add_records([{"step": 1, "train/loss": 2.0}])
    logs["a"].rankings[1] = logs["b"].rankings[1] = [A, B]
    logs["c"].rankings[1] = [B]
    assert logs.latest(["a", "b"], "train/loss") == {"a": 2.0}
    assert logs.rankings(["a", "b", "c", "d"], 1) == [[A, B], [B]]
    logs.mark_ended(["b"])
    assert [logs[name].has_ended for name in ("a", "b")] == [False, True]
