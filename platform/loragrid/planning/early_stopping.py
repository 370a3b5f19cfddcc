"""What early stopping will do to a plan's settings, and what it leaves for a verdict, in sentences."""

from loragrid.config.execution import EarlyStoppingConfig
from loragrid.formatting import count_of
from loragrid.planning.plan import Plan
from loragrid.trials.contests import by_contest, by_setting, method_of
from loragrid.trials.successive_halving import num_survivors, rung_steps

MIN_SEEDS = 3
"""With fewer seeds nothing is claimed about methods, unless fresh seeds confirm their choices."""


def early_stopping_sentences(plan: Plan) -> list[str]:
    """The rungs, with the number of settings that continue from each; empty without early stopping."""
    config = plan.experiment.early_stopping
    if config is None:
        return []
    lines: dict[str, list[str]] = {}
    for contest in by_contest(plan.trials, config):
        numbers = [len(by_setting(contest))]
        rungs = rung_steps(config, contest[0].training.num_steps)
        for _ in rungs[:-1]:
            numbers.append(num_survivors(numbers[-1], config.reduction_factor))
        steps = ", ".join(f"{left} after step {rung}" for left, rung in zip(numbers[1:], rungs, strict=False))
        line = f"{count_of(numbers[0], 'setting')}, {steps}, to step {rungs[-1]}"
        lines.setdefault(line, []).append("all methods" if config.within == "sweep" else method_of(contest[0]))
    return [
        f"early stopping by the mean of {config.metric} over seeds: {', '.join(dict.fromkeys(names))}: {line}"
        for line, names in lines.items()
    ]


def early_stopping_notes(plan: Plan) -> list[str]:
    """What early stopping may take from the verdict of this plan: one sentence for each reason."""
    config = plan.experiment.early_stopping
    if config is None:
        return []
    methods = {method_of(trial) for trial in plan.trials}
    notes = []
    if config.within == "sweep" and len(methods) > 1:
        notes.append(
            f"early_stopping.within: sweep ranks the settings of all {len(methods)} methods together, so methods may "
            "be left without a verdict; allowed: method, which keeps a setting of each"
        )
    notes += _notes_on_numbers(plan, config)
    num_seeds = min(len(setting) for setting in by_setting(plan.trials))
    if num_seeds < MIN_SEEDS and plan.experiment.confirm is None:
        notes.append(
            f"early stopping ranks each setting on {count_of(num_seeds, 'seed')}, and with fewer than {MIN_SEEDS} "
            "nothing can be claimed about methods; grid.seed sets more, and confirm: adds fresh ones"
        )
    return [*notes, *_notes_on_queues(plan, config)]


def _notes_on_numbers(plan: Plan, config: EarlyStoppingConfig) -> list[str]:
    numbers = [(contest[0], len(by_setting(contest))) for contest in by_contest(plan.trials, config)]
    if all(number == 1 for _, number in numbers):
        return ["early stopping stops nothing: every method has one setting, and seeds of a setting end together"]
    factor = config.reduction_factor
    few = [method_of(trial) for trial, number in numbers if 1 < number < factor]
    if not few:
        return []
    return [
        f"{', '.join(dict.fromkeys(few))}: fewer settings than early_stopping.reduction_factor {factor}, so the first "
        "rung leaves one"
    ]


def _notes_on_queues(plan: Plan, config: EarlyStoppingConfig) -> list[str]:
    """A note for every contest that is divided over several queues, each of which keeps a setting."""
    groups = {trial.trial_id: pack.rung_group for pack in plan.packs for trial in pack.trials}
    notes = []
    for contest in by_contest(plan.trials, config):
        number = len({groups[trial.trial_id] for trial in contest})
        if number > 1:
            name = "the sweep" if config.within == "sweep" else method_of(contest[0])
            notes.append(
                f"{name} is divided over {number} queues, which rank their own settings: at least {number} settings "
                "reach the last step"
            )
    return notes
