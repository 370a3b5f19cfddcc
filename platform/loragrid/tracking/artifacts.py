"""Finds a recorded trial's adapter in MLflow and writes it where the user wants it."""

import shutil
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from loragrid.config.experiment import ModelConfig
from loragrid.tracking.store_uri import parse_parameter
from loragrid.trials.tags import REASON_TAG, TRIAL_TAG
from loragrid.worker.export import ADAPTER_CONFIG, export_merged
from loragrid_methods import get_method

ADAPTER_ARTIFACT = "adapter"


def export_run(run_id: str, tracking_uri: str, folder: str | Path, *, merged: bool = False) -> None:
    """Write a recorded trial's adapter into `folder`, in PEFT's format, or the whole model with the adapter merged in.

    run_id: the trial's MLflow run id, or its trial id. `folder` must not exist yet.

    Raises:
        ValueError: there is no such run, the run has no adapter, or the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"--to {folder}: exists already; give a folder that does not")
    client = MlflowClient(tracking_uri=tracking_uri)
    run = _find_run(client, run_id, tracking_uri)
    if not client.list_artifacts(run.info.run_id, ADAPTER_ARTIFACT):
        reason = run.data.tags.get(REASON_TAG, f"its method ({run.data.params.get('method.name')}) leaves none")
        raise ValueError(f"{run_id}: the run has no adapter: {reason}")
    with tempfile.TemporaryDirectory() as name:
        adapter = Path(client.download_artifacts(run.info.run_id, ADAPTER_ARTIFACT, name))
        if merged and (adapter / ADAPTER_CONFIG).exists():
            fields = {
                key.removeprefix("model."): parse_parameter(value)
                for key, value in run.data.params.items()
                if key.startswith("model.")
            }
            method = get_method(run.data.params["method.name"])
            export_merged(ModelConfig.model_validate(fields), adapter, method, folder)
        else:
            shutil.copytree(adapter, folder)


def _find_run(client: MlflowClient, run_id: str, tracking_uri: str) -> Run:
    try:
        return client.get_run(run_id)
    except MlflowException:
        pass
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    # A trial id has no character that could end the quotes; anything else finds nothing.
    trial_id = "".join(character for character in run_id if character.isalnum() or character in "-_.")
    runs = client.search_runs(
        experiments, f"tags.`{TRIAL_TAG}` = '{trial_id}'", order_by=["attributes.start_time DESC"]
    )
    if not runs:
        raise ValueError(
            f"{run_id}: no such run or trial in {tracking_uri}; `loragrid compare NAME --csv` lists both ids"
        )
    return runs[0]
