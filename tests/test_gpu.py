"What a GPU computes is what the CPU computes, to float32 tolerance; skipped where there is none."
import numpy as np
import pytest
import torch

from moevo_nb.backbone import extract
from moevo_nb.data import load
from moevo_nb.encoding import encodings
from moevo_nb.head import fit_heads, presets

devices = [d for d, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there]
pytestmark = pytest.mark.skipif(not devices, reason="no GPU")


@pytest.mark.parametrize("encoding", encodings)
def test_heads(encoding):
    rng = np.random.default_rng(0)
    x, y = np.maximum(rng.normal(0, 1, (90, 40)), 0).astype(np.float32), np.arange(90) % 3
    masks, folds = rng.random((4, encodings[encoding].n_neurons(40, 3))) < 0.5, [np.arange(60), np.arange(30, 90)]
    fits = [list(fit_heads(x, y, masks, 3, folds, dict(presets["paper"], epochs=40), encoding, device=d)) for d in ("cpu", devices[0])]
    for one, other in zip(*fits, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4)
            np.testing.assert_allclose(a.logits(x), b.logits(x), atol=1e-2)


def test_features():
    flowers = load("flowers")
    cpu, gpu = (extract(flowers, np.arange(8), ("efficientnet_lite0", "", d), 96) for d in ("cpu", devices[0]))
    np.testing.assert_allclose(cpu, gpu, atol=1e-2)
