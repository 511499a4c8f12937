"Downloads from a local server, folders as users have them, and registered sets."
import functools
import hashlib
import http.server
import io
import shutil
import struct
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moevo_nb import registry
from moevo_nb.data import (
    ImageSet, as_rgb, folder_set, hold_out, load, locate, ood_mixture, ood_names, ood_sets, protocol_mixtures, protocol_splits, splits)
from moevo_nb.registry import class_files, download, fetch, unpack
from moevo_nb.study import load_images, make_parameters
from moevo_nb.system import import_torchvision


def picture(seed, size=8):
    "The bytes of a small JPEG."
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def fill(folder, classes, each, first=0):
    "A folder of class folders."
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each): (folder / name / f"{i}.jpg").write_bytes(picture(first + 100 * k + i))


def packed(path, content):
    "An archive with this content, name -> bytes."
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, data in content.items(): z.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as t:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path):
    "Address and folder of a file server on this machine."
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

        def end_headers(self):
            if "cut" in self.path: self.close_connection = True
            super().end_headers()

        def copyfile(self, source, out):
            out.write(source.read(50)) if "cut" in self.path else super().copyfile(source, out)
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEVO_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def toy(monkeypatch, url, sha256, images=(12, 4), **archive):
    "A registered set `toy` with an archive."
    parts = {"train": "toy-main/Train", "test": "toy-main/Test"}
    monkeypatch.setitem(registry.registered, "toy", {**registry.registered["rps"], "classes": 2, "images": images, "image_size": 16})
    monkeypatch.setitem(registry.archives, "toy", [dict(url=url, sha256=sha256, parts=parts, without=("rare",), **archive)])


def toy_content(n=6):
    return ({f"toy-main/Train/{c}/{i}.jpg": picture(10 * k + i) for k, c in enumerate(("Left hand", "right", "rare")) for i in range(n)}
            | {f"toy-main/Test/{c}/{i}.jpg": picture(100 + 10 * k + i) for k, c in enumerate(("Left hand", "right")) for i in range(2)})


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_a_missing_set_is_fetched_unpacked_and_whole(server, home, monkeypatch, suffix):
    url, folder = server
    toy(monkeypatch, f"{url}/toy.{suffix}", packed(folder / f"toy.{suffix}", toy_content()))
    assert locate("toy") == home / "toy"
    images = load("toy")
    assert images.classes == ("left_hand", "right") and images.test.sum() == 4 and len(images) == 16 and images.image_size == 16
    shutil.rmtree(folder)
    assert load("toy").manifest == images.manifest                            # it is there, and not fetched again
    assert [p.name for p in home.iterdir()] == ["toy"]                        # nothing else is left behind


@pytest.mark.parametrize("trouble, said", [("checksum", "sha256"), ("cut", "expected"), ("gone", "404"), ("changed", "has changed"),
                                            ("nothing", "holds no folder")])
def test_a_bad_download_leaves_nothing(server, home, monkeypatch, trouble, said):
    url, folder = server
    content = {"other/1.jpg": b"1"} if trouble == "nothing" else toy_content(5 if trouble == "changed" else 6)
    found = packed(folder / ("cut.zip" if trouble == "cut" else "toy.zip"), content)
    toy(monkeypatch, f"{url}/{'cut' if trouble == 'cut' else 'gone' if trouble == 'gone' else 'toy'}.zip", "0" * 64 if trouble == "checksum" else found)
    with pytest.raises((ValueError, OSError), match=said): load("toy")
    assert list(home.iterdir()) == []


def test_an_unknown_checksum_is_recorded_and_then_kept_to(server, home, monkeypatch):
    url, folder = server
    toy(monkeypatch, f"{url}/toy.zip", "")
    first = packed(folder / "toy.zip", toy_content())
    fetch("toy")
    assert (home / ".toy-0.sha256").read_text() == first
    shutil.rmtree(home / "toy")
    packed(folder / "toy.zip", toy_content() | {"toy-main/README": b"new"})
    with pytest.raises(ValueError, match=first): fetch("toy")


