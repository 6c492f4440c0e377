"""Steering a speech LM: directions that were planted, α that is found, what is said then, what tables make of it."""

import copy
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from eqknobs.config import merge
from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.io import file_sha256, read_csv, read_json
from eqknobs.models.mimi import Mimi
from eqknobs.models.moshi.checkpoint import save_net
from eqknobs.models.moshi.config import MoshiConfig
from eqknobs.pieces import Pieces
from eqknobs.report.tables import write_tables
from eqknobs.sae import train_sae
from eqknobs.schema import schema
from eqknobs.sound.judges import Transcriber
from eqknobs.speaking.clips import sounds, write_tokeniser
from eqknobs.speaking.grammar import drawn, part_of
from eqknobs.stages.lm_layers import turns
from eqknobs.stages.lm_steering import compute
from eqknobs.stages.lm_steering.checks import check
from eqknobs.stages.lm_steering.compute import (
    Condition,
    Found,
    PromptsCfg,
    RandomCfg,
    SteeringCfg,
    closest,
    next_alpha,
    pushed,
    shifts_of,
    solve,
    steer_and_score,
)
from eqknobs.stages.lm_steering.compute import (
    Inputs as Files,
)
from eqknobs.stages.lm_steering.directions import Files as Sources
from eqknobs.stages.lm_steering.directions import find, two_voices
from eqknobs.stages.lm_steering.section import show
from eqknobs.stages.lm_steering.tables import compared, findings, tabulate, with_shifts
from eqknobs.stages.speech_lm_training.training import TOKENISER, new_net
from helpers import ROOT
from helpers.speech_lm_world import CODEC, SIZES, write_speech

