"""Rendering conditions, and the codec's round trips."""

import h5py
import numpy as np
import pandas as pd
import pytest

from eqknobs.audio import read_audio
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE
from eqknobs.sound import renders
from eqknobs.sound.renders import Condition, load_clip, open_codec, pick_clips, render_conditions
from eqknobs.stages.codec.compute import render_codec
from helpers.tiny_world import RATE, SITE, make_world

METRICS = "centroid_hz centroid_original_hz centroid_correlation_frame loudness_db loudness_change_db".split()
METRICS += ["f0_error_cents", "mel_distance", "latent_sq_error", "latent_sq_total"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def render(world, folder, conditions, **kwargs):
    """Signal scores and index of some conditions on the test clips."""
    with world.open() as cache, open_codec(world.cfg, cache) as model:
        render_conditions(
            model, world.cfg, world.clips("test"), cache, conditions, folder / "out", folder / "signal.csv", **kwargs
        )
    return read_csv(folder / "signal.csv"), read_csv(folder / "out/index.csv")


def test_clips_take_speakers_in_turn():
    manifest = pd.DataFrame({"id": ["x3", "x1", "x2", "y1", "z1"], "speaker": list("xxxyz"), "split": "test"})
    assert pick_clips(manifest, "test", 4)["id"].tolist() == ["x1", "y1", "z1", "x2"]
    assert len(pick_clips(manifest, "test", 99)) == 5
    with pytest.raises(EqknobsError, match="no utterance in split val"):
        pick_clips(manifest, "val", 1)


def test_untouched_clip_scores_as_identical(world, tmp_path):
    signal, _ = render(world, tmp_path, [Condition("original", {"path": "original"}, codec=False)])
    assert (signal["mel_distance"] == 0).all() and (signal["latent_sq_error"] == 0).all()
    assert (signal["loudness_change_db"] == 0).all()
    assert (signal["centroid_hz"] == signal["centroid_original_hz"]).all()
    np.testing.assert_allclose(signal["centroid_correlation_frame"], 1)


def test_round_trip_is_the_models_own(world, tmp_path):
    conditions = [Condition(f"q{count}", {}, codebooks=count, keep=True) for count in (None, 4)]
    render(world, tmp_path, conditions)
    model = world.model()
    for row in world.clips("test").itertuples():
        wav = read_audio(row.path, RATE)
        acts = model.encode(wav, SITE)
        for count in (None, 4):
            expected = model.decode(acts, SITE, len(wav), count)
            found = read_audio(tmp_path / f"out/q{count}/{row.id}.flac", RATE)
            assert np.abs(expected).max() > 0.01
            np.testing.assert_allclose(found, np.clip(expected, -1, 1), atol=1 / 32768)


def test_files_and_columns(world, tmp_path):
    def half(acts):
        return acts / 2

    conditions = [
        Condition("all", {"arm": "a", "alpha": 1.5}, keep=True, pitch=True),
        Condition("first", {"arm": "b"}, edit=half, listen=1),
    ]
    signal, index = render(world, tmp_path, conditions)
    assert list(signal) == ["id", "speaker", "split", "condition", "arm", "alpha", "seconds", *METRICS]
    assert len(signal) == 2 * 4 and (signal["split"] == "test").all()
    assert list(index) == ["id", "condition", "file", "judged", "arm", "alpha"]
    assert index.groupby("condition")["id"].count().to_dict() == {"all": 4, "first": 1}
    assert index["judged"].tolist() == (index["condition"] == "all").tolist()
    assert all((tmp_path / "out" / file).is_file() for file in index["file"])
    assert signal[signal["condition"] == "first"]["f0_error_cents"].isna().all()
    wav = read_audio(world.clips("test")["path"].iloc[0], RATE)
    assert signal["seconds"].iloc[0] == pytest.approx(len(wav) / RATE)


def test_latent_error_of_the_mean_is_one(world, tmp_path):
    with world.open() as cache:
        mean = cache.mean
    edit = Condition("mean", {}, edit=lambda acts: np.broadcast_to(mean, acts.shape).astype(np.float32))
    signal, _ = render(world, tmp_path, [edit])
    np.testing.assert_allclose(signal["latent_sq_error"], signal["latent_sq_total"], rtol=1e-5)


def test_filter_acts_on_sound_before_the_codec(world, tmp_path):
    seen = []

    def louder(wav, rate):
        seen.append((len(wav), rate))
        return 2 * wav

    render(world, tmp_path, [Condition("loud", {}, wav_filter=louder, keep=True)])
    model, row = world.model(), next(world.clips("test").itertuples())
    wav = read_audio(row.path, RATE)
    expected = model.decode(model.encode(2 * wav, SITE), SITE, len(wav))
    found = read_audio(tmp_path / f"out/loud/{row.id}.flac", RATE)
    np.testing.assert_allclose(found, np.clip(expected, -1, 1), atol=1 / 32768)
    assert seen[0] == (len(wav), RATE)


def test_equal_edits_are_decoded_once(world, tmp_path, monkeypatch):
    calls = []
    measure = renders.signal_metrics
    monkeypatch.setattr(renders, "signal_metrics", lambda *a: calls.append(1) or measure(*a))
    signal, _ = render(world, tmp_path, [Condition("plain", {}), Condition("zero", {}, edit=lambda acts: acts + 0)])
    assert len(calls) == 4
    plain, zero = (signal[signal["condition"] == key].reset_index() for key in ("plain", "zero"))
    assert (plain["mel_distance"] == zero["mel_distance"]).all()


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([Condition("bad", {}, edit=lambda acts: acts * np.nan)], "condition bad.*not finite"),
        ([Condition("twice", {}), Condition("twice", {})], "twice.*unique"),
        ([Condition("many", {}, codebooks=5)], "codebooks"),
    ],
)
def test_bad_conditions_leave_nothing(world, tmp_path, conditions, message):
    with pytest.raises(EqknobsError, match=message):
        render(world, tmp_path, conditions)
    assert list(tmp_path.iterdir()) == []


