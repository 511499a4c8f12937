"What must not depend on the number of processes or threads, nor on whether one of them was killed."
import os
import signal
import subprocess
import sys

import numpy as np

from moevo_nb.backbone import extract
from moevo_nb.data import load
from moevo_nb.evaluation import Problem, fold_outputs
from moevo_nb.head import fit_heads, presets
from moevo_nb.operators import importance
from moevo_nb.system import numeric_libraries

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
