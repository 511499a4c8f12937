"A search may be killed, interrupted and started again at any moment: the same front, and nothing computed twice."
import os
import re
import resource
import signal
import time

import numpy as np
import psutil
import pytest
from joblib.externals.loky import get_reusable_executor
from toy import Toy, committed, fork, logged, same, search, wait_for

from moevo_nb.evaluation import Evaluator, Problem
from moevo_nb.evolution import Search, run_names, run_searches
from moevo_nb.head import presets
from moevo_nb.operators import BlindVariation
from moevo_nb.pareto import merge_fronts
from moevo_nb.store import Store, run_locks


def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    path, log, rng, n_evals = tmp_path / "killed.sqlite", tmp_path / "log", np.random.default_rng(), 1000
    for _ in range(20):   # of 0.15 s at most, so all together they cannot finish 1000 evaluations of 3 ms
        known, before = committed(path), len(logged(log))
        pid = fork(search, path, log, 0.003, n_evals)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL and not known & {*logged(log)[before:]}
    known, before = committed(path), len(logged(log))
    resumed, whole = search(path, log, n_evals=n_evals), search(":memory:", n_evals=n_evals)
    assert 0 < len(known) < 980 and not known & {*logged(log)[before:]}
    assert same(resumed, whole) and len(logged(log)) - len(committed(path)) <= 20   # a kill loses one evaluation at most
    for one, other in zip(*(merge_fronts([masks], [table]) for masks, table in (resumed, whole))): assert np.array_equal(one, other)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_around_a_commit(tmp_path, moment):
    path, log = tmp_path / "killed.sqlite", tmp_path / "log"

    class Killed(Store):
        def add(self, *args):
            if moment == "before" and len(logged(log)) == 30: os.kill(os.getpid(), signal.SIGKILL)
            super().add(*args)
            if len(logged(log)) == 30: os.kill(os.getpid(), signal.SIGKILL)

    assert os.waitpid(fork(search, path, log, 0, 200, Killed), 0)[1] == signal.SIGKILL
    assert len(logged(log)) == 30 and len(committed(path)) == (29 if moment == "before" else 30)
    assert same(search(path, log), search(":memory:"))
    assert logged(log).count(logged(log)[29]) == (2 if moment == "before" else 1) and len({*logged(log)}) == len(committed(path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_within_one_evaluation_and_says_how_to_go_on(tmp_path, number):
    path, log, said = tmp_path / "stopped.sqlite", tmp_path / "log", tmp_path / "said"

    def stopped():
        try: search(path, log, 0.05)
        except KeyboardInterrupt as e: said.write_text(str(e))

    pid = fork(stopped)
    wait_for(lambda: len(logged(log)) > 8)
    began = time.monotonic()
    os.kill(pid, number)
    assert os.waitpid(pid, 0)[1] == 0 and time.monotonic() - began < 5
    n = len(committed(path))
    assert said.read_text().startswith(f"{number.name}: stopped after {n} of 200 evaluations; they are kept: the same command goes on")
    assert len(logged(log)) - n in (0, 1) and not path.with_name("stopped.sqlite-wal").exists()   # the store was closed
    assert same(search(path, log), search(":memory:")) and len(logged(log)) - len(committed(path)) in (0, 1)


def small_problem():
    rng = np.random.default_rng(0)
    x, y = np.maximum(rng.normal(0, 1, (80, 30)), 0).astype(np.float32), np.arange(80) % 2
    return Problem(x, y, [(np.arange(40), np.arange(40, 80))], [x[40:] + 1], training=presets["quick"])


def run(): return Search(BlindVariation(30), 400, pop_size=20, n_offsprings=10)


def in_two_processes(path, said):
    os.setsid()   # a process group of its own, as in a terminal
    with Store(path) as store:
        try: run_searches(Evaluator(small_problem(), store, n_jobs=2), [run()])
        except KeyboardInterrupt as e: said.write_text(str(e))


def test_worker_processes_neither_keep_the_lock_nor_outlive_an_interrupt(tmp_path):
    path, said = tmp_path / "two.sqlite", tmp_path / "said"
    Store(path).db.close()
    get_reusable_executor().shutdown()   # another test's workers cannot be shared with a forked process
    pid = fork(in_two_processes, path, said)
    wait_for(lambda: len(committed(path)) > 5)
    orphans = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert any(o.is_running() for o in orphans)
    with Store(path) as store, run_locks(store, run_names(Evaluator(small_problem(), store), [run()])): pass

    n = len(committed(path))
    pid = fork(in_two_processes, path, said)
    wait_for(lambda: len(committed(path)) > n + 5)
    workers = psutil.Process(pid).children(recursive=True)
    os.killpg(pid, signal.SIGINT)   # as Ctrl-C does
    assert os.waitpid(pid, 0)[1] == 0
    assert re.fullmatch(r"SIGINT: stopped after \d+ of 400 evaluations; .*", said.read_text())
    assert not psutil.wait_procs(workers, timeout=5)[1]
    for orphan in psutil.wait_procs(orphans, timeout=0)[1]: orphan.kill()


def test_two_processes_on_the_same_run(tmp_path):
    path, log = tmp_path / "locked.sqlite", tmp_path / "log"
    pid = fork(search, path, log, 0.01)
    wait_for(lambda: len(logged(log)) > 3)
    with pytest.raises(RuntimeError, match=f"is being computed by process {pid} on .* since 20.*: wait for it, or"): search(path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert same(search(path), search(":memory:"))


def test_many_runs_need_few_open_files(tmp_path):
    def with_few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        with Store(tmp_path / "store.sqlite") as store:
            searches = [Search(BlindVariation(64), 2, pop_size=2, seed=seed) for seed in range(200)]
            assert [len(masks) for masks, _ in run_searches(Toy(store), searches)] == 200 * [2]

    assert os.waitpid(fork(with_few_files), 0)[1] == 0 and not [*(tmp_path / "locks").iterdir()]


def test_of_commands_that_share_a_run_one_goes_on(tmp_path):
    "Each of eight has a run of its own and one in common, and dies without letting go."
    path, go = tmp_path / "store.sqlite", tmp_path / "go"
    Store(path).close()

    def command(i):
        wait_for(go.exists)
        with Store(path) as store:
            try:
                with run_locks(store, ["common", f"run {i}"]):
                    (tmp_path / f"{i}.has").touch()
                    wait_for(lambda: len([*tmp_path.glob("*.lacks")]) == 7)
                    os.kill(os.getpid(), signal.SIGKILL)
            except RuntimeError as e: (tmp_path / f"{i}.lacks").write_text(str(e))

    pids = [fork(command, i) for i in range(8)]
    go.touch()
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    (winner,), refusals = tmp_path.glob("*.has"), [lacks.read_text() for lacks in tmp_path.glob("*.lacks")]
    pid = pids[int(winner.stem)]
    assert sorted(statuses) == 7 * [0] + [signal.SIGKILL] and all(f"run 'common' is being computed by process {pid} on" in r for r in refusals)
    with Store(path) as store:
        with run_locks(store, ["common"]): assert len([*(tmp_path / "locks").iterdir()]) == 2   # what the dead one left is gone


def test_another_seed_goes_on_beside_it(tmp_path):
    with Store(tmp_path / "one.sqlite") as store:
        with run_locks(store, run_names(Toy(store), [Search(BlindVariation(64), 200)])):
            run_searches(Toy(store), [Search(BlindVariation(64), 40, seed=1)])
            with pytest.raises(RuntimeError, match=f"process {os.getpid()} "):
                run_searches(Toy(store), [Search(BlindVariation(64), 40)])


def test_a_larger_budget_goes_on_and_a_changed_course_is_forgotten(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:
        run = lambda n, **how: run_searches(Toy(store), [Search(BlindVariation(64), n, pop_size=20, n_offsprings=10)], **how)[0]
        with pytest.raises(ValueError, match="nothing to resume: the store '.*' knows no run"): run(31, resume="must")
        short, longer = run(31), run(60, resume="must")
        assert (longer[0][:31] == short[0]).all() and longer[1][:31].equals(short[1])
        name, = run_names(Toy(store), [Search(BlindVariation(64), 60, pop_size=20, n_offsprings=10)])
        assert store.history(name).step.tolist() == 20 * [0] + 10 * [1] + 10 * [2] + 10 * [3] + 10 * [4]
        with store.transaction(): store.ask(name, 1, 20, ~longer[0][20:30])   # as another version of the operators might
        assert len(list(store.read("asked", "run = ?", (name,)))) == 30
