"The main job through papermill, on a few small images and masks: complete, repeatable, resumable, and strict."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from moevo_nb.head import presets
from moevo_nb.store import Store

root = Path(__file__).parent.parent
small = dict(ood="weaves", image_size=48, n_evals=7, pop_size=4, n_jobs=1)


def papermill(folder, cache, notebook="experiment", **parameters):
    "Run a notebook as a user would, in a folder, with a cache; the finished process."
    given = [word for k, v in parameters.items() for word in ("-p", k, str(v))]
    return subprocess.run([str(Path(sys.executable).parent / "papermill"), str(root / "nbs" / f"{notebook}.ipynb"), "out.ipynb", *given], cwd=folder,
                          capture_output=True, text=True, env=os.environ | dict(MOEVO_CACHE=str(cache), MOEVO_DATA=str(folder / "none")))


def printed(notebook):
    return "".join(o.get("text", "") for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" for o in c.outputs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, class_folders):
    "Two runs with the same parameters, each with an empty cache, and one more with the first one's cache."
    folders = [tmp_path_factory.mktemp(f"run{k}") for k in range(3)]
    for folder, cache, resume in zip(folders, (folders[0], folders[1], folders[0]), ("auto", "auto", "must")):
        done = papermill(folder, cache / "cache", dataset=class_folders, out_dir="results", resume=resume, **small)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def test_a_run_leaves_everything_behind(finished):
    out = finished[0] / "results"
    result = json.loads((out / "result.json").read_text())
    assert result["evaluations"] == 7 and result["images"]["total"] == 42 and result["ood"] == [{"weaves": 9}]
    single = [name for name, model in result["models"].items() if "ensemble" not in name]
    assert set(result["ood_by_set"]) == set(result["calibration"]) == {*single, "front median"} and {"ensemble", "greedy ensemble"} <= {*result["models"]}
    assert all(0 <= found[ece] <= 1 for found in result["calibration"].values() for ece in ("ece", "scaled_ece"))
    unpruned = result["ood_by_set"]["unpruned"]["auroc"]
    assert list(unpruned) == ["weaves", "pooled"] and abs(unpruned["pooled"] - result["unpruned"]["auroc"]) < 1e-9
    assert result["seeds"] == [1, 2, 3, 4, 5] and result["gains_over_seeds"]["knee"]["accuracy"]["min"] <= 1
    assert result["trainings"] == dict(search=presets["quick"], report=presets["paper"])
    assert len(result["code"]["package"]) == len(result["code"]["experiment"]) == 64
    assert result["training_seconds"]["search"] > 0 and 0 <= result["recurring_neurons"]["sampler_top_frequency"] <= 1
    front = pd.read_csv(out / "front.csv", dtype={"mask": str})
    assert list(front.columns) == ["run", "accuracy", "active_fraction", "auroc", "searched_accuracy", "searched_auroc", "mask"]
    assert len(front) == result["front_size"]
    assert 0 < result["hypervolume"] < 1 and result["best"]["accuracy"] == front.accuracy[front.active_fraction <= 0.4].max()
    names = {f.stem for f in (out / "figures").glob("*.png")}
    assert names == {"front", "hypervolume", "models", "ood", "seeds", "magnitude", "neurons", "cams", "ensembles"}   # no ground truth, so no pointing game
    assert names <= {f.stem for f in (out / "figures").glob("*.csv")} and (out / "evaluations.sqlite").exists()


def test_the_executed_notebook_is_short_and_whole(finished):
    text = printed(finished[0] / "out.ipynb")
    assert "7 of 7 evaluations" in text and "6 of 7 evaluations" not in text and len(text.splitlines()) < 18


def test_the_same_parameters_give_the_same_front(finished):
    one, two, warm = [(f / "results" / "front.csv").read_text() for f in finished]
    assert one == two == warm


def test_a_warm_cache_spares_the_backbone(finished):
    assert "through the backbone" in printed(finished[1] / "out.ipynb")
    assert "through the backbone" not in printed(finished[2] / "out.ipynb")


def test_the_papers_search_under_holdout_reports_what_it_never_saw(finished, class_folders, tmp_path):
    "With two objectives, another detector, an OoD set of the search's own, and a corruption."
    own = dict(search="paper", preset="quick", report_preset="quick", protocol="holdout", runs=2, out_dir="results", objectives="accuracy,auroc",
               detector="knn", ood="weaves,pebbles", ood_search="pebbles", corruptions="jpeg")
    done = papermill(tmp_path, finished[0] / "cache", dataset=class_folders, **dict(small, **own))
    assert done.returncode == 0, done.stderr[-3000:]
    result, front = json.loads((tmp_path / "results" / "result.json").read_text()), pd.read_csv(tmp_path / "results" / "front.csv", dtype={"mask": str})
    assert list(front.columns) == ["run", "accuracy", "active_fraction", "auroc", "validation_accuracy", "validation_auroc", "mask"]
    best, unpruned = result["models"]["best accuracy"], result["models"]["unpruned"]
    assert result["best"]["accuracy"] == best["accuracy"] == front.accuracy[int(best["members"][0])] and best["active_fraction"] <= 0.4
    assert result["models"]["fold ensemble"]["members"] == [f"{best['members'][0]} fold {k}" for k in range(5)]
    assert unpruned["members"] == [] and unpruned["accuracy_gain"] == 0 and best["accuracy_gain"] == best["accuracy"] - unpruned["accuracy"]
    assert result["hypervolume_selection"] != result["hypervolume"]
    assert result["evaluations"] == 14 and set(front.run) <= {0, 1} and result["parameters"]["report_preset"] == "quick"
    assert result["trainings"]["search"] == result["trainings"]["report"] == presets["quick"]
    attained = pd.read_csv(tmp_path / "results" / "figures" / "attainment.csv", header=[0, 1], index_col=0)
    assert attained.columns.tolist() == [(o, f"run_{k}") for o in ("accuracy", "auroc") for k in range(2)]
    curves = pd.read_csv(tmp_path / "results" / "figures" / "hypervolume.csv")
    assert len(curves) == 7 and (attained.diff().iloc[1:] >= 0).all(axis=None)
    assert result["ood"] == [{"weaves": 9}] and [*result["ood_by_set"]["unpruned"]["auroc"]] == ["weaves", "pooled"]
    under = result["corruptions"]["accuracy"]
    assert under["unpruned"]["clean"] == result["unpruned"]["accuracy"] and [*under["unpruned"]] == ["clean", "jpeg", "mean"]
    assert any(name.startswith("vote") for name in under) and set(result["corruptions"]["auroc"]) == {name for name in result["models"] if "ensemble" not in name}


def test_run_all_again_and_every_cell_singly(class_folders, cache, tmp_path, monkeypatch):
    "In one kernel: in order, then every cell alone, the last one first, then in order; with names of classes that figures must not read."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MPLBACKEND", raising=False)   # figures are shown, as in a user's notebook
    for folder, name in zip(sorted(class_folders.iterdir()), ("$5_$10", "_<b>", "花")): shutil.copytree(folder, tmp_path / "own" / name)
    given = dict(small, dataset="own", report_preset="quick", show_images=True)
    notebook = nbformat.from_dict(json.loads((root / "nbs" / "experiment.ipynb").read_text()))
    for k, cell in enumerate(notebook.cells): cell.update(id=f"cell-{k}", source="".join(cell.source))
    tagged = next(k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    lines = ["# Parameters", *(f"{name} = {value!r}" for name, value in given.items())]   # as papermill does
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    cells, results = [c for c in notebook.cells if c.cell_type == "code"], tmp_path / "runs" / "own"

    def left_behind(): return {str(f.relative_to(results)): f.read_bytes() for f in results.rglob("*") if f.suffix in (".json", ".csv", ".png")}

    found, client = [], NotebookClient(notebook, kernel_name="python3")
    with client.setup_kernel():
        for part in (cells, cells[::-1], cells):
            for cell in part: client.execute_cell(cell, notebook.cells.index(cell))
            found.append(left_behind())
    one, singly, again = found
    for other in (singly, again):
        assert set(one) == set(other) and all(one[name] == other[name] for name in one if name.endswith(".csv"))
        results_of = [json.loads(files["result.json"]) | dict(seconds=0, training_seconds=0) for files in (one, other)]
        assert results_of[0] == results_of[1]
    text = "".join(str(c.outputs) for c in cells)
    assert "$5_$10" in text and "mathjax_ignore" in text and "Warning" not in text


def test_resume_must_says_what_differs(finished, class_folders, tmp_path):
    (tmp_path / "results").mkdir()
    earlier = (finished[0] / "results" / "result.json").read_text()
    (tmp_path / "results" / "result.json").write_text(earlier)   # stays
    done = papermill(tmp_path, finished[0] / "cache", dataset=class_folders, resume="must", out_dir="results", **dict(small, pop_size=5))
    assert (tmp_path / "results" / "result.json").read_text() == earlier
    assert done.returncode != 0 and "there is nothing to resume" in done.stderr and "- pop_size: 4 there, 5 asked for" in done.stderr
    assert "- n_evals" not in done.stderr and "- seed" not in done.stderr


@pytest.mark.parametrize("wrong, said", [
    (dict(datset="flowers", n_evals="many", pop_size=1, dataset="007", show_images="false"),
     ["did you mean 'dataset'?", "int expected", "at least 2", "dataset = 7 is int", "-r dataset VALUE", "write True or False"]),
    (dict(objectives="accuracy,aurocs"), ["did you mean 'auroc'?"]), (dict(corruptions="jpgs"), ["did you mean 'jpeg'?"]),
    (dict(ood="class:rose"), ["class 'rose' is to be held out, but there is no such class"]), (dict(ood_search="weaves"), ["needs protocol 'holdout'"]),
    (dict(out_dir="/proc/x"), ["cannot be written"])])
def test_bad_parameters_stop_before_anything_is_computed(tmp_path, wrong, said):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "result.json").write_text("{}")
    done = papermill(tmp_path, tmp_path / "cache", **dict(dict(out_dir="results"), **wrong))
    assert done.returncode != 0 and all(words in done.stderr for words in said)
    assert (tmp_path / "results" / "result.json").read_text() == "{}" and not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def folds(finished, class_folders, tmp_path_factory):
    "The results of a run with two folds; the cache beside them is that of the first run."
    folder = tmp_path_factory.mktemp("folds")
    (folder / "cache").symlink_to(finished[0] / "cache")
    done = papermill(folder, folder / "cache", dataset=class_folders, folds=2, out_dir="results", **small)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "results"


def test_folds_give_each_fold_its_own_ranked_mask(finished, folds):
    with Store(folds / "evaluations.sqlite") as store: sizes = {store.mask(name).size for _, name, *_ in store.read("evaluations")}
    assert sizes == {1280}                                                    # what the search asked for holds for both folds
    with Store(finished[0] / "cache" / "evaluations.sqlite") as store:
        evaluated = [store.mask(name) for _, name, *_ in store.read("evaluations")]
    ranked = [mask.reshape(2, 1280) for mask in evaluated if mask.size == 2 * 1280]
    assert len(ranked) == 8 and sum((one != other).any() for one, other in ranked) >= 4   # each fold's own ranking


def test_the_paper_reads_what_runs_left(finished):
    folder = finished[0]
    (folder / "study").mkdir(exist_ok=True)
    (folder / "study" / "result.json").write_text(json.dumps(dict(parameters={}, measurements=dict(hypervolume={}))))
    done = subprocess.run([str(Path(sys.executable).parent / "papermill"), str(root / "nbs" / "paper.ipynb"), "paper.ipynb", "-p", "folder", "."],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "published" in (folder / "paper.ipynb").read_text()


def test_a_member_becomes_a_model_with_the_metrics_of_the_run(finished, class_folders, tmp_path, monkeypatch):
    "From the files of its images, without torch's part of the package, the model has the accuracy and the AUROC that the run reports."
    from moevo_nb.predict import Classifier
    from moevo_nb.robustness import auroc
    from moevo_nb.study import load_images, make_parameters
    out = tmp_path / "results"
    shutil.copytree(finished[0] / "results", out)
    new = next(class_folders.iterdir())
    done = papermill(tmp_path, finished[0] / "cache", "deploy", run="results", member="knee", images=new, n_jobs=1)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(tmp_path)
    result, classify = json.loads((out / "result.json").read_text()), Classifier(out / "model")
    study = load_images(make_parameters(**result["parameters"]))
    (_, own, mixture), = study.report_splits
    files = [path for folder in sorted(class_folders.iterdir()) for path in sorted(folder.iterdir())]
    found = pd.DataFrame(classify([files[k] for k in own]))
    ood = pd.DataFrame(classify(study.ood_sets[0].pixels(mixture[0], 48)))
    labels = [study.images.classes[k] for k in study.images.labels[own]]
    knee = result["models"]["knee"]
    assert (found.label == labels).mean() == knee["accuracy"] == classify.about["metrics"]["accuracy"]["value"]
    assert auroc(found.score.to_numpy(), ood.score.to_numpy()) == knee["auroc"] == classify.about["metrics"]["AUROC"]["value"]
    assert found.in_distribution.mean() >= 0.95   # which is how the threshold was chosen
    predictions = pd.read_csv(out / "predictions.csv")
    assert len(predictions) == 14 and predictions.columns.tolist() == ["image", "label", "probability", "score", "in_distribution"]
    assert not [*tmp_path.rglob("*.pkl"), *tmp_path.rglob("*.pt"), *out.glob("*partial*")]


def test_all_members_trained_on_all_images_become_one_model(folds, class_folders, tmp_path):
    from moevo_nb.deploy import load_heads
    done = papermill(folds.parent, folds.parent / "cache", "deploy", run="results", member="ensemble", refit=True, show_images=False, n_jobs=1)
    assert done.returncode == 0, done.stderr[-3000:]
    about, front = json.loads((folds / "model" / "model.json").read_text()), pd.read_csv(folds / "front.csv", dtype={"mask": str})
    assert about["masks"] == {str(k): mask for k, mask in enumerate(front["mask"])} and about["provenance"]["refit"]
    assert about["metrics"]["accuracy"]["images"] == 42 and any("trained on all images" in note for note in about["notes"])
    run, model = load_heads(folds / "heads.safetensors"), load_heads(folds / "model" / "model.safetensors")
    assert len(run["0"]) == 2 and set(model) == set(run) - {"unpruned"}
    largest = str(front.active_fraction.idxmax())
    assert (run[largest][0].inputs == model[largest][0].inputs).all() and (run[largest][0].weights[0] != model[largest][0].weights[0]).any()
