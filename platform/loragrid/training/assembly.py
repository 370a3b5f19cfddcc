"""Builds a pack from base, adapters, optimizer and batches: the only place where platform and methods meet."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from loragrid.data.dataset import TokenizedData
from loragrid.training.batches import PackBatches
from loragrid.training.schedule import learning_rates
from loragrid.training.step import PackModel
from loragrid.trials.trial import Trial
from loragrid_methods.stacks.optimizer import MemberAdamW
from loragrid_methods.stacks.pack import AdapterPack


def build_model(trials: Sequence[Trial], base: PreTrainedModel) -> PackModel:
    """The trials of a pack as members on `base`, in the order given (planning has put equal methods side by side).

    Adapters and optimizer are float32, or float64 on a float64 base. If building fails, nothing stays attached.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    pack = AdapterPack(
        base,
        [(trial.method, trial.seed) for trial in trials],
        output_layer=base.get_output_embeddings(),
        dtype=dtype,
    )
    try:
        return _with_optimizer(trials, base, pack)
    except BaseException:  # memory mostly runs out when the optimizer's moments are allocated
        pack.detach()
        raise


def _with_optimizer(trials: Sequence[Trial], base: PreTrainedModel, pack: AdapterPack) -> PackModel:
    pack.train()
    device = base.device
    shared = trials[0].training
    clip_norms = [trial.training.clip_norm for trial in trials]
    optimizer = MemberAdamW(
        pack.blocks,
        weight_decay=_vector([trial.training.weight_decay for trial in trials], device),
        clip_norm=_vector([float("inf") if norm is None else norm for norm in clip_norms], device),
        beta1=shared.beta1,
        beta2=shared.beta2,
        epsilon=shared.epsilon,
    )
    return PackModel(
        base=base,
        pack=pack,
        optimizer=optimizer,
        learning_rates=learning_rates([trial.training for trial in trials]).to(device),
        active=torch.ones(len(trials), dtype=torch.bool, device=device),
        micro_batch_size=shared.micro_batch_size,
    )


def build_batches(
    trials: Sequence[Trial],
    data: TokenizedData,
    device: torch.device,
    *,
    worker: int = 0,
    num_workers: int = 1,
    prompts_at_once: int | None = None,
) -> PackBatches:
    """This worker's batches for the members of the pack; see `PackBatches`."""
    shared = trials[0].training
    return PackBatches(
        data,
        [trial.seed for trial in trials],
        shared.batch_size,
        micro_batch_size=shared.micro_batch_size,
        prompts_at_once=prompts_at_once,
        worker=worker,
        num_workers=num_workers,
        device=device,
    )


def _vector(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)
