"A search whose evaluations cost nothing or some milliseconds, and processes forked from the test that runs it."
import os
import time
import traceback
from types import SimpleNamespace

import numpy as np

from moevo_nb.evaluation import Evaluator
from moevo_nb.evolution import Search, run_searches
from moevo_nb.operators import BlindVariation
from moevo_nb.store import Store, mask_name

weights = np.random.default_rng(0).random((2, 64))
folds = dict(accuracy=[0.7, 0.9], active_fraction=[0.25, 0.25], auroc=[0.85, 0.95])
row = dict(accuracy=0.8, active_fraction=0.25, auroc=0.9, folds=folds, epochs=600, seconds=1.5)


class Toy(Evaluator):
    "Objectives of a mask without training. Every evaluation is logged when it begins."
    def __init__(self, store, log=None, seconds=0.0):
        super().__init__(SimpleNamespace(definition=lambda: dict(data="toy"), n_neurons=64, folds=[0, 1]), store)
        self.log, self.seconds = log, seconds

    def rows(self, masks):
        for mask in masks:
            if self.log:
                with open(self.log, "a") as log: log.write(mask_name(mask) + "\n")
            time.sleep(self.seconds)
            accuracy, auroc = (weights @ mask / weights.sum(1)).tolist()
            yield dict(row, accuracy=accuracy, active_fraction=float(mask.mean()), auroc=1 - auroc**2)


def search(path, log=None, seconds=0.0, n_evals=200, store=Store):
    "Masks and objectives of one run against a store."
    with store(path) as kept: return run_searches(Toy(kept, log, seconds), [Search(BlindVariation(64), n_evals, pop_size=20, n_offsprings=10)])[0]


def committed(path):
    "The names of the masks that a store knows."
    with Store(path) as store: return {mask for _, mask, *_ in store.read("evaluations")}


def logged(log): return log.read_text().split() if log.exists() else []


def same(one, other): return (one[0] == other[0]).all() and one[1].equals(other[1])


def fork(function, *args):
    "Run a function in a child process; what it raises is printed. The child's id."
    if pid := os.fork(): return pid
    status = 1
    try:
        function(*args)
        status = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(status)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)
