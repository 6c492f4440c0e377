"""Hallucination steering, in a world whose answers are known: which arm keeps silent, at which cost."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch

import eqknobs.stages.hallucination.compute as compute
import eqknobs.transcribe
from eqknobs.cli import main
from eqknobs.errors import EqknobsError
from eqknobs.evidence.comparisons import with_holm
from eqknobs.evidence.inputs import Inputs as Declared
from eqknobs.evidence.stage import Context
from eqknobs.io import file_sha256, read_csv, write_csv, write_json
from eqknobs.models.whisper import Halfway, Said
from eqknobs.pieces import Pieces
from eqknobs.sae.base import make_config, new_sae
from eqknobs.stages.hallucination import section, tables
from eqknobs.stages.hallucination.checks import check, hallucinating
from eqknobs.stages.hallucination.clips import at_level, made, mixed, noise, rms_db, sourced, speech
from eqknobs.stages.hallucination.edits import (
    Fitted,
    Point,
    direction,
    edit_of,
    edited,
    fit,
    load_fitted,
    pooled,
    save_fitted,
    shift,
)
from helpers.recompute import check_hallucinations

RATE, HOP, D = 16000, 1600, 4
TEXT = "the cat sat down"


class Model:
    """Its one layer says in dimension 0 that somebody speaks, in 1 that nobody does.

    The decoder writes "you" where nobody speaks, unless dimension 1 is above 1.5 or head 2 is muted; speech loses its
    words where dimension 0 is below −1.
    """

    name, device, revision, sample_rate, window = "w", "cpu", "r", RATE, 30 * RATE
    config = SimpleNamespace(decoder_attention_heads=3)

    def __init__(self):
        self.sites = {"layer.0": None}
        self.muted: list[int] = []
        self.said = 0

    def halfway(self, wavs, sites):
        acts, frames = torch.zeros(len(wavs), 31, D), []  # the last position is padding, and tells `say`
        for row, wav in enumerate(wavs):
            frames.append(len(wav) // HOP)
            talks = np.abs(np.fft.rfft(wav, RATE))[440] > 0.9 * np.abs(np.fft.rfft(wav, RATE)).max()
            acts[row, : frames[-1], 0 if talks and np.any(wav) else 1] = 1
            acts[row, -1, 0] = float(talks and np.any(wav))
        return Halfway({site: acts for site in sites}, np.array(frames), np.arange(len(wavs)))

    def go_on(self, acts, site):
        return acts

    def without_heads(self, heads):
        model = self

        class Muting:
            def __enter__(self):
                model.muted = list(heads)

            def __exit__(self, *_):
                model.muted = []

        return Muting()

    def say(self, states, max_tokens=224, batch=8, blanks=False, symbols=False):
        self.said += len(states)
        found = []
        for state in states:
            speech, other = state[:5].mean(0)[:2].tolist()
            if state[-1, 0] > 0:
                found.append(Said(TEXT if speech > -1 else "", -0.1, 0.01))
            else:
                silent = other > 1.5 or 2 in self.muted
                found.append(Said("" if silent else "(noise)" if symbols else "you", -0.5, min(0.9, 0.5 + other / 5)))
        return found


def identity() -> object:
    """An SAE whose features are the dimensions."""
    config = make_config({"variant": "topk", "d_in": D, "d_sae": D, "k": D})
    sae = new_sae(config, np.zeros(D), np.ones(D)).requires_grad_(False).eval()
    sae.W_enc.copy_(torch.eye(D))
    sae.W_dec.copy_(torch.eye(D))
    return sae


# --- sounds


def test_noises_have_their_level_and_slope_and_differ() -> None:
    voices = [np.sin(np.arange(RATE) / 9).astype(np.float32)]
    made_of = {
        kind: noise(kind, RATE, RATE, np.random.default_rng(0), voices)
        for kind in "white pink brown hum babble".split()
    }
    for kind, wav in made_of.items():
        assert wav.dtype == np.float32 and rms_db(wav) == pytest.approx(-23, abs=1e-3), kind
    octaves = {}
    for kind in ("white", "pink", "brown"):
        power = np.abs(np.fft.rfft(made_of[kind])) ** 2
        octaves[kind] = 10 * np.log10(power[200:400].mean() / power[3200:6400].mean())
    assert octaves["white"] == pytest.approx(0, abs=1) and octaves["pink"] == pytest.approx(12, abs=1)
    assert octaves["brown"] == pytest.approx(24, abs=1.5)
    assert rms_db(np.zeros(5)) == pytest.approx(-240) and not at_level(np.zeros(5), -20).any()


def test_noisy_speech_has_the_ratio_asked_for() -> None:
    rng = np.random.default_rng(0)
    wav, under = (rng.standard_normal(8000).astype(np.float32) * level for level in (0.01, 0.2))
    assert rms_db(mixed(wav, under, 5) - wav) == pytest.approx(rms_db(wav) - 5, abs=1e-3)
    assert np.abs(mixed(wav * 90, under, -10)).max() <= 1


def test_sources_of_test_are_no_other_splits() -> None:
    rows = pd.DataFrame({"id": list("abcd"), "split": ["train", "train", "test", "test"], "source": list("xyxy")})
    assert sourced(rows, ["y"])["id"].tolist() == ["a", "d"] and len(sourced(rows, [])) == 4
    with pytest.raises(EqknobsError, match="name no source"):
        sourced(rows.drop(columns="source"), ["y"])
    cfg = {"clips": {"val": 3, "test": 3}, "seed": 0}
    kinds = {
        split: {clip.id.split("-")[1] for clip in made(split, RATE, [np.ones(RATE)], cfg) if clip.domain == "noise"}
        for split in ("val", "test")
    }
    assert not kinds["val"] & kinds["test"] and len(made("test", RATE, [np.ones(RATE)], cfg)) == 6


# --- edits


def world() -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    talk = [np.array([[2.0, 0, 0.1, 0]] * 5) * rng.uniform(0.8, 1.2) for _ in range(6)]
    other = [np.array([[0, 3.0, 0.1, 0]] * 5) * rng.uniform(0.8, 1.2) for _ in range(6)]
    return [*talk, *other], np.array([1] * 6 + [0] * 6)


def test_features_are_ranked_by_the_classifier_and_moved_against_their_sign(tmp_path: Path) -> None:
    clips, labels = world()
    fitted = fit(clips, labels, identity())
    assert fitted.beta[0] > 0 > fitted.beta[1] and abs(fitted.beta[2]) < 0.05 and fitted.beta[3] == 0
    assert fitted.typical == pytest.approx([2, 3, 0.1, 0], rel=0.1)
    assert fitted.difference == pytest.approx([2, -3, 0, 0], rel=0.1, abs=0.02)
    assert shift(Point("sae", 0, 2, 1.0), fitted).tolist() == [-1, 1, 0, 0]
    assert shift(Point("sae_scaled", 0, 2, 1.0), fitted) == pytest.approx([-2, 3, 0, 0], rel=0.1)
    random = shift(Point("random_features", 0, 2, 1.0, 3), fitted)
    assert np.count_nonzero(random) == 2 and random[3] == 0 and sorted(random[random != 0]) == [-1, 1]  # 3 never fires
    assert np.linalg.norm(direction(Point("random_direction", 0), fitted)) == pytest.approx(
        np.linalg.norm(fitted.difference)
    )
    save_fitted(tmp_path / "f.npz", {0: fitted})
    assert (load_fitted(tmp_path / "f.npz")[0].beta == fitted.beta).all()
    with pytest.raises(EqknobsError, match="0 of 12 train clips count as speech"):
        fit(clips, labels * 0, identity())


def test_a_pooled_code_is_the_mean_where_a_feature_fires() -> None:
    assert pooled(np.array([[2.0, 0, 0], [4.0, 1, 0]])).tolist() == [3, 1, 0]


def test_edits_do_what_they_are_called() -> None:
    fitted = Fitted(np.array([2.0, -3.0, 0.1, 0]), np.array([2.0, 3, 1, 0]), np.array([2.0, -3, 0, 0]))
    sae, acts = identity(), torch.tensor([[1.0, -0.5, 0, 2.0]])
    rebuilt = [1, 0, 0, 2]  # the code is not negative

    def after(arm: str, alpha: float) -> list[float]:
        return edit_of(Point(arm, 0, 1, alpha), fitted, sae)(acts)[0].tolist()

    assert after("sae_inserted", 0) == rebuilt
    assert after("sae", 2.0) == [1, 2, 0, 2] and after("sae_scaled", 2.0) == [1, 6, 0, 2]
    assert after("sae_error", 2.0) == [1, 1.5, 0, 2]  # what the SAE cannot rebuild is still there
    assert after("mean_difference", 0.5) == [0, 1, 0, 2]
    with pytest.raises(EqknobsError, match="arm vad edits no layer"):
        after("vad", 1.0)


def test_frames_of_padding_are_edited_only_if_asked() -> None:
    acts = torch.zeros(2, 4, D)
    found = edited(acts, np.array([1, 3]), lambda frames: frames + 1, window=False)
    assert found[..., 0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]] and not acts.any()
    assert edited(acts, np.array([1, 3]), lambda frames: frames + 1, window=True).all()


# --- scores and choices


@pytest.mark.parametrize(
    ("said", "wanted"), [("you", True), ("(upbeat music)", False), ("♪", False), ("...", False), ("", False)]
)
def test_what_counts_as_words(said: str, wanted: bool) -> None:
    assert compute.written(said) == wanted


def test_words_are_counted_against_the_text() -> None:
    assert compute.word_counts(TEXT, "the cot sat") == {"errors_text": 2, "words_text": 4, "deleted": 1}
    assert compute.word_counts(TEXT, "") == {"errors_text": 4, "words_text": 4, "deleted": 4}
    assert all(np.isnan(value) for value in compute.word_counts("", "you").values())


@pytest.mark.parametrize(
    ("point", "passes"),
    [
        (Point("no_speech", alpha=0.7), True),
        (Point("no_speech", alpha=0.5), False),
        (Point("no_speech_logprob", alpha=0.5), True),  # its words are too likely
        (Point("energy", alpha=-30), True),
        (Point("energy", alpha=-10), False),
        (Point("vad", alpha=0.5), False),  # white noise is no voice
    ],
)
def test_gates(point: Point, passes: bool) -> None:
    wav = at_level(np.random.default_rng(0).standard_normal(RATE), -20)
    assert compute.gate(point, Said("you", -0.5, 0.6), wav, RATE, -1.0) == passes
    if point.arm == "no_speech_logprob":
        assert not compute.gate(point, Said("you", -1.5, 0.6), wav, RATE, -1.0)


def test_voice_activity_hears_speech() -> None:
    wav, rate = sf.read("resources/corpus/101/1101/101-1101-0000.flac", dtype="float32")
    assert compute.voice_activity(wav[::1] if rate == RATE else wav, RATE) > 0.9
    with pytest.raises(EqknobsError, match="hears 16000 Hz, not 8000"):
        compute.voice_activity(wav, 8000)


def test_the_choice_keeps_words_first_and_then_is_silent() -> None:
    few, fewer, dear = Point("sae", 0, 1, 1.0), Point("sae", 0, 2, 1.0), Point("sae", 0, 3, 1.0)
    points = {
        few: compute.Tried(0.5, 0, 0.9, 0.1),
        fewer: compute.Tried(0.4, 0, 0.9, 0.12),
        dear: compute.Tried(0, 0, 0.9, 0.5),
    }
    assert compute.choose(points, 0.12) == fewer and compute.choose(points, 0.11) == few
    assert compute.choose(points, 0.6) == dear and compute.choose(points, 0.05) == few  # none fits: the fewest errors
    surer = {few: compute.Tried(1, 0, 0.8, 0.1), fewer: compute.Tried(1, 0, 0.9, 0.11)}
    assert compute.choose(surer, 0.2) == fewer


# --- all of it

CFG = {
    "model": {"device": "cpu"},
    "layers": [0],
    "non_speech": ["music"],
    "held_out": ["b"],
    "clips": {"train": 2, "val": 2, "test": 3},
    "speech": {"val": 1, "test": 2},
    "quiet_db": -20,
    "snr_db": 20,
    "label": "speech",
    "tau": 0.5,
    "counts": [1, 2],
    "alphas": [1, 3],
    "rivals": {
        "alphas": [0.5, 4],
        "heads": [1, 2],
        "no_speech": [0.5, 0.6],
        "logprob": -1,
        "energy_db": [-50],
        "vad": [0.5],
        "seeds": 2,
    },
    "edit": "clip",
    "blanks": True,
    "wer_margin": 0.1,
    "max_tokens": 5,
    "batch": 4,
    "listen": 1,
    "seed": 0,
}


def tone(hertz: float) -> np.ndarray:
    return 0.1 * np.sin(2 * np.pi * hertz * np.arange(RATE // 2) / RATE)


def write_corpora(folder: Path) -> compute.Inputs:
    """Speech is a tone of 440 Hz, music one of 2000; the cache says of every train clip what `Model` would."""
    rows: dict[str, list[dict]] = {"speech": [], "music": []}
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for i in range(count):
            for corpus, hertz in (("speech", 440), ("music", 2000)):
                path = folder / f"{corpus}{split}{i}.wav"
                sf.write(path, tone(hertz), RATE)
                text = TEXT if corpus == "speech" else ""
                row = {
                    "id": f"{split}{i}",
                    "path": path,
                    "speaker": f"{corpus}{split}{i}",
                    "split": split,
                    "text": text,
                }
                row |= {"sha256": file_sha256(path), "source": "b" if split == "test" else "a"}
                rows[corpus].append(row)
    for corpus, own in rows.items():
        write_csv(folder / f"{corpus}.csv", pd.DataFrame(own))
    heard = [{**row, "id": f"{corpus}-{row['id']}", "domain": corpus} for corpus, own in rows.items() for row in own]
    write_csv(folder / "heard.csv", pd.DataFrame(heard))
    identity().save(folder / "sae")
    return compute.Inputs(
        str(folder / "speech.csv"),
        {"music": str(folder / "music.csv")},
        str(folder / "heard.csv"),
        {0: "cache"},
        {0: folder / "sae"},
    )


class Cache:
    """Stands for the activation cache of the train clips."""

    def __init__(self, folder: Path):
        heard = read_csv(folder / "heard.csv")
        self.attrs = {"revision": "r"}
        self.utterances = heard[["id"]].assign(start=np.arange(len(heard)) * 5, frames=5)
        self.acts = np.zeros((5 * len(heard), D), np.float32)
        for row, domain in zip(self.utterances.itertuples(), heard["domain"]):
            self.acts[row.start : row.start + 5, 0 if domain == "speech" else 1] = 1

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def world_run(tmp_path_factory: pytest.TempPathFactory):
    """(run folder, the model) after the whole stage, its table and its page."""
    folder = tmp_path_factory.mktemp("hallucination")
    inputs = write_corpora(folder)
    run = folder / "run"
    out = compute.Outputs(
        *(
            str(run / name)
            for name in (
                "scores/w.hallucination.csv",
                "hallucination/w.json",
                "hallucination/w.npz",
                "renders/w/hallucination",
            )
        )
    )
    model = Model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "load_model", lambda cfg: model)
        patch.setattr(compute, "ActivationCache", lambda path: Cache(folder))
        compute.hallucinate(inputs, out, CFG, Pieces(folder / "pieces"))
        first = model.said
        compute.hallucinate(inputs, out, CFG, Pieces(folder / "pieces"))
        assert model.said == first  # every transcript was kept
    (run / "saes/w.layer.0@mix/topk/seed0").parent.mkdir(parents=True)
    identity().save(run / "saes/w.layer.0@mix/topk/seed0")
    return run, model


def context(run: Path) -> Context:
    own = {"targets": ["w"], "non_speech": ["music"], "wer_margin": 0.1, "tau": 0.5, "held_out": []}
    return Context("w", Declared.below(run), {"bootstrap": 50, "seed": 0}, own)


def test_every_arm_does_in_the_tiny_world_what_is_known_of_it(world_run) -> None:
    run, _ = world_run
    about = json.loads((run / "hallucination/w.json").read_text())
    assert about["heads"][0] == 2  # the only one without which nothing is written
    assert about["arms"]["sae"] == {"arm": "sae", "layer": 0, "k": 2, "alpha": 1, "seed": 0}  # 3 would cost the words
    found = tables.tabulate(context(run)).tables["hallucination"]
    test = found[(found["split"] == "test") & (found["domain"] == "all")].set_index("arm")
    silent = {"sae", "muted_heads", "symbols", "no_speech"}
    by_domain = found[found["split"] == "test"].set_index(["arm", "domain"])["hallucination_rate"]
    assert by_domain["none", "noise"] == 1 and by_domain["vad", "noise"] == 0  # babble of tones has a tone in it
    for arm in ("none", "sae_inserted", *silent):
        for domain in ("music", "silence"):
            assert by_domain[arm, domain] == (0 if arm in silent else 1), arm
        assert test.loc[arm, "wer_text"] == 0 and test.loc[arm, "within_margin"], arm
    assert test.loc["random_direction", "seeds"] == 2 and test.loc["none", "non_speech"] == 9
    assert test.loc["none", "clips"] == 9 + 2 * 3
    music = found[(found["split"] == "test") & (found["domain"] == "music")].set_index("arm").loc["none"]
    assert music["clips"] == music["non_speech"] == 3 and np.isnan(music["wer_text"])


def test_the_sentence_says_whether_features_beat_what_is_cheap(world_run) -> None:
    run, _ = world_run
    at = context(run)
    made_of = tables.tabulate(at)
    facts = made_of.facts | {"comparisons": with_holm(made_of.comparisons)}
    lines = tables.findings(at, facts)
    assert "writes words for 1.000" in lines[0]["text"]
    assert lines[1]["text"].startswith("SAE steering of w (SAE features; layer 0, k 2, α 1) ")
    assert (
        lines[1]["verdict"] == "undecided" and "does not beat the cheap rivals: it is better than" in lines[1]["text"]
    )
    worse = [{**record, "verdict": "worse", "p_holm": 0.01} for record in facts["comparisons"]]
    assert tables.findings(at, facts | {"comparisons": worse})[1]["verdict"] == "negative"
    better = [{**record, "verdict": "better", "p_holm": 0.01} for record in facts["comparisons"]]
    (line,) = tables.findings(at, facts | {"comparisons": better})[1:2]
    assert line["verdict"] == "positive" and "fewer words where nobody speaks than 5 of 5 cheap rivals" in line["text"]


def test_the_table_is_recomputed_and_the_page_plays(world_run) -> None:
    run, _ = world_run
    at = context(run)
    made_of = tables.tabulate(at)
    write_csv(run / "tables/hallucination.csv", made_of.tables["hallucination"])
    comparisons = with_holm(made_of.comparisons)
    write_json(run / "tables/summary.json", {"targets": {"w": {"comparisons": comparisons}}})
    table = read_csv(run / "tables/hallucination.csv")
    assert check_hallucinations(run, "w", table, at.cfg) > 400
    shown = section.show(context(run))
    assert [clip["domain"] for clip in shown["clips"]] == ["music", "noise", "silence", "clean", "quiet", "noisy"]
    takes = {take["arm"]: take["said"] for take in shown["clips"][0]["takes"]}
    assert (
        takes["nothing done"] == "you" and takes["SAE features"] == "" and takes["Whisper's own symbols"] == "(noise)"
    )
    assert all(clip["sound"].startswith("data:audio/mpeg") for clip in shown["clips"])


@pytest.mark.parametrize("label", ["median", "tau"])
def test_labels_by_no_speech_are_of_non_speech_alone(tmp_path: Path, label: str) -> None:
    inputs = write_corpora(tmp_path)
    train = read_csv(inputs.heard).query("split == 'train'")
    found = compute.labels_of(Model(), train, inputs.non_speech, CFG | {"label": label, "tau": 0.75})
    assert set(found) == {"music-train0", "music-train1"} and set(found.values()) <= {0, 1}
    assert sum(found.values()) == (2 if label == "tau" else 0)  # they are alike: none is under the median


def steer(run: Path, audio: Path, arm: str, capsys: pytest.CaptureFixture) -> str:
    main(["transcribe", "--run", str(run), "--model", "w", "--audio", str(audio), "--steer", arm, "--device", "cpu"])
    return capsys.readouterr().out


@pytest.fixture
def served(world_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, _ = world_run
    (run / "report").mkdir(exist_ok=True)
    config = {"models": {"w": {"kind": "whisper"}}, "hallucination": {"sae": "topk", "layers": [0]}, "sae_seeds": [0]}
    write_json(run / "report/config.yaml", config | {"saes": {"topk": {"corpus": "mix"}}})
    monkeypatch.setattr(eqknobs.transcribe, "load_model", lambda cfg: Model())
    sf.write(tmp_path / "long.wav", np.concatenate([np.tile(tone(2000), 60), tone(440)]), RATE)
    return run, tmp_path / "long.wav"


@pytest.mark.parametrize(
    ("arm", "after"),
    [("sae", "(nothing)"), ("muted_heads", "(nothing)"), ("no_speech", "(nothing)"), ("symbols", "(noise)")],
)
def test_a_recording_of_yours_is_steered_window_by_window(served, arm: str, after: str, capsys) -> None:
    run, audio = served
    lines = steer(run, audio, arm, capsys).splitlines()
    assert lines == [
        "0:00 (no speech: 0.70) you",
        f"    {arm}: {after}",
        f"0:30 (no speech: 0.01) {TEXT}",
        f"    {arm}: {TEXT}",
    ]


def test_without_an_arm_it_only_transcribes_and_what_is_not_there_is_one_line(served, capsys) -> None:
    run, audio = served
    assert steer(run, audio, "none", capsys).splitlines()[1] == f"0:30 (no speech: 0.01) {TEXT}"
    for given, said in ((["--steer", "magic"], "no such arm"), (["--model", "x"], "it has w")):
        arguments = {"--run": str(run), "--model": "w", "--audio": str(audio)} | dict([given])
        with pytest.raises(SystemExit, match=said):
            main(["transcribe", *(part for pair in arguments.items() for part in pair)])


def test_a_reference_tells_what_speech_without_texts_says(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.flac", np.sin(np.arange(RATE) / 9), RATE, subtype="PCM_16")
    row = {"id": "a", "path": tmp_path / "a.flac", "speaker": "s", "split": "val", "seconds": 1.0, "text": ""}
    write_csv(tmp_path / "m.csv", pd.DataFrame([row | {"sha256": file_sha256(tmp_path / "a.flac")}]))
    voices = [np.sin(np.arange(RATE) / 7).astype(np.float32)]
    with pytest.raises(EqknobsError, match=r"a of .* has no text; give texts, name a splicing\.reference"):
        speech(tmp_path / "m.csv", "val", RATE, voices, CFG)
    model = SimpleNamespace(sample_rate=RATE, transcribe=lambda wavs: [f" {len(wavs[0])} samples"])
    found = speech(tmp_path / "m.csv", "val", RATE, voices, CFG, model)
    assert [(clip.domain, clip.text) for clip in found] == [(d, "16000 samples") for d in ("clean", "quiet", "noisy")]
    model.transcribe = lambda wavs: [" "]
    with pytest.raises(EqknobsError, match="no words to the reference"):
        speech(tmp_path / "m.csv", "val", RATE, voices, CFG, model)


# --- checks


def config(**own) -> dict:
    section = {"models": ["w"], "sae": "topk", "layers": [1], "non_speech": ["music"], "counts": [4], "alphas": [1]}
    return {
        "models": {"w": {"kind": "whisper"}, "m": {"kind": "mimi"}},
        "data": {"source": "folder"},
        "run": {"targets": ["w.layer.1", "m.encoder"]},
        "corpora": {"music": {}, "mix": {"source": "union", "of": ["speech", "music"]}},
        "saes": {"topk": {"d_sae": 64, "corpus": "mix"}, "plain": {"d_sae": 64}},
        "hallucination": section | own,
    }


def test_models_that_the_run_does_not_open_are_passed_over() -> None:
    check(config())
    assert hallucinating(config()) == ["w"] and hallucinating(config(models=["x"])) == []
    check(config(models=["x"], sae="none"))
    check({**config(), "hallucination": None})


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"models": ["m"]}, "does not transcribe"),
        ({"sae": "none"}, "not under saes"),
        ({"sae": "plain"}, "no union of speech with music"),
        ({"layers": [2]}, "w.layer.2 is no target"),
        ({"non_speech": ["rain"]}, "rain"),
        ({"non_speech": ["speech"]}, "speech itself"),
        ({"counts": [1, 2, 3, 4, 5], "alphas": [1, 2, 3]}, "are 30 points, at most 24"),
        ({"counts": [65]}, "65 is more than the SAE has, 64"),
    ],
)
def test_what_it_names_must_be_there(own: dict, said: str) -> None:
    with pytest.raises(EqknobsError, match=said):
        check(config(**own))