@pytest.mark.parametrize("name", ["../outside.jpg", "/tmp/moevo-outside.jpg", "a/../../outside.jpg"])
@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_an_archive_that_would_write_outside_is_refused(tmp_path, name, suffix):
    packed(tmp_path / f"evil.{suffix}", {"a/1.jpg": b"1", name: b"2"})
    with pytest.raises(ValueError, match="outside"): unpack(tmp_path / f"evil.{suffix}", tmp_path / "into")
    assert not (tmp_path / "outside.jpg").exists()


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_a_truncated_archive_is_refused(tmp_path, suffix):
    packed(tmp_path / f"whole.{suffix}", {f"{i}.jpg": picture(i) for i in range(20)})
    cut = tmp_path / f"cut.{suffix}"
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    cut.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"): unpack(cut, tmp_path / "into")


@pytest.mark.parametrize("filtered", [True, False])
def test_a_link_out_of_a_tar_is_refused(tmp_path, monkeypatch, filtered):
    if not filtered: monkeypatch.delattr(tarfile, "data_filter", raising=False)   # as in Python 3.11.3
    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as t:
        info = tarfile.TarInfo("a")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        t.addfile(info)
    with pytest.raises(ValueError, match="unsafe"): unpack(tmp_path / "link.tar.gz", tmp_path / "into")


def test_a_half_extracted_set_is_noticed(home, monkeypatch):
    toy(monkeypatch, "http://127.0.0.1:9/none", "")
    fill(home / "toy" / "train", "ab", 6)
    fill(home / "toy" / "test", "ab", 2, first=50)
    assert len(load("toy")) == 16
    (home / "toy" / "train" / "a" / "3.jpg").unlink()
    with pytest.raises(ValueError, match="train 11 files in 2 classes.*expected are train 12"): load("toy")
    assert len(folder_set(home / "toy")) == 15                                # a folder by its path is taken as it is


def test_dtd_comes_through_torchvision(server, home, monkeypatch):
    url, folder = server
    torchvision = import_torchvision()
    content = {f"dtd/images/{c}/{c}_{i}.jpg": picture(10 * k + i) for k, c in enumerate(("banded", "dotted")) for i in range(6)}
    for k, part in enumerate(("train", "val", "test")):
        content[f"dtd/labels/{part}1.txt"] = "".join(f"{c}/{c}_{i}.jpg\n" for c in ("banded", "dotted") for i in (2 * k, 2 * k + 1)).encode()
    packed(folder / "dtd.tar.gz", content)
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{url}/dtd.tar.gz")
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", hashlib.md5((folder / "dtd.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setitem(registry.registered, "dtd", registry.registered["dtd"] | dict(classes=2, images=(8, 4)))
    images = load("dtd")
    assert images.classes == ("banded", "dotted") and images.test.tolist() == [False] * 8 + [True] * 4
    assert {p.name for p in home.iterdir()} == {"dtd"}


