"The experiment with each encoding: searched, stored, resumed and explained, on a few small images and masks."
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from moevo_nb.encoding import find_encoding
from moevo_nb.evolution import Search
from moevo_nb.operators import InformedVariation, importance
from moevo_nb.store import Store, from_hex

cells = json.loads((Path(__file__).parent.parent / "nbs" / "experiment.ipynb").read_text())["cells"]
code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
small = dict(ood="weaves", image_size=48, n_evals=7, pop_size=4, n_jobs=1, report_preset="quick")


def run(**given):
    "Run the notebook's cells in this process; their names."
    names = {"display": lambda *_: None}
    for cell in code:
        exec(compile(cell, cell.split("\n")[0], "exec"), names)
        if cell.startswith("dataset = "): names.update(given)
    plt.close("all")
    return names


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    "A cache that the tests of this file share, so that the backbone runs once."
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("encodings")
        patch.setenv("MOEVO_CACHE", str(folder / "cache"))
        patch.setenv("MOEVO_DATA", str(folder / "no data"))
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())   # rendering takes longer than all else
        yield folder


@pytest.mark.parametrize("encoding, given", [
    ("units", dict(protocol="holdout", runs=2, validation_folds=0)), ("two_layers_first", dict(search="paper")), ("two_layers_second", dict(folds=2)),
    ("two_layers_both", {}), ("connections", dict(protocol="holdout"))])
def test_an_encoding_from_search_to_explanation(shared_cache, class_folders, encoding, given):
    given = small | given | dict(dataset=str(class_folders), encoding=encoding, out_dir=str(shared_cache / encoding))
    names, kind = run(**given), find_encoding(encoding)
    n_neurons, n_evaluated = kind.n_neurons(1280, 3), names["evaluator"].trained
    result = json.loads((shared_cache / encoding / "result.json").read_text())
    front = pd.read_csv(shared_cache / encoding / "front.csv", dtype={"mask": str})
    masks = np.array([from_hex(digits, n_neurons) for digits in front["mask"]])
    assert result["parameters"]["encoding"] == encoding and len(front) == result["front_size"]
    assert (masks.mean(axis=1) == front.active_fraction).all() and 0 < n_evaluated <= result["evaluations"]
    with Store(shared_cache / encoding / "evaluations.sqlite") as store:
        stored = {store.mask(name).tobytes() for _, name, *_ in store.read("evaluations")}
    assert {mask.tobytes() for mask in masks} <= stored
    figures = shared_cache / encoding / "figures"
    assert {path.stem for path in figures.glob("*.png")} >= {"front", "neurons", "cams", "ensembles", "magnitude"}
    assert len(pd.read_csv(figures / "neurons.csv")) == 10 and pd.read_csv(figures / "cams.csv").iloc[:, 1:].to_numpy().any()


def test_an_encoding_is_resumed(shared_cache, class_folders, capsys):
    "Started again it trains nothing, and gives the same front; another encoding is another run."
    given = small | dict(dataset=str(class_folders), resume="must", out_dir=str(shared_cache / "again"))
    again = run(**given, encoding="two_layers_both")
    fronts = [(shared_cache / folder / "front.csv").read_text() for folder in ("two_layers_both", "again")]
    assert again["evaluator"].trained == 0 and fronts[0] == fronts[1]
    with pytest.raises(ValueError, match="- encoding: 'two_layers_both' there, 'units' asked for"): run(**given, encoding="units")


def test_a_step_over_connections_costs_less_than_a_second():
    "Choosing among offspring of 655,360 connections and learning from two, in processor time; and what the search keeps is packed."
    rng = np.random.default_rng(0)
    known = importance(rng.gamma(0.5, 1, (200, 1280)).astype(np.float32), 8, "connections")
    search, seconds = Search(InformedVariation(known), n_evals=40, surrogate=known), []
    while search.left:
        began = time.process_time()
        masks = search.ask()
        asked = time.process_time() - began
        table = pd.DataFrame(dict(accuracy=rng.random(len(masks)), active_fraction=masks.mean(axis=1), auroc=rng.random(len(masks))))
        began = time.process_time()
        search.tell(table)
        seconds.append(asked + time.process_time() - began)
    assert np.median(seconds[1:]) < 1 and sum(part.nbytes for part in search.masks) == 40 * 655_360 / 8
    masks, table = search.history()
    assert masks.dtype == bool and (masks.mean(axis=1) == table.active_fraction).all()
