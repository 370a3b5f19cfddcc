"""Judges the GSM8K finding again from what its report holds, and writes the result into the finding's page.

    python -m docs.findings.rejudge_gsm8k           # print the part of the page
    python -m docs.findings.rejudge_gsm8k --write   # replace it in gsm8k_tuned.md

The report (gsm8k_tuned.html) has every trial's losses to four digits and the interval of every pair over the 512 test
rows, but not the losses of the rows. So a pair's variance over rows is taken from its interval, and the noise that
seeds and rows share (C in `loragrid.comparison.variance`) is unknown. It is taken as 0: then the variance is too large,
and its degrees of freedom are too. Every other value that it can have is tried as well, and what changes is said.
"""

import argparse
import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from scipy import special

from loragrid.comparison.method_comparison import ALL_PAIRS, PairTest
from loragrid.comparison.method_scores import MethodScores
from loragrid.comparison.noise_floor import Design, Noise, seeds_to_show, smallest_difference
from loragrid.comparison.pair_tests import Differences, bounds_behind_best, not_behind, tests_of_pairs
from loragrid.comparison.variance import Components, moderated, total_variance

FOLDER = Path(__file__).parent
REPORT, PAGE = FOLDER / "gsm8k_tuned.html", FOLDER / "gsm8k_tuned.md"
BEGIN, END = "<!-- rejudged: begin -->", "<!-- rejudged: end -->"
NUM_ROWS = 512
SEEDS = (0, 1, 2)
ROUNDING = 1e-4
"""The intervals are printed to four digits: each is at most this much wider than it was."""
NAMES = {
    "full": "full fine-tuning",
    "lora_plus": "LoRA+",
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "lora (alpha x 3)": "LoRA, alpha × 3",
    "lora_fa": "LoRA-FA",
    "lora_fa_projected": "LoRA-FA, projected",
    "delta_lora": "Delta-LoRA",
    "vera": "VeRA",
}
Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the report's tables say.

    losses: (method, learning rate) -> seed -> (evaluation loss, test loss) of finished trials. chosen: method -> its
    learning rate, in the report's order. row_intervals: pair -> (low, high) over test rows. shown_over_rows: the pairs
    for which the report says that a difference is shown over test rows.
    """

    losses: Mapping[tuple[str, str], Mapping[int, tuple[float, float]]]
    chosen: Mapping[str, str]
    row_intervals: Mapping[Pair, tuple[float, float]]
    shown_over_rows: frozenset[Pair]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The finding by the present procedure. behind: method -> the most that it is behind the best.

    optimism: method -> how much lower its loss is than with a setting that was chosen by the other seeds. noise: the
    seeds' part contains what seeds and rows share; the rows' part does not fall with more seeds.
    """

    tests: tuple[PairTest, ...]
    means: Mapping[str, float]
    behind: Mapping[str, float]
    best_group: tuple[str, ...]
    optimism: Mapping[str, float]
    noise: Noise
    design: Design

    @property
    def shown(self) -> list[PairTest]:
        return [test for test in self.tests if test.is_shown]

    def worse_than(self, method: str) -> list[str]:
        """The methods than which this one is shown to be worse."""
        return [test.better for test in self.shown if method in (test.first, test.second) and test.better != method]


class _Tables(HTMLParser):
    """Collects the cells of all tables: table, row, cell; parts of a cell are separated by a line break."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None and data.strip():
            self._cell.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("\n".join(self._cell))
            self._cell = None


def read_report(path: Path = REPORT) -> Report:
    """The report's tables of settings, of pairs, and of trials."""
    parser = _Tables()
    parser.feed(path.read_text(encoding="utf-8"))
    chosen: dict[str, str] = {}
    losses: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    intervals: dict[Pair, tuple[float, float]] = {}
    shown: set[Pair] = set()
    for head, *rows in parser.tables:
        cells = [dict(zip(head, row, strict=True)) for row in rows]
        if "chosen setting" in head:
            chosen |= {cell["method"]: cell["chosen setting"].split()[1] for cell in cells}
        elif "pair" in head:
            for cell in cells:
                pair, _, test = cell["pair"].partition("\n")
                if "bootstrap" in test:
                    first, second = pair.split(" − ")
                    low, high = (float(end.replace("−", "-")) for end in cell["95 % interval"].split(" to "))
                    intervals[first, second] = (low, high)
                    if cell["what it shows"] != "no difference shown":
                        shown.add((first, second))
        elif "test/loss" in head:
            for cell in cells:
                if cell["ended"] == "finished":
                    figures = float(cell["eval/final_loss"]), float(cell["test/loss"])
                    losses.setdefault((cell["method"], cell["lr"]), {})[int(cell["seed"])] = figures
    return Report(losses=losses, chosen=chosen, row_intervals=intervals, shown_over_rows=frozenset(shown))


