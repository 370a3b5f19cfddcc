"""Judges a sweep: compares the methods at their chosen settings, and answers which one to take."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from loragrid.comparison.answer import Answer, Contest, answer_of
from loragrid.comparison.choice import Choice, Selection, reported_summary
from loragrid.comparison.choice_costs import costs_of
from loragrid.comparison.claims import Claim, claims_of
from loragrid.comparison.data_record import data_record_of
from loragrid.comparison.findings import (
    basis_sentences,
    best_mean,
    edge_warnings,
    missing_basis,
    optimism_sentences,
    reference_sentences,
    refusal_sentence,
    seeds_needed_words,
    trained_sentences,
)
from loragrid.comparison.item_scores import load_scores
from loragrid.comparison.optimism import Optimism, optimism_of
from loragrid.comparison.pairwise import (
    ALL_PAIRS,
    Family,
    MethodComparison,
    MethodEstimate,
    compare_methods,
    compare_trained_models,
)
from loragrid.comparison.phases import split_phases
from loragrid.comparison.ranking import best_trial, is_proportion
from loragrid.comparison.row_scores import ArrangedScores, arrange_scores
from loragrid.comparison.seed_spread import known_seed_variances
from loragrid.comparison.selection import choose
from loragrid.comparison.settings import tasks_of
from loragrid.comparison.table import Comparison
from loragrid.comparison.tuning import budget_words
from loragrid.tracking.store_uri import parse_parameter

DEFAULT_MARGIN = 0.01
"""A recommended method is at most 1 % of the best loss, or one point of an accuracy, behind the best."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a sweep: an answer, the chosen settings, the comparison of the methods, and sentences to quote.

    metric: the reported metric, `test/loss` or `test/accuracy` (without test rows `eval/final_loss`, `eval/accuracy`).
    choices: best first. references: the choices of methods that train nothing, such as the untrained base.
    result: the comparison over new seeds and new rows; None if the sweep has no scores of single test rows in common.
    claims: every pair of `result`, with the better method first. trained: the comparison of these trained models on new
    rows, which says nothing about their methods; None without scores. trained_sentences: the same in words.
    seeds: the seeds that all compared methods have in common. margin: in the metric's unit.
    optimism: name of the choice -> how much its figure owes to the seeds that chose its setting; empty if the reported
    figures are of fresh seeds.
    sentences: the answer, then what it rests on. warnings: what a reader must know beside it.
    """

    metric: str
    higher_is_better: bool
    answer: Answer
    choices: tuple[Choice, ...]
    references: tuple[Choice, ...] = ()
    result: MethodComparison | None = None
    claims: tuple[Claim, ...] = ()
    trained: MethodComparison | None = None
    trained_sentences: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    margin: float = 0.0
    optimism: Mapping[str, Optimism | None] = field(default_factory=dict)
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]

    def estimate(self, name: str) -> MethodEstimate | None:
        """A compared choice's expected figure over new seeds and rows; None if it is not compared."""
        estimates = self.result.estimates if self.result is not None else ()
        return next((estimate for estimate in estimates if estimate.name == name), None)

    def claim(self, one: str, other: str) -> Claim | None:
        """The tested pair of two choices, in either order."""
        return next((claim for claim in self.claims if {claim.better, claim.worse} == {one, other}), None)


def judge(comparison: Comparison, scores: pd.DataFrame | None = None, apart: Collection[str] = ()) -> Verdict:
    """Compare every method's choice with every other, and answer which one to take.

    scores: the result of `load_scores`. A claim is about new seeds and new rows of the same kind, so without scores of
    single rows nothing is claimed. The pairs are those that the experiment names before it runs (`verdict.against`).
    docs/verdict.md describes the procedure. apart: see `choose`.

    A sweep over several models or data sets has no common verdict; judge its parts, see `tasks_of`.

    Raises:
        ValueError: `apart` names no axis.
    """
    tasks = tasks_of(comparison)
    if len(tasks) > 1:
        warning = f"several tasks ({'; '.join(tasks)}): their figures cannot be compared, so each is judged separately"
        return _empty("", (warning,))
    selection = choose(comparison, apart)
    warnings = [*selection.warnings, *edge_warnings(selection.choices)]
    if budgets := budget_words(comparison, {choice.name: choice.setting for choice in selection.choices}):
        warnings.append(budgets)
    record = data_record_of(comparison)
    if record is not None and record.is_partial:
        warnings.append(" ".join(record.left_out_sentences()))
    ranked = [choice for choice in selection.choices if reported_summary(choice, selection.reported) is not None]
    if not ranked:
        return replace(
            _empty("Nothing can be compared yet: no method has a finished trial with a figure to report.", warnings),
            metric=selection.reported,
            choices=selection.choices,
            references=selection.references,
        )
    arranged = arrange_scores(ranked, scores, selection.reported)
    if arranged.scores is not None:
        compared = [choice for choice in ranked if choice.name in arranged.scores.names]
        known = known_seed_variances(comparison, compared, selection.reported)
        arranged = replace(arranged, scores=replace(arranged.scores, seed_variances=known))
    family, words = _family(comparison, arranged)
    verdict = _judged(comparison, selection, ranked, arranged, family, [*warnings, *arranged.warnings, *words])
    if any(choice.is_confirmed for choice in ranked):
        return verdict
    optimism = optimism_of(split_phases(comparison)[0], selection)
    return replace(
        verdict, optimism=optimism, sentences=(*verdict.sentences, *optimism_sentences(optimism, selection.reported))
    )


