"Backbones of many architectures, and the feature cache under two processes."
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from moevo_nb import backbone
from moevo_nb.backbone import backbone_engine, cached_features, load_backbone, load_weights, weights_hash
from moevo_nb.data import ImageSet
from moevo_nb.system import check_cache, digest

architectures = {   # name: features as its authors declare them
    "efficientnet_lite0": 1280, "torchvision:resnet18": 512, "torchvision:densenet121": 1024, "torchvision:mobilenet_v3_small": 576,
    "torchvision:shufflenet_v2_x0_5": 1024, "torchvision:squeezenet1_1": 512, "torchvision:mnasnet0_5": 1280,
    "torchvision:regnet_y_400mf": 440, "torchvision:googlenet": 1024, "timm:mobilenetv3_small_100": 576, "timm:ghostnet_100": 960,
    "timm:convnext_atto": 320, "timm:repvgg_a0": 1280, "timm:resnet10t": 512, "timm:regnetx_002": 368,
}
pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("name", architectures)
def test_features_are_the_pooled_map_of_a_frozen_network(name, cache):
    net = load_backbone(name, "none")
    assert not any(m.training for m in net.model.modules()) and not any(p.requires_grad for p in net.model.parameters())
    maps = []
    hook = net.model.features.register_forward_hook(lambda module, given, found: maps.append(found))
    features = net.eager(pixels)
    hook.remove()
    assert features.shape == (5, net.n_features) and net.n_features == architectures[name] and net.cam_layer
    scale = max(1, abs(features).max())                                    # untrained networks may give large or tiny numbers
    np.testing.assert_allclose(features, maps[0].mean((2, 3)).numpy(), atol=1e-6 * scale)
    assert not maps[0].requires_grad and features.std(0).max() > 0
    exported = net(pixels)                                                 # by ONNX Runtime, after which torch still computes the same
    assert net.engine(64).name.startswith("onnxruntime") and not net.engine(64).reason
    np.testing.assert_allclose(exported, features, atol=1e-4 * scale)
    np.testing.assert_allclose(exported, net.feature_maps(pixels).mean((2, 3)), atol=1e-5 * scale)
    for batch in ([0], [1, 0, 3]): np.testing.assert_array_equal(net(pixels[batch]), exported[batch])
    np.testing.assert_array_equal(net.eager(pixels), features)


def test_the_size_of_images_is_checked_and_the_next_possible_one_is_named(cache):
    for name, size in (("torchvision:inception_v3", 48), ("timm:hrnet_w18_small", 97)):   # a least size; one that halves evenly
        with pytest.raises(ValueError, match=f"'{name}' cannot take images of {size} x {size} pixels; the next larger size") as told:
            backbone_engine(name, "none", size=size)
        net, least = load_backbone(name, "none"), int(str(told.value).split()[-1][:-1])
        assert least > size and net.eager(np.zeros((1, least, least, 3), np.uint8)).shape == (1, net.n_features)
        with pytest.raises(ValueError, match=f"give image_size {least}"): net.eager(np.zeros((1, least - 1, least - 1, 3), np.uint8))


def test_a_network_that_cannot_be_exported_runs_in_torch_and_says_why(cache, monkeypatch):
    images, name = counted("set", cache.parent / "log"), "timm:resnet10t"
    exported = cached_features(images, name, "none", 32)
    shutil.rmtree(cache / "networks")
    def refuse(*args): raise RuntimeError("no such operator\nand a long graph")
    monkeypatch.setattr(backbone, "export_onnx", refuse)
    features = cached_features(images, name, "none", 32)
    engine = backbone_engine(name, "none", size=32)
    assert engine.name == f"torch {torch.__version__}" and engine.file is None
    assert engine.reason == "it cannot be exported to ONNX (RuntimeError: no such operator)"
    assert len([*(cache / "features").glob("*.safetensors")]) == 2             # the engine is part of the key
    np.testing.assert_array_equal(features, load_backbone(name, "none").eager(images.pixels(range(6), 32)))
    np.testing.assert_allclose(features, exported, atol=1e-4)