def judge(report: Report, *, shared: float = 0.0, effective_rows: float = NUM_ROWS) -> Judgement:
    """Test every pair by the present procedure.

    shared: the unknown part of every pair's variance over rows that seeds and rows share, from 0 to 1.
    effective_rows: only for the degrees of freedom over rows.

    The report's interval of a pair over rows is ± t √(n / (n - 1)) times the bootstrap's deviation, with t for n - 1
    degrees of freedom. So (width / 2 t)² is the variance over rows, corrected as `loragrid.comparison.variance` does.
    """
    names = tuple(report.chosen)
    per_seed = np.array(
        [[report.losses[name, rate][seed][1] for seed in SEEDS] for name, rate in report.chosen.items()]
    )
    pairs = list(itertools.combinations(range(len(names)), 2))
    widths = [np.ptp(report.row_intervals[names[a], names[b]]) + ROUNDING for a, b in pairs]
    over_rows = (np.array(widths) / 2 / special.stdtrit(NUM_ROWS - 1, 0.975)) ** 2
    over_seeds = np.array([(per_seed[a] - per_seed[b]).var(ddof=1) for a, b in pairs])
    parts = Components(seeds=over_seeds, rows=over_rows, cross=shared * over_rows)
    seeds, degrees = moderated(parts, len(SEEDS), len(names))
    variance, freedom = total_variance(parts, seeds, degrees, len(SEEDS), effective_rows)
    mean = per_seed.mean(axis=1)
    found = Differences(
        difference=np.array([mean[a] - mean[b] for a, b in pairs]),
        error=np.sqrt(variance),
        degrees=freedom,
        unmeasured=np.zeros(len(pairs), bool),
        above=None,
        below=None,
        num_groups=NUM_ROWS,
        effective_groups=effective_rows,
    )
    # The trials' means as if each were its only row: only the names and the direction are read.
    scores = MethodScores(
        names=names, values=per_seed[..., None], weights=np.ones(1), groups=np.zeros(1, dtype=np.int64)
    )
    tests = tests_of_pairs(scores, found, ALL_PAIRS)
    return Judgement(
        tests=tests,
        means=dict(zip(names, mean.tolist(), strict=True)),
        behind=dict(zip(names, bounds_behind_best(scores, found).tolist(), strict=True)),
        best_group=not_behind(names, tests),
        optimism={name: _optimism(report, name) for name in names},
        noise=Noise(
            seed_deviation=float(np.sqrt(over_seeds.mean() / 2)),
            pair_row_deviation=float(np.sqrt(over_rows.mean() * NUM_ROWS)),
            row_seed_deviation=0.0,
        ),
        design=Design(num_methods=len(names), num_pairs=len(pairs), num_seeds=len(SEEDS), num_groups=NUM_ROWS),
    )


def _optimism(report: Report, method: str) -> float:
    """The test loss of settings chosen by the evaluation losses of the other seeds, minus the reported one."""
    ladder = {rate: seeds for (name, rate), seeds in report.losses.items() if name == method and len(seeds) == 3}
    left_out = []
    for seed in SEEDS:
        others = [other for other in SEEDS if other != seed]
        best = min(ladder, key=lambda rate: sum(ladder[rate][other][0] for other in others))
        left_out.append(ladder[best][seed][1])
    reported = [ladder[report.chosen[method]][seed][1] for seed in SEEDS]
    return statistics.fmean(left_out) - statistics.fmean(reported)


