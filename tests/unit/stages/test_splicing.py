"""What is lost downstream, on a model whose every answer follows from the activations it is given."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eqknobs.errors import EqknobsError
from eqknobs.sae import make_config, new_sae
from eqknobs.stages.saes.splicing import Spoken, spliced_scores

D = 8


class Model:
    """Hears a clip as frames [n, D]; says "good morning" if they still are near what they were, else "noise"."""

    name = "fake"

    def __init__(self):
        self.edit, self.calls = None, []

    @contextmanager
    def editing(self, site, edit, clip_only=False):
        assert clip_only, "padding is to pass"
        self.calls.append(site)
        self.edit = edit
        yield
        self.edit = None

    def hear(self, clips):
        acts = torch.from_numpy(clips[0].reshape(1, -1, D))
        after = acts if self.edit is None else self.edit(acts)
        assert after.shape == acts.shape
        error = float((acts - after).square().sum() / acts.square().sum())
        return SimpleNamespace(error=error)

    def transcribe(self, heard):
        return ["Good morning." if heard.error < 0.1 else "noise"]

    def nll(self, heard, texts):
        return np.array([heard.error]), np.array([3])

    def no_speech_prob(self, heard):
        return np.array([min(heard.error, 1.0)])


def test_arms_stand_between_nothing_lost_and_everything() -> None:
    sae = new_sae(make_config({"variant": "topk", "d_in": D, "d_sae": 16, "k": 8}), np.zeros(D), np.ones(D))
    eye = torch.cat([torch.eye(D), -torch.eye(D)])
    sae.requires_grad_(False).W_enc.copy_(eye)
    sae.W_dec.copy_(eye)
    rng, model = np.random.default_rng(0), Model()
    clips = [Spoken(f"c{i}", "s", "test", rng.normal(size=20 * D).astype(np.float32), "good morning") for i in range(2)]
    clips.append(Spoken("song", "t", "test", rng.normal(size=20 * D).astype(np.float32), ""))
    rows = spliced_scores(model, "layer.1", {("topk", 3): sae}, np.zeros(D), clips)
    assert set(model.calls) == {"layer.1"} and len(rows) == 4 * 3
    by = rows[rows["id"] == "c0"].set_index("arm")
    assert by.loc["unspliced", "nats"] == 0 and by.loc["mean", "nats"] == pytest.approx(1)
    assert by.loc["sae", "nats"] == pytest.approx(0, abs=1e-9)  # that dictionary holds everything
    assert by.loc["untrained", "nats"] > 0.1
    assert by["errors"].tolist() == [0, 2, 0, 2] and by["words"].tolist() == [2] * 4
    assert by["seed"].tolist() == [-1, -1, 3, 3]
    song = rows[rows["id"] == "song"]
    assert song[["errors", "words", "nats", "tokens"]].isna().all(axis=None) and song["no_speech_prob"].notna().all()


def test_what_cannot_be_spliced_is_one_line() -> None:
    with pytest.raises(EqknobsError, match="no clips"):
        spliced_scores(Model(), "layer.1", {}, np.zeros(D), [])
    with pytest.raises(EqknobsError, match="does not transcribe"):
        spliced_scores(SimpleNamespace(name="mimi"), "encoder", {}, np.zeros(D), [])
