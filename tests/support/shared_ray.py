"""One Ray of two CPUs for all tests of a process: to start one takes as long as many tests do."""

import logging


class SharedRay:
    """Starts Ray when the first test wants it; a test that starts a cluster of its own stops it before."""

    def start(self) -> str:
        """Start Ray, if it is not running, with this process as its driver; returns its address."""
        import ray

        if not ray.is_initialized():
            ray.init(address="local", num_cpus=2, num_gpus=0, log_to_driver=False, logging_level=logging.ERROR)
        return str(ray.get_runtime_context().gcs_address)

    def stop(self) -> None:
        """End Ray, if it is running."""
        import ray

        ray.shutdown()