def test_an_export_that_deviates_is_not_used(cache, monkeypatch):
    true = backbone.export_onnx
    monkeypatch.setattr(backbone, "export_onnx", lambda model, mean, std, size: true(model, mean, (1, 1, 1), size))
    assert "Not equal to tolerance" in backbone_engine("timm:resnet10t", "none", size=32).reason


def test_a_damaged_export_is_made_again(cache):
    first = load_backbone("timm:resnet10t", "none")
    expected, file = first(pixels), first.engine(64).file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged and is computed again"): first.engine(64)
    for cached in (backbone.load_exported, backbone._exported_network): cached.cache_clear()
    np.testing.assert_array_equal(first(pixels), expected)


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "timm:mixer_s32_224", "torchvision:vit_b_32"])
def test_models_without_a_feature_map_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match="cannot be used: it.* map"): load_backbone(name, "none")


def test_random_weights_are_reproducible_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = load_backbone("timm:resnet10t", "none")(pixels)
    assert torch.rand(1) == expected
    load_backbone.cache_clear()
    np.testing.assert_array_equal(load_backbone("timm:resnet10t", "none")(pixels), first)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_model_fine_tuned_to_other_classes_gives_its_own_features(tmp_path, suffix):
    import timm
    from safetensors.torch import save_file
    tuned = timm.create_model("mobilenetv3_small_100", num_classes=7)
    file = tmp_path / f"tuned.{suffix}"
    torch.save(tuned.state_dict(), file) if suffix == "pth" else save_file(tuned.state_dict(), file)
    net = load_backbone("timm:mobilenetv3_small_100", str(file))
    with torch.inference_mode(): expected = tuned.eval().forward_features(net.preprocess(pixels)).mean((2, 3))
    np.testing.assert_allclose(net(pixels), expected, atol=1e-5)
    assert net.weights_hash != weights_hash("timm:mobilenetv3_small_100", "none")


wrappings = {
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "lightning": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()} | {"loss.weight": torch.zeros(7)}, "hyper_parameters": {"lr": 0.1}},
    "compiled": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "contrast": lambda state: {f"{part}.trunk.{k}": v for part in ("encoder_q", "encoder_k") for k, v in state.items()} | {"queue": torch.zeros(2, 9)},
    "two": lambda state: {"scheduler": {}, "net": {"weights": state, "norm": torch.zeros(2)}},
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("wrapping", wrappings)
def test_weights_are_found_in_the_files_of_training_programs(tmp_path, wrapping, suffix):
    from safetensors.torch import save_file
    source, target = (backbone.build_backbone("timm:resnet10t").features for _ in range(2))
    state = {k: v + 1 if v.dtype == torch.float32 else v for k, v in source.state_dict().items()}
    content, file = wrappings[wrapping](state), tmp_path / f"tuned.{suffix}"
    if suffix == "safetensors":                                               # no nesting there: the names of dictionaries become prefixes
        flat = dict(flattened(content))
        save_file({k: v.clone() for k, v in sorted(flat.items())}, file)
    else: torch.save(content, file)
    load_weights(target, file)
    loaded = target.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def flattened(content, prefix=""):
    for key, value in content.items():
        if isinstance(value, dict): yield from flattened(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor): yield prefix + str(key), value