def test_cache_of_another_model_is_refused(world, tmp_path):
    copy = tmp_path / "cache.h5"
    copy.write_bytes(world.cache.read_bytes())
    with h5py.File(copy, "r+") as file:
        file.attrs["revision"] = "other"
    with (
        pytest.raises(EqknobsError, match=r"revision other.*make it again"),
        renders.ActivationCache(copy) as cache,
        open_codec(world.cfg, cache),
    ):
        pass


def test_changed_audio_is_refused(world, tmp_path):
    clips = world.clips("test")
    swapped = clips.assign(path=clips["path"].to_list()[::-1])
    drawn_again = swapped.assign(sha256=clips["sha256"].to_list()[::-1])
    for table, said in ((swapped, "changed since the manifest was drawn"), (drawn_again, "not what the cache holds")):
        with world.open() as cache, open_codec(world.cfg, cache) as model, pytest.raises(EqknobsError, match=said):
            render_conditions(model, world.cfg, table, cache, [Condition("x", {})], tmp_path / "o", tmp_path / "s.csv")


def test_codec_stage(world, tmp_path):
    cfg = {**world.cfg, "codebooks": [4, 1], "clips": 3, "listen": 1}
    render_codec(world.manifest, world.cache, world.saes, tmp_path / "codec", tmp_path / "signal.csv", cfg)
    signal, index = read_csv(tmp_path / "signal.csv"), read_csv(tmp_path / "codec/index.csv")
    paths = signal[["path", "codebooks"]].drop_duplicates().fillna(0).values.tolist()
    assert paths == [["original", 0], ["unquantized", 0], ["quantized", 4], ["quantized", 1], ["sae", 4]]
    assert len(signal) == len(index) == 6 * 3 and index["judged"].all()
    distance = signal.groupby("condition")["mel_distance"].mean()
    assert distance["original"] == 0 and (distance.drop("original") > 0).all()
    assert distance["unquantized"] != distance["quantized-4"] != distance["quantized-1"]
    error = signal.groupby("condition")["latent_sq_error"].max()
    assert (error[["original", "unquantized", "quantized-4"]] == 0).all()  # quantising comes after the site
    spliced = signal[signal["path"] == "sae"]
    assert sorted(spliced["sae"].unique()) == ["rms_l1", "topk"] and (spliced["latent_sq_error"] > 0).all()
    with world.open() as cache, open_codec(world.cfg, cache) as model:
        row = pick_clips(read_csv(world.manifest), "test", 1).iloc[0]
        acts = load_clip(model, cache, row).acts
        sae = SAE.load(world.saes["topk"])
        before, after = (model.tokens(a, SITE, 4) for a in (acts, sae(acts)))
    scored = spliced[(spliced["id"] == row["id"]) & (spliced["sae"] == "topk")].iloc[0]
    assert scored["tokens"] == before.size and scored["tokens_flipped"] == (before != after).sum() > 0
    assert signal.loc[signal["path"] != "sae", "tokens"].isna().all()


