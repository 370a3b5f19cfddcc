"""The published finding says what its report supports by the present procedure, and no more."""

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from docs.findings.rejudge_gsm8k import PAGE, REPORT, Judgement, Report, judge, read_report, section, with_section
from loragrid.comparison.noise_floor import Design, smallest_difference
from loragrid.sweep.noise_forecast import LOSS_PRIOR, PROPORTION_PRIOR


@pytest.fixture(scope="module")
def report() -> Report:
    return read_report()


@pytest.fixture(scope="module")
def judgement(report: Report) -> Judgement:
    return judge(report)


def test_page_holds_what_the_script_computes(report: Report, judgement: Judgement) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_section(page, section(report, judgement)) == page, "run: python -m docs.findings.rejudge_gsm8k --write"


def test_report_is_read_whole(report: Report) -> None:
    assert sum(len(seeds) for seeds in report.losses.values()) == 134
    assert (len(report.chosen), len(report.row_intervals), len(report.shown_over_rows)) == (9, 36, 32)
    assert report.losses["full", "0.0003162"] == {1: (0.6386, 0.6639), 0: (0.6387, 0.6644), 2: (0.6431, 0.6731)}
    assert report.row_intervals["full", "lora_plus"] == (-0.0052, 0.0003)


def test_losses_read_give_the_reports_own_tests_over_seeds(report: Report) -> None:
    """Student's t over the losses that were read gives the intervals that the report prints over seeds."""
    chosen = (_chosen(report, name) for name in ("lora", "vera"))
    lora, vera = ([seeds[seed][1] for seed in (0, 1, 2)] for seeds in chosen)
    low, high = stats.ttest_rel(lora, vera).confidence_interval(0.95)
    assert low == pytest.approx(-0.0439, abs=2e-4)
    assert high == pytest.approx(-0.0414, abs=2e-4)


def _chosen(report: Report, method: str) -> Mapping[int, tuple[float, float]]:
    return report.losses[method, report.chosen[method]]


def test_claims_of_the_page_are_those_that_hold(report: Report, judgement: Judgement) -> None:
    assert judgement.best_group == ("full", "lora_plus", "lora", "rslora", "lora (alpha x 3)")
    assert len(judgement.worse_than("vera")) == 8
    assert judgement.worse_than("delta_lora") == ["full", "lora_plus", "lora"]
    assert judgement.worse_than("lora_fa") == judgement.worse_than("lora_fa_projected") == ["full", "lora_plus"]
    assert {(test.first, test.second) for test in judgement.shown} < report.shown_over_rows


def test_p_values_and_bounds_in_the_text_are_computed_ones(report: Report, judgement: Judgement) -> None:
    computed = section(report, judgement)
    text = PAGE.read_text(encoding="utf-8").replace(computed, "").partition("## The table as it was published")[0]
    values = re.findall(r"p = ([\d.]+\d)", text)
    assert len(values) == 3
    for value in values:
        assert f"| {value} |" in computed, value
    for bound in re.findall(r"up to (0\.\d+)", text):
        assert f"| {bound} |" in computed, bound


def test_unknown_parts_of_the_record_change_no_claim(report: Report, judgement: Judgement) -> None:
    shown = [(test.first, test.second) for test in judgement.shown]
    for changed in (judge(report, effective_rows=50.0), judge(report, shared=0.9)):
        assert [(test.first, test.second) for test in changed.shown] == shown
        assert changed.best_group == judgement.best_group


def test_seeds_that_agree_less_show_less(report: Report, judgement: Judgement) -> None:
    """Three times the deviation over seeds: the test would not notice it if the seeds were taken as fixed."""
    wider = {}
    for key, seeds in report.losses.items():
        middle = np.mean([test for _, test in seeds.values()])
        wider[key] = {seed: (own, float(middle + 3 * (test - middle))) for seed, (own, test) in seeds.items()}
    assert len(judge(replace(report, losses=wider)).shown) < len(judgement.shown)


def test_prior_of_the_plan_is_the_findings_noise(judgement: Judgement) -> None:
    """The prior is the noise as shares of the mean loss, with two digits."""
    loss = np.mean(list(judgement.means.values()))
    for part, value in vars(judgement.noise).items():
        assert getattr(LOSS_PRIOR, part) == float(f"{value / loss:.2g}"), part
    assert smallest_difference(judgement.noise, judgement.design) == pytest.approx(0.0154, abs=1e-4)


def test_withdrawal_stands_before_the_reports_old_verdict() -> None:
    page = REPORT.read_text(encoding="utf-8")
    assert 0 < page.index("The verdict below is withdrawn") < page.index("has the lowest test loss")


def test_tables_of_seeds_and_rows_are_computed_ones() -> None:
    """The how-to page's tables hold the floors of five methods with the two priors, in hundredths."""
    page = (PAGE.parents[1] / "how_to" / "seeds_and_rows.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) seeds \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for place, (num_seeds, *floors) in enumerate(rows):
        noise = LOSS_PRIOR if place < 3 else PROPORTION_PRIOR
        for num_rows, floor in zip((64, 256, 1000), floors, strict=True):
            design = Design(num_methods=5, num_pairs=10, num_seeds=int(num_seeds), num_groups=num_rows)
            difference = smallest_difference(noise, design)
            assert difference is not None
            assert f"{100 * difference:.2g}" == floor
