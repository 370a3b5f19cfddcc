"""A worker's tags about itself and its inputs, which the driver of a cluster, on another machine, cannot know."""

import platform
from functools import lru_cache
from pathlib import Path

import torch

from loragrid.data.dataset import TokenizedData
from loragrid.data.record import data_tags
from loragrid.models.loading import model_digest
from loragrid.trials.tags import DATA_DIGEST_TAG, DEVICE_TAG
from loragrid.trials.trial import Trial
from loragrid.worker.environment import environment_tags


class WorkerEnvironment:
    """Returns the tags of a trial that this worker trains; tags that never change are determined once."""

    def __init__(self, device: torch.device, num_workers: int, *, shard: bool = False) -> None:
        workers = {"loragrid.workers": f"{num_workers} × {'a share of the base' if shard else 'the whole base'}"}
        self._own = {**environment_tags(), **arithmetic_tags(device), **workers}

    def __call__(self, trial: Trial, data: TokenizedData) -> dict[str, str]:
        """Tags of the worker, the trial's base and its rows. The first call for a base reads its files completely."""
        return {
            **self._own,
            **input_tags(model_digest(trial.model), data.digest),
            **data_tags(data),
            "loragrid.model.dtype": trial.model.dtype,
        }


def input_tags(weights: str, rows: str) -> dict[str, str]:
    """Tags that identify a base (`model_digest`: a hash, or a commit on the hub) and the rows."""
    revision = {} if weights.startswith("sha256:") else {"loragrid.model.revision": weights.rpartition("@")[2]}
    return {"loragrid.model.weights": weights, DATA_DIGEST_TAG: rows, **revision}


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
