"""Runs one pack on Ray: a `TorchTrainer` inside a Tune trial, reporting back to Tune."""

import ray
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from loragrid.data import TokenizedData
from loragrid.placement import Placement
from loragrid.planning import Pack
from loragrid.worker import WorkerTask, run_worker


def drive_pack(pack: Pack, data: TokenizedData, placement: Placement, storage_path: str) -> None:
    """Train the pack to its end; its updates reach Tune one by one.

    Must be called in a Tune trial. Raises what the workers raised.
    """
    task = WorkerTask(pack=pack, data=ray.put(data), threads=placement.threads)
    resources = {"CPU": placement.cpus_per_worker}
    if placement.use_gpu:
        resources["GPU"] = 1.0
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=task,  # type: ignore[arg-type]  # any object is handed on as it is
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers, use_gpu=placement.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if placement.use_gpu else "gloo"),
        run_config=RunConfig(
            name=pack.pack_id,
            storage_path=storage_path,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()
