"""A sweep of 32 trials with made-up values, written by the real recorder."""

from loragrid.tracking.recorder import Recorder
from loragrid.trials.outcome import STOPPED_EARLY

NUM_TRIALS = 32


def record_many(uri: str) -> tuple[Recorder, str]:
    """Records 32 trials of four methods: one failed, one stopped early; `lora-5` is best on the evaluation rows."""
    recorder = Recorder("many", uri)
    recorder.start_sweep("many-1", {}, {})
    for index in range(NUM_TRIALS):
        method = ("lora", "vera", "lora_plus", "lora_fa")[index % 4] if index != 5 else "lora"
        trial_id = f"{method}-{index}"
        loss = 1.5 if index == 5 else 2.0 + index / 100
        recorder.start_trial(
            trial_id,
            {"method.name": method, "method.rank": 8, "training.lr": 1e-3 * (1 + index % 3), "seed": index},
            {},
        )
        recorder.log_records(
            trial_id,
            [
                {"step": step, "train/loss": loss + 2 / (step + 1), "eval/loss": loss + 1 / (step + 1)}
                for step in range(6)
            ],
        )
        # Trial 9 has the lowest test loss. It must not be chosen: test rows choose nothing.
        recorder.log_summary(trial_id, {"eval/final_loss": loss, "test/loss": 1.0 if index == 9 else loss + 0.25})
        if index == 30:
            recorder.end_trial(trial_id, "FAILED", "out of memory")
        elif index == 31:
            recorder.end_trial(trial_id, "KILLED", f"{STOPPED_EARLY} at rung 1")
        else:
            recorder.end_trial(trial_id, "FINISHED")
    return recorder, "many-1"
