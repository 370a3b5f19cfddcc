"""What the end-to-end tests share: a Ray cluster of two CPUs, and how to reach MLflow's record."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def ray_of_two_cpus() -> Iterator[str]:
    """A Ray cluster that the tests of one file share, in which this process is the driver; gives its address."""
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=0, log_to_driver=False, logging_level=logging.ERROR)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