def test_flowers102_comes_through_torchvision(server, home, monkeypatch):
    from scipy.io import savemat
    url, folder = server
    torchvision = import_torchvision()
    packed(folder / "102flowers.tgz", {f"jpg/image_{i:05d}.jpg": picture(i) for i in range(1, 9)})
    savemat(folder / "imagelabels.mat", {"labels": [1, 1, 1, 1, 2, 2, 2, 2]})
    savemat(folder / "setid.mat", {"trnid": [1, 5], "valid": [2, 6], "tstid": [3, 4, 7, 8]})
    md5 = {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    Flowers = torchvision.datasets.Flowers102
    monkeypatch.setattr(Flowers, "_download_url_prefix", f"{url}/")
    monkeypatch.setattr(Flowers, "_file_dict", {k: (name, md5[name]) for k, (name, _) in Flowers._file_dict.items()})
    monkeypatch.setitem(registry.registered, "flowers102", registry.registered["flowers102"] | dict(classes=2, images=(4, 4)))
    images = load("flowers102")
    assert images.test.tolist() == [False] * 4 + [True] * 4 and images.labels.tolist() == [0, 0, 1, 1] * 2


def test_a_set_that_cannot_be_fetched_says_where_it_is(home):
    for name in ("srsmas", "cataract", "painting"):
        row = registry.registered[name]
        with pytest.raises(ValueError) as e: load(name)
        assert row["source"] in str(e.value) and str(home / name) in str(e.value) and f"in {row['classes']} class folders" in str(e.value)
    with pytest.raises(OSError, match="leaves.*cannot be.*lay it out as"):    # nothing can be reached in the tests
        registry.archives["leaves"][0], kept = registry.archives["leaves"][0] | dict(url="http://127.0.0.1:9/x"), registry.archives["leaves"][0]
        try: fetch("leaves")
        finally: registry.archives["leaves"][0] = kept


def test_every_entry_of_the_registry_is_complete():
    for name, row in registry.registered.items():
        assert set(row) - {"keeps_split"} == {"classes", "images", "image_size", "folds", "near", "citation", "licence", "source"}, name
        assert row["folds"] in (0, 5) and (isinstance(row["images"], int) or row["folds"] == 0)
    assert {n for n, row in registry.registered.items() if row["folds"]} >= {"leaves", "srsmas"}


def test_all_that_is_wrong_is_said_at_once_and_skipped_on_request(tmp_path):
    fill(tmp_path / "train", "ab", 3)
    fill(tmp_path / "test", "ab", 2, first=50)
    clean = folder_set(tmp_path)
    a = tmp_path / "train" / "a"
    (a / "empty.jpg").touch()
    (a / "text.jpg").write_text("no image")
    (a / "notes.txt").write_text("no image")
    (a / "cut.jpg").write_bytes(picture(9, 64)[:900])
    (a / "copy.jpg").write_bytes((tmp_path / "test/b/0.jpg").read_bytes())
    (a / ".hidden").touch()
    (a / "Thumbs.db").touch()
    with pytest.raises(ValueError) as e: folder_set(tmp_path)
    assert all(f"train/a/{name}: " in str(e.value) for name in ("empty.jpg", "text.jpg", "notes.txt", "cut.jpg", "copy.jpg"))
    assert len(str(e.value).splitlines()) == 6 and "train/a/copy.jpg: the same image as test/b/0.jpg" in str(e.value)
    skipping = folder_set(tmp_path, on_bad="skip")
    assert skipping.skipped == 5 and clean.skipped == 0 and skipping.manifest == clean.manifest
    np.testing.assert_array_equal(skipping.pixels(range(10), 8), clean.pixels(range(10), 8))
    with pytest.raises(ValueError, match="'error' or 'skip'"): folder_set(tmp_path, on_bad="ignore")


@pytest.mark.parametrize("layout, said", [
    (dict(train="ab", test="a"), "train/b: this class is missing in test"), (dict(train="ab"), "train: this folder needs its counterpart"),
    ({"": "a"}, "1 class folders, at least 2"), ({"": ""}, "0 class folders, at least 2")])
def test_wrong_layouts_are_said_and_never_skipped(tmp_path, layout, said):
    for part, classes in layout.items(): fill(tmp_path / part, classes, 5, first=ord(part[:1] or "a"))
    for on_bad in ("error", "skip"):
        with pytest.raises(ValueError, match=said): folder_set(tmp_path, on_bad=on_bad)


def test_small_classes(tmp_path):
    fill(tmp_path, "ab", 5)
    assert [len(e) for _, e in splits(folder_set(tmp_path))] == [2]
    (tmp_path / "a" / "0.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="a: 4 usable images, at least 5"): folder_set(tmp_path, on_bad="skip")
    assert len(folder_set(tmp_path, on_bad="skip", least=1)) == 9             # enough for OoD images


def test_many_problems_stay_readable(tmp_path):
    fill(tmp_path, "ab", 5)
    for i in range(200): (tmp_path / "a" / f"{i}.png").touch()
    with pytest.raises(ValueError, match="and 150 more") as e: folder_set(tmp_path)
    assert len(str(e.value).splitlines()) == 52


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tif", "webp", "ppm"])
def test_formats(tmp_path, suffix):
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / f"1.{suffix}")
    from moevo_nb.data import read_image
    np.testing.assert_allclose(read_image(tmp_path / f"1.{suffix}", 4)[0, 0], (200, 100, 50), atol=4)


def test_a_cmyk_jpeg_and_a_grey_jpeg(tmp_path):
    from moevo_nb.data import read_image
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    np.testing.assert_allclose(read_image(tmp_path / "red.jpg", 8)[0, 0], (255, 0, 0), atol=3)
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.jpg", quality=100)
    np.testing.assert_allclose(read_image(tmp_path / "grey.jpg", 8)[0, 0], (77, 77, 77), atol=1)


def test_a_split_by_seed_is_stratified(tmp_path):
    fill(tmp_path, "abc", 10)
    images = folder_set(tmp_path)
    (train, evaluate), = splits(images, seed=1)
    assert np.bincount(images.labels[evaluate]).tolist() == [2, 2, 2] and not set(train) & set(evaluate)
    assert (splits(images, seed=1)[0][1] == evaluate).all() and (splits(images, seed=2)[0][1] != evaluate).any()


def test_ood_sets_are_never_the_same_content(home, monkeypatch):
    monkeypatch.setitem(registry.registered, "dtd10", registry.registered["dtd10"] | dict(classes=2, images=12))
    fill(home / "dtd10", "ab", 6)
    shutil.copytree(home / "dtd10", home / "mine")
    (home / "link").symlink_to(home / "dtd10")
    fill(home / "apple", "ab", 6, first=500)
    monkeypatch.setitem(registry.registered, "apple", registry.registered["apple"] | dict(classes=2, images=12))
    assert ood_names("mine") == ["dtd10", "apple"] and ood_names("link") == ["apple"]
    assert [s.name for s in ood_sets(load("mine"), "mine")] == ["apple"]
    with pytest.raises(ValueError, match="share images with mine, or .*: {'dtd10': 12}"): ood_sets(load("mine"), "mine", "apple,dtd10")
    assert [len(m) for m in ood_mixture(ood_sets(load("apple"), "apple"), 5)] == [5]


def test_the_default_mixture_of_a_folder_without_others_is_rendered(home, tmp_path):
    fill(tmp_path / "own", "ab", 5)
    assert ood_names(str(tmp_path / "own")) == ["flowers", "foliage", "pebbles", "weaves"]
    fill(tmp_path / "elsewhere", "c", 2, first=50)                            # one class, two images: enough for OoD images
    own = load(str(tmp_path / "own"))
    assert [s.name for s in ood_sets(own, str(tmp_path / "own"), str(tmp_path / "elsewhere"))] == ["elsewhere"]


def test_hidden_folders_are_no_classes(tmp_path):
    fill(tmp_path, ["a", "b", ".ipynb_checkpoints"], 5)
    assert list(class_files(tmp_path)[""]) == ["a", "b"]


def test_a_file_that_is_shorter_than_announced_is_not_kept(server, tmp_path):
    url, folder = server
    (folder / "cut.bin").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="50 bytes.* 1000 bytes"): download(f"{url}/cut.bin", tmp_path / "file")
    assert not (tmp_path / "file").exists() and not list(tmp_path.glob("*.partial"))


