"""The report is one page that requests nothing and shows what MLflow holds, in every state of the sweep."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow import MlflowClient
from scipy import stats

from loragrid.comparison.table import load_comparison
from loragrid.report.charts import method_styles
from loragrid.report.files import write_report
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import Scalar, default_tracking_uri
from loragrid.training.failure import Failure
from loragrid.trials.tags import LABEL_TAG, QUESTION_TAG
from tests.support.recorded_sweeps import (
    METHODS,
    QUESTION,
    MadeUpTrial,
    record_maths,
    record_trial,
    record_word_problems,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Page(HTMLParser):
    """A parsed page: its tables as rows of texts, its whole text, the tags with their attributes."""

    html: str
    tables: list[list[list[str]]] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(self.html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or ("th" in self.open and self.tables):
            self.tables[-1][-1][-1] += f" {data.strip()}" if data.strip() else ""

    def tables_of(self, heading: str) -> list[list[dict[str, str]]]:
        """The rows of every table with this column."""
        found = []
        for header, *rows in self.tables:
            names = [name.strip() for name in header]
            if heading in names:
                found.append([dict(zip(names, (cell.strip() for cell in row), strict=True)) for row in rows])
        assert found, f"no table has a column {heading!r}"
        return found

    def table_of(self, heading: str) -> list[dict[str, str]]:
        """The rows of the first table with this column."""
        return self.tables_of(heading)[0]


def page_of(uri: str, name: str, folder: Path) -> Page:
    write_report(load_comparison(name, uri), folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def maths_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = default_tracking_uri(str(tmp_path_factory.mktemp("maths")), None)
    record_maths(uri)
    return uri


@pytest.fixture(scope="module")
def maths(maths_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(maths_uri, "maths", tmp_path_factory.mktemp("page"))


def record_small(
    uri: str,
    name: str,
    losses: Mapping[str, float | None],
    *,
    question: str = "",
    reason: str = "it broke",
    parameters: Mapping[str, Scalar] | None = None,
    figures: Mapping[str, float] | None = None,
    tags: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """A sweep with one trial per method; a loss of None is a trial that failed."""
    recorder = Recorder(name, uri)
    recorder.start_sweep(f"{name}-1", {}, {QUESTION_TAG: question})
    for method, loss in losses.items():
        own = {"method.name": method, "seed": 0, "training.lr": 1e-3, **(parameters or {})}
        trial_id = f"{re.sub('[^a-z_0-9]', '', method)}-x"
        recorder.start_trial(trial_id, own, (tags or {}).get(method, {}))
        if loss is None:
            recorder.end_trial(trial_id, "FAILED", reason)
            continue
        recorder.log_records(trial_id, [{"step": 0, "eval/loss": loss + 1}, {"step": 5, "eval/loss": loss}])
        recorder.log_summary(trial_id, {"eval/final_loss": loss, **(figures or {})})
        recorder.end_trial(trial_id, "FINISHED")
    recorder.end_sweep("FINISHED")


def test_choices_show_stored_figures_with_interval_and_n(maths: Page, maths_uri: str) -> None:
    client = MlflowClient(tracking_uri=maths_uri)
    experiment = client.get_experiment_by_name("maths")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'", max_results=1000)
    rows = maths.table_of("chosen setting")
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        setting = dict(part.split(" ") for part in row["chosen setting"].split(", ")[:3] if len(part.split(" ")) == 2)
        lr = float(re.findall(r"lr ([0-9.e-]+)", row["chosen setting"])[0])
        own = [
            run
            for run in runs
            if run.data.params.get("method.name") == row["method"]
            and float(run.data.params["training.lr"]) == lr
            and all(float(run.data.params[f"method.{key}"]) == float(v) for key, v in setting.items() if key != "lr")
        ]
        assert len(own) == 3, row
        for column, key in (("test loss", "test/loss"), ("evaluation loss", "eval/final_loss")):
            values = [run.data.metrics[key] for run in own]
            assert row[column].startswith(f"{sum(values) / 3:.4f} ")
            if column == "evaluation loss":
                assert f"deviation {stats.tstd(values):.4f}, 3 seeds" in row[column]
            else:
                low, high = map(
                    float, re.findall(r"([0-9.]+) to ([0-9.]+) \(95 %, new seeds and rows\)", row[column])[0]
                )
                assert low < sum(values) / 3 < high


def test_every_pair_is_shown_with_its_conclusion(maths: Page) -> None:
    with_best, others = maths.tables_of("what it shows")
    (anchor,) = {row["pair"].split(" − ")[0] for row in with_best}
    assert (len(with_best), len(others)) == (4, 6)
    assert not any(anchor in row["pair"].split(" − ") for row in others)
    for row in [*with_best, *others]:
        first, second = row["pair"].split(" − ")
        is_shown = row["p (Holm)"].startswith("<") or float(row["p (Holm)"]) < 0.05
        better = first if row["difference"].startswith("−") else second
        assert row["what it shows"] == (f"{better} is better" if is_shown else "not told apart")
    answer = re.findall(r'<p class="answer">(.*?)</p>', maths.html)
    assert len(answer) == 1
    assert anchor in answer[0]


def test_edge_values_are_marked_and_the_default_is_shown(maths: Page) -> None:
    rows = {row["method"]: row for row in maths.table_of("chosen setting")}
    assert "lr 0.003 is the highest tried: extend the ladder" in rows["lora_fa"]["chosen setting"]
    assert "extend" not in rows["lora"]["chosen setting"]
    assert "rank 8, lr 0.001" in rows["lora"]["untuned default"]
    assert "3 seeds" in rows["lora"]["untuned default"]
    assert rows["vera"]["untuned default"] == "– not in the sweep"


def test_unfinished_trials_show_reasons_and_all_trials_show_figures(maths: Page) -> None:
    ended = {row["trial"]: row for row in maths.table_of("reason")}
    assert len(ended) == 10
    assert ended["delta_lora-0.003-16-2"]["ended"] == "out of memory"
    assert ended["vera-0.1-8-0"]["ended"] == "failed"
    assert ended["vera-0.1-8-0"]["reason"] == "diverged: loss or gradient not finite at step 37"
    assert ended["lora_fa-0.0003-8-0"]["ended"] == "stopped early"
    trials = {row["trial"]: row for row in maths.table_of("parameters/trainable")}
    assert len(trials) == 90
    assert trials["vera-0.1-8-0"]["eval/final_loss"] == "–"
    assert trials["lora-0.001-8-0"]["parameters/trainable"] == "461 K"
    assert trials["lora-0.001-8-0"]["memory/saved_activation_bytes"] == "604 MiB"
    assert "90 trials80 finished1 out of memory3 stopped early6 failed" in maths.text.replace("\n", "")


def test_memory_time_and_estimates_are_those_of_the_store(maths: Page) -> None:
    memory = {row["method"]: row for row in maths.table_of("saved activations")}
    assert memory["lora_fa"]["base"] == "269 MiB"
    assert memory["lora_fa"]["saved activations"] == "402 MiB"
    assert memory["lora_fa"]["peak allocated, evaluation"] == "1.07 GiB"
    times = {row["method"]: row for row in maths.table_of("one step, measured solo")}
    assert times["vera"]["one step, measured solo"] == "87 to 97 ms"
    assert times["vera"]["compiling"] == "14 s"
    estimates = maths.table_of("measured / estimated")
    assert {row["of"]: row["measured / estimated"] for row in estimates} == {
        "pack-delta_lora and 3 other packs": "0.93",
        "pack-vera": "1.00",
    }


def test_the_page_loads_nothing_from_anywhere(maths: Page) -> None:
    for tag, attributes in maths.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert (value or "").startswith("#"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert "@import" not in maths.html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", maths.html))
    assert "http" not in re.sub(r"<(dd|code|pre)>.*?</\1>", "", maths.html, flags=re.DOTALL)


def test_every_reference_inside_the_page_has_its_target(maths: Page) -> None:
    ids = [attributes["id"] for _, attributes in maths.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = [str(a["href"])[1:] for _, a in maths.tags if a.get("href")]
    targets += re.findall(r"url\(#([^)]*)\)", maths.html)
    targets += [name for _, a in maths.tags for name in (a.get("aria-labelledby") or "").split()]
    assert targets
    assert set(targets) <= set(ids)


def test_every_chart_has_a_title_and_a_description_in_words(maths: Page) -> None:
    charts = [attributes for tag, attributes in maths.tags if tag == "svg"]
    assert len(charts) == 2 + 1 + 3 + 3 + 5 + 2
    assert "Evaluation loss over lr</title>" in maths.html
    assert all(attributes["role"] == "img" and attributes["aria-labelledby"] for attributes in charts)
    assert "Last values in nats per token: delta_lora 1." in maths.html


@pytest.mark.heavy
def test_every_apart_value_has_its_own_tuning_curve(maths_uri: str, tmp_path: Path) -> None:
    def curves(*apart: str) -> dict[str, str]:
        write_report(load_comparison("maths", maths_uri), tmp_path / "report.html", apart=apart)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        (words,) = re.findall(r"Evaluation loss over lr</title><desc[^>]*>([^<]*)<", page)
        return dict(curve.split(": ") for curve in words.split("; "))

    together, by_rank = curves(), curves("rank")
    assert "lora" in together.keys() <= set(METHODS)
    assert "lora" not in by_rank
    assert by_rank["lora rank 8"] != by_rank["lora rank 16"]


def test_captions_say_that_settings_were_chosen_and_by_what(maths: Page) -> None:
    text = " ".join(maths.text.split())
    assert "Settings were chosen by their mean evaluation loss over seeds, on the evaluation rows." in text
    caption = "The chosen setting of every method: mean over its seeds"
    assert f"{caption}; the band spans the lowest and the highest of them. The axis leaves out the steep start." in text
    assert f"One worker, every trial measured solo. {caption}." in text
    assert "large marks are the chosen settings" in text


def test_a_sweep_without_scores_of_rows_claims_nothing(maths: Page, tmp_path: Path) -> None:
    assert "No claim about methods" not in maths.text
    uri = default_tracking_uri(str(tmp_path), None)
    record_small(uri, "rowless", {"lora": 2.0, "vera": 2.5})
    page = page_of(uri, "rowless", tmp_path)
    assert "No claim about methods: there are no test rows" in page.text
    assert "what it shows" not in page.text


def test_without_a_choice_captions_say_all_trials_are_shown(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    recorder = Recorder("halfway", uri)
    recorder.start_sweep("halfway-1", {}, {})
    for lr in (1e-3, 1e-2):
        recorder.start_trial(f"lora-{lr:g}", {"method.name": "lora", "training.lr": lr, "seed": 0}, {})
        recorder.log_records(f"lora-{lr:g}", [{"step": step, "eval/loss": 3.0 - lr * step} for step in (0, 5)])
    recorder.end_sweep("KILLED")
    text = page_of(uri, "halfway", tmp_path).text
    caption = "All trials of every method, because none has a figure to choose a setting by: mean over them"
    assert f"{caption}; the band spans the lowest and the highest of them." in text
    assert "chosen setting" not in text


def test_accuracy_curves_are_drawn_beside_loss_curves(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    record_word_problems(uri)
    page = page_of(uri, "words", tmp_path)
    (row,) = [row for row in page.table_of("chosen setting") if row["method"] == "lora"]
    share = " ".join(row["evaluation accuracy"].split()[:2])
    for scale in ("steps", "tokens", "seconds"):
        assert f"Evaluation loss over {scale}" in page.text
        assert f"Evaluation accuracy over {scale}" in page.text
    found = re.findall(r"Last values of the rows answered right: ([^<]*)\.", page.html)
    assert len(found) == 3
    assert all(f"lora {share}" in ends and "LoRA, A frozen" in ends for ends in found)
    assert "chosen by their mean evaluation accuracy over seeds" in " ".join(page.text.split())
    assert re.search(r"Evaluation accuracy over steps.*?20 %", page.html, flags=re.DOTALL)


def test_cards_fingerprint_and_the_experiment_are_there(maths: Page) -> None:
    for text in ("2106.09685", "update rule", "0f3c2a9d7be14c55a8f1b6e9d2c3a4b5c6d7e8f9", "1 × NVIDIA H200", QUESTION):
        assert text in maths.text
    assert "loragrid run experiment.yaml" in maths.text
    assert "start_step: 100" in maths.text


def test_the_same_record_gives_the_same_page(maths: Page, maths_uri: str, tmp_path: Path) -> None:
    assert page_of(maths_uri, "maths", tmp_path).html == maths.html


def test_everything_from_the_record_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script> & $x^2$ \"q\""
    uri = default_tracking_uri(str(tmp_path), None)
    record_small(
        uri,
        "evil",
        {"lora": 2.0, f"me{evil}": 2.5, "vera": None},
        question=evil,
        reason=f"/data/{evil}",
        parameters={"model.name": f"/models/{evil}"},
        tags={"lora": {"loragrid.card.title": evil, "loragrid.card.paper": evil, "loragrid.gpu": evil}},
    )
    page = page_of(uri, "evil", tmp_path)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "<script" not in page.html
    assert page.text.count(evil) >= 9
    assert any(row["reason"] == f"/data/{evil}" for row in page.table_of("reason"))


def test_one_trial_alone_has_a_report_without_intervals(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    record_small(uri, "one", {"lora": 2.25}, question="Does it learn?")
    page = page_of(uri, "one", tmp_path)
    (row,) = page.table_of("settings tried")
    assert row["setting"] == "its only setting"
    assert "nothing was chosen. The figures are of the evaluation rows." in " ".join(page.text.split())
    assert "The only setting of every method: mean over its seeds." in page.text
    for word in ("chosen setting", "large marks", "were chosen", "best setting", "flatters"):
        assert word not in page.text.lower(), word
    assert row["evaluation loss"] == "2.2500 1 seed"
    assert row["trained params"] == "–"
    assert "1 trial1 finished" in page.text.replace("\n", "")
    assert "test loss" not in row


def test_missing_gpu_figures_are_named_and_never_zero(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    record_small(uri, "cpu", {"lora": 2.25, "vera": 2.5}, figures={"parameters/trainable": 100})
    page = page_of(uri, "cpu", tmp_path)
    for sentence in (
        "No Pareto front over memory, because no trial measured memory.",
        "No Pareto front over step time, because no trial measured step time.",
        "Evaluation loss over tokens is not drawn: no throughput was measured.",
        "Evaluation loss over seconds is not drawn: no step time was measured.",
        "No memory was measured by part.",
        "No time was measured.",
        "The sweep kept no experiment file",
    ):
        assert sentence in page.text, sentence
    assert not any(re.fullmatch(r"0(\.0+)? ?(B|ms|s|MiB)?", cell.strip()) for t in page.tables for r in t for cell in r)
    assert sum(tag == "svg" for tag, _ in page.tags) == 2


def test_a_sweep_of_failed_trials_shows_their_reasons(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    record_small(uri, "broken", {"lora": None, "vera": None}, reason=Failure.of(MemoryError()).reason)
    page = page_of(uri, "broken", tmp_path)
    assert "No method has a setting whose trials finished with a figure to compare." in page.text
    assert [row["ended"] for row in page.table_of("reason")] == ["out of memory"] * 2
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_a_sweep_without_trials_has_a_report_too(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    record_small(uri, "empty", {})
    assert "0 trials" in page_of(uri, "empty", tmp_path).text


def test_trials_of_different_machines_are_marked_and_announced(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    tags = {name: {"loragrid.device": "NVIDIA H100"} for name in ("lora", "vera", "lora_fa")}
    tags["vera"] = {"loragrid.device": "NVIDIA H200"}
    record_small(uri, "mixed", {"lora": 2.0, "vera": 2.5, "lora_fa": 2.6}, tags=tags)
    page = page_of(uri, "mixed", tmp_path)
    assert "Mixed fingerprints: trials differ in more than their settings: device" in page.text
    assert {row["trial"]: row["fingerprint"] for row in page.table_of("fingerprint")} == {
        "lora-x": "like most",
        "lora_fa-x": "like most",
        "vera-x": "ran with device NVIDIA H200, the others with NVIDIA H100",
    }
    assert any(row["fact"] == "device" and "NVIDIA H200 (1 trial)" in row["value"] for row in page.table_of("fact"))


def test_a_card_has_the_colours_of_its_methods_curves(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    recorder = Recorder("labels", uri)
    recorder.start_sweep("labels-1", {}, {})
    for number, (method, label) in enumerate({"lora_fa": "frozen A", "vera": "vera", "lora": "lora"}.items()):
        trial = MadeUpTrial(trial_id=f"t{number}", method=method, rank=8, lr=1e-3, seed=0)
        record_trial(recorder, trial, {LABEL_TAG: label})
    record_trial(recorder, replace(trial, trial_id="t3"), {LABEL_TAG: "twin"})
    recorder.end_sweep("FINISHED")
    page = page_of(uri, "labels", tmp_path)
    cards = re.findall(r"<summary>\s*(<span class=.swatch.*?)</summary>", page.html, flags=re.DOTALL)
    shown = [re.findall(r'background:(#\w+)"></span>([^·<]+) ·', card) for card in cards]
    colours = {name: style.colour for name, style in method_styles(["frozen A", "lora", "twin", "vera"]).items()}
    own = [["lora", "twin"], ["frozen A"], ["vera"]]
    assert shown == [[(colours[name], name) for name in names] for names in own]
    assert " · lora_fa · LoRA-FA" in cards[1]
    assert "vera · vera" not in cards[2]


def test_a_sweep_over_two_data_sets_has_two_verdicts(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    recorder = Recorder("tasks", uri)
    recorder.start_sweep("tasks-1", {}, {})
    for data, base in (("chat", 2.0), ("maths", 1.0)):
        for method, extra in (("lora", 0.1), ("vera", 0.2)):
            trial_id = f"{method}-{data}"
            recorder.start_trial(trial_id, {"method.name": method, "data.name": data, "seed": 0}, {})
            recorder.log_records(trial_id, [{"step": s, "eval/loss": base + extra + 1 - s} for s in (0, 1)])
            recorder.log_summary(trial_id, {"eval/final_loss": base + extra})
            recorder.end_trial(trial_id, "FINISHED")
    recorder.end_sweep("FINISHED")
    page = page_of(uri, "tasks", tmp_path)
    means = [row[2].strip()[:6] for table in page.tables for row in table[1:] if "setting" in table[0][1]]
    assert means == ["2.1000", "2.2000", "1.1000", "1.2000"]
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


@pytest.mark.smoke
@pytest.mark.end_to_end
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.skipif(CHROMEDRIVER is None, reason="no chromedriver on this machine: apt-get install chromium-driver")
@pytest.mark.parametrize("width", [1280, 390])
def test_an_offline_browser_shows_the_whole_page_without_sideways_scrolling(
    maths: Page, width: int, tmp_path: Path
) -> None:
    import base64

    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    file = tmp_path / "report.html"
    file.write_text(maths.html, encoding="utf-8")
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER))) as browser:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        browser.get(file.as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
        page_width, shown = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert page_width <= shown == width
        boxes = browser.execute_script(
            "return [...document.querySelectorAll('svg')].map(svg => {const box = svg.getBoundingClientRect();"
            " return [box.left, box.right, box.height]})"
        )
        assert len(boxes) == 16
        assert all(left >= 0 and right <= width and height > 60 for left, right, height in boxes)
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
        if folder := os.environ.get("LORAGRID_SCREENSHOTS"):
            height = browser.execute_script("return document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
            (Path(folder) / f"report-{width}.png").write_bytes(base64.b64decode(shot["data"]))
