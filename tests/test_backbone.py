"Backbones of many architectures, and the feature cache under two processes."
import multiprocessing
import os
import signal
import time
from itertools import product

import numpy as np
import pytest
import torch

from moevo_nb import backbone
from moevo_nb.backbone import cached_features, load_backbone, load_weights, weights_hash
from moevo_nb.data import ImageSet
from moevo_nb.system import digest

architectures = {   # name: features as its authors declare them
    "efficientnet_lite0": 1280, "torchvision:resnet18": 512, "torchvision:densenet121": 1024, "torchvision:mobilenet_v3_small": 576,
    "torchvision:shufflenet_v2_x0_5": 1024, "torchvision:squeezenet1_1": 512, "torchvision:mnasnet0_5": 1280,
    "torchvision:regnet_y_400mf": 440, "torchvision:googlenet": 1024, "timm:mobilenetv3_small_100": 576, "timm:ghostnet_100": 960,
    "timm:convnext_atto": 320, "timm:repvgg_a0": 1280, "timm:resnet10t": 512, "timm:regnetx_002": 368,
}
pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("name", architectures)
def test_features_are_the_pooled_map_of_a_frozen_network(name):
    net = load_backbone(name, "none")
    assert not any(m.training for m in net.model.modules()) and not any(p.requires_grad for p in net.model.parameters())
    maps = []
    hook = net.model.features.register_forward_hook(lambda module, given, found: maps.append(found))
    features = net(pixels)
    hook.remove()
    assert features.shape == (5, net.n_features) and net.n_features == architectures[name] and net.cam_layer
    scale = max(1, abs(features).max())                                    # untrained networks may give large or tiny numbers
    np.testing.assert_allclose(features, maps[0].mean((2, 3)).numpy(), atol=1e-6 * scale)
    np.testing.assert_allclose(features, net.feature_maps(pixels).mean((2, 3)), atol=1e-5 * scale)
    assert not maps[0].requires_grad and features.std(0).max() > 0
    for batch in ([0], [1, 0, 3]): np.testing.assert_allclose(net(pixels[batch]), features[batch], atol=1e-5 * scale)


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
    for again, net, studied in product((0, 1), nets, sets):                     # every set is studied, the others are foreign to it
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
