"What must not depend on the number of processes or threads, nor on whether one of them was killed or cannot be started."
import ast
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest

from moevo_nb.backbone import extract
from moevo_nb.data import load
from moevo_nb.evaluation import Problem, fold_outputs
from moevo_nb.head import fit_heads, presets
from moevo_nb.operators import importance
from moevo_nb.system import graceful_interrupt, numeric_libraries, run_parallel

search = """
import sys
import numpy as np
from moevo_nb.evaluation import Evaluator, Problem
from moevo_nb.evolution import Search, evolve
from moevo_nb.operators import BlindVariation
from moevo_nb.store import Store, to_hex
rng = np.random.default_rng(0)
x, y = np.maximum(rng.normal(0, 1, (80, 30)), 0).astype(np.float32), np.arange(80) % 2
x[:, :5] += y[:, None]
problem = Problem(x, y, [(np.arange(40), np.arange(40, 80))], [x[40:] + 1])
with Store(sys.argv[1]) as store:
    evaluate = Evaluator(problem, store, progress=lambda: print("trained", flush=True))
    (masks, table), = evolve(evaluate, [Search(BlindVariation(30), 40, pop_size=10)])
    print(to_hex(masks.ravel()), table.to_csv())
"""


def start(path):
    return subprocess.Popen([sys.executable, "-c", search, str(path)], stdout=subprocess.PIPE, text=True)


def test_a_killed_search_goes_on_where_it_stopped(tmp_path):
    whole = start(tmp_path / "whole.sqlite").communicate()[0].split("trained\n")
    killed = start(tmp_path / "killed.sqlite")
    for _ in range(15): killed.stdout.readline()
    os.kill(killed.pid, signal.SIGKILL)
    finished = 15 + killed.communicate()[0].count("trained")
    resumed = start(tmp_path / "killed.sqlite").communicate()[0].split("trained\n")
    assert resumed[-1] == whole[-1] and len(resumed[-1]) > 100
    assert len(whole) - len(resumed) in (finished, finished + 1)   # one may have been committed, but not told of, when it was killed


def test_features_do_not_depend_on_the_number_of_processes():
    flowers, some = load("flowers"), np.arange(40)
    one, two = (extract(flowers, some, ("efficientnet_lite0", "", "cpu"), 64, n_jobs=n) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_heads_do_not_depend_on_the_number_of_processes():
    rng = np.random.default_rng(0)
    x, y = np.maximum(rng.normal(0, 1, (150, 120)), 0).astype(np.float32), np.arange(150) % 3   # enough for oneDNN's products
    masks, folds = rng.random((5, 120)) < np.linspace(0, 1, 5)[:, None], [np.arange(100), np.arange(50, 150)]
    for one, two in zip(fit_heads(x, y, masks, 3, folds), fit_heads(x, y, masks, 3, folds, n_jobs=2), strict=True):
        for a, b in zip(one, two, strict=True):
            assert all((getattr(a, k) == getattr(b, k)).all() for k in ("inputs", "bias", "losses"))
            assert all((v == w).all() for v, w in zip(a.weights, b.weights, strict=True))


def test_logits_and_importance_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(0)
    x, y = np.maximum(rng.normal(0, 1, (1000, 640)), 0).astype(np.float32), np.arange(1000) % 4
    problem = Problem(x, y, [(np.arange(100), np.arange(100, 1000))], [x[:900] + 1], training=presets["quick"], encoding="units")
    heads, seen = next(problem.fit(np.ones((1, 512), bool))), []
    for threads in (1, 2):
        with numeric_libraries().limit(limits=threads): 
            outputs, = fold_outputs(problem, heads)
            seen.append([outputs.logits, outputs.ood_logits, outputs.scores, importance(problem.training_images(), 4, "units")])
    for one, two in zip(*seen, strict=True): np.testing.assert_array_equal(one, two)


def test_there_is_one_door_for_processes():
    for module in (Path(__file__).parent.parent / "moevo_nb").glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Attribute)}
        assert ("Parallel" in names) == (module.name == "system.py"), module


without_shared_memory = """
import _multiprocessing, sys, warnings
class Refused(_multiprocessing.SemLock):
    def __new__(*_, **__): raise FileNotFoundError(2, "No such file or directory")   # as without /dev/shm
_multiprocessing.SemLock = Refused
warnings.simplefilter("ignore")
import numpy as np
from moevo_nb.backbone import extract
from moevo_nb.data import load
from moevo_nb.head import fit_heads
x = extract(load("flowers"), np.arange(40), ("efficientnet_lite0", "", "cpu"), 64, n_jobs=1)
warnings.simplefilter("default")
for n_jobs in (1, 2): found = [head.weights[0] for head, in fit_heads(x, np.arange(40) % 3, np.ones((2, 1280), bool), 3, n_jobs=n_jobs)]
np.savez(sys.argv[1], features=x, weights=found)
"""


