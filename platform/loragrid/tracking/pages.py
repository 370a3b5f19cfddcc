"""The addresses of MLflow's web pages, and the command that serves them.

MLflow does not document these addresses; a test opens them in a browser.
"""

import json
import sys
from collections.abc import Sequence
from urllib.parse import quote

from mlflow import MlflowClient

from loragrid.tracking.mlflow_internals import quiet_store
from loragrid.tracking.store_uri import sqlite_path
from loragrid.trials.tags import KIND_TAG, SWEEP_TAG


def tracking_ui_command(uri: str, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves MLflow's web pages for a store.

    Raises:
        ValueError: `uri` is a server, which serves its own pages.
    """
    if uri.startswith(("http://", "https://")):
        raise ValueError(f"tracking URI {uri} is a server with its own pages: open it in a browser")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    path = sqlite_path(uri)
    if path is not None:
        # Without this option MLflow creates a folder `mlartifacts` in the working directory.
        command += ["--artifacts-destination", (path.parent / "artifacts").as_uri()]
    # One server process is enough for one reader, and it starts faster than several.
    return [*command, "--workers", "1"]


def experiment_page(server: str, experiment_id: str) -> str:
    """The address of an experiment's table of runs. server: such as http://127.0.0.1:5000.

    Without `workflowType` MLflow opens a page about traces of language-model calls, which shows no runs.
    """
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def trials_page(server: str, experiment_id: str, sweep: str | None = None, *, charts: bool = False) -> str:
    """The address of an experiment's trials, of one sweep or of all: a list, lowest final loss first, or charts.

    The list must not be ordered by time, because MLflow would then hide the trials under their sweep's run and chart
    only that run. MLflow charts the first ten runs of the list.
    """
    condition = f"tags.`{KIND_TAG}` = 'trial'" + (f" and tags.`{SWEEP_TAG}` = '{sweep}'" if sweep else "")
    order = quote("metrics.`eval/final_loss`", safe="")
    mode = "&compareRunsMode=CHART" if charts else ""
    page = experiment_page(server, experiment_id)
    return f"{page}{mode}&orderByKey={order}&orderByAsc=true&searchFilter={quote(condition, safe='')}"


def experiment_pages(uri: str, server: str) -> dict[str, str]:
    """Title -> address on `server`: the runs and the charts of every experiment, latest first."""
    with quiet_store():
        experiments = MlflowClient(tracking_uri=uri).search_experiments(order_by=["last_update_time DESC"])
    # MLflow creates an empty experiment 0, "Default", in every store.
    pages: dict[str, str] = {}
    for experiment in experiments:
        if experiment.experiment_id != "0":
            pages[experiment.name] = experiment_page(server, experiment.experiment_id)
            pages[f"{experiment.name}: trials in charts"] = trials_page(server, experiment.experiment_id, charts=True)
    return pages


def comparison_page(server: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The address of MLflow's page that compares runs."""
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment_id]))
    return f"{server.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"
