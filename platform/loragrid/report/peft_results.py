"""Writes a sweep's choices as result files for PEFT's `method_comparison` app, one per trial.

The app reads every `.json` file of a task's `results` folder (`method_comparison/processing.py` of huggingface/peft).
It requires integers for memory, file size, samples and tokens, so a trial that lacks one of these has no file.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from loragrid.comparison.sweep_record import SweepRecord, TrialRun, read_artifact
from loragrid.comparison.verdict import Verdict
from loragrid.formatting import is_missing
from loragrid.tracking.store_uri import parse_parameter

ADAPTER_CONFIG = "adapter/adapter_config.json"
BYTES_PER_NUMBER = 4
_VERSIONS = ("transformers", "datasets", "torch", "peft", "bitsandbytes")
_REQUIRED = (
    "memory/peak_reserved_bytes",
    "time/step_seconds",
    "throughput/tokens_per_second",
    "parameters/trainable",
    "parameters/stored",
)


def write_peft_results(record: SweepRecord, verdicts: Sequence[Verdict], folder: Path) -> list[str]:
    """Write a file for every seed of every method's choice; return a sentence for every trial without a file.

    Raises:
        ValueError: no trial has the figures that PEFT's app requires.
    """
    rows = {row["trial_id"]: row for row in record.comparison.table.to_dict("records")}
    results: dict[str, dict[str, Any]] = {}
    left_out = []
    for choice in [choice for verdict in verdicts for choice in verdict.choices]:
        for trial_id in choice.setting.trial_ids.values():
            absent = [key for key in _REQUIRED if is_missing(rows[trial_id].get(key))]
            if absent:
                left_out.append(
                    f"{trial_id}: no file, because PEFT's app requires {', '.join(absent)}, which was not measured"
                )
            else:
                results[trial_id] = peft_result(record, trial_id, rows[trial_id])
    if not results:
        raise ValueError(
            "--format peft: no trial of a chosen setting has the figures that PEFT's app requires: "
            + ("; ".join(left_out) or "no trial finished")
            + "; allowed: a sweep with training.measure_steps on a GPU"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for trial_id, result in results.items():
        (folder / f"{trial_id}.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return left_out


def peft_result(record: SweepRecord, trial_id: str, row: Mapping[Any, Any]) -> dict[str, Any]:
    """One trial in PEFT's schema; `meta_info.loragrid` notes which figures replace others."""
    run = record.trials[trial_id]
    parameters = {key: parse_parameter(text) for key, text in run.parameters.items()}
    steps, batch_size = int(parameters["training.steps"] or 0), int(parameters["training.batch_size"] or 0)
    train_time = steps * float(row["time/step_seconds"])
    peak = int(row["memory/peak_reserved_bytes"])
    return {
        "run_info": {
            # The app requires the key; null means that the date is unknown.
            "created_at": _date(record.started if run.started is None else run.started),
            "total_time": (run.ended - run.started) if run.ended and run.started else train_time,
            "experiment_name": f"{row['method']}/{trial_id}",
            "peft_branch": "none: trained by LoraGrid",
            "train_config": _train_config(parameters),
            "peft_config": _peft_config(record, run, parameters, row),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": peak,
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": peak,
            "train_time": train_time,
            "file_size": int(row["parameters/stored"]) * BYTES_PER_NUMBER,
            "num_trainable_params": int(row["parameters/trainable"]),
            "num_total_params": None,
            "status": "success",
            "metrics": _metrics(record, trial_id, row, steps=steps, batch_size=batch_size, train_seconds=train_time),
        },
        "meta_info": _meta_info(run, parameters),
    }


def _metrics(
    record: SweepRecord, trial_id: str, row: Mapping[Any, Any], *, steps: int, batch_size: int, train_seconds: float
) -> list[dict[str, float | None]]:
    """One entry per evaluation, then one for the end of the training."""
    metrics: list[dict[str, float | None]] = [
        {"step": step, "valid accuracy": value, "train samples": step * batch_size}
        for step, value in _curve(record, trial_id, "eval/accuracy")
    ]
    metrics.append(
        {
            "step": steps,
            "test accuracy": _number(row.get("test/accuracy")),
            "test loss": _number(row.get("test/loss")),
            "train loss": _last(record, trial_id, "train/loss"),
            "train samples": steps * batch_size,
            "train total tokens": round(train_seconds * float(row["throughput/tokens_per_second"])),
        }
    )
    return metrics