def test_parts_of_a_split_are_known_by_other_names(tmp_path):
    fill(tmp_path / "X" / "Training", "ab", 6)
    fill(tmp_path / "X" / "TEST", "ab", 2, first=50)
    fill(tmp_path / "X" / "valid", "ab", 3, first=70)
    images = folder_set(tmp_path / "X")
    assert images.classes == ("a", "b") and images.test.sum() == 4 and images.validation.sum() == 6
    (train, validation), = protocol_splits(images, "holdout")[0]
    assert len(train) == 12 and (validation == np.flatnonzero(images.validation)).all()
    (train, evaluated), = protocol_splits(images)[0]
    assert len(train) == 18 and (evaluated == np.flatnonzero(images.test)).all()


@pytest.mark.parametrize("layout, said", [
    (["train", "test"], "the parts of a split hold class folders, but here they hold images"),
    (["set/Train/a", "set/Test/a"], r"set: it holds folders only \(Test, Train\)"),
    (["a/left", "b/left"], r"a: it holds folders only \(left\)"),
    (["train/a", "train/b", "val/a", "val/b"], "train, val: this folder needs its counterpart.*rename it to test"),
    (["train/a", "train/b", "test/a", "test/b", "more/a"], "more: it holds images beside train, test"),
    (["train/a", "Training/a", "test/a"], "each is the train part of the split"),
    (["train/a/old", "train/b", "test/a", "test/b"], r"train/a: it holds folders only \(old\)")])
