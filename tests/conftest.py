"Every test has an empty cache, and data of its own."
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder, in force."
    monkeypatch.setenv("MOEVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOEVO_DATA", str(tmp_path / "no data"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    "A user's own folder: 14 pictures of each of three species."
    from PIL import Image

    from moevo_nb.data import load
    flowers, folder = load("flowers"), tmp_path_factory.mktemp("own") / "garden"
    for label in (0, 2, 6):
        (folder / flowers.classes[label]).mkdir(parents=True)
        for i in range(14): Image.fromarray(flowers.pixels([70 * label + i], 64)[0]).save(folder / flowers.classes[label] / f"{i}.png")
    return folder
