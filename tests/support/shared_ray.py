"""One Ray of two CPUs for all tests of a process, because starting Ray takes as long as many tests."""

import logging


class SharedRay:
    """Starts Ray when the first test needs it. Tests that need their own cluster, or no Ray, stop it first."""

    def __init__(self) -> None:
        self._runs = False

    def start(self) -> str:
        """Start Ray, if it is not running, with this process as its driver; returns its address.

        Raises:
            RuntimeError: the process is connected to the cluster of another fixture, whose faults would hit the caller.
        """
        import ray

        if ray.is_initialized():
            if not self._runs:
                raise RuntimeError("this process is connected to another cluster; request the shared Ray before it")
        else:
            ray.init(address="local", num_cpus=2, num_gpus=0, log_to_driver=False, logging_level=logging.ERROR)
            self._runs = True
        return str(ray.get_runtime_context().gcs_address)

    def stop(self) -> None:
        """End Ray, if it is running."""
        if self._runs:
            import ray

            ray.shutdown()
            self._runs = False
