"Baselines in several processes."
import pandas as pd

from moevo_nb.baselines import measure_baselines
from moevo_nb.evaluation import _toy_problem
from moevo_nb.store import Store


def test_any_number_of_processes_gives_the_same_table(tmp_path):
    names = ["random", "Taylor", "polynomial weights"]
    tables = [measure_baselines(names, _toy_problem(), [0.2, 0.5], Store(tmp_path / f"{n}.sqlite"), n) for n in (1, 2)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
