"A store that is damaged, cut, full, locked or not a store at all: what was committed is there, or it says that it is not."
import errno
import os
import resource
import shutil
import signal
import sqlite3
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from toy import committed, fork, row

from moevo_nb.store import Store, columns, mask_name, software


def mask(i): return np.unpackbits(np.array([i >> 8, i & 255], np.uint8)).astype(bool)


def content(i): return dict(row, accuracy=i / 1000, seconds=float(i))


def fill(store, *numbers):
    for i in numbers: store.add("key", mask(i), content(i))


def found(path):
    "The numbers of the rows in a store, each proved right."
    with Store(path) as store:
        numbers = sorted(int.from_bytes(np.packbits(store.mask(name))) for _, name, *_ in store.read("evaluations"))
        for i in numbers: assert {k: store.find("key", mask(i))[k] for k in columns[:-1]} == content(i)
    return numbers


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "What a killed process left behind: 60 rows, 30 of them in the file itself and 30 in its write-ahead log."
    path = tmp_path_factory.mktemp("killed") / "evaluations.sqlite"

    def write():
        store = Store(path)
        fill(store, *range(30))
        store.execute("pragma wal_checkpoint(truncate)")
        fill(store, *range(30, 60))
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(write), 0)
    log = path.with_name(path.name + "-wal")
    return path.read_bytes(), log.read_bytes()


@pytest.fixture
def restore(tmp_path, killed):
    "Puts both files back, changed as told."
    path = tmp_path / "evaluations.sqlite"

    def put(main=lambda b: b, log=lambda b: b):
        for file in tmp_path.iterdir(): file.unlink()
        path.write_bytes(main(bytearray(killed[0])))
        if (rest := log(bytearray(killed[1]))) is not None: path.with_name(path.name + "-wal").write_bytes(rest)
        return path
    return put


def outcome(path):
    "The number of rows, which must be the first so many, or None if the store is refused with a reason."
    try: numbers = found(path)
    except ValueError as e:
        assert str(path) in str(e) and "Move it away" in str(e)
        return None
    assert numbers == list(range(len(numbers)))
    return len(numbers)


def test_what_was_committed_survives_the_kill(restore): assert found(restore()) == list(range(60))


def test_without_its_log_the_store_is_what_it_was_before(restore): assert found(restore(log=lambda _: None)) == list(range(30))


@pytest.mark.parametrize("at", ["main", "log", "main alone"])
@pytest.mark.parametrize("n_bytes", [1, 32])
def test_random_bytes(restore, at, n_bytes):
    rng, outcomes = np.random.default_rng(n_bytes), []

    def damage(content):
        for i in rng.integers(len(content), size=n_bytes): content[i] ^= rng.integers(1, 256)
        return content

    for _ in range(64):
        how = {"main": dict(main=damage), "log": dict(log=damage), "main alone": dict(main=damage, log=lambda _: None)}[at]
        outcomes.append(outcome(restore(**how)))
    if at == "main": assert {*outcomes} <= {None, 60}
    elif at == "main alone": assert {*outcomes} <= {None, 30} and (None in outcomes)
    else: assert {*outcomes} <= {None, *range(30, 61)} and len({*outcomes}) > 3   # a damaged log ends at the damage


@pytest.mark.parametrize("keep", [0, 1, 4095])   # bytes of the last page
def test_a_last_page_cut_short(restore, keep):
    assert outcome(restore(lambda b: b[:len(b) - 4096 + keep], log=lambda _: None)) in (None, 30)
    assert outcome(restore(lambda b: b[:len(b) - 4096 + keep])) in (None, 60)


def test_files_cut_anywhere(restore):
    rng = np.random.default_rng(0)
    for _ in range(32): assert outcome(restore(lambda b: b[:rng.integers(1, len(b))], log=lambda _: None)) is None
    outcomes = [outcome(restore(log=lambda b: b[:rng.integers(len(b))])) for _ in range(32)]
    assert None not in outcomes and len({*outcomes}) > 10


