"""Verdicts put together by hand, so that a report can be tested on any that a sweep may have."""

from loragrid.comparison import Comparison, is_missing
from loragrid.selection import Choice, Contrast, Setting, Verdict
from loragrid.statistics import Interval, PairedTest


def settings_by_hand(comparison: Comparison) -> list[Setting]:
    """Every method with every combination of its axes, `seed` aside."""
    names = [name for name in comparison.axes if name != "seed"]
    groups: dict[tuple[object, ...], list[dict[object, object]]] = {}
    for row in comparison.table.to_dict("records"):
        key = (row["method"], *(None if is_missing(row[name]) else row[name] for name in names))
        groups.setdefault(key, []).append(row)
    return [
        Setting(
            method=str(key[0]),
            values={name: value for name, value in zip(names, key[1:], strict=True) if value is not None},  # type: ignore[misc]
            trial_ids={int(row.get("seed", 0)): str(row["trial_id"]) for row in rows if row["status"] == "FINISHED"},  # type: ignore[call-overload]
            num_trials=len(rows),
        )
        for key, rows in groups.items()
    ]


def interval_of(comparison: Comparison, setting: Setting, metric: str) -> Interval | None:
    table = comparison.table.set_index("trial_id")
    if metric not in table:
        return None
    values = table.loc[list(setting.trial_ids.values()), metric]
    if len(values) < 2:
        return Interval(mean=float(values.iloc[0]), std=None, low=None, high=None, num=1)
    mean, std = float(values.mean()), float(values.std())
    half = 4.303 * std / len(values) ** 0.5
    return Interval(mean=mean, std=std, low=mean - half, high=mean + half, num=len(values))


def verdict_by_hand(comparison: Comparison) -> Verdict:
    """The lowest `eval/final_loss` per method, reported on `test/loss` where there is one."""
    best: dict[str, tuple[float, Setting]] = {}
    settings = settings_by_hand(comparison)
    for setting in settings:
        if not setting.trial_ids:
            continue
        interval = interval_of(comparison, setting, "eval/final_loss")
        assert interval is not None
        if setting.method not in best or interval.mean < best[setting.method][0]:
            best[setting.method] = (interval.mean, setting)
    choices = [choice_of(comparison, setting, settings) for _, setting in best.values()]
    choices.sort(key=lambda choice: (choice.test or choice.validation).mean)
    contrasts = []
    for i, first in enumerate(choices):
        for second in choices[i + 1 :]:
            difference = (first.test or first.validation).mean - (second.test or second.validation).mean
            p = 0.3 if abs(difference) < 0.012 else 0.0004
            test = PairedTest(
                test="paired t over seeds",
                difference=difference,
                low=difference - 0.008,
                high=difference + 0.008,
                p_value=p / 3,
                p_adjusted=p,
                num=3,
            )
            contrasts.append(
                Contrast(
                    first=first.method, second=second.method, metric="test/loss", over_seeds=test, over_items=None
                )
            )
    return Verdict(
        metric="test/loss" if "test/loss" in comparison.table else "eval/final_loss",
        higher_is_better=False,
        choices=tuple(choices),
        contrasts=tuple(contrasts),
        sentences=tuple(
            f"{choice.method} reaches {(choice.test or choice.validation).mean:.4f} nats per token." for choice in choices
        ),
        warnings=("vera: lr 0.01 was chosen; its ladder ends there for all that did not diverge.",) if choices else (),
    )


def choice_of(comparison: Comparison, setting: Setting, settings: list[Setting]) -> Choice:
    own = [other for other in settings if other.method == setting.method]
    validation = interval_of(comparison, setting, "eval/final_loss")
    assert validation is not None
    edges = {
        name: value
        for name, value in setting.values.items()
        if len({other.values[name] for other in own}) > 1
        and value in (min(o.values[name] for o in own), max(o.values[name] for o in own))  # type: ignore[type-var]
        and name == "lr"
    }
    default = next((other for other in own if other.trial_ids and other is not setting), None)
    return Choice(
        method=setting.method,
        setting=setting,
        metric="eval/final_loss",
        validation=validation,
        test=interval_of(comparison, setting, "test/loss"),
        edges=edges,
        num_settings=len(own),
        default=None
        if default is None
        else Choice(
            method=setting.method,
            setting=default,
            metric="eval/final_loss",
            validation=interval_of(comparison, default, "eval/final_loss") or validation,
            test=interval_of(comparison, default, "test/loss"),
            edges={},
            num_settings=len(own),
        ),
    )
