"""A speech LM's layers and heads: turns, probes in batches, rankings, SAEs' features."""

import json
import random
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sentencepiece
import soundfile as sf
import torch
import yaml
from sklearn.linear_model import LogisticRegression

import lm_heads
from eqknobs.config import validate
from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.io import file_sha256, read_csv
from eqknobs.models import load_model
from eqknobs.models.moshi.monologue import monologue
from eqknobs.stages.lm_layers import dictionaries, tables, turns
from eqknobs.stages.lm_layers.batched import scored, told_right
from eqknobs.stages.lm_layers.compute import Asked, LmLayersCfg, probe_layers
from eqknobs.stages.lm_layers.ranking import pruning_order, rank_heads
from eqknobs.stages.lm_layers.section import heatmap
from eqknobs.stages.probes.compute import LabelledFrames
from helpers import ROOT
from helpers.moshi_world import KYUTAI, write_codec, write_kyutai

SENTENCES = ["good morning jane", "the lazy dog", "the quick fox", "you help the bank", "the dog jumps", "good fox"] * 2
SPLITS = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
LABELS = {"crepe": "tiny", "periodicity": 0.5, "floor_db": 40, "fmin": 50, "fmax": 550, "n_mels": 16, "tokens": 4}
PROBED: LmLayersCfg = {"properties": ["centroid", "token", "who", "voice"], "bins": 4, "lags": [0, 1], "seed": 0}


def frames_of(count: int, splits: tuple[float, float] = (0.5, 0.25)) -> LabelledFrames:
    train, val = (round(share * count) for share in splits)
    split = np.array(["train"] * train + ["val"] * val + ["test"] * (count - train - val))
    return LabelledFrames(np.arange(count), np.zeros(count), split, np.zeros(count, int))


# --- probes in batches