def test_a_store_whose_masks_are_digits_is_refused(tmp_path):
    with Store(tmp_path / "evaluations.sqlite") as store:
        for statement in ("drop table masks", "pragma user_version = 3"): store.execute(statement)
    assert outcome(tmp_path / "evaluations.sqlite") is None


def test_masks_over_connections_take_little_room(tmp_path):
    "Ten masks of 655,360 neurons, each evaluated and asked for by two runs: 82 kB each, once."
    path, masks = tmp_path / "evaluations.sqlite", np.random.default_rng(0).random((10, 655_360)) < 0.5
    with Store(path) as store:
        for name in ("one", "other"):
            store.start(name, "key", {})
            with store.transaction(): store.ask(name, 0, 0, masks)
        for m in masks: store.add("key", m, content(0))
    assert 10 * 655_360 / 8 < path.stat().st_size < 1.1 * 10 * 655_360 / 8
    with Store(path) as store: assert all((store.mask(mask_name(m)) == m).all() for m in masks) and len(store.history("other")) == 10


def test_a_store_may_be_moved_away(restore, tmp_path):
    path = restore(lambda b: b[:5000])
    assert outcome(path) is None
    for file in tmp_path.iterdir(): shutil.move(file, str(file) + ".damaged")
    assert found(path) == []


def filling_up(path, report, limit):
    "Writes rows until the disk is full, and says what happened."
    store = Store(path)
    if limit == "file size": resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    else: store.execute("pragma max_page_count = 12")
    for i in range(1000):
        try: fill(store, i)
        except OSError as e:
            assert e.errno == errno.ENOSPC and e.filename == str(path) and "Every committed evaluation is kept" in str(e)
            assert store.find("key", mask(i)) is None and store.find("key", mask(i - 1))["seconds"] == i - 1
            return report.write_text(str(i))


@pytest.mark.parametrize("limit", ["file size", "pages"])
def test_a_full_disk(tmp_path, limit):
    path, report = tmp_path / "evaluations.sqlite", tmp_path / "report"
    assert os.waitpid(fork(filling_up, path, report, limit), 0)[1] == 0
    n = int(report.read_text())
    assert n > 10 and found(path) == list(range(n))
    with Store(path) as store: fill(store, n)
    assert found(path) == list(range(n + 1))


def test_four_writers(tmp_path):
    def write(writer):
        with Store(tmp_path / "new" / "evaluations.sqlite") as store: fill(store, *range(200 * writer, 200 * writer + 200))

    children = [fork(write, writer) for writer in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == 4 * [0]
    assert found(tmp_path / "new" / "evaluations.sqlite") == list(range(800))


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_cannot_be_written(there):
    folder = Path(tempfile.mkdtemp())
    if there: Store(folder / "evaluations.sqlite").db.close()

    def opened():
        if os.getuid() == 0: os.setuid(65534)   # nobody
        with pytest.raises(PermissionError, match="cannot be opened for writing .* set MOEVO_CACHE to a folder of your own"):
            with Store(folder / "evaluations.sqlite") as store: fill(store, 0)

    folder.chmod(0o555)
    for file in folder.iterdir(): file.chmod(0o444)
    assert os.waitpid(fork(opened), 0)[1] == 0
    shutil.rmtree(folder)


@pytest.mark.parametrize("file", ["text", "another database", "older store", "folder"])
def test_what_is_no_store(tmp_path, file):
    path = tmp_path / "evaluations.sqlite"
    if file == "text": path.write_text("accuracy,auroc\n" * 100)
    elif file == "folder": path.mkdir()
    else:
        table = "songs (title)" if file == "another database" else "evaluations (key, mask, accuracy)"
        with sqlite3.connect(path) as db: db.execute(f"create table {table}")
        db.close()
    with pytest.raises((ValueError, PermissionError), match="evaluations.sqlite"): Store(path)


def test_rows_say_which_versions_computed_them(tmp_path):
    with Store(tmp_path / "evaluations.sqlite") as store: fill(store, 1)
    assert committed(tmp_path / "evaluations.sqlite") == {mask_name(mask(1))}
    with Store(tmp_path / "evaluations.sqlite") as store: known = store.find("key", mask(1))["versions"]
    assert known == software() and known["torch"] == version("torch")
