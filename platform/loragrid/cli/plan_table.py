"""A plan as a table for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loragrid.comparison.axes import varying_axes
from loragrid.formatting import count_of
from loragrid.planning.adapted_layers import adapted_sentences
from loragrid.planning.early_stopping import early_stopping_notes, early_stopping_sentences
from loragrid.planning.memory_estimate import MemoryEstimate
from loragrid.planning.plan import Plan
from loragrid.planning.row_notes import epochs_of, row_notes
from loragrid.planning.rows import sentences_about
from loragrid.planning.time_estimate import TimeEstimate
from loragrid.sweep.noise_forecast import NoiseForecast

MOST_NAMES = 3
"""More models or data sets are counted, not named."""


def render_plan(
    plan: Plan, estimate: TimeEstimate | None = None, noise: Sequence[NoiseForecast] = ()
) -> RenderableType:
    """Render every trial with its axes, exact parameter counts and pack.

    estimate: the time on this machine. noise: what the sweep can show, for every base and data set.
    """
    experiment, first = plan.experiment, plan.trials[0]
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("trial", no_wrap=True)
    table.add_column("method", no_wrap=True)
    axes = varying_axes(
        [trial.parameters() for trial in plan.trials],
        found=set.intersection(*({*trial.found} for trial in plan.trials)),
    )
    for heading in [*axes, "trainable", "stored", "pack"]:
        table.add_column(heading, justify="right", no_wrap=True)
    pack_of = {trial.trial_id: pack.pack_id for pack in plan.packs for trial in pack.trials}
    for trial in plan.trials:
        parameters, count = trial.parameters(), plan.counts[trial.trial_id]
        point = ["" if parameters.get(path) is None else str(parameters[path]) for path in axes.values()]
        table.add_row(
            trial.trial_id,
            trial.label or trial.method.name,
            *point,
            f"{count.trainable:,}",
            f"{count.stored:,}",
            pack_of[trial.trial_id],
        )
    training = first.training
    facts = (
        f"{count_of(len(plan.trials), 'trial')} in {count_of(len(plan.packs), 'pack')}; "
        f"{_different(f'{trial.model.name} ({trial.model.dtype})' for trial in plan.trials)}, "
        f"{_different(trial.data.name for trial in plan.trials)}, {_steps(plan)} of {_rows_of_a_step(plan)}"
    )
    if training.micro_batch_size is not None:
        facts += f", on each worker {training.micro_batch_size} at once"
    engines: dict[str, list[str]] = {}
    for pack in [pack for phase in plan.phases for pack in phase.packs]:
        choice = plan.gpu_engine(pack)
        engines.setdefault(f"{choice.mode} ({choice.reason})", []).append(pack.pack_id)
    lines = [Text(f"steps on a GPU, {_first_and_last(packs)}: {engine}") for engine, packs in engines.items()]
    lines += [Text(sentence) for sentence in adapted_sentences(plan.trials)]
    for pack in [pack for phase in plan.phases for pack in phase.largest_packs()]:
        size = count_of(len(pack.trials), "trial")
        lines.append(Text(f"memory on a GPU, {pack.pack_id} ({size}): {_memory(plan.gpu_memory(pack))}"))
    lines.append(Text(f"tokens: {_tokens(plan)}"))
    if estimate is not None:
        lines += [Text(sentence) for sentence in estimate.sentences()]
    for one in noise:
        place = f"{one.model}, {one.data}: " if len(noise) > 1 else ""
        lines += [Text(place + sentence) for sentence in one.sentences()]
    lines += [Text(sentence) for sentence in early_stopping_sentences(plan)]
    lines += [Text(f"note: {note}", style="yellow") for note in (*row_notes(plan), *early_stopping_notes(plan))]
    if plan.confirm is not None:
        lines.append(Text(f"confirm: {_confirmation(plan.confirm)}"))
    rows = [Text(sentence) for sentence in sentences_about(plan.rows)]
    return Group(Text(experiment.question, style="bold"), Text(facts), *rows, *lines, table)


def _tokens(plan: Plan) -> str:
    """What all steps compute, and how much of it belongs to rows; without the rows, an upper bound."""
    positions = [trial.training.num_steps * trial.training.batch_size * plan.row_length(trial) for trial in plan.trials]
    if not plan.rows:
        return f"at most {max(positions):,} per trial, {sum(positions):,} in all"
    records = [plan.rows[(trial.model, trial.data)].record for trial in plan.trials]
    used = [
        round(number * record.train_tokens / (record.rows["train"] * plan.row_length(trial)))
        for number, record, trial in zip(positions, records, plan.trials, strict=True)
    ]
    return (
        f"about {max(used):,} per trial, {sum(used):,} in all; with padding {max(positions):,} per trial, "
        f"{sum(positions):,} in all"
    )


def _different(names: Iterable[str]) -> str:
    """The first few different names."""
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return ", ".join(found[:MOST_NAMES]) + more


def _steps(plan: Plan) -> str:
    """The steps of all trials, or their lowest and highest, with the epochs that they make if the rows are known."""
    steps = sorted({trial.training.num_steps for trial in plan.trials})
    words = count_of(steps[0], "step") if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"
    if not plan.rows:
        return words
    epochs = [f"{epochs:.3g}" for epochs in sorted({epochs_of(plan, trial) for trial in plan.trials})]
    span = epochs[0] if epochs[0] == epochs[-1] else f"{epochs[0]} to {epochs[-1]}"
    return f"{words} ({span} {'epoch' if span == '1' else 'epochs'})"


def _rows_of_a_step(plan: Plan) -> str:
    """The batch size of all trials, or their lowest and highest."""
    sizes = sorted({trial.training.batch_size for trial in plan.trials})
    return count_of(sizes[0], "row") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} rows"


def _memory(estimate: MemoryEstimate | None) -> str:
    if estimate is None:
        return "unknown, because this model's steps depend on the data's values"
    sizes = asdict(estimate)
    unit, unit_name = (2**30, "GiB") if estimate.total >= 2**30 else (2**20, "MiB")
    scoring = _parts({name: sizes.pop(name) for name in ("evaluation", "generation")}, unit)
    instead = f"when scored, in place of activations and passing: {scoring}" if scoring else ""
    parts = "; ".join(part for part in (_parts(sizes, unit), instead) if part)
    return f"about {estimate.total / unit:.1f} {unit_name}" + (f" ({parts})" if parts else "")


def _parts(sizes: Mapping[str, int], unit: int) -> str:
    """The parts with their sizes in `unit` bytes, without those that round to 0.0."""
    return ", ".join(f"{name} {size / unit:.1f}" for name, size in sizes.items() if size >= unit / 20)


def _confirmation(confirm: Plan) -> str:
    """A sentence: how many trials will train chosen settings again, and with which seeds."""
    seeds = list(dict.fromkeys(trial.seed for trial in confirm.trials))
    settings = count_of(len(confirm.trials) // len(seeds), "chosen setting")
    num_tokens = sum(t.training.num_steps * t.training.batch_size * confirm.row_length(t) for t in confirm.trials)
    return (
        f"{settings} x {len(seeds)} fresh seeds ({', '.join(map(str, seeds))}) = "
        f"{count_of(len(confirm.trials), 'trial')} more in {count_of(len(confirm.packs), 'pack')}, at most "
        f"{num_tokens:,} tokens; time and memory are those of each method's most expensive setting"
    )


def _first_and_last(pack_ids: list[str]) -> str:
    return pack_ids[0] if len(pack_ids) == 1 else f"{pack_ids[0]} to {pack_ids[-1]} ({len(pack_ids)} packs)"
