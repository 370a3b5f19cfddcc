"""A queue's places on the cluster are released, however the queue ends."""

import asyncio
import time
from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.util.placement_group import placement_group

from loragrid.sweep.ray_internals import placement_release

pytestmark = [pytest.mark.end_to_end, pytest.mark.usefixtures("ray_of_two_cpus")]


def free_cpus(expected: float) -> float:
    """What Ray has free, once it is as expected, or after a minute."""
    for _ in range(600):
        if ray.available_resources().get("CPU", 0.0) == expected:  # type: ignore[no-untyped-call]
            break
        time.sleep(0.1)
    return float(ray.available_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]


def test_an_ending_controller_gives_its_workers_places_back() -> None:
    # What Train reserves for workers is bound to no process: it stays reserved when the controller is gone.
    handle = DefaultPlacementGroupHandle(placement_group([{"CPU": 2}]))
    assert handle.wait(60)
    state = SimpleNamespace(placement_group_handle=handle)
    places = placement_release()
    places.after_worker_group_start(SimpleNamespace(get_worker_group_state=lambda: state))
    assert free_cpus(0.0) == 0.0
    asyncio.run(places.before_controller_shutdown())
    assert free_cpus(2.0) == 2.0
    asyncio.run(places.before_controller_shutdown())
    handle.shutdown()  # as a controller does that can end its workers: given back twice is no error
    assert free_cpus(2.0) == 2.0