def test_without_shared_memory_one_process_computes_the_same(tmp_path):
    done = subprocess.run([sys.executable, "-c", without_shared_memory, tmp_path / "found.npz"], capture_output=True, text=True, check=True)
    assert done.stderr.count("n_jobs = 2, but parallel processes are not available here (they need shared memory, /dev/shm): one") == 1
    found = np.load(tmp_path / "found.npz")
    x = extract(load("flowers"), np.arange(40), ("efficientnet_lite0", "", "cpu"), 64, n_jobs=2)
    np.testing.assert_array_equal(found["features"], x)
    heads = fit_heads(x, np.arange(40) % 3, np.ones((2, 1280), bool), 3, n_jobs=2)
    np.testing.assert_array_equal(found["weights"], [head.weights[0] for head, in heads])


sleepers = """
import time
from moevo_nb.system import run_parallel
for _ in run_parallel(time.sleep, ((0.1,) for _ in range(6000)), n_jobs=2): open("going", "w").close()
"""


def sleeping(folder, papermill=False):
    "A process that computes in two others, and all that it has started."
    command = ["-c", sleepers]
    if papermill:
        kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(sleepers)], metadata=kernel), folder / "sleepers.ipynb")
        command = ["-m", "papermill", "sleepers.ipynb", "out.ipynb"]
    parent = subprocess.Popen([sys.executable, *command], cwd=folder, stderr=subprocess.DEVNULL)
    while not (folder / "going").exists(): time.sleep(0.05)
    return parent, psutil.Process(parent.pid).children(recursive=True)


@pytest.mark.parametrize("papermill", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_and_trackers_end_within_five_seconds_of_their_parent(tmp_path, number, papermill):
    parent, started = sleeping(tmp_path, papermill)
    assert len(started) >= 3 + papermill   # two workers, a tracker and, of papermill, a kernel
    os.kill(parent.pid, number)
    try: assert not psutil.wait_procs(started, timeout=5)[1]
    finally:
        parent.wait()
        for orphan in psutil.wait_procs(started, timeout=0)[1]: orphan.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_whatever_runs_in_processes(number):
    with pytest.raises(KeyboardInterrupt, match=f"^{number.name}: the stage is kept$"):
        with graceful_interrupt(lambda: "the stage is kept"):
            for i, _ in enumerate(run_parallel(time.sleep, ((0.05,) for _ in count()), n_jobs=2)):
                if i == 5: os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_innermost_of_nested_stages_speaks():
    with pytest.raises(KeyboardInterrupt, match="^SIGTERM: search$"):
        with graceful_interrupt(lambda: "stage"), graceful_interrupt(lambda: "search"): os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="^SIGTERM: stage$"):
        with graceful_interrupt(lambda: "stage"):
            with graceful_interrupt(lambda: "search"): pass
            os.kill(os.getpid(), signal.SIGTERM)


def killed(deaths):
    "A function that gives back a number and logs it; its process is killed the first times that it is asked for 7."
    def found(number, log):
        with open(log, "a") as file: file.write(f"{number}\n")
        if number == 7 and Path(log).read_text().split().count("7") <= deaths: os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return number
    return found   # a nested function travels by value, so that workers need not import this module


def test_what_a_killed_worker_was_doing_is_run_once_more(tmp_path):
    log = tmp_path / "log"
    with pytest.warns(UserWarning, match="a worker process was killed; what it was doing is run once more"):
        assert [*run_parallel(killed(1), ((i, log) for i in range(40)), n_jobs=2)] == [*range(40)]
    calls = log.read_text().split()
    assert calls.count("7") == 2 and {*map(int, calls)} == {*range(40)} and len(calls) < 60   # those that were done are not repeated


def test_two_kills_at_one_task_end_the_run(tmp_path):
    found = run_parallel(killed(2), ((i, tmp_path / "log") for i in range(40)), n_jobs=2)
    with pytest.raises(RuntimeError, match=r"killed twice at the same tasks, most likely because memory has run out: use fewer processes \(n_jobs\)"):
        with pytest.warns(UserWarning, match="run once more"):
            for i, number in enumerate(found): assert i == number
    assert (tmp_path / "log").read_text().split().count("7") == 2
    assert [*run_parallel(abs, ((-i,) for i in range(9)), n_jobs=2)] == [*range(9)]   # the next call has processes again


def test_two_kills_at_different_tasks_are_survived(tmp_path):
    tasks = [(i % 40, tmp_path / str(i // 40)) for i in range(80)]
    with pytest.warns(UserWarning, match="run once more") as told:
        assert [*run_parallel(killed(1), tasks, n_jobs=2)] == [i for i, _ in tasks]
    assert len(told) == 2


def test_an_error_of_a_task_is_its_own():
    with pytest.raises(ZeroDivisionError): [*run_parallel(divmod, [(1, 1), (1, 0)], n_jobs=2)]


def test_a_large_task_is_no_leak():
    def held(megabytes):
        sys.held = np.ones(megabytes << 18, np.float32)   # longer than a second, after which loky would look
        time.sleep(1.1)
        return os.getpid()
    assert len({*run_parallel(held, [(1,), (1,), *[(350,)] * 4], n_jobs=2)}) == 2