def section(report: Report, judgement: Judgement) -> str:
    """The part of the page with everything that is computed here, as Markdown."""
    floor = smallest_difference(judgement.noise, judgement.design)
    assert floor is not None
    best = min(judgement.means.values())
    wanted = 0.01 * best
    needed = seeds_to_show(judgement.noise, judgement.design, wanted)
    shown = {(test.first, test.second) for test in judgement.shown}
    withdrawn = report.shown_over_rows - shown
    behind = [name for name in judgement.means if name not in judgement.best_group]
    lines = [
        "*`python -m docs.findings.rejudge_gsm8k --write` writes this part from the report.*",
        "",
        f"* **Not told apart**: {_list(judgement.best_group)}. None of these is shown to be worse than another method.",
        f"* **Behind**: {_list(behind)}. Each is shown to be worse than another method; the table says which.",
        f"* {len(shown)} of {len(judgement.tests)} differences are shown. Over test rows the report called "
        f"{len(report.shown_over_rows)} of them shown; {len(withdrawn)} of these claims are withdrawn.",
        f"* **What could have been shown**: three seeds, 512 rows and {len(judgement.tests)} pairs find a difference "
        f"of about {floor:.3f} ({100 * floor / best:.1f} % of the best loss) in four of five cases. A difference of "
        f"1 % ({wanted:.4f}) would take {f'about {needed} seeds' if needed else 'more than 50 seeds'} with these rows.",
        f"* **The unknown part**: {_shared_in_words(report, shown)}",
        f"* **Chosen and reported with the same seeds**: {_optimism_in_words(judgement.optimism)}",
        "",
        "| | chosen lr | test loss | at most behind the best | shown to be worse than |",
        "|---|---|---|---|---|",
    ]
    for name, mean in judgement.means.items():
        worse = judgement.worse_than(name)
        everything = len(worse) == len(judgement.means) - 1
        lines.append(
            f"| {NAMES[name]} | {_rate(report.chosen[name])} | {mean:.4f} | {judgement.behind[name]:.4f} | "
            f"{'every other' if everything else _list(worse) or '–'} |"
        )
    lines += [
        "",
        "*At most behind the best*: 95 %, right for all nine at once, for new seeds and new rows (Hsu 1984). The "
        "losses are means of figures with four digits.",
        "",
        "### Every pair",
        "",
        "First minus second. The intervals are right for all 36 pairs at once in 95 % of such sweeps; p is "
        "Holm's over the 36 pairs. Holm's correction shows a little more than the intervals do, so an interval of a "
        "difference that is shown can just include 0. *Withdrawn*: the report calls the difference shown over test "
        "rows, and it is not shown.",
        "",
        "| pair | difference | simultaneous 95 % interval | p | |",
        "|---|---|---|---|---|",
    ]
    for test in sorted(judgement.tests, key=lambda test: (test.p_adjusted or 0.0, test.p_value or 0.0)):
        pair = (test.first, test.second)
        assert test.p_adjusted is not None
        p = "< 0.001" if test.p_adjusted < 0.001 else f"{test.p_adjusted:.3f}" if test.p_adjusted < 0.995 else "1"
        word = "shown" if test.is_shown else "withdrawn" if pair in withdrawn else ""
        lines.append(
            f"| {NAMES[test.first]} − {NAMES[test.second]} | {_signed(test.difference)} | "
            f"{_signed(test.low)} to {_signed(test.high)} | {p} | {word} |"
        )
    return "\n".join(lines)


def with_section(page: str, text: str) -> str:
    """The page with the part between the markers replaced."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(page)) == 1, f"the page must have {BEGIN} and {END} once"
    return pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page)


def _shared_in_words(report: Report, shown: set[Pair]) -> str:
    """What the noise that seeds and rows share could change, if it were a larger part of the rows' variance."""
    kept, changed = 0.0, set[Pair]()
    for tenths in range(1, 11):
        now = {(test.first, test.second) for test in judge(report, shared=tenths / 10).shown}
        if now == shown and not changed:
            kept = tenths / 10
        changed |= now ^ shown
    same = f"the same {len(shown)} differences are shown if it is up to {100 * kept:.0f} % of the variance over rows"
    pairs = [f"{NAMES[first]} against {NAMES[second]}" for first, second in sorted(changed)]
    return f"{same}; above that, {', '.join(pairs)} would change." if pairs else f"{same}."


def _optimism_in_words(optimism: Mapping[str, float]) -> str:
    moved = [f"{NAMES[name]} {_signed(value)}" for name, value in optimism.items() if value]
    if moved:
        return f"with the setting of each seed chosen by the two others, losses change: {', '.join(moved)}."
    return "if each seed's setting is chosen by the two other seeds alone, the same settings are chosen for all nine."


def _list(names: Sequence[str]) -> str:
    words = [NAMES[name] for name in names]
    # Some names contain a comma.
    return "; ".join(words) if any("," in word for word in words) else ", ".join(words)


def _rate(text: str) -> str:
    """A learning rate with two digits: 3.2e-4, 1e-2."""
    mantissa, exponent = f"{float(text):.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def main() -> None:
    """Print the part of the page, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the part in gsm8k_tuned.md")
    report = read_report()
    text = section(report, judge(report))
    if parser.parse_args().write:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
