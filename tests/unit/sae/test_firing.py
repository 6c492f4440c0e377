"""Which features fire on which frames."""

import numpy as np
import pandas as pd
import pytest

from eqknobs.errors import EqknobsError
from eqknobs.sae import make_config, new_sae
from eqknobs.sae.firing import clip_codes, codes, firing


class Cache:
    """Two clips of test, one of val."""

    def __init__(self, frames: int = 30):
        self.attrs = {"site": "layer.0"}
        self.acts = np.random.default_rng(0).normal(size=(3 * frames, 8)).astype(np.float32)
        table = {"id": ["b", "c", "a"], "speaker": ["s", "t", "s"], "split": ["test", "val", "test"]}
        self.utterances = pd.DataFrame(table).assign(start=[0, frames, 2 * frames], frames=frames)


def sae(variant: str = "batchtopk", **more: object):
    return new_sae(make_config({"variant": variant, "d_in": 8, "d_sae": 64, **more}), np.zeros(8), np.ones(8))


def test_of_a_clip_the_largest_activations_fire() -> None:
    raw, one = Cache().acts[:30], sae(k=4)
    found = clip_codes(one, raw, 4).toarray()
    h = np.maximum((raw - one.b_dec.detach().numpy()) @ one.W_enc.detach().numpy().T, 0)
    assert (found > 0).sum() == 120
    np.testing.assert_allclose(found[found > 0], h[found > 0], rtol=1e-5)
    assert h[found == 0].max() <= found[found > 0].min() + 1e-6


def test_without_a_number_the_saes_own_rule_decides() -> None:
    raw, one = Cache().acts[:30], sae("topk", k=5)
    np.testing.assert_array_equal(clip_codes(one, raw, 0).toarray(), one.encode(raw))


def test_codes_are_clip_by_clip_in_the_order_of_ids() -> None:
    cache, one = Cache(), sae(k=4)
    found, clips = codes(cache, one, ["test"], 4)  # type: ignore[arg-type]
    assert list(clips["id"]) == ["a", "b"] and found.shape == (60, 64)
    np.testing.assert_array_equal(found[:30].toarray(), clip_codes(one, cache.acts[60:], 4).toarray())
    on = firing(cache, one, "test", 4)  # type: ignore[arg-type]
    np.testing.assert_array_equal(on.on.toarray(), found.toarray() > 0)
    assert list(on.bounds()) == [0, 30, 60]


def test_an_empty_split_is_one_line() -> None:
    with pytest.raises(EqknobsError, match=r"no train frames in the cache of layer\.0"):
        codes(Cache(), sae(k=4), ["train"], 4)  # type: ignore[arg-type]
