"""A real browser on MLflow's own comparison page finds both methods and their metrics."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from loragrid.sweep.summary import SweepCost, record_summary
from loragrid.tracking.pages import comparison_page, experiment_page, tracking_ui_command, trials_page
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import default_tracking_uri
from loragrid.trials.tags import QUESTION_TAG
from tests.support.many_trials import record_many

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1800",
)
SERVER_TIMEOUT_SECONDS = 120.0
PAGE_TIMEOUT_SECONDS = 120.0

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif(CHROMEDRIVER is None, reason="no chromedriver on this machine: apt-get install chromium-driver"),
]

LOSSES = {"lora": 2.512, "delta_lora": 2.347}
TRAINABLE = {"lora": 460_800, "delta_lora": 921_600}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tracking URI of the store that both experiments are recorded in."""
    return default_tracking_uri(str(tmp_path_factory.mktemp("store")), None)


@pytest.fixture(scope="module")
def recorder(store: str) -> Recorder:
    """Two finished trials of two methods."""
    recorder = Recorder("quickstart", store)
    recorder.start_sweep("first", {"name": "quickstart"}, {QUESTION_TAG: "Which learns best?"})
    for method, loss in LOSSES.items():
        recorder.start_trial(f"{method}-1", {"method.name": method, "method.rank": 8, "training.lr": 1e-3}, {})
        recorder.log_records(f"{method}-1", [{"step": 0, "train/loss": 4.125}, {"step": 1, "train/loss": 3.125}])
        recorder.log_summary(f"{method}-1", {"eval/final_loss": loss, "parameters/trainable": TRAINABLE[method]})
        recorder.end_trial(f"{method}-1", "FINISHED")
    recorder.end_sweep("FINISHED")
    return recorder


@pytest.fixture(scope="module")
def many(store: str) -> Recorder:
    """Thirty-two trials, summarised as a sweep is that has ended."""
    recorder, sweep = record_many(store)
    record_summary(recorder, sweep, SweepCost())
    recorder.end_sweep("FAILED")
    return recorder


@pytest.fixture(scope="module")
def server(recorder: Recorder, many: Recorder, store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server on the recorded store, started with the command behind `loragrid ui`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, log_file = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("log") / "server.log"
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
    with log_file.open("w") as log:
        process = subprocess.Popen(
            tracking_ui_command(store, "127.0.0.1", port),
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for_server(address, process, log_file)
            yield address
            assert not list(folder.iterdir()), "the server leaves files where it is started"
        finally:
            end_session(process)


def wait_for_server(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SERVER_TIMEOUT_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"`mlflow ui` does not answer on {address}:\n{log.read_text()}")


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends the server with the worker processes it has started: they share its process group."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@pytest.mark.smoke
def test_mlflows_pages_show_both_methods_side_by_side(recorder: Recorder, server: str, tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    runs = [recorder.run_ids[f"{method}-1"] for method in LOSSES]
    with webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER))) as browser:

        def page_text() -> str:
            # Not the visible text: the page's own scroll areas hide some rows of a small window.
            return str(browser.execute_script("return document.body.innerText + document.body.textContent"))

        browser.get(comparison_page(server, recorder.experiment_id, runs))
        WebDriverWait(browser, PAGE_TIMEOUT_SECONDS).until(lambda _: "eval/final_loss" in page_text())
        text = page_text()
        if folder := os.environ.get("LORAGRID_SCREENSHOTS"):
            browser.save_screenshot(str(Path(folder) / "mlflow-comparison.png"))
        assert "Comparing 2 Runs from 1 Experiment" in text
        for method in LOSSES:
            assert f"{method}-1" in text
            assert str(LOSSES[method]) in text
            assert str(TRAINABLE[method]) in text
        for key in ("method.name", "method.rank", "eval/final_loss", "parameters/trainable", "train/loss"):
            assert key in text

        browser.get(experiment_page(server, recorder.experiment_id))
        WebDriverWait(browser, PAGE_TIMEOUT_SECONDS).until(
            lambda _: all(part in page_text() for part in ("3 matching runs", "New run", "first")),
            f"the experiment does not open on its table of runs: {browser.current_url}",
        )


def test_thirty_two_trials_are_listed_charted_and_compared(many: Recorder, server: str, tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    experiment_id, trials = many.experiment_id, many.run_ids
    with webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER))) as browser:

        def shows(page: str, name: str, *parts: str) -> None:
            browser.get("about:blank")  # else only the part behind # changes
            browser.get(page)
            WebDriverWait(browser, PAGE_TIMEOUT_SECONDS).until(
                lambda _: all(part in page_text() for part in parts), f"{name} does not show {parts}"
            )
            if folder := os.environ.get("LORAGRID_SCREENSHOTS"):
                time.sleep(5.0)  # until the charts are drawn
                browser.save_screenshot(str(Path(folder) / f"mlflow-many-{name}.png"))

        def page_text() -> str:
            return str(browser.execute_script("return document.body.innerText + document.body.textContent"))

        best = "lora-5"
        shows(trials_page(server, experiment_id), "table", "32 matching runs", best)
        assert page_text().index(best) < page_text().index("lora-0"), "lowest loss first"
        shows(trials_page(server, experiment_id, charts=True), "charts", "32 matching runs", best, "eval/loss")
        assert "sweep/wall_seconds" not in page_text(), "the sweep's own run is not charted"
        shows(comparison_page(server, experiment_id, list(trials.values())), "compare", "Comparing 32 Runs", best)
        parent = f"{server}/#/experiments/{experiment_id}/runs/{many.sweep_run_id}"
        shows(parent, "sweep", "sweep/trials_finished", "loragrid.best_trial", "Charts of the trials")
        links = browser.execute_script(
            "return [...document.querySelectorAll('a')].map(a => a.textContent + ' ' + a.href)"
        )
        assert f"Charts of the trials {trials_page(server, experiment_id, 'many-1', charts=True)}" in links