def load_verdict(comparison: Comparison, apart: Collection[str] = ()) -> Verdict:
    """The verdict of a recorded sweep; reads the scores of the chosen trials on single rows from MLflow.

    Raises:
        ValueError: `apart` names no axis.
    """
    if len(tasks_of(comparison)) > 1:
        return judge(comparison, apart=apart)
    chosen = {trial for choice in choose(comparison, apart).choices for trial in choice.reported_trials.values()}
    return judge(comparison, load_scores(comparison, chosen), apart)


def trial_to_keep(comparison: Comparison, verdict: Verdict) -> str:
    """The trial to export: of the chosen setting of the answer's method, the best on the evaluation rows.

    The answer's method is the recommended one, otherwise the leading one. If it names none, the best of all trials on
    the evaluation rows. "" if no trial has a figure.
    """
    named = verdict.answer.recommended or verdict.answer.leader
    chosen = next((choice for choice in verdict.choices if choice.name == named), None)
    if chosen is None:
        return best_trial(comparison)
    own = {*chosen.setting.trial_ids.values(), *chosen.reported_trials.values()}
    table = comparison.table[comparison.table["trial_id"].isin(own)]
    return best_trial(replace(comparison, table=table))


def _judged(
    comparison: Comparison,
    selection: Selection,
    ranked: Sequence[Choice],
    arranged: ArrangedScores,
    family: Family,
    warnings: Sequence[str],
) -> Verdict:
    metric, scores = selection.reported, arranged.scores
    references = reference_sentences(ranked, selection)
    verdict = Verdict(
        metric=metric,
        higher_is_better=selection.higher_is_better,
        answer=Answer(sentence=missing_basis(ranked, metric)),
        choices=selection.choices,
        references=selection.references,
        seeds=arranged.seeds,
        sentences=(missing_basis(ranked, metric), *references),
        warnings=tuple(warnings),
    )
    if scores is None:
        return verdict
    result, trained = compare_methods(scores, family), compare_trained_models(scores, family)
    verdict = replace(
        verdict,
        choices=_best_first(selection, result),
        result=result,
        trained=trained,
        trained_sentences=tuple(trained_sentences(trained, metric, arranged.seeds)),
        warnings=(*warnings, *result.caveats),
    )
    if result.refusal:
        fresh = any(choice.is_confirmed for choice in ranked)
        answer = Answer(sentence=refusal_sentence(result, is_confirmed=fresh))
        return replace(verdict, answer=answer, sentences=(answer.sentence, *references))
    margin = _margin(comparison, result, metric)
    claims = claims_of(result, ranked, selection.higher_is_better)
    contest = Contest(
        metric=metric,
        higher_is_better=selection.higher_is_better,
        choices=ranked,
        costs=costs_of(comparison, tuple(choice for choice in ranked if choice.name in scores.names)),
        result=result,
        claims=claims,
        margin=margin,
        cost=str(_recorded(comparison, "cost") or "parameters"),
        seeds_needed=seeds_needed_words(result, metric, margin),
    )
    answer = answer_of(contest)
    return replace(
        verdict,
        answer=answer,
        claims=claims,
        margin=margin,
        sentences=(answer.sentence, *references, *basis_sentences(result, claims, metric, ranked)),
    )


def _family(comparison: Comparison, arranged: ArrangedScores) -> tuple[Family, list[str]]:
    """The pairs that the experiment names, and a warning if its method is not among those compared."""
    against = _recorded(comparison, "against")
    if against is None or arranged.scores is None:
        return ALL_PAIRS, []
    if against in arranged.scores.names:
        return Family(kind="against", against=str(against)), []
    split = any(name.startswith(f"{against} ") for name in arranged.scores.names)
    why = "is split into several contestants" if split else "is not among the compared methods"
    return ALL_PAIRS, [f"verdict.against: {against} {why}, so every pair is tested"]


def _recorded(comparison: Comparison, key: str) -> object:
    """The value of a key of the section `verdict`, as the sweep recorded it; None in older sweeps."""
    text = comparison.sweep_parameters.get(f"verdict.{key}")
    return None if text is None else parse_parameter(text)


def _margin(comparison: Comparison, result: MethodComparison, metric: str) -> float:
    stated = _recorded(comparison, "margin")
    if isinstance(stated, int | float):
        return float(stated)
    if is_proportion(metric):
        return DEFAULT_MARGIN
    return DEFAULT_MARGIN * abs(best_mean(result, metric))


def _best_first(selection: Selection, result: MethodComparison) -> tuple[Choice, ...]:
    """The choices by the compared means, so that every table has the order of the answer; others follow."""
    sign = -1 if selection.higher_is_better else 1
    means = {estimate.name: sign * estimate.mean for estimate in result.estimates}
    return tuple(sorted(selection.choices, key=lambda choice: means.get(choice.name, float("inf"))))


def _empty(sentence: str, warnings: Sequence[str]) -> Verdict:
    return Verdict(
        metric="",
        higher_is_better=False,
        answer=Answer(sentence=sentence),
        choices=(),
        sentences=(sentence,) if sentence else (),
        warnings=tuple(warnings),
    )