def test_tensors_of_a_safetensors_file_are_never_taken_by_their_order(tmp_path):
    from safetensors.torch import save_file
    save_file({"a": torch.ones(3, 3), "b": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    target = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    with pytest.raises(ValueError, match=r"2 missing \(0.weight, 1.weight\); 2 unexpected \(a, b\)"): load_weights(target, tmp_path / "other.safetensors")


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 broken archive", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_weights_file_is_said_in_our_words(tmp_path, content, suffix):
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} (cannot be read as weights|holds no state dict)") as told: load_weights(torch.nn.Linear(1, 1), file)
    assert "weights_only" not in str(told.value)


def test_densenet_weights_under_their_published_names(tmp_path):
    import torchvision
    model = torchvision.models.densenet121()
    old = {k.replace(".norm1.", ".norm.1.").replace(".norm2.", ".norm.2.").replace(".conv1.", ".conv.1.").replace(".conv2.", ".conv.2."): v
           for k, v in model.state_dict().items() if "num_batches" not in k}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    net = load_backbone("densenet121", str(tmp_path / "densenet121.pth"))
    with torch.inference_mode(): expected = torch.relu(model.eval().features(net.preprocess(pixels))).mean((2, 3))
    np.testing.assert_allclose(net(pixels), expected, atol=1e-4)


def test_weights_of_another_architecture_name_what_is_missing_and_what_is_too_much(tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"layer1.0.conv1.weight": torch.zeros(1), "stem.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"missing \(bn1.bias.*unexpected \(stem.weight\).*another shape \(layer1.0.conv1.weight\)"):
        load_backbone("torchvision:resnet18", str(file))


def test_a_pickle_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "executed"),)
    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(Exception, match="[Ww]eights"): load_weights(torch.nn.Linear(1, 1), tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_no_network_is_said_so(monkeypatch):
    def offline(*args, **kwargs): raise OSError("no route to host")
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(OSError, match="cannot be had .*local file, or 'none'"): backbone.build_backbone("timm:resnet10t", own=True)


def counted(name, log):
    "A set of six images that writes a line to `log` whenever one is asked for."
    def draw(indices, size):
        with open(log, "a") as out: out.writelines(f"{name} {i}\n" for i in indices)
        return np.stack([np.full((size, size, 3), 40 * i, np.uint8) for i in indices])
    return ImageSet(name, ("a", "b"), np.arange(6) % 2, draw, 32, digest(name))


def test_three_sets_and_two_backbones_extract_every_image_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEVO_CACHE", str(tmp_path / "cache"))
    sets, nets = [counted(name, tmp_path / "log") for name in "abc"], ["timm:resnet10t", "timm:mobilenetv3_small_100"]
    for again, net, studied in product((0, 1), nets, sets):                     # every set is studied, the others are OoD to it
        for images in (studied, *(s for s in sets if s is not studied)): cached_features(images, net, "none", 32)
        cached_features(studied, net, "none", 32, indices=[4, 2])
    asked = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len(asked) == 2 * 3 * 6 and all(asked.count(line) == 2 for line in asked)


def extract_slowly(folder, wait):
    os.environ["MOEVO_CACHE"] = f"{folder}/cache"
    images = counted("slow", f"{folder}/log")
    draw = images.pixels
    object.__setattr__(images, "pixels", lambda indices, size: (time.sleep(wait), draw(indices, size))[1])
    cached_features(images, "timm:resnet10t", "none", 32)


def wait_for(path):
    for _ in range(300):
        if path.exists(): return
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def test_two_processes_compute_once_and_the_second_waits(tmp_path):
    processes = [multiprocessing.get_context("spawn").Process(target=extract_slowly, args=(tmp_path, 1)) for _ in range(2)]
    for p in processes: p.start()
    for p in processes: p.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 6


def test_the_lock_of_a_killed_process_is_free(tmp_path, monkeypatch):
    holder = multiprocessing.get_context("spawn").Process(target=extract_slowly, args=(tmp_path, 600))
    holder.start()
    wait_for(tmp_path / "cache" / "features")
    time.sleep(0.3)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    monkeypatch.setenv("MOEVO_CACHE", str(tmp_path / "cache"))
    began = time.perf_counter()
    assert cached_features(counted("slow", tmp_path / "log"), "timm:resnet10t", "none", 32).shape == (6, 512)
    assert time.perf_counter() - began < 20


@contextmanager
def shared_cache():
    "An empty cache of a group, setgid; where tests run as root the folder of the test belongs to the group."
    folder = Path(tempfile.mkdtemp())
    umask = os.umask(0o002)
    try:
        (folder / "cache").mkdir()
        if os.geteuid() == 0: os.chown(folder / "cache", -1, 4242)
        folder.chmod(0o755)
        (folder / "cache").chmod(0o2775)
        yield folder / "cache"
    finally:
        os.umask(umask)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "Whatever is imported at the first use, since another user may not be able to read it."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEVO_CACHE", str(tmp_path_factory.mktemp("first")))
        cached_features(drawn("first", []), "timm:resnet10t", "none")


@contextmanager
def as_user(uid):
    "Act as another user of the group; without the right to do so, as oneself."
    if os.geteuid(): yield
    else:
        groups = os.getgroups()
        os.setgroups([])
        os.setegid(4242)
        os.seteuid(uid)
        try: yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)


def drawn(name, asked):
    "A set of six images that records in a list which were asked for."
    def draw(indices, size):
        asked.extend(indices)
        return np.stack([np.full((size, size, 3), 40 * i, np.uint8) for i in indices])
    return ImageSet(name, ("a", "b"), np.arange(6) % 2, draw, 32, digest(name))


def test_two_users_share_a_cache(imported, monkeypatch):
    asked = []
    with shared_cache() as cache:
        monkeypatch.setenv("MOEVO_CACHE", str(cache))
        with as_user(60001): first = cached_features(drawn("shared", asked), "timm:resnet10t", "none")
        with as_user(60002): second = cached_features(drawn("shared", asked), "timm:resnet10t", "none")
        with as_user(60002): cached_features(drawn("other", asked), "timm:resnet10t", "none")
        np.testing.assert_array_equal(first, second)
        assert len(asked) == 12
        files = [path for path in cache.rglob("*") if path.is_file()]
        assert files and all(path.stat().st_mode & 0o660 == 0o660 for path in files)


def test_a_file_that_may_not_be_read_is_not_called_damaged(imported, monkeypatch):
    asked = []
    with shared_cache() as cache:
        monkeypatch.setenv("MOEVO_CACHE", str(cache))
        with as_user(60001):
            cached_features(drawn("private", asked), "timm:resnet10t", "none")
            file, = (cache / "features").glob("*.safetensors")
            file.chmod(0)
        with as_user(60002), pytest.raises(PermissionError, match=f"{file.name} cannot be read .Permission denied.*MOEVO_CACHE"):
            cached_features(drawn("private", asked), "timm:resnet10t", "none")
    assert len(asked) == 6


def test_a_cache_that_cannot_be_written_serves_what_it_holds(imported, monkeypatch):
    asked = []
    with shared_cache() as cache:
        monkeypatch.setenv("MOEVO_CACHE", str(cache))
        with as_user(60001):
            first = cached_features(drawn("kept", asked), "timm:resnet10t", "none")
        for lock in cache.rglob("*.lock"): lock.unlink()
        for folder in (*cache.iterdir(), cache): folder.chmod(0o2555)
        with as_user(60002):
            np.testing.assert_array_equal(cached_features(drawn("kept", asked), "timm:resnet10t", "none"), first)
            with pytest.raises(PermissionError, match="cannot be locked .Permission denied.*MOEVO_CACHE"):
                cached_features(drawn("missing", asked), "timm:resnet10t", "none")
            with pytest.raises(PermissionError, match=f"the cache folder {cache} cannot be used.*MOEVO_CACHE"): check_cache()
        for folder in (cache, *cache.iterdir()): folder.chmod(0o2775)
    assert len(asked) == 6


def test_a_home_that_cannot_be_written_is_said_at_once(monkeypatch):
    with shared_cache() as cache:
        cache.chmod(0o555)
        monkeypatch.delenv("MOEVO_CACHE", raising=False)
        monkeypatch.setenv("HOME", str(cache))
        with as_user(60001), pytest.raises(PermissionError, match=f"the cache folder {cache}/.cache/moevo_nb cannot be used.*MOEVO_CACHE"): check_cache()
        cache.chmod(0o755)


def test_a_disk_that_fills_up_is_reported_with_the_path(cache):
    backbone_engine("timm:resnet10t", "none", size=32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="features/.*safetensors cannot be written .*MOEVO_CACHE"):
            cached_features(drawn("full", []), "timm:resnet10t", "none")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in (cache / "features").iterdir()] == [".lock"]


def test_long_names_are_cut(cache):
    for name in ("x" * 240, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 120, "class:a/b"):
        assert cached_features(drawn(name, []), "timm:resnet10t", "none").shape == (6, 512)
    assert len([*(cache / "features").glob("*.safetensors")]) == 3
