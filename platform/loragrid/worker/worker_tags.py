"""A worker's tags about itself and its inputs, which the driver of a cluster, on another machine, cannot know."""

import json
import platform
from functools import lru_cache
from pathlib import Path

import torch

from loragrid.config.experiment import ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.data.record import data_tags
from loragrid.models.base_record import BaseRecord, record_base
from loragrid.models.loading import unused_weights
from loragrid.models.unused_weights import names_in_short
from loragrid.trials.tags import (
    DATA_DIGEST_TAG,
    DEVICE_TAG,
    MODEL_CONFIG_TAG,
    MODEL_FILES_TAG,
    MODEL_LOCATION_TAG,
    UNUSED_WEIGHTS_TAG,
    WEIGHTS_TAG,
)
from loragrid.trials.trial import Trial
from loragrid.worker.environment import environment_tags


class WorkerEnvironment:
    """Returns the tags of a trial that this worker trains; tags that never change are determined once."""

    def __init__(self, device: torch.device, num_workers: int, *, shard: bool = False) -> None:
        workers = {"loragrid.workers": f"{num_workers} × {'a share of the base' if shard else 'the whole base'}"}
        self._own = {**environment_tags(), **arithmetic_tags(device), **workers}
        self._base: tuple[ModelConfig, BaseRecord] | None = None
        self._unused: dict[str, str] = {}

    def __call__(self, trial: Trial, data: TokenizedData, just_loaded: bool = True) -> dict[str, str]:
        """Tags of the worker, the trial's base and its rows.

        just_loaded: whether the base has just been loaded; its files are then read completely. Otherwise the tags are
        those of the base in memory, even if its files have changed since.
        """
        if just_loaded or self._base is None or self._base[0] != trial.model:
            self._base = (trial.model, record_base(trial.model))
            unused = unused_weights(trial.model, is_fetched=True)
            self._unused = {UNUSED_WEIGHTS_TAG: names_in_short(unused)} if unused else {}
        base = self._base[1]
        return {
            **self._own,
            **input_tags(base.weights, data.digest),
            **location_tags(base),
            **self._unused,
            **data_tags(data),
            "loragrid.model.dtype": trial.model.dtype,
        }


def input_tags(weights: str, rows: str) -> dict[str, str]:
    """Tags that identify a base (`model_digest`: a hash, or a commit on the hub) and the rows."""
    revision = {} if weights.startswith("sha256:") else {"loragrid.model.revision": weights.rpartition("@")[2]}
    return {WEIGHTS_TAG: weights, DATA_DIGEST_TAG: rows, **revision}


def location_tags(base: BaseRecord) -> dict[str, str]:
    """Tags that tell an export where the base was and what its files held."""
    tags = {MODEL_LOCATION_TAG: base.location}
    if base.files:
        tags[MODEL_FILES_TAG] = json.dumps(base.files, sort_keys=True)
    if base.config:
        tags[MODEL_CONFIG_TAG] = json.dumps(base.config, sort_keys=True)
    return tags


def arithmetic_tags(device: torch.device) -> dict[str, str]:
    """The device that computes, and the settings that determine its precision."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    tags = {
        DEVICE_TAG: cpu_name(),
        "loragrid.precision.float32_matmul": torch.get_float32_matmul_precision(),
        "loragrid.deterministic": str(torch.are_deterministic_algorithms_enabled()).lower(),
        "loragrid.threads": str(torch.get_num_threads()),
    }
    if device.type != "cuda":
        return tags
    major, minor = torch.cuda.get_device_capability(device)
    return tags | {
        DEVICE_TAG: torch.cuda.get_device_name(device),
        "loragrid.gpu.capability": f"{major}.{minor}",
        "loragrid.version.cuda": str(torch.version.cuda),
        "loragrid.precision.tf32": f"matmul {_on(matmul.allow_tf32)}, cudnn {_on(cudnn.allow_tf32)}",
        "loragrid.precision.reduced_bfloat16_sums": _on(matmul.allow_bf16_reduced_precision_reduction),
    }


def cpu_name() -> str:
    """The processor, with the instruction set that torch uses."""
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's model name; its architecture if the system does not provide the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _on(switch: bool) -> str:
    return "on" if switch else "off"