def test_a_layout_that_can_be_misread_is_refused(tmp_path, layout, said):
    for k, place in enumerate(layout): fill(tmp_path, [place], 6, first=100 * k)
    for on_bad in ("error", "skip"):
        with pytest.raises(ValueError, match=said): folder_set(tmp_path, on_bad=on_bad)


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, ["bus", "train"], 5)
    assert folder_set(tmp_path).classes == ("bus", "train") and folder_set(tmp_path).test is None


def test_hidden_and_system_folders_below_a_class_hold_no_images(tmp_path):
    fill(tmp_path, "ab", 5)
    for name in (".thumbnails", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "deeper/.cache"): fill(tmp_path / "a", [name], 2, first=500)
    assert len(folder_set(tmp_path)) == 10


def test_links_are_followed_and_dangling_ones_reported(tmp_path):
    fill(tmp_path / "X", "ab", 5)
    fill(tmp_path / "elsewhere", "c", 3, first=500)
    a = tmp_path / "X" / "a"
    (a / "more").symlink_to(tmp_path / "elsewhere" / "c")
    (a / "one.jpg").symlink_to(tmp_path / "elsewhere" / "c" / "0.jpg")
    (a / "round").symlink_to(a)
    (tmp_path / "elsewhere" / "c" / "up").symlink_to(tmp_path / "X")
    with pytest.raises(ValueError, match="of another class"): folder_set(tmp_path / "X")      # up leads to b, too
    (tmp_path / "elsewhere" / "c" / "up").unlink()
    assert np.bincount(folder_set(tmp_path / "X").labels).tolist() == [9, 5]
    (a / "gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(ValueError, match="a/gone.jpg: a link that leads nowhere"): folder_set(tmp_path / "X")
    assert folder_set(tmp_path / "X", on_bad="skip").skipped == 1


def png_of(values, bits=None):
    "A grey PNG of 16 bits, with the sBIT chunk if `bits` is given."
    out = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(out, "PNG")
    data = out.getvalue()
    if bits is None: return data
    chunk = b"sBIT" + bytes([bits])
    return data[:33] + (1).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]


def test_few_bits_in_sixteen_are_scaled_by_what_the_file_says(tmp_path):
    from moevo_nb.data import read_image
    values = np.linspace(0, 1020, 256).reshape(16, 16).round()
    path = tmp_path / "1.png"
    for content in (png_of(values, 10), png_of(64 * values, 10), png_of(64 * values)):        # as they are, and scaled as PNG demands
        path.write_bytes(content)
        np.testing.assert_array_equal(read_image(path, 16)[..., 0], values.astype(int) >> 2)
    fill(tmp_path / "X", "ab", 5)
    (tmp_path / "X" / "a" / "dark.png").write_bytes(png_of(values))
    with pytest.raises(ValueError, match="dark.png: ValueError: its 16-bit samples reach 1020 only"): folder_set(tmp_path / "X")
    path.write_bytes(png_of(0 * values))
    assert read_image(path, 16).max() == 0                                    # black is black in any scale


