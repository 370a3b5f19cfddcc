"""A cluster whose two nodes share only the storage path loses one node in the middle of a pack."""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

import loragrid as lg
from tests.support.mounts import can_mount
from tests.support.shared_ray import SharedRay
from tests.support.sweep_processes import STEPS, curves, experiment, sqlite_uri
from tests.support.sweep_results import assert_succeeded

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.xdist_group("faults"),
    pytest.mark.skipif(not can_mount(), reason="no right to mount: the nodes would share all their folders"),
]

FIRST_STATE = 8
"""The step at which the plug is pulled; states have been saved before."""


class Node:
    """A real `ray start` in a mount namespace in which `private` folders are empty."""

    def __init__(self, address: str, private: list[Path], log: Path) -> None:
        mounts = [f"mount -t tmpfs none '{folder}'" for folder in private]
        ray = f"exec '{Path(sys.executable).parent / 'ray'}' start --address={address} --num-cpus=2 --block"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "RAY_raylet_start_wait_time_s": "120",  # a busy machine needs more than 30 s to start a node
        }
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, ray])],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        """All that lives on the node. Ray gives some of them sessions of their own."""
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def trains(self) -> bool:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in process.name():
                    return True
        return False

    def lose(self) -> None:
        """As if its plug were pulled."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def cluster(undisturbed: Path, shared_ray: SharedRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Two nodes beside a head that trains nothing; this process is connected.

    It needs `undisturbed` only so that the undisturbed sweep runs before this cluster starts, on the shared Ray.
    """
    import ray
    from ray.cluster_utils import Cluster

    shared_ray.stop()
    private = tmp_path_factory.mktemp("private")
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=head.address, log_to_driver=False)
    nodes: list[Node] = []
    try:
        for number in (1, 2):
            log = private.parent / f"node-{number}.log"
            # Ray's own sockets and files too: on one machine the nodes would share these.
            nodes.append(Node(head.address, [private, Path("/tmp/ray")], log))
            for _ in range(1200):
                if ray.cluster_resources().get("CPU") == 2.0 * number:  # type: ignore[no-untyped-call]
                    break
                time.sleep(0.1)
            else:
                raise AssertionError(log.read_text())
        yield nodes
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.lose()
        ray.shutdown()
        head.shutdown()  # type: ignore[no-untyped-call]


class PullsThePlug(io.StringIO):
    """A terminal that loses a node which trains, once the first pack to train is some steps into its training.

    No pack has ended by then: whichever node is lost had one.
    """

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__()
        self.nodes, self.lost = nodes, 0

    def write(self, text: str) -> int:
        if not self.lost and (step := re.search(r": step (\d+)/", text)) and int(step[1]) >= FIRST_STATE:
            assert int(step[1]) < STEPS, "the first pack to train has ended already"
            training = [node for node in self.nodes if node.trains()]
            training[0].lose()
            self.lost += 1
        return super().write(text)


def test_a_folder_that_nodes_do_not_share_is_refused(
    cluster: list[Node], faults_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    private = next(tmp_path_factory.getbasetemp().glob("private*"))
    with pytest.raises(ValueError, match=r"storage\.path: .*private.* does not see what this machine writes there"):
        lg.run(experiment(faults_settings, private))


def test_a_lost_node_changes_no_bit_of_the_sweep(
    undisturbed: Path,
    cluster: list[Node],
    faults_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loragrid.sweep.progress.PLAIN_LINE_SECONDS", 0.0)  # a line for every step
    # A URI, as of a bucket: nothing may take it for a folder of this machine.
    uri = (tmp_path / "shared").as_uri()
    terminal = PullsThePlug(cluster)
    result = lg.run(
        experiment(faults_settings, uri, tracking={"uri": f"sqlite:///{tmp_path}/m.db"}),
        console=Console(file=terminal, width=200),
    )
    assert terminal.lost == 1
    assert_succeeded(result, terminal.getvalue())
    assert curves(result.tracking_uri, result.name) == curves(sqlite_uri(undisturbed))