def _meta_info(run: TrialRun, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_info": {"sha": parameters.get("model.revision"), "created_at": None},
        "dataset_info": {
            str(parameters.get("data.name")): {"sha": parameters.get("data.revision"), "created_at": None}
        },
        "package_info": _package_info(run),
        "system_info": {
            "system": run.tags.get("loragrid.system", ""),
            "accelerator": run.tags.get("loragrid.gpu", ""),
        },
        "pytorch_info": "",
        "loragrid": {
            "version": run.tags.get("loragrid.version.loragrid"),
            "commit": run.tags.get("mlflow.source.git.commit"),
            "mlflow_run_id": run.run_id,
            "notes": _NOTES,
        },
    }


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _train_config(parameters: Mapping[str, Any]) -> dict[str, Any]:
    training = {
        key.removeprefix("training."): value for key, value in parameters.items() if key.startswith("training.")
    }
    return {
        **training,
        "model_id": parameters.get("model.name"),
        "dtype": parameters.get("model.dtype"),
        "max_seq_length": parameters.get("data.max_length"),
        "max_steps": training.get("steps"),
        "eval_steps": training.get("eval_every"),
        "seed": parameters.get("seed"),
        "grad_norm_clip": training.get("clip_norm"),
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": training.get("lr")},
        "lr_scheduler": training.get("schedule"),
    }


def _peft_config(
    record: SweepRecord, run: TrialRun, parameters: Mapping[str, Any], row: Mapping[Any, Any]
) -> dict[str, Any] | None:
    """The adapter's PEFT config if it was kept, else one made of the parameters; None means full fine-tuning."""
    kept = read_artifact(record.comparison.tracking_uri, run.run_id, ADAPTER_CONFIG)
    if kept is not None:
        return dict(json.loads(kept))
    hyperparameters = {
        key.removeprefix("method."): value
        for key, value in parameters.items()
        if key.startswith("method.") and key != "method.name"
    }
    if not hyperparameters and row["parameters/trainable"]:
        return None
    return {
        # The app groups by this value, so it is the method's name and not the label in the table.
        "peft_type": str(parameters.get("method.name") or row["method"]).upper(),
        "base_model_name_or_path": parameters.get("model.name"),
        **hyperparameters,
    }


def _package_info(run: TrialRun) -> dict[str, str | None]:
    info: dict[str, str | None] = {}
    for package in _VERSIONS:
        # The app's columns are text, so a package that was not used needs an entry too.
        info[f"{package}-version"] = run.tags.get(f"loragrid.version.{package}", "not used")
        info[f"{package}-commit-hash"] = None
    return info


def _curve(record: SweepRecord, trial_id: str, key: str) -> list[tuple[int, float]]:
    curves: pd.DataFrame = record.comparison.curves
    own = curves[(curves["trial_id"] == trial_id) & (curves["key"] == key)]
    return [(int(step), float(value)) for step, value in zip(own["step"], own["value"], strict=True)]


def _last(record: SweepRecord, trial_id: str, key: str) -> float | None:
    curve = _curve(record, trial_id, key)
    return curve[-1][1] if curve else None


def _number(value: Any) -> float | None:
    return None if is_missing(value) else float(value)


_NOTES = {
    "accelerator_memory_reserved_avg": "the trial's peak, measured solo: LoraGrid keeps no average; an upper bound",
    "accelerator_memory_reserved_99th": "the trial's peak, measured solo; an upper bound",
    "accelerator_memory_max": "peak of the reserved memory in training, evaluation left out",
    "train_time": "steps times the step time of the trial, measured solo",
    "total_time": "of the packs that the trial shared with others",
    "train total tokens": "estimated: train_time times the measured non-padding tokens per second",
    "file_size": "number of values in the adapter's file times 4 bytes",
}
