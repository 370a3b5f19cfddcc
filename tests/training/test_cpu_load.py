"""The load of the CPUs counts other processes, and only on cores that this process may use."""

import multiprocessing
import time

import pytest
import torch

from loragrid.training.cpu_load import SHORTEST_SECONDS, CpuLoad, load_of, num_cores, worker_threads


@pytest.mark.parametrize(
    ("num_threads", "num_cores", "busy", "load"),
    [
        (2, 2, 20.0, 1.0),  # this process alone
        (2, 2, 30.0, 1.5),  # another takes a core
        (1, 8, 90.0, 1.0),
        (1, 8, 20.0, 0.125),
        (2, 2, 19.9, 1.0),  # ticks are rounded
    ],
)
def test_a_load_of_one_is_a_machine_just_filled(num_threads: int, num_cores: int, busy: float, load: float) -> None:
    assert load_of(num_threads, num_cores, 10.0, 20.0, busy) == pytest.approx(load)


def test_too_short_a_measurement_has_no_load() -> None:
    assert load_of(2, 2, 0.9 * SHORTEST_SECONDS, 1.0, 1.0) is None
    assert load_of(2, 2, 10.0, 20.0, 0.0) is None  # the system counts no CPU time
    with CpuLoad(1) as load:
        pass
    assert load.value is None


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_another_process_that_computes_is_seen() -> None:
    """Its own work does not count: without the other process the load would be this one's thread."""
    other = multiprocessing.get_context("spawn").Process(target=_spin, args=(6.0,))
    other.start()
    time.sleep(3.0)  # it imports torch first
    with CpuLoad(1) as load:
        _spin(1.5)
    other.join()
    assert load.value is not None
    assert load.value >= (1 + 0.5) / num_cores()


def test_on_a_gpu_one_thread_launches_kernels() -> None:
    assert worker_threads(torch.device("cuda")) == 1
    assert worker_threads(torch.device("cpu")) == torch.get_num_threads()
