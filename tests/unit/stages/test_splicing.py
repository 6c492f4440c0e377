"""What is lost downstream, on a model whose every answer follows from the activations it is given."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch

from eqknobs.errors import EqknobsError
from eqknobs.evidence.estimates import records
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.io import file_sha256, write_csv
from eqknobs.sae import make_config, new_sae
from eqknobs.stages.saes.checks import check, spliced_saes
from eqknobs.stages.saes.section import _front, fronts, points
from eqknobs.stages.saes.splicing import Spoken, _clips, spliced_scores
from eqknobs.stages.saes.tables import LEAST_CLIPS, _spliced_finding, auc_draws, spliced_rows
from helpers.recompute import check_splicing

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


CFG = {"bootstrap": 50, "seed": 0}


def raw_rows() -> pd.DataFrame:
    """Four arms on 6 clips of speech and 4 without; each arm loses more nats than the one before."""
    rows = []
    for place, (arm, sae, seed) in enumerate(
        [("unspliced", "", -1), ("sae", "topk", 0), ("untrained", "topk", 0), ("mean", "", -1)]
    ):
        for i in range(10):
            speech = i < 6
            keys = {"arm": arm, "sae": sae, "seed": seed, "id": f"c{i}", "speaker": f"s{i % 3}", "split": "test"}
            said = {"errors": place, "words": 8, "nats": 10.0 * (1 + place) + i, "tokens": 10}
            said = said if speech else dict.fromkeys(said, np.nan)
            no_speech = (0.1 if speech else 0.9) if place < 3 else 0.5
            rows.append(keys | said | {"transcript": "", "no_speech_prob": no_speech, "reference": "text"})
    return pd.DataFrame(rows)


def test_table_holds_every_arm_beside_the_unspliced_model() -> None:
    table = spliced_rows(raw_rows(), "w.layer.2", CFG).set_index("arm")
    assert (
        table["clips"].tolist() == [6] * 4 and table["non_speech"].tolist() == [4] * 4 and (table["layer"] == 2).all()
    )
    assert table["wer_text"].tolist() == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8])
    assert table["nll_difference"].tolist() == pytest.approx([0, 1, 2, 3])
    assert table.loc["sae", ["nll_difference_low", "nll_difference_high"]].tolist() == pytest.approx([1, 1])  # paired
    assert table.loc["sae", "nll_over_untrained"] == pytest.approx(-1)
    assert table["nll_over_untrained"].drop("sae").isna().all()
    assert table.loc["sae", "wer_text_over_untrained"] == pytest.approx(-1 / 8)
    assert table["no_speech_auc"].tolist() == [1, 1, 1, 0.5]
    assert table["no_speech_auc_difference"].tolist() == [0, 0, 0, -0.5]


def test_table_is_recomputed_from_clips(tmp_path) -> None:
    raw = raw_rows()
    raw["no_speech_prob"] = np.random.default_rng(0).random(len(raw))
    write_csv(tmp_path / "scores" / "w.layer.2.splicing.csv", raw)
    table = spliced_rows(raw, "w.layer.2", CFG)
    assert check_splicing(tmp_path, "w.layer.2", table, CFG) == 4 * 15


def test_without_other_sound_there_is_no_auc() -> None:
    rows = raw_rows()
    table = spliced_rows(rows[rows["tokens"].notna()], "w.layer.2", CFG)
    assert table["no_speech_auc"].isna().all() and table["nll"].notna().all()


def test_auc_is_the_share_of_pairs_in_order() -> None:
    speech = pd.DataFrame({"id": list("abc"), "speaker": list("xyz"), "no_speech_prob": [0.1, 0.4, 0.5]})
    other = pd.DataFrame({"id": list("de"), "speaker": list("uv"), "no_speech_prob": [0.4, 0.05]})
    draws = auc_draws(speech, other, CFG)
    assert draws[0] == pytest.approx(1.5 / 6) and len(draws) == 51 and ((draws >= 0) & (draws <= 1)).all()


def test_speech_needs_texts_and_other_sound_gets_none(tmp_path) -> None:
    sf.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    row = {"id": "a", "path": tmp_path / "a.wav", "speaker": "s", "split": "test", "text": "la la"}
    row |= {"sha256": file_sha256(tmp_path / "a.wav")}
    write_csv(tmp_path / "m.csv", pd.DataFrame([row]))
    cfg = {"split": "test", "clips": 3}
    assert _clips(tmp_path / "m.csv", "", 16000, cfg)[0].text == "la la"
    (song,) = _clips(tmp_path / "m.csv", "music", 16000, cfg)
    assert (song.id, song.speaker, song.text) == ("music-a", "music-s", "")
    write_csv(tmp_path / "m.csv", pd.DataFrame([row | {"text": ""}]))
    with pytest.raises(EqknobsError, match="has no text"):
        _clips(tmp_path / "m.csv", "", 16000, cfg)
    heard: list[int] = []

    def transcribe(clips):
        heard.append(len(clips[0]))
        return [answer]

    other = SimpleNamespace(name="base", sample_rate=8000, transcribe=transcribe)
    answer = " la la la "
    assert _clips(tmp_path / "m.csv", "", 16000, cfg, other)[0].text == "la la la" and heard == [800]  # at its rate
    assert _clips(tmp_path / "m.csv", "music", 16000, cfg, other)[0].text == "" and heard == [800]
    answer = ""
    with pytest.raises(EqknobsError, match="a says nothing to base; or set"):
        _clips(tmp_path / "m.csv", "", 16000, cfg, other)


def config(**splicing) -> dict:
    sae = {"variant": "topk", "d_sae": 64, "k": 8, "lr": 0.001, "batch_size": 32, "epochs": 1}
    return {
        "models": {"w": {"kind": "whisper"}, "m": {"kind": "mimi"}},
        "run": {"targets": ["w.layer.1", "m.encoder"]},
        "corpora": {"music": {}, "mix": {"source": "union", "of": ["speech", "music"]}},
        "saes": {"topk": sae, "wide": {**sae, "corpus": "mix"}},
        "splicing": {"split": "test", "clips": 2, "non_speech": ["music"], "seeds": 1, **splicing},
    }


def test_models_that_transcribe_are_spliced_where_their_saes_lie() -> None:
    check(config())
    assert spliced_saes(config()) == {"w.layer.1": ["topk"], "w.layer.1@mix": ["wide"]}
    assert spliced_saes(config(saes=["wide"])) == {"w.layer.1@mix": ["wide"]}
    assert spliced_saes({**config(), "splicing": None}) == {}
    check(config(targets=["other.*"]))  # fits nothing, as in another run's configuration
    check(config(reference="w"))


@pytest.mark.parametrize(
    ("splicing", "said"),
    [
        ({"targets": ["m.encoder"]}, "no model that transcribes"),
        ({"saes": ["none"]}, "not under saes"),
        ({"non_speech": ["rain"]}, "rain"),
        ({"non_speech": ["speech"]}, "speech itself"),
        ({"reference": "m"}, "'m' is no model of kind whisper"),
        ({"reference": "base"}, "'base' is no model of kind whisper"),
    ],
)
def test_what_splicing_names_must_be_there(splicing, said) -> None:
    with pytest.raises(EqknobsError, match=said):
        check(config(**splicing))


@pytest.mark.parametrize(
    ("clips", "verdict"), [(LEAST_CLIPS, "positive"), (LEAST_CLIPS - 1, "undecided")], ids=["enough", "few"]
)
def test_few_clips_decide_nothing(clips: int, verdict: str) -> None:
    rows = records(spliced_rows(raw_rows(), "w.layer.2", CFG))
    (row,) = (row for row in rows if row["arm"] == "sae")
    found = _spliced_finding({**row, "clips": clips}, rows)
    assert "hears" not in found["detail"]
    others = _spliced_finding({**row, "reference": "base"}, rows)
    assert "; the text is what base hears" in others["detail"]
    assert found["verdict"] == verdict and ("decide nothing" in found["detail"]) == (verdict == "undecided")
    worse = {**row, "clips": LEAST_CLIPS, "wer_text_over_untrained_low": 0.1, "wer_text_over_untrained_high": 0.2}
    assert _spliced_finding(worse, rows)["verdict"] == "negative"  # fewer nats do not make up for words


def test_sizes_and_sparsities_of_a_grid_are_drawn_and_listed(tmp_path) -> None:
    grid = [
        {"k": k, "d_sae": d, "val_fvu": 5 / k, "val_l0": k, "dead_share": 0.25} for k in (50, 25) for d in (32, 128)
    ]
    write_csv(tmp_path / "saes/w.layer.2/front/grid/front.csv", pd.DataFrame(grid))
    write_csv(tmp_path / "saes/w.layer.2/other/grid/front.csv", pd.DataFrame([{"l0": 9} | grid[0]]).drop(columns="k"))
    found = fronts(Context("w.layer.2", Inputs.below(tmp_path), {}, {}), ["front", "other", "without"])
    assert list(found) == ["front", "other"] and found["front"]["val_l0"].tolist() == [25, 25, 50, 50]
    shown = points(found)
    assert shown["head"] == ["SAE", "d_sae", "k", "l0", "L0, val", "FVU, val", "dead share"]
    assert [[text for text, _ in row] for row in shown["rows"]] == [
        ["front", "32", "50", "–", "50.0", "0.100", "0.250"],
        ["front", "128", "50", "–", "50.0", "0.100", "0.250"],
        ["front", "32", "25", "–", "25.0", "0.200", "0.250"],
        ["front", "128", "25", "–", "25.0", "0.200", "0.250"],
        ["other", "32", "–", "9", "50.0", "0.100", "0.250"],
    ]
    assert points({}) is None
    last = pd.DataFrame([{"val_l0": 30.0, "val_fvu": 0.2}])
    drawn = _front(found, {(sae, 0): last for sae in ("front", "other")}, ["front", "other"], 0)
    assert all(
        f"{sae}, {width} features" in drawn["svg"] for sae, width in (("front", 32), ("front", 128), ("other", 32))
    )
