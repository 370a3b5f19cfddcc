"""The load of the CPUs counts other processes, and only on cores that this process may use."""

import subprocess
import sys
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


def test_another_process_that_computes_is_seen() -> None:
    """This one's own work does not count: without the other, the load would be that of its thread."""
    other = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        time.sleep(0.3)  # the interpreter starts
        with CpuLoad(1) as load:
            end = time.monotonic() + 2 * SHORTEST_SECONDS
            while time.monotonic() < end:
                pass
    finally:
        other.kill()
        other.wait()
    assert load.value is not None
    assert load.value >= (1 + 0.5) / num_cores()


def test_on_a_gpu_one_thread_launches_kernels() -> None:
    assert worker_threads(torch.device("cuda")) == 1
    assert worker_threads(torch.device("cpu")) == torch.get_num_threads()