def test_twelve_bits_of_a_tiff_are_its_range(tmp_path):
    from moevo_nb.data import read_image
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, 3)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    pixels = (0xABC << 12 | 0x123).to_bytes(3, "big")
    (tmp_path / "1.tif").write_bytes(b"II*\0" + struct.pack("<I", 12) + pixels + b"\0" + struct.pack("<H", len(tags)) + entries + bytes(4))
    with Image.open(tmp_path / "1.tif") as image: assert as_rgb(image).getchannel(0).tobytes() == bytes([0xAB, 0x12])


def test_ten_bits_of_colour_in_sixteen_are_refused_and_fourteen_doubted(tmp_path):
    "Pillow writes no such file: rows of 16-bit samples are packed by hand."
    def chunk(kind, data): return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    for most, found in ((1020, "refused"), (16383, "doubted"), (65280, "read")):
        samples = np.linspace(0, most, 3 * 16 * 16).astype(">u2").reshape(16, -1)
        rows = b"".join(b"\0" + row.tobytes() for row in samples)
        header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
        path = tmp_path / f"{most}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
        with Image.open(path) as image:
            if found == "read": assert as_rgb(image).mode == "RGB"
            elif found == "doubted":
                with pytest.warns(UserWarning, match="if there are 14"): assert as_rgb(image).getextrema()[2][1] == 63
            else:
                with pytest.raises(ValueError, match="few of the 16 bits of its coloured samples"): as_rgb(image)