LAYER, SPLITS = 1, ["train", "train", "val", "test"]
CFG = {"bootstrap": 50, "seed": 0, "unmeasurable_wer": 99}  # an untrained model is not understood
LABELS = {"crepe": "tiny", "periodicity": 0.1, "floor_db": 40, "fmin": 50, "fmax": 550, "n_mels": 16, "tokens": 4}
FOUND = {"directions": ["probe", "difference_in_means", "sae_probe", "sae_feature"], "bins": 3, "lag": 1}
FOUND |= {"l2": [0.01], "epochs": 5, "seed": 0}
RAW = ("lm_steering_calibration", "lm_steered_answers")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two voices, an untrained model, its caches and labels, and an SAE."""
    root = tmp_path_factory.mktemp("steering")
    clips = sorted(write_speech(root / "speech").glob("*/*.flac"))
    (root / "model").mkdir()
    codec = Mimi({"name": "codec", "kind": "mimi", "path": str(CODEC), "device": "cpu"})
    write_tokeniser(root / TOKENISER)
    shape = SIZES | {"text_card": 136, "card": codec.config.codebook_size}
    save_net(new_net(MoshiConfig(**shape, **sounds(codec, 8)), 0), root / "model", root / TOKENISER, str(CODEC))
    rows = [(f"{p.parent.name}-{p.stem}", str(p), p.parent.name, file_sha256(p), p.stat().st_size) for p in clips]
    table = pd.DataFrame(rows, columns=["id", "path", "speaker", "sha256", "seconds"]).assign(text="")
    table["split"] = [SPLITS[i % len(SPLITS)] for i in table.groupby("speaker").cumcount()]
    table.to_csv(root / "manifest.csv", index=False)
    made = {"model": model_of(root), "asr": "none", "beam": 1, "lead": 1, "seed": 0}
    turns.cache_turns(root / "manifest.csv", root / "turns.csv", root / "caches.json", made)
    turns.label_turns(root / "turns.csv", root / "caches.json", root / "labels.h5", LABELS)
    sae = {"variant": "topk", "d_sae": 64, "k": 8, "aux_k": 16, "dead_epochs": 2, "lr": 0.002, "batch_size": 64}
    for layer in (0, LAYER):
        train_sae(cache_of(root, layer), root / f"saes/residual.{layer}", sae | {"epochs": 3}, 0, "cpu")
    return root


def model_of(world: Path) -> dict:
    return {"name": "tones", "kind": "moshi", "path": str(world / "model"), "device": "cpu"}


def cache_of(world: Path, layer: int = LAYER) -> str:
    return turns.read_index(world / "caches.json")["caches"]["trained"][f"residual.{layer}"]


def sources(world: Path, **changes: object) -> Sources:
    named = {"turns": world / "turns.csv", "labels": world / "labels.h5", "cache": cache_of(world)}
    return Sources(**{k: str(v) for k, v in named.items()}, sae=world / f"saes/residual.{LAYER}")


def config(world: Path) -> SteeringCfg:
    return {
        **FOUND,
        "directions": ["difference_in_means", "sae_probe"],
        "model": model_of(world),
        "prompts": {"source": "sentences", "sentences": str(world / "speech"), "val": 2, "test": 3},
        "layers": [0, LAYER],
        "shifts": {"rms": -2.0, "voice": 0.01},
        "alphas": [0.5, 1.0],
        "rounds": 0,
        "tolerance": 0.1,
        "multiples": [2.0],
        "random": {"seeds": 2, "beside": ["sae_probe"]},
        "periodicity": 0.3,
        "draws": 1,
        "batch": 4,
        "temperature": 0.5,
        "listen": 1,
        "judges": {"asr": "tiny.en", "beam": 1},
    }


def run(world: Path, folder: Path, pieces: Pieces) -> Path:
    calibration, answers = (str(folder / f"scores/tones.{name}.csv") for name in RAW)
    out = {"calibration": calibration, "answers": answers, "sounds": str(folder / "renders/tones/steered")}
    given = {name: str(world / file) for name, file in (("turns", "turns.csv"), ("index", "caches.json"))}
    more = {"labels": str(world / "labels.h5"), "saes": world / "saes", "manifest": None, "codes": world / "codes.npz"}
    steer_and_score(config(world), Files(**given, **more), out, pieces)
    return folder


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:  # of noise the recogniser makes up words, slowly
        patch.setattr(Transcriber, "transcribe", lambda _self, wav: f"the {'garden ' * (len(wav) % 3)}")
        return run(world, folder / "run", Pieces(folder / "pieces"))


def context(finished: Path, **cfg: object) -> Context:
    return Context("tones", Inputs.below(finished), {**CFG, **cfg}, {"targets": ["tones"]})


# --- α


def test_alpha_is_where_the_shift_is_met_or_what_comes_closest() -> None:
    found = solve(lambda alpha: alpha / 0.7, [0.25, 0.5, 1.0], 3, 0.02)
    assert found.reached and found.alpha == pytest.approx(0.7, rel=0.02)
    assert solve(lambda alpha: 0.4 * alpha, [0.5, 1.0], 3, 0.1) == Found(1.0, 0.4, False)
    assert solve(lambda alpha: -alpha, [0.5, 1.0], 3, 0.1) == Found(0.5, -0.5, False)
    assert solve(lambda alpha: 0.0 if alpha < 0.9 else 9.0, [0.5, 1.0], 2, 0.1).reached is False
    tried: list[float] = []
    solve(lambda alpha: tried.append(alpha) or 1.0, [0.1, 1.0], 3, 0.1)
    assert tried == [0.1]  # nothing beyond the shift is tried


def test_what_cannot_be_measured_counts_as_beyond_the_shift() -> None:
    broken = {0.5: 0.2, 1.0: float("nan")}
    assert next_alpha(broken) == 0.75 and closest(broken, 0.1) == Found(0.5, 0.2, False)
    assert np.isnan(closest({1.0: float("nan")}, 0.1).share)
    assert solve(lambda alpha: np.nan if alpha > 0.65 else alpha, [0.4, 0.8], 1, 0.5).reached


def test_shifts_are_in_semitones_decibels_and_similarity() -> None:
    assert shifts_of("pitch", [200, 100], [100, 200]) == pytest.approx([12, -12])
    assert shifts_of("rms", [-20, np.nan], [-23, -23])[0] == 3 and np.isnan(shifts_of("rms", [np.nan], [1])[0])


# --- directions


def test_directions_are_the_ones_that_were_planted(world: Path, tmp_path: Path) -> None:
    """A dimension of the layer is what is labelled one frame later, times ten."""
    with ActivationCache(cache_of(world)) as cache:
        acts, std = np.array(cache.acts), cache.std
    with h5py.File(world / "labels.h5") as file, h5py.File(tmp_path / "labels.h5", "w") as other:
        for name in file:
            file.copy(name, other)
        del other["rms"]
        other["rms"] = np.roll(10 * acts[:, 3], 1).astype(np.float32)
        other["energetic"][:] = True
    place = Sources(str(world / "turns.csv"), str(tmp_path / "labels.h5"), cache_of(world), sources(world).sae)
    steps = find(place, "rms", {**FOUND, "epochs": 40}, random=2)
    assert set(steps) == {*FOUND["directions"], "random:0", "random:1"}
    for name in ("probe", "difference_in_means"):
        share = np.abs(steps[name] / std)
        assert share.argmax() == 3 and steps[name][3] > 0, name
    for step in steps.values():  # all of one length in standard deviations
        assert np.linalg.norm(step / std) == pytest.approx(np.sqrt(len(std)), rel=1e-4)
    assert abs(np.corrcoef(steps["random:0"], steps["random:1"])[0, 1]) < 0.6


def test_one_sae_feature_is_a_row_of_the_decoder(world: Path) -> None:
    from eqknobs.sae import SAE

    sae, steps = SAE.load(world / f"saes/residual.{LAYER}"), find(sources(world), "voice", FOUND, random=0)
    rows = (sae.W_dec * sae.std).numpy()
    alike = rows @ steps["sae_feature"] / np.linalg.norm(rows, axis=1) / np.linalg.norm(steps["sae_feature"])
    assert np.abs(alike).max() == pytest.approx(1, abs=1e-4)


def test_voices_are_the_two_who_say_most_of_train_and_something_of_test() -> None:
    rows = [("a", "train", 9.0), ("b", "train", 5.0), ("b", "test", 1.0), ("c", "train", 3.0), ("c", "test", 1.0)]
    rows += [("d", "train", 1.0), ("d", "test", 9.0)]
    table = pd.DataFrame(rows, columns=["speaker", "split", "seconds"]).assign(stream="agent")
    assert two_voices(table) == ("b", "c")
    assert two_voices(table[table["speaker"] == "b"]) is None


def test_a_direction_that_is_nothing_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "eqknobs.stages.lm_steering.directions._of_layer", lambda z, task: {"probe": np.zeros(z.shape[1])}
    )
    with pytest.raises(EqknobsError, match=r"voice, probe: the direction has norm 0.0; leave it out"):
        find(sources(world), "voice", {**FOUND, "directions": ["probe"]}, random=0)


# --- what is said


def test_a_step_reaches_the_last_column_of_each_row_alone() -> None:
    acts, steps = torch.zeros(2, 5, 3), torch.tensor([[1.0, 2, 3], [-1, -2, -3]])
    found = pushed(steps)(acts)
    assert torch.equal(found[:, -1], steps) and not found[:, :-1].any() and not acts.any()


def test_no_step_changes_nothing_and_a_batch_is_as_its_rows_alone(world: Path) -> None:
    bench, cfg = bench_of(world), config(world)
    bench.cfg["batch"] = 2
    rng = np.random.default_rng(0)
    step = rng.standard_normal(SIZES["dim"]).astype(np.float32)
    at = Condition("voice", "random", 0, LAYER, 3.0, step=step)
    assert bench.signs == [-1.0, 1.0, -1.0]  # high, low, high: from high to low is back
    whole, intact = bench.answers(at), bench.answers(compute.INTACT)
    nothing = bench.answers(Condition("voice", "random", 0, LAYER, 0.0, step=step))
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(nothing, intact, strict=True))
    assert any(not torch.equal(a.codes, b.codes) for a, b in zip(whole, intact, strict=True))
    cfg["batch"] = 1
    alone = bench_of(world, cfg).answers(at)
    assert [a.text.tolist() for a in alone] == [a.text.tolist() for a in whole]


def bench_of(world: Path, cfg: SteeringCfg | None = None) -> compute.SteerBench:
    from eqknobs.models.moshi.adapter import Moshi
    from eqknobs.speaking.scores import Judge

    cfg = cfg or config(world)
    model = Moshi(cfg["model"])
    judge = Judge(model, cfg["judges"])
    files = Files(turns="", index="", labels="", saes=None, manifest=None, codes=world / "codes.npz")
    _, asked, turned = compute.asked_of(model, judge, cfg, files)
    voices = [(name, np.eye(256, dtype=np.float32)[i]) for i, name in enumerate(("low", "high"))]
    return compute.SteerBench(model, judge, asked, turned, voices, cfg, Pieces(None))


def test_prompts_of_test_are_new_to_the_model_the_directions_and_val(world: Path) -> None:
    texts = {path.with_suffix(".json").read_text() for path in (world / "speech").glob("*/*.flac")}
    bench = bench_of(world)
    told = [row.told for row in bench.asked]
    assert len(set(told)) == 3 and {part_of(text) for text in told} == {"test"}
    assert not any(text in known for text in told for known in texts)
    assert not set(told) & set(drawn("val", 50, 0)) and drawn("test", 1, 0, told[:1]) != told[:1]
    assert [row.speaker for row in bench.asked] == ["high", "low", "high"]
    assert [row.speaker for row in bench.turned] == ["low", "high", "low"]
    assert [row.told for row in bench.turned] == told


def test_what_shifts_without_steering_has_the_intact_words(world: Path) -> None:
    bench = bench_of(world)
    gain = Condition("rms", "gain", matched="plain", shift=6.0)
    (answer, *_), (same, *_) = bench.answers(compute.INTACT), bench.answers(gain)
    assert torch.equal(answer.codes, same.codes)
    assert bench.sound(gain, same) == pytest.approx(bench.sound(compute.INTACT, answer) * 10**0.3, rel=1e-4)
    prompt = bench.answers(Condition("voice", "prompt", matched="plain", shift=0.1))
    assert any(not torch.equal(a.codes, b.codes) for a, b in zip(prompt, bench.answers(compute.INTACT), strict=True))


# --- a run


def test_a_run_tries_alphas_on_val_and_speaks_on_test(finished: Path) -> None:
    tried, answers = (read_csv(finished / f"scores/tones.{name}.csv") for name in RAW)
    assert set(tried["split"]) == {"val"} and set(answers["split"]) == {"test"}
    assert set(tried["layer"]) == {0, LAYER} and set(tried["property"]) == {"rms", "voice"}
    ends = tried[tried["matched"] != "tried"]
    assert ends.groupby(["layer", "property", "direction"])["alpha"].nunique().eq(1).all()
    assert ends["errors_monologue"].notna().all() and tried.query("matched == 'tried'")["errors_prompt"].isna().all()
    assert answers.groupby("property")["layer"].nunique().drop("none").eq(1).all()
    spoken = answers.groupby(["property", "direction", "seed", "matched", "beside"]).size()
    assert spoken["none", "intact", 0, "intact", "none"] == 6  # two draws
    assert spoken["voice", "random", 1, "same_length", "sae_probe"] == 3
    assert spoken["rms", "gain", 0, "plain", "none"] == spoken["voice", "prompt", 0, "plain", "none"] == 3
    for _, mine in answers[answers["direction"].isin(["sae_probe", "random"])].groupby("property"):
        alpha = mine[mine["matched"].isin(["reached", "unreached"])]["alpha"].iloc[0]
        assert mine[mine["matched"] == "same_length"]["alpha"].eq(alpha).all()
        assert mine[mine["matched"] == "multiple"]["alpha"].eq(2 * alpha).all()
    gain = answers[answers["direction"] == "gain"].merge(answers.query("direction == 'intact' and draw == 0"), on="id")
    assert (gain["level_db_x"] - gain["level_db_y"]).to_numpy() == pytest.approx([-2, -2, -2], abs=1e-3)


def test_a_job_that_was_ended_goes_on_and_says_the_same(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object, **_more: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(compute, "speak", never)
    monkeypatch.setattr(Transcriber, "transcribe", lambda _self, _wav: "heard for the page")
    monkeypatch.setattr(compute.SteerBench, "_measure", never)
    again = run(world, tmp_path / "run", Pieces(finished.parent / "pieces"))
    for name in RAW:
        file = f"scores/tones.{name}.csv"
        assert (again / file).read_bytes() == (finished / file).read_bytes(), name


# --- tables


def test_shifts_are_paired_with_the_intact_answer_of_the_prompt_and_draw() -> None:
    base = {"direction": "intact", "property": "none", "f0": 100.0, "level_db": -20.0}
    rows = [base | {"id": "a", "draw": 0, "similarity_to": 0.2, "similarity_from": 0.9}]
    rows += [base | {"id": "a", "draw": 1, "level_db": -19.0, "similarity_to": 0.3, "similarity_from": 0.9}]
    mine = {"direction": "probe", "property": "voice", "id": "a", "f0": 200.0, "level_db": -26.0}
    rows += [mine | {"draw": draw, "similarity_to": 0.8, "similarity_from": 0.7} for draw in (0, 1)]
    found = with_shifts(pd.DataFrame(rows))
    assert found["pitch_shift"].tolist() == [0, 0, 12, 12] and found["level_shift"].tolist() == [0, 1, -6, -7]
    assert found["voice_shift"].tolist() == pytest.approx([0, 0.1, 0.8, 0.7])
    assert found["shift"].tolist()[2:] == pytest.approx([0.8, 0.7]) and found["shift"][:2].isna().all()


def test_tables_are_made_of_the_raw_rows_alone(finished: Path) -> None:
    at = context(finished)
    found = tabulate(at)
    rows, answers = found.tables["lm_steering"], read_csv(finished / "scores/tones.lm_steered_answers.csv")
    one = rows.query("property == 'voice' and matched == 'same_length' and seed == 1").iloc[0]
    mine = answers.query("property == 'voice' and matched == 'same_length' and seed == 1").set_index("id")
    base = answers.query("direction == 'intact' and draw == 0").set_index("id").loc[mine.index]
    apart = [part["similarity_to"] - part["similarity_from"] for part in (mine, base)]
    assert one["shift"] == one["voice_shift"] == pytest.approx((apart[0] - apart[1]).mean())
    assert one["level_shift"] == pytest.approx((mine["level_db"] - base["level_db"]).mean())
    wer = [part["errors_prompt"].sum() / part["words_prompt"].sum() for part in (mine, base)]
    assert one["delta_wer_prompt"] == pytest.approx(wer[0] - wer[1]) and one["wer_prompt"] == pytest.approx(wer[0])
    null = rows.query("direction == 'intact'").set_index("seed")
    assert null.loc[0, "level_shift"] == 0 and null.loc[1, "answers"] == 3
    pairs = {(r["property"], r["a"], r["b"]) for r in found.comparisons}
    assert {("voice", "sae_probe", "random"), ("rms", "difference_in_means", "intact")} <= pairs
    assert ("rms", "difference_in_means", "random") not in pairs  # none is as long
    facts = found.facts | {"comparisons": [r | {"p_holm": r["p"], "compared": 1} for r in found.comparisons]}
    lines = findings(at, facts)
    assert {line["topic"] for line in lines} == {"lm_steering"}
    assert any("of 2 directions shift the level by −2.00 dB on val" in line["text"] for line in lines)
    strict = tabulate(context(finished, unmeasurable_wer=0.0)).comparisons
    assert {r["measure"] for r in strict} == {"shift"}  # words say nothing of a model that is not understood


def test_a_shift_downwards_is_better_the_larger_it_is(finished: Path) -> None:
    answers = read_csv(finished / "scores/tones.lm_steered_answers.csv")
    mine = answers[(answers["property"] == "rms") & (answers["direction"] == "sae_probe")].index
    answers.loc[mine, "level_db"] = -90.0
    found = compared(context(finished), with_shifts(answers))
    (record,) = [r for r in found if (r["property"], r["a"], r["b"]) == ("rms", "sae_probe", "random")]
    assert record["verdict"] == "better" and record["difference"] > 20


def test_the_page_shows_shift_against_words_and_plays_answers(finished: Path) -> None:
    cfg = {**CFG, "targets": ["tones"], "stages": {"lm_steering": {"targets": ["tones"]}}}
    write_tables(Inputs.below(finished), cfg, finished / "tables")
    assert read_json(finished / "tables/summary.json")["targets"]["tones"]["lm_steering"]
    shown = show(context(finished))
    assert {figure["title"] for figure in shown["drawn"]} >= {
        "Level: shift and words lost",
        "Voice: shift and words lost",
    }
    (answer,) = shown["answers"]
    names = [take["name"] for take in answer["takes"]]
    assert names[0] == "intact" and sum("random direction" in name for name in names) == 2
    assert (
        "voice +0.01 of similarity: the other voice's prompt" in names and "level −2.00 dB: gain on the sound" in names
    )


# --- the configuration


def test_the_typed_configuration_has_the_keys_of_the_schema() -> None:
    section = schema()["properties"]["lm_steering"]
    below = section["properties"]
    ours = {"model", "judges", "seed", "device", "content", "l2", "epochs"}
    for typed, found, more in ((SteeringCfg, section, ours), (PromptsCfg, below["prompts"], set())):
        known = set(found["properties"]) - {"models"}
        assert set(typed.__annotations__) - more == known
        assert typed.__required_keys__ - more == set(found["required"]) - {"models"}
    assert set(RandomCfg.__annotations__) == set(below["random"]["properties"])


def test_checks_say_what_is_missing() -> None:
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())

    def refused(over: dict, message: str) -> None:
        config = merge(copy.deepcopy(default), over)
        with pytest.raises(EqknobsError, match=message):
            check(config)

    refused({"lm_steering": {"models": ["tiny-mimi"]}}, "tiny-mimi is of kind mimi, not moshi")
    refused({"lm_layers": None}, "needs the caches of tiny-moshi's layers")
    refused({"lm_steering": {"layers": [6]}}, "tiny-moshi has layers 0 to 5, not 6")
    refused({"lm_steering": {"layers": [2]}}, "layer 2 has no SAE; add it to lm_layers.sae.layers")
    refused({"lm_steering": {"random": {"beside": ["sae_feature"]}}}, "'sae_feature' is not under")
    refused({"lm_steering": {"shifts": {"rms": 0}}}, "shift that is not 0")
    refused({"corpora": {"sentences": {"split_unit": "speaker"}}}, "voice needs speakers who are in train and test")
    check(
        merge(
            copy.deepcopy(default), {"lm_steering": {"layers": [2], "directions": ["probe"], "random": {"beside": []}}}
        )
    )
    check(merge(default, {"lm_steering": None}))
