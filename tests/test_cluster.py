"Heads trained by the workers of a Dask cluster: the same front as on this machine, whatever becomes of a worker."
import os
import signal
import sys

import numpy as np
import psutil
import pytest

from moevo_nb import store, system
from moevo_nb.evaluation import Evaluator, Problem, connect_dask, dask_workers
from moevo_nb.evolution import Search, run_searches
from moevo_nb.head import presets
from moevo_nb.operators import BlindVariation
from moevo_nb.store import Store


def small_problem():
    rng = np.random.default_rng(0)
    x, y = np.maximum(rng.normal(0, 1, (300, 1000)), 0).astype(np.float32), np.arange(300) % 3
    x[:, :100] += 0.2 * y[:, None]
    halves = np.arange(150), np.arange(150, 300)
    return Problem(x, y, [halves, halves[::-1]], [x[:40] + 1, x[40:80] + 1], training=presets["quick"])


def search(problem, on_training=None):
    with Store(":memory:") as kept:
        return run_searches(Evaluator(problem, kept, progress=on_training), [Search(BlindVariation(1000), 24, pop_size=8, n_offsprings=4)])[0]


def count_received():
    "From now on a worker counts the bytes that it receives."
    import distributed.comm.utils
    from distributed.utils import nbytes
    protocol, counted = distributed.comm.utils.protocol, type(os)("counted")
    vars(counted).update(vars(protocol))
    distributed.comm.utils.received = 0

    def loads(frames, **how):
        distributed.comm.utils.received += sum(map(nbytes, frames))
        return protocol.loads(frames, **how)
    counted.loads = loads
    distributed.comm.utils.protocol = counted


def received():
    import distributed.comm.utils
    return distributed.comm.utils.received


@pytest.fixture(scope="module")
def workers():
    "A scheduler with two workers of one thread each; one that dies is replaced."
    from distributed import LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as workers: yield workers


def test_features_travel_once_to_each_worker(workers):
    problem = small_problem()
    features = problem.features.nbytes
    with connect_dask(workers.scheduler_address) as client:
        client.run(count_received)
        with dask_workers(workers.scheduler_address, problem):
            for _ in range(2): search(problem)
            counts = client.run(received).values()
    assert len(counts) == 2 and all(features < n < 1.5 * features for n in counts)


def test_the_front_does_not_depend_on_a_killed_worker(workers):
    problem, victim, trained = small_problem(), workers.workers[0].pid, []

    def on_training():
        trained.append(None)
        if len(trained) == 10: os.kill(victim, signal.SIGKILL)

    with dask_workers(workers.scheduler_address, problem): there = search(problem, on_training)
    assert len(trained) > 20 and not psutil.pid_exists(victim)
    here = search(problem)
    assert (there[0] == here[0]).all() and there[1].equals(here[1])


def test_what_cannot_be_a_cluster(workers, monkeypatch):
    with pytest.raises(ValueError, match="no Dask scheduler answers at 'tcp://127.0.0.1:1' within 1 s .*dask worker"):
        connect_dask("tcp://127.0.0.1:1", timeout=1)
    version = system.version
    with monkeypatch.context() as patch:
        patch.setattr(system, "version", lambda name: "0.0" if name == "torch" else version(name))
        store.software.cache_clear()
        with pytest.raises(ValueError, match="worker tcp://.* would compute something else: it has .*here is .*'torch': '0.0'"):
            with dask_workers(workers.scheduler_address, small_problem()): pass
    store.software.cache_clear()
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r'pip install "moevo_nb\[cluster\]"'): connect_dask(workers.scheduler_address)