def test_formats_that_are_not_read_are_answered_with_those_that_are(tmp_path):
    fill(tmp_path, "ab", 5)
    (tmp_path / "a" / "1.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    with pytest.raises(ValueError, match=r"a/1.heic: not an image \(JPEG, PNG, BMP, GIF, TIFF, WEBP, PPM are read\)"): folder_set(tmp_path)


def test_copies_do_not_count_and_contradictions_are_reported(tmp_path):
    fill(tmp_path, "ab", 10)
    for i in range(10): (tmp_path / "a" / f"{i}.jpg").write_bytes(picture(0))
    with pytest.raises(ValueError, match=r"a: 10 usable images \(1 without copies\), at least 5"): folder_set(tmp_path)
    for i in range(6): (tmp_path / "a" / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "b" / "0.jpg").write_bytes(picture(0))
    with pytest.raises(ValueError, match="b/0.jpg: the same image as a/0.jpg, which is of another class"): folder_set(tmp_path)
    images = folder_set(tmp_path, on_bad="skip")
    assert images.skipped == 6 and np.bincount(images.labels).tolist() == [5, 9]     # five copies in a, one in b


def test_a_class_of_copies_trains_but_cannot_validate(tmp_path):
    fill(tmp_path / "train", "ab", 6)
    fill(tmp_path / "test", "ab", 2, first=50)
    for i in range(6): (tmp_path / "train" / "a" / f"{i}.jpg").write_bytes(picture(0))
    images = folder_set(tmp_path)
    assert len(protocol_splits(images)[0][0][0]) == 12
    with pytest.raises(ValueError, match="class 'a' has fewer than 2 different training images"): protocol_splits(images, "holdout")


def ood_study(folder, **given):
    "The images of a study whose own set is this folder."
    return load_images(make_parameters(dataset=str(folder), **given))


def test_ood_folders_may_be_called_like_columns_and_like_each_other(home, tmp_path):
    fill(tmp_path / "own", "ab", 10)
    for k, name in enumerate(("images", "train", "pooled", "fold", "x/own", "y/own", "a, b")): fill(tmp_path / "ood", [f"{name}/c"], 3, first=1000 * k + 500)
    paths = [str(tmp_path / "ood" / name).replace(",", r"\,") for name in ("images", "train", "pooled", "fold", "x/own", "y/own", "a, b")]
    study = ood_study(tmp_path / "own", ood=",".join(paths))
    names = ["images (OoD)", "train (OoD)", "pooled (OoD)", "fold (OoD)", "x-own", "y-own", "a, b"]
    assert [images.name for images in study.ood_sets] == names
    assert study.table().loc[(0, "evaluation"), "evaluated"] == 4 and study.about()["ood"] == [dict.fromkeys(names, 1)]
    with pytest.raises(ValueError, match=r"A comma within a name is written \\,"): ood_names("flowers", str(tmp_path / "ood" / "a, b"))
    with pytest.raises(ValueError, match="name each set once"): ood_names("flowers", ",".join([str(tmp_path / "own")] * 2))


def test_a_flat_folder_of_ood_images_is_one_class(home, tmp_path):
    fill(tmp_path / "own", "ab", 10)
    fill(tmp_path, ["meadow"], 30, first=900)
    study = ood_study(tmp_path / "own", ood=str(tmp_path / "meadow"))
    assert study.ood_sets[0].classes == ("meadow",) and study.about()["ood"] == [{"meadow": 4}]
    with pytest.raises(ValueError, match="0 class folders, at least 2 .* the folder holds no folder, and 30 files"): folder_set(tmp_path / "meadow")


def test_ood_images_never_run_out():
    others = [load(name) for name in ("foliage", "pebbles", "weaves")]
    fold = np.arange(4000), np.arange(4000, 7000)
    fewer = np.arange(3200), np.arange(3200, 4000)
    for n_ood, expected in ((0, [800, 2000]), (2500, [2500, 2500])):
        found, search, report = protocol_mixtures(others, [fewer], [fold], n_ood)
        (*_, unseen), (*_, drawn) = *search, *report
        assert [sum(map(len, mixture)) for mixture in (unseen, drawn)] == expected
        assert not any(set(a) & set(b) for a, b in zip(unseen, drawn))
        assert all(np.ptp(np.bincount(images.labels[own])) <= 1 for images, own in zip(found, drawn))
    report = [(fold[0], fold[1][:360])]                                       # as many as there are today
    assert [images.manifest for images in protocol_mixtures(others, report, report)[0]] == [images.manifest for images in others]


def test_real_ood_sets_that_hold_too_few_give_all_they_have(home, tmp_path):
    fill(tmp_path / "own", "ab", 60)
    fill(tmp_path / "few", "c", 12, first=5000)
    for protocol, expected in (("paper", [12]), ("holdout", [12 - 12 * 20 // 44, 12 * 20 // 44])):
        study = ood_study(tmp_path / "own", ood=str(tmp_path / "few"), protocol=protocol)
        splits = [study.report_splits] + [study.search_splits] * (not study.same_splits)
        assert [len(split[0][2][0]) for split in splits] == expected
        assert f"fold 0, evaluation: {expected[0]} OoD images for 24 evaluated images" in study.about()["images"]["notes"]


def test_held_out_classes_take_no_part(home, tmp_path):
    fill(tmp_path / "own", "abcde", 10)
    fill(tmp_path / "others", "xy", 10, first=5000)
    own = str(tmp_path / "own")
    study = ood_study(own, ood=f"class:b,classes:1,{tmp_path / 'others'}", n_ood=9, protocol="holdout")
    names = [images.name for images in study.ood_sets]
    assert names[0] == "class:b" and names[1] in {f"class:{c}" for c in "acde"} and names[2] == "others"
    assert study.images.classes == tuple(c for c in "abcde" if f"class:{c}" not in names)
    assert sorted(np.unique(study.images.labels)) == [0, 1, 2] and len(study.images) == 30
    assert set(study.images.contents).isdisjoint(study.ood_sets[0].contents + study.ood_sets[1].contents)
    assert study.images.part_of[0].manifest == load(own).manifest             # so that features are shared
    for wrong, said in (("class:f", "no such class"), ("classes:4", "at least 2 must be left"), ("classes:0", "a number of classes")):
        with pytest.raises(ValueError, match=said): make_parameters(dataset=own, ood=wrong)


def test_a_split_is_random_but_features_are_those_of_the_files(home, tmp_path):
    fill(tmp_path / "own" / "train", "ab", 12)
    fill(tmp_path / "own" / "test", "ab", 3, first=50)
    fill(tmp_path / "far", "xy", 30, first=5000)
    studies = [ood_study(tmp_path / "own", ood=str(tmp_path / "far"), split=k) for k in (-1, 0, 1, 1)]
    evaluated = [tuple(study.report_splits[0][1]) for study in studies]
    assert len(set(evaluated)) == 3 and evaluated[2] == evaluated[3] and len({study.images.manifest for study in studies}) == 1
    drawn = [tuple(study.report_splits[0][2][0]) for study in studies]
    assert len(set(drawn)) == 3 and drawn[2] == drawn[3]
    with pytest.raises(ValueError, match="split 2 is one split, but 5 folds are requested"): make_parameters(split=2, folds=5)


def test_rps_photo_keeps_its_split(home, monkeypatch):
    monkeypatch.setitem(registry.registered, "rps_photo", registry.registered["rps_photo"] | dict(classes=2, images=(12, 4)))
    fill(home / "rps_photo" / "train", "ab", 6)
    fill(home / "rps_photo" / "test", "ab", 2, first=50)
    images = load("rps_photo", split=3)
    assert (splits(images, split=3)[0][1] == np.flatnonzero(images.test)).all()


def test_rendered_sets_are_other_images_in_each_split():
    studies = [load_images(make_parameters(split=k)) for k in (-1, 0, 1)]
    for images in zip(*([study.images, *study.ood_sets] for study in studies)):
        assert len({some.manifest for some in images}) == len({some.pixels([3], 32).tobytes() for some in images}) == 3


def test_parts_share_the_features_of_their_set(cache):
    from moevo_nb.backbone import cached_features
    given = dict(name="timm:mobilenetv3_small_100", weights="none", size=32)
    whole = replace(load("weaves"), labels=np.repeat([0, 1, 2, 3], 30), classes=tuple("abcd"))
    features = cached_features(whole, **given)
    rest, (part,) = hold_out(whole, [2])
    files = sorted((cache / "features").iterdir())
    np.testing.assert_array_equal(cached_features(rest, **given), features[whole.labels != 2])
    np.testing.assert_array_equal(cached_features(part, **given), features[whole.labels == 2])
    assert sorted((cache / "features").iterdir()) == files


def test_splitting_takes_no_memory_of_images_times_images():
    labels = np.random.default_rng(0).integers(0, 3, 1500)
    images = ImageSet("many", tuple("abc"), labels, None, 32, "many", contents=tuple(map(str, range(1500))))
    tracemalloc.start()
    protocol_splits(images)
    assert tracemalloc.get_traced_memory()[1] < 1.5e6                         # 2.25 MB, if there were a byte for each pair
    tracemalloc.stop()


def test_search_and_report_share_a_small_ood_set(home, tmp_path):
    "The report alone would take all of the held-out class, and the search would see none of it."
    fill(tmp_path / "own", "abc", 60)
    study = ood_study(tmp_path / "own", ood="class:b,weaves", protocol="holdout", n_ood=120)
    ((*_, searched),), ((*_, reported),) = study.search_splits, study.report_splits
    assert [len(drawn) for drawn in searched] == [30, 90] and [len(drawn) for drawn in reported] == [30, 90]
    assert not set(searched[0]) & set(reported[0])