def test_ids_that_differ_in_special_characters_get_files_of_their_own(world, tmp_path, monkeypatch):
    ids, load = iter(["C# minor", "C minor", "c-minor", *map(str, range(99))]), renders.load_clip
    monkeypatch.setattr(renders, "load_clip", lambda *args: load(*args))
    clips = world.clips("test").head(3)
    names = {row.id: next(ids) for row in clips.itertuples()}
    back = {new: old for old, new in names.items()}
    renamed = clips.assign(id=clips["id"].map(names))
    monkeypatch.setattr(
        renders, "load_clip", lambda model, cache, row: load(model, cache, row._replace(id=back[row.id]))
    )
    with world.open() as cache, open_codec(world.cfg, cache) as model:
        files = (tmp_path / "out", tmp_path / "signal.csv")
        render_conditions(model, world.cfg, renamed, cache, [Condition("x", {}, codec=False, keep=True)], *files)
    index = read_csv(tmp_path / "out/index.csv")
    assert index["file"].str.lower().nunique() == len(clips) > 1
    for row, clip in zip(index.itertuples(), clips.itertuples()):
        np.testing.assert_allclose(
            read_audio(tmp_path / "out" / row.file, RATE), read_audio(clip.path, RATE), atol=1e-4
        )


def test_only_what_is_new_is_decoded_and_measured(world, tmp_path, monkeypatch):
    """A FLAC of the last time is taken if it is that sound, and a broken piece is made anew."""
    measured, decoded, measure = [], [], renders.signal_metrics
    monkeypatch.setattr(renders, "signal_metrics", lambda *args: measured.append(1) or measure(*args))

    def run(*alphas, codebooks=4):
        measured.clear(), decoded.clear()
        conditions = [
            Condition(
                f"a{a}", {"alpha": a}, edit=lambda x, a=a: x * (1 + a), codebooks=codebooks, keep=True, tokens=True
            )
            for a in alphas
        ]
        with world.open() as cache, open_codec(world.cfg, cache) as model:
            decode = model.decode
            monkeypatch.setattr(model, "decode", lambda *args: decoded.append(1) or decode(*args))
            kept = renders.render_pieces(Pieces(tmp_path / "pieces"), model, world.cfg)
            files = (tmp_path / "out", tmp_path / "signal.csv")
            render_conditions(model, world.cfg, world.clips("test"), cache, conditions, *files, pieces=kept)
        made = {f.relative_to(tmp_path): f.read_bytes() for f in sorted((tmp_path / "out").rglob("*.*"))}
        return {**made, "signal": files[1].read_bytes()}, len(measured), len(decoded)

    first, *counts = run(0, 1)
    assert counts == [8, 8]
    assert run(0, 1) == (first, 0, 0)
    assert run(0, 1, 2)[1:] == (4, 4)
    assert run(0, 1, codebooks=2)[1:] == (8, 8)
    # The sounds are those of other codebooks now: they are decoded again, not measured.
    assert run(0, 1) == (first, 0, 8)
    next((tmp_path / "out/a1").iterdir()).unlink()
    assert run(0, 1) == (first, 0, 1)
    packs = [f for f in (tmp_path / "pieces").rglob("*.json")]
    assert len(packs) == 4
    packs[0].write_text("{")
    assert run(0, 1) == (first, 2, 2)


def test_shards_leave_what_the_whole_job_then_finds(world, tmp_path, monkeypatch):
    """The same files, nothing decoded twice and no sound copied, also of two clips with one name."""
    conditions = [
        Condition(f"a{a}", {"alpha": a}, edit=lambda x, a=a: x * (1 + a), codebooks=4, tokens=True, **kept)
        for a, kept in ((0, {"keep": True}), (1, {"listen": 3}), (2, {}))
    ]

    def run(folder, *shards):
        decoded = []
        with world.open() as cache, open_codec(world.cfg, cache) as model:
            decode = model.decode
            monkeypatch.setattr(model, "decode", lambda *args: decoded.append(1) or decode(*args))
            kept = renders.render_pieces(Pieces(folder / "pieces"), model, world.cfg)
            for shard in shards:
                cfg, files = world.cfg | ({"shard": shard} if shard else {}), (folder / "out", folder / "signal.csv")
                render_conditions(model, cfg, world.clips("test"), cache, conditions, *files, pieces=kept)
        return len(decoded)

    whole = run(tmp_path / "whole", None)
    assert run(tmp_path / "split", (2, 3), (0, 3), (1, 3)) == whole and not (tmp_path / "split/out").exists()
    assert run(tmp_path / "split", None) == 0
    for name in (
        "signal.csv",
        *(f"out/{file}" for file in ["index.csv", *read_csv(tmp_path / "whole/out/index.csv")["file"]]),
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "split" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "split").iterdir()) == ["out", "pieces", "signal.csv"]
