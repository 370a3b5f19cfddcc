"""Cuts a plan into packs and queues for a cluster: the estimate of a sweep and the sweep itself use these functions."""

from collections.abc import Sequence
from dataclasses import replace

from loragrid.config.experiment import Experiment
from loragrid.planning.placement import Placement
from loragrid.planning.plan import Plan
from loragrid.trials.packing import Pack, PackQueue, assign_queues, group_into_packs, rung_units


def cut_for(plan: Plan, placement: Placement) -> Plan:
    """The plan with its packs cut so that every GPU of the cluster has work; on CPUs the packs stay as planned.

    With early stopping they are cut for CPUs too, because each place needs its own rung group.
    """
    early_stopping = plan.experiment.early_stopping
    if not placement.use_gpu and early_stopping is None:
        return plan
    packs = group_into_packs(
        plan.trials,
        plan.experiment.pack,
        placement.num_packs,
        num_workers=placement.num_workers,
        early_stopping=early_stopping,
    )
    confirm = None if plan.confirm is None else cut_for(plan.confirm, placement)
    return replace(plan, packs=tuple(packs), confirm=confirm)


def queues_on(
    packs: Sequence[Pack], experiment: Experiment, placement: Placement, *, first: int = 0
) -> list[PackQueue]:
    """The packs as queues, numbered from `first`: one queue per place of the cluster.

    One queue per pack if packs hold single trials, if packs span workers (one failure stops all workers of a queue), or
    if the cluster has no free place yet (its later size is unknown). Packs of one rung group always share a queue.
    """
    one_per_pack = experiment.pack.max_members == 1 or placement.num_workers > 1 or not placement.num_packs
    return assign_queues(packs, len(rung_units(packs)) if one_per_pack else placement.num_packs, first=first)
