"""The engine on a Ray cluster: output equal to the embedded engine's, byte for byte, whatever is killed meanwhile.

Needs the extra [ray]. A cluster of two nodes is started on this machine.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from test_batch import COMMAND, contents, predictions_of, write_texts

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture
def cluster():
    """A local Ray cluster: a head node and a second node, each with one processor."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def actors() -> list[psutil.Process]:
    """Return the processes of the actors that score."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "ShardScorer" in " ".join(process.cmdline()):
                found.append(process)
    return found


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen([*COMMAND, *arguments], stdout=file, stderr=file)


@pytest.mark.parametrize(("n", "n_kills", "longest"), [(20_000, 6, 15), (1_000_000, 10, 60)])
def test_killed_actors_nodes_and_drivers_change_no_byte(cluster, tiny, tmp_path, n, n_kills, longest):
    inputs, rng = write_texts(tmp_path / "in", n, files=5), random.Random(n)
    arguments = [str(tiny), str(inputs), "--keep", "scores", "--sample", "0.1", "--shard-rows", str(max(2000, n // 50))]
    begun = time.perf_counter()
    assert subprocess.run([*COMMAND, *arguments, "--output", str(tmp_path / "local")], check=False).returncode == 0
    print(f"embedded: {time.perf_counter() - begun:.0f} s")
    arguments += ["--output", str(tmp_path / "out"), "--ray", cluster.address, "--workers", "2"]
    manifests, killed = tmp_path / "out" / "shards", []
    driver = start(arguments, tmp_path / "log")
    for kind in (["actor", "node", "driver"] * n_kills)[:n_kills]:
        end = time.monotonic() + rng.uniform(5, longest)
        while time.monotonic() < end and driver.poll() is None:
            time.sleep(0.2)
        if driver.poll() is not None:
            assert driver.returncode == 0, (tmp_path / "log").read_text()[-3000:]
            for path in rng.sample(sorted(manifests.glob("*.json")), k=len(list(manifests.glob("*.json"))) // 2):
                path.unlink()  # it was whole before the next kill: again from a random state
            driver = start(arguments, tmp_path / "log")
            while not actors() and driver.poll() is None:
                time.sleep(0.2)
        if kind == "actor" and actors():
            rng.choice(actors()).kill()
        elif kind == "node":
            cluster.remove_node(sorted(cluster.worker_nodes, key=id)[0], allow_graceful=False)
            cluster.add_node(**NODE)
        else:
            kind = "driver"
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            driver = start(arguments, tmp_path / "log")
        killed.append((kind, len(list(manifests.glob("*.json")))))
    assert driver.wait(3000) == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"killed, and shards done then: {killed}; in all {time.perf_counter() - begun:.0f} s")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert sorted(predictions_of(tmp_path / "out")["example_id"]) == list(range(n))