def planted(count: int = 4000, groups: int = 5, width: int = 24, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [G, n, width] that tell classes the better the higher their number; dimensions are correlated."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=count)
    centres = rng.normal(size=(classes, width)) * np.linspace(0, 0.8, groups)[:, None, None]
    noise = rng.normal(size=(groups, count, width)) @ (
        np.eye(width) + 0.4 * rng.normal(size=(width, width)) / width**0.5
    )
    return (centres[:, labels] + noise).astype(np.float32), labels


def test_batched_probes_are_within_a_point_of_logistic_regression() -> None:
    x, labels = planted()
    frames = frames_of(len(labels))
    ours = told_right(torch.from_numpy(x), labels, labels, 6, frames)
    test = frames.split[scored(frames)] == "test"
    theirs = []
    for matrix in x:
        fit = LogisticRegression(C=1.0, max_iter=500).fit(matrix[frames.of("train")], labels[frames.of("train")])
        theirs.append(fit.score(matrix[frames.of("test")], labels[frames.of("test")]))
    accuracy = ours[:, test].mean(1)
    assert abs(accuracy.mean() - np.mean(theirs)) < 0.01 and np.abs(accuracy - theirs).max() < 0.025
    assert accuracy[0] < 0.21 and accuracy[-1] > 0.6 and (np.diff(accuracy) > 0).all()


def test_shuffled_labels_are_told_no_better_than_by_chance_and_a_class_that_train_lacks_is_never_told() -> None:
    x, labels = planted()
    frames, rng = frames_of(len(labels)), np.random.default_rng(1)
    assert told_right(torch.from_numpy(x[-1:]), rng.permutation(labels), labels, 6, frames).mean() < 0.22
    rare = labels.copy()
    rare[frames.of("test")[:50]] = 6
    found = told_right(torch.from_numpy(x), rare, rare, 7, frames)
    assert np.isfinite(found).all() and not found[:, rare[scored(frames)] == 6].any()


def test_what_is_chosen_is_chosen_on_val_alone() -> None:
    x, labels = planted(count=400)
    frames = frames_of(400)
    other = labels.copy()
    other[frames.of("test")] = (labels[frames.of("test")] + 1) % 6
    part = frames.split[scored(frames)] == "val"
    one, two = (told_right(torch.from_numpy(x), y, y, 6, frames)[:, part] for y in (labels, other))
    assert np.array_equal(one, two)


# --- turns


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Moshi, twelve clips with word times in two voices, and everything that the stage makes of them."""
    folder = tmp_path_factory.mktemp("lm")
    write_kyutai(folder / "model")
    write_codec(folder / "codec")
    rng, rows = np.random.default_rng(0), []
    for i, (text, split) in enumerate(zip(SENTENCES, SPLITS)):
        frames = [2 + 4 * place for place in range(len(text.split()) + 1)]
        envelope = np.repeat([0.0] * 2 + [1.0] * (frames[-1] - 2) + [0.0] * 3, 1920)
        sound = np.cumsum(rng.standard_normal(len(envelope))) if i % 2 else rng.standard_normal(len(envelope))
        wav = 0.2 * envelope * sound / np.abs(sound).max()
        sf.write(folder / f"{i}.wav", wav, 24000)
        (folder / f"{i}.json").write_text(json.dumps({"text": text, "frames": frames}))
        digest = file_sha256(folder / f"{i}.wav")
        rows.append([f"c{i:02d}", str(folder / f"{i}.wav"), f"v{i % 2}", split, digest, text])
    table = pd.DataFrame(rows, columns=["id", "path", "speaker", "split", "sha256", "text"])
    table.to_csv(folder / "manifest.csv", index=False)
    make(folder, folder)
    turns.label_turns(folder / "turns.csv", folder / "caches.json", folder / "labels.h5", LABELS)
    outs = [folder / f"run/scores/m.{part}.csv" for part in ("lm_layers", "lm_heads.clips", "lm_heads")]
    probe_layers(folder / "turns.csv", folder / "caches.json", folder / "labels.h5", *outs, PROBED)
    return folder


def config(folder: Path, **changes: object) -> dict:
    model = {"name": "m", "kind": "moshi", "path": f"{folder}/model", "codec": f"{folder}/codec", "device": "cpu"}
    return {"model": model, "asr": "none", "beam": 1, "lead": 1, "seed": 0, **changes}


def make(world: Path, out: Path, **changes: object) -> None:
    turns.cache_turns(world / "manifest.csv", out / "turns.csv", out / "caches.json", config(world, **changes))


def test_every_site_is_cached_of_both_streams_and_of_a_random_network(world: Path) -> None:
    index, table = turns.read_index(world / "caches.json"), read_csv(world / "turns.csv")
    assert set(index["caches"]["random"]) == {"residual.0", "residual.1", "residual.2"}
    assert set(index["caches"]["trained"]) == set(index["caches"]["random"]) | {"embeddings"} | {
        f"heads.{layer}" for layer in range(3)
    }
    assert list(table["id"][:2]) == ["c00.agent", "c00.user"] and len(table) == 2 * len(SENTENCES)
    model = load_model(config(world)["model"])
    wav = sf.read(world / "3.wav", dtype="float32")[0]
    codes, text = model.codes(wav), torch.tensor(index["tokens"]["c03.agent"]["written"])
    for site in ("embeddings", "residual.2", "heads.1"):
        with ActivationCache(index["caches"]["trained"][site]) as cache:
            starts = cache.utterances.set_index("id")["start"]
            for turn, said in (("c03.user", None), ("c03.agent", text)):
                expected = model.activations(model.turn(codes, turn.partition(".")[2], said), [site])[site]
                rows = slice(starts[turn], starts[turn] + len(expected))
                np.testing.assert_allclose(cache.acts[rows], expected, atol=1e-5)
    random_h5, trained_h5 = (index["caches"][network]["residual.2"] for network in ("random", "trained"))
    with ActivationCache(random_h5) as other, ActivationCache(trained_h5) as cache:
        assert other.acts.shape == cache.acts.shape
        assert abs(np.corrcoef(other.acts.ravel(), cache.acts.ravel())[0, 1]) < 0.2


def test_a_pass_that_was_interrupted_goes_on_and_ends_alike(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run = [], turns.Moshi.activations

    def stopping(model, grid, sites):
        calls.append(len(sites))
        if len(calls) == 30:  # of 24 turns and two networks
            raise KeyboardInterrupt
        return run(model, grid, sites)

    monkeypatch.setattr(turns.Moshi, "activations", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(world, tmp_path)
    assert not (tmp_path / "caches.json").exists()
    make(world, tmp_path)
    assert len(calls) == 30 + 24 - 5  # the call that was interrupted is made again, the 29 before are not
    for name in ("trained.embeddings", "trained.heads.2", "random.residual.1"):
        assert (tmp_path / f"caches/{name}.h5").read_bytes() == (world / f"caches/{name}.h5").read_bytes(), name


def test_a_budget_keeps_the_same_frames_of_both_turns_of_a_clip(world: Path, tmp_path: Path) -> None:
    make(world, tmp_path, frames=24 * 16)
    with ActivationCache(tmp_path / "caches/trained.heads.0.h5") as cache:
        table = cache.utterances
        assert table["frames"].sum() <= 24 * 16 and (table["frames"] < table["clip_frames"]).any()
        firsts = table.assign(clip=table["id"].str[:3]).groupby("clip")["first"].nunique()
        assert (firsts == 1).all()
    turns.label_turns(tmp_path / "turns.csv", tmp_path / "caches.json", tmp_path / "labels.h5", LABELS)
    with h5py.File(tmp_path / "labels.h5") as some, h5py.File(world / "labels.h5") as whole:
        ids, starts = whole["utterances/id"].asstr()[:].tolist(), whole["utterances/start"][:]
        for row in table.itertuples():
            kept = slice(row.start, row.start + row.frames)
            begin = starts[ids.index(row.id)] + row.first
            for name in ("who", "written", "centroid"):
                np.testing.assert_array_equal(some[name][kept], whole[name][begin : begin + row.frames])


def test_labels_say_which_token_sounds_who_speaks_and_where_text_is_written(world: Path) -> None:
    tokeniser = sentencepiece.SentencePieceProcessor(model_file=str(next((world / "model").glob("tokenizer*"))))
    with h5py.File(world / "labels.h5") as file:
        names, token = list(file["token"].attrs["names"]), file["token"][:]
        ids, starts, frames = (file[f"utterances/{k}"][:] for k in ("id", "start", "frames"))
        who, written, energetic = file["who"][:], file["written"][:], file["energetic"][:]
        for turn, start, count in zip(ids.astype(str), starts, frames):
            rows, text = slice(start, start + count), SENTENCES[int(turn[1:3])]
            sounding = [None] * count
            for i, word in enumerate(text.split()):
                pieces = tokeniser.encode(word, out_type=str)
                for place in range(4):
                    sounding[2 + 4 * i + place] = pieces[int((place + 0.5) / 4 * len(pieces))]
            expected = [names.index(piece) if piece in names else -1 for piece in sounding]
            assert token[rows].tolist() == expected
            speaks = ("user", "agent").index(turn.partition(".")[2])
            assert who[rows].tolist() == [speaks if loud else 2 for loud in energetic[rows]]
            assert written[rows].any() == turn.endswith("agent")
    assert 2 <= len(names) <= LABELS["tokens"]
    assert {0, 1, 2} == set(who)


def test_the_monologue_of_words_of_one_token_is_the_one_that_training_writes() -> None:
    """As tiny-moshi was trained: word i at its start or, if that is taken, as soon as possible, EPAD before it."""
    pad, epad, rng = KYUTAI.pad, KYUTAI.epad, random.Random(0)
    for _ in range(20):
        words, starts = rng.sample(range(4, 90), 6), sorted(rng.choices(range(-1, 30), k=6))
        expected, at = [pad] * 40, -1
        for token, start in zip(words, starts):
            at = max(at + 1, start)
            expected[at] = token
            if at and expected[at - 1] == pad:
                expected[at - 1] = epad
        assert monologue([[word] for word in words], starts, 40, KYUTAI).tolist() == expected


def test_word_times_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "two words", "frames": [1, 2]}')
    clips = pd.DataFrame({"id": ["a"], "path": [f"{tmp_path}/a.wav"]})
    with pytest.raises(EqknobsError, match="2 words, 2 frames"):
        turns.word_times(clips, config(tmp_path))


# --- layers and heads


def test_counts_are_of_the_frames_that_carry_the_property(world: Path) -> None:
    rows = read_csv(world / "run/scores/m.lm_layers.csv")
    assert set(zip(rows["property"], rows["stream"])) == {
        (name, stream) for name in ("centroid", "token", "voice") for stream in ("user", "agent")
    } | {("who", "both")}
    assert set(rows[rows["property"] == "voice"]["lag"]) == {0} and set(rows["split"]) == {"val", "test"}
    told = [c for c in rows if c in ("majority", "logmel", "embeddings") or "residual" in c]
    assert (rows[told].le(rows["frames"], axis=0)).all().all() and len(told) == 3 + 3 + 3
    who = rows[(rows["property"] == "who") & (rows["labels"] == "true") & (rows["lag"] == 0)]
    assert who["residual.2"].sum() > 1.3 * who["majority"].sum()  # the streams have embeddings of their own
    voice = rows[(rows["property"] == "voice") & (rows["labels"] == "true")]
    assert voice["logmel"].sum() > 0.95 * voice["frames"].sum()


def test_a_lag_pairs_an_activation_with_what_comes_later() -> None:
    labels = np.random.default_rng(0).integers(4, size=604)
    matrix = np.zeros((1, 604, 4), np.float32)
    matrix[0, np.arange(602), labels[2:]] = 1  # frame t knows the label of frame t + 2
    frames = frames_of(600)
    frames = LabelledFrames(frames.rows + 2, frames.values, frames.split, frames.utterance)
    asked = Asked("agent", "token", frames, labels[2:602], labels[2:602], 4, [0, 2])
    asked.fit(["m"], torch.from_numpy(matrix), [0, 2])
    assert asked.right["true", 2, "m"].all() and asked.right["true", 0, "m"].mean() < 0.4


def test_pruning_reads_the_agents_heads_on_val(world: Path) -> None:
    order, clips = read_csv(world / "run/scores/m.lm_heads.csv"), read_csv(world / "run/scores/m.lm_heads.clips.csv")
    assert list(order) == "layer head property accuracy selectivity half_a half_b".split()
    assert len(order) == 2 * 3 * 4 and set(order["property"]) == {"centroid", "token"}
    val = clips[(clips["split"] == "val") & (clips["stream"] == "agent") & (clips["labels"] == "true")]
    for row in order.itertuples():
        mine = val[val["property"] == row.property]
        for half, found in (("all", row.accuracy), ("a", row.half_a), ("b", row.half_b)):
            part = mine[mine["half"] == half]
            assert found == pytest.approx(part[f"{row.layer}.{row.head}"].sum() / part["frames"].sum())
    ids = {half: set(val[val["half"] == half]["id"]) for half in ("all", "a", "b")}
    assert ids["a"] | ids["b"] == ids["all"] and not ids["a"] & ids["b"]


def test_selectivity_is_acoustic_less_semantic_each_over_its_majority() -> None:
    about = {"stream": "agent", "split": "val", "lag": 0, "id": "x", "speaker": "s", "frames": 100}
    rows = [
        {**about, "property": name, "labels": labels, "half": half, "majority": majority, "0.0": right, "0.1": 10}
        for name, majority, right in (("centroid", 20, 60), ("token", 50, 75))
        for labels, half in (("true", "all"), ("true", "a"), ("true", "b"), ("shuffled", "all"))
    ]
    found = rank_heads(pd.DataFrame(rows)).set_index(["property", "head"])
    assert found.loc[("centroid", 0), "selectivity"] == pytest.approx(0.4 / 0.8 - 0.25 / 0.5)
    assert found.loc[("token", 1), "selectivity"] == pytest.approx(-0.1 / 0.8 + 0.4 / 0.5)
    assert len(pruning_order(pd.DataFrame(rows))) == 4


def test_rank_correlation_tells_heads_that_differ_from_heads_that_do_not() -> None:
    rng = np.random.default_rng(0)
    for spread, low in ((0.3, True), (0.0, False)):
        rows = []
        for half in ("a", "b"):
            for i in range(20):
                right = rng.binomial(40, 0.4 + spread * np.linspace(-1, 1, 12))
                rows.append({"id": f"{half}{i}", "speaker": f"s{i % 4}", "half": half, "frames": 40, "labels": "true"})
                rows[-1] |= {f"0.{head}": count for head, count in enumerate(right)}
        clips = pd.DataFrame(rows).assign(stream="agent", property="centroid", split="val")
        (found,) = tables._spearman(Context("m", None, {"bootstrap": 200, "seed": 0}, {}), clips)
        assert (found["spearman_low"] > 0.8) == low and found["heads"] == 12 and found["clips"] == 40


# --- SAEs


def test_features_are_tagged_by_the_frames_in_which_they_are_largest() -> None:
    table = pd.DataFrame({"split": ["train", "train"], "frames": [40, 60]})
    kinds = np.array([0] * 40 + [1] * 30 + [2] * 30)  # user; agent; text
    code = np.zeros((100, 5), np.float32)
    code[:30, 0] = 1 + np.arange(30)
    code[:, 0] += 0.1  # everywhere a little, largest in what is heard
    code[45:65, 1], code[75:95, 2] = 1, 1
    code[30:50, 3] = 1  # half heard, half said
    found = dictionaries._features(scipy.sparse.csr_array(code), table, kinds).set_index("feature")
    assert found["tag"].to_dict() == {0: "user", 1: "agent", 2: "text", 3: "mixed"}  # 4 never fires
    assert found.loc[3, "user_share"] == 0.5 and found.loc[1, "fired"] == pytest.approx(0.2)


def test_saes_of_layers_and_all_tables(world: Path) -> None:
    sae = {"layers": [1], "d_sae": 32, "k": 4, "aux_k": 8, "lr": 0.002, "batch_size": 64, "epochs": 2}
    cfg = {"sae": sae, "bins": 4, "l2": [0.01], "epochs": 2, "seed": 0}
    files = [world / f"run/scores/m.{part}.csv" for part in ("lm_saes", "lm_features")]
    inputs = (world / "turns.csv", world / "caches.json", world / "labels.h5", world / "saes")
    dictionaries.train_dictionaries(*inputs, *files, cfg)
    assert (world / "saes/residual.1/sae.safetensors").is_file()
    at = Context("m", Inputs.below(world / "run"), {"bootstrap": 50, "seed": 0}, {})
    found = tables.tabulate(at)
    assert {name: " ".join(rows) for name, rows in found.tables.items()} == tables.COLUMNS
    saes = found.tables["lm_saes"]
    assert set(saes["space"]) == {"sae", "random"} and set(saes["stream"]) == {"user", "agent"}
    assert (saes[["user_tagged", "agent_tagged", "text_tagged", "mixed"]].sum(axis=1) - 1).abs().max() < 1e-9
    layers = found.tables["lm_layers"]
    measured = ["accuracy", "majority", "shuffled", "logmel", "embeddings", "random_network"]
    assert layers[measured].notna().all().all() and set(layers["layer"]) == {0, 1, 2}
    compared = [record | {"p_holm": 0.5, "compared": 2} for record in found.comparisons]
    facts = json.loads(json.dumps(found.facts)) | {"comparisons": compared}
    lines = tables.findings(at, facts)
    assert {line["topic"] for line in lines} == {"lm_layers", "lm_heads", "lm_saes"}


def test_the_benchmark_runs_and_the_committed_one_is_fifty_times_as_fast(world: Path, tmp_path: Path) -> None:
    lm_heads.main([str(world), "--quick", "--out", str(tmp_path / "out.csv")])
    found, committed = pd.read_csv(tmp_path / "out.csv"), pd.read_csv(ROOT / "benchmarks/results/lm_heads.csv")
    assert list(found) == list(committed) and list(found["case"]) == list(committed["case"])
    ours = committed[committed["heads"] == 48]
    assert (ours["ratio"] >= 50).all() and len(ours) == 4
    told = ours[ours["case"].str.startswith("agent")]  # neither reads much of the user's stream
    assert (told["difference"].abs() <= 0.01).all() and len(told) == 2


# --- page and configuration


def test_a_heat_map_tells_its_values_where_one_points() -> None:
    rows = pd.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 1], "accuracy": [0.1, 0.2, 0.35]})
    drawn = heatmap("Heads", "caption", rows, "accuracy")["svg"]
    assert drawn.count("<rect ") == 3 and "<title>layer 1, head 1: 0.350</title>" in drawn
    assert 'fill-opacity="1.000"' in drawn and 'fill-opacity="0.060"' in drawn


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ["tiny-mimi"]}, "is of kind mimi, not moshi"),
        ({"models": ["nobody"]}, "not under models"),
        ({"corpus": "nowhere"}, "names the corpus 'nowhere'"),
        ({"properties": ["centroid", "rms"]}, "must hold 'token'"),
        ({"properties": ["centroid", "token", "loudness"]}, "'loudness' is not one of"),
        ({"corpus": "speech"}, "'voice' asks who speaks"),
        ({"lags": [1]}, "lm_layers.lags: must hold 0"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(change: dict, said: str) -> None:
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    default["lm_layers"] |= change
    with pytest.raises(EqknobsError) as caught:
        validate(default)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_sae_of_a_layer_that_is_not_there_is_refused() -> None:
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    default["lm_layers"]["sae"]["layers"] = [6]
    with pytest.raises(EqknobsError, match="has layers 0 to 5, not 6"):
        validate(default)
