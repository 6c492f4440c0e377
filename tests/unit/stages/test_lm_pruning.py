"""Pruning a speech LM: which parts go, what is said then, what the tables make of it."""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
import yaml

import eqknobs.stages.lm_pruning.bench as bench_module
from eqknobs.config import merge
from eqknobs.errors import EqknobsError
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.spoken import WER_MONOLOGUE, paired
from eqknobs.evidence.stage import Context
from eqknobs.io import file_sha256, read_csv
from eqknobs.models.mimi import Mimi
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import save_net
from eqknobs.models.moshi.config import MoshiConfig
from eqknobs.models.moshi.likelihood import Said, nats
from eqknobs.models.moshi.quantise import weight_of
from eqknobs.pieces import Pieces
from eqknobs.report.tables import write_tables
from eqknobs.schema import schema
from eqknobs.sound.judges import SpeakerEncoder
from eqknobs.speaking.answers import divergence, free_codebooks, speak
from eqknobs.speaking.bench import PromptsCfg, matching
from eqknobs.speaking.clips import sounds, write_tokeniser
from eqknobs.speaking.gates import GATES, Gate, signal_values, token_values, word_values
from eqknobs.speaking.prompts import Talk, conversations
from eqknobs.stages.lm_pruning import plan
from eqknobs.stages.lm_pruning.bench import CodebooksCfg, PruningCfg, RemovalCfg
from eqknobs.stages.lm_pruning.checks import check
from eqknobs.stages.lm_pruning.codebooks import heard_by
from eqknobs.stages.lm_pruning.compute import prune_and_score
from eqknobs.stages.lm_pruning.plan import HeadsCfg, PartsCfg
from eqknobs.stages.lm_pruning.section import show
from eqknobs.stages.lm_pruning.tables import RAW, findings, gates_table, largest_share, tabulate
from eqknobs.stages.speech_lm_training.training import TOKENISER, new_net
from helpers import ROOT
from helpers.speech_lm_world import CODEC, SIZES, write_speech

ORDERS = ["acoustic_first", "acoustic_last", "random", "random_layers", "norm", "gradient", "damage"]
LAYERS, HEADS = 3, 4
CFG = {"bootstrap": 50, "seed": 0, "unmeasurable_wer": 99}  # an untrained model is not understood
OUTPUTS = {
    "orders": "orders",
    "nats": "nats",
    "answers": "pruned_answers",
    "real": "real_speech",
    "codebooks": "codebook_answers",
    "removal": "removal",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, an untrained model, and accuracies of its heads."""
    root = tmp_path_factory.mktemp("pruning")
    write_speech(root / "speech")
    (root / "model").mkdir()
    codec = Mimi({"name": "codec", "kind": "mimi", "path": str(CODEC), "device": "cpu"})
    write_tokeniser(root / TOKENISER)
    shape = SIZES | {"layers": LAYERS, "heads": HEADS, "text_card": 136, "card": codec.config.codebook_size}
    net = new_net(MoshiConfig(**shape, **sounds(codec, 8)), 0)
    save_net(net, root / "model", root / TOKENISER, str(CODEC))
    values = np.random.default_rng(0).permutation(LAYERS * HEADS) / 100
    rows = [(layer, head, "centroid") for layer in range(LAYERS) for head in range(HEADS)]
    table = pd.DataFrame(rows, columns=["layer", "head", "property"]).assign(accuracy=values)
    table.to_csv(root / "heads.csv", index=False)
    return root


@pytest.fixture(scope="module")
def model(world: Path) -> Moshi:
    return Moshi({"name": "tones", "path": str(world / "model"), "device": "cpu"})


def config(world: Path) -> PruningCfg:
    parts = {"orders": ["uniform", "guided"], "shares": [0.25], "seeds": 1}
    return {
        "model": {"name": "tones", "kind": "moshi", "path": str(world / "model"), "device": "cpu"},
        "prompts": {
            "source": "sentences",
            "sentences": str(world / "speech"),
            "count": 2,
            "held_out": 3,
            "calibration": 2,
        },
        "property": "centroid",
        "heads": {"orders": ORDERS, "shares": [0.25, 0.5], "seeds": 2, "repairs": ["zero", "mean"]},
        "weights": parts,
        "layers": {"orders": ["damage", "random"], "shares": [0.34], "seeds": 1},
        "answered": ["heads:acoustic_first:0.25:zero:0", "heads:random:0.25:zero:*", "weights:uniform:*"],
        "confirmed": ["heads:acoustic_first:*"],
        "draws": 2,
        "removal": {"order": "acoustic_first", "shares": [0.5], "nf4": False},
        "codebooks": {"readings": ["a", "d"], "counts": [3], "count": 1},
        "batch": 2,
        "temperature": 0.5,
        "dnsmos": False,
        "listen": 1,
        "judges": {"asr": "tiny.en", "beam": 1},
    }


def run(world: Path, folder: Path, pieces: Pieces | None = None) -> Path:
    """A run's folder below `folder`, in which the stage has made its files."""
    out = {key: str(folder / f"scores/tones.lm_{name}.csv") for key, name in OUTPUTS.items()}
    out["sounds"] = str(folder / "renders/tones/pruned")
    files = {"heads": str(world / "heads.csv"), "manifest": None, "codes": world / "codes.npz"}
    prune_and_score(config(world), files, out, pieces)
    return folder


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return run(world, folder / "run", Pieces(folder / "pieces"))


def context(finished: Path) -> Context:
    return Context("tones", Inputs.below(finished), CFG, {"targets": ["tones"]})


# Which parts go


def test_orders_take_the_heads_that_they_are_named_after() -> None:
    values = {
        name: torch.randn(LAYERS, HEADS, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")
    }
    found = {"accuracy": values["a"], "norm": values["b"], "gradient": values["b"], "damage": -values["b"]}
    orders = plan.head_orders(found, {"orders": ORDERS, "shares": [0.5], "seeds": 3, "repairs": ["zero"]})
    flat = {(layer, head): float(values["a"][layer, head]) for layer in range(LAYERS) for head in range(HEADS)}
    first = orders["acoustic_first", 0]
    assert [flat[head] for head in first] == sorted(flat.values(), reverse=True)
    assert orders["acoustic_last", 0] == first[::-1] and orders["damage", 0] == orders["norm", 0][::-1]
    assert len({tuple(orders["random", seed]) for seed in range(3)}) == 3
    for seed in range(3):
        drawn = orders["random_layers", seed]
        assert sorted(drawn) == sorted(orders["random", seed]) == sorted(first)
        for count in range(1, len(first)):  # at every share as many of each layer, and not the same heads
            assert Counter(head[0] for head in drawn[:count]) == Counter(head[0] for head in first[:count])
    assert len({tuple(orders["random_layers", seed]) for seed in range(3)} | {tuple(first)}) == 4


def test_layers_lose_the_share_on_average_and_the_most_acoustic_ones_most() -> None:
    acoustic = torch.tensor([0.3, 0.1, 0.2])
    for order in ("uniform", "guided", "inverted", "random"):
        shares = plan.layer_shares(order, 0, 0.2, acoustic, 3)
        assert np.mean(shares) == pytest.approx(0.2) and min(shares) >= 0 and max(shares) <= 0.4 + 1e-9
    assert plan.layer_shares("guided", 0, 0.2, acoustic, 3) == pytest.approx([0.4, 0, 0.2])
    assert plan.layer_shares("inverted", 0, 0.2, acoustic, 3) == pytest.approx([0, 0.4, 0.2])


def test_norms_are_of_the_heads_own_rows_and_columns(model: Moshi) -> None:
    attention, dim = model.net.layers[1].self_attn, model.config.head_dim
    value = weight_of(attention.in_proj)[2 * model.config.dim + 2 * dim : 2 * model.config.dim + 3 * dim]
    out = weight_of(attention.out_proj)[:, 2 * dim : 3 * dim]
    assert plan.norms(model.net)[1, 2] == pytest.approx(float(value.norm() * out.norm()), rel=1e-5)


def test_conditions_prune_while_they_hold(world: Path, model: Moshi) -> None:
    heads = {"orders": ["norm"], "shares": [0.01, 0.5], "seeds": 1, "repairs": ["zero", "mean"]}
    orders = plan.head_orders({"norm": plan.norms(model.net)}, heads)
    found = list(plan.head_conditions(orders, heads))
    assert [c.name for c in found] == ["heads:norm:0.5:zero:0", "heads:norm:0.5:mean:0"]  # 1 % is no head
    found += plan.weight_conditions({"orders": ["uniform"], "shares": [0.4], "seeds": 1}, None, LAYERS)
    layers = plan.layer_orders(
        torch.tensor([2.0, 1.0, 3.0]), {"orders": ["damage", "last"], "shares": [0.4], "seeds": 1}
    )
    assert layers == {("damage", 0): [1, 0, 2], ("last", 0): [2, 1, 0]}
    found += plan.layer_conditions(layers, {"orders": [], "shares": [0.4], "seeds": 1})
    means = [torch.ones(HEADS, model.config.head_dim) for _ in range(LAYERS)]
    row = Said(
        model.prompt(), torch.zeros(8, 5, dtype=torch.long), torch.arange(5) + 4, torch.ones(8, 5, dtype=torch.long)
    )
    with torch.no_grad():
        before = nats(model.net, [row]).text
        seen = [before]
        for condition in found:
            with condition.applied(model.net, means):
                seen.append(nats(model.net, [row]).text)
            assert torch.equal(nats(model.net, [row]).text, before)
    assert len({tuple(one.flatten().tolist()) for one in seen}) == len(seen)
    assert [c.name for c in matching(found, ["heads:*:mean:*", "layers:last:*"], "lm_pruning.answered")] == [
        "heads:norm:0.5:mean:0",
        "layers:last:0.4:zero:0",
    ]
    with pytest.raises(EqknobsError, match=r"lm_pruning.answered: no condition is called 'heads:x'"):
        matching(found, ["heads:x"], "lm_pruning.answered")


def test_accuracies_are_asked_of_every_head(world: Path) -> None:
    table = read_csv(world / "heads.csv")
    assert plan.accuracies(table, "centroid", LAYERS, HEADS)[2, 1] == table["accuracy"][2 * HEADS + 1]
    with pytest.raises(EqknobsError, match="no probe of rms reads head 0 of layer 0; known are centroid"):
        plan.accuracies(table, "rms", LAYERS, HEADS)
    with pytest.raises(EqknobsError, match="reads head 0 of layer 3"):
        plan.accuracies(table, "centroid", LAYERS + 1, HEADS)


# What is asked and answered


def test_people_talk_to_a_model_and_then_keep_silent(world: Path, model: Moshi, tmp_path: Path) -> None:
    path = sorted((world / "speech/low").glob("*.flac"))[0]
    wav, _ = sf.read(path, dtype="float32")
    clips = pd.DataFrame([{"id": "a", "speaker": "low", "path": str(path), "sha256": file_sha256(path), "text": "x"}])
    encoder = SpeakerEncoder()
    frames = len(wav) // model.hop
    (one,) = conversations(model, clips, Talk(seconds=frames * 0.08 + 0.96, text="five", voice=str(path)), encoder)
    assert one.told is None and one.user.shape == (8, frames + 12)
    assert torch.equal(one.user[:, :frames], model.codes(wav)[:, :frames])
    assert (one.user[:, frames:] == torch.tensor(model.config.silence)[:, None]).all()
    assert one.voice == pytest.approx(encoder.embed(wav)) and one.prompt.columns > 12
    (short,) = conversations(model, clips, Talk(seconds=0.8), encoder)
    assert short.user.shape[1] == 10 and short.voice is None and short.prompt.frames is None
    together = speak(model, [one, short], batch=2)
    alone = [speak(model, [row], batch=1)[0] for row in (one, short)]
    assert [len(answer.text) for answer in together] == [frames + 12, 10]
    assert all(torch.equal(a.text, b.text) and torch.equal(a.codes, b.codes) for a, b in zip(together, alone))
    fixed = speak(model, [short], fixed=free_codebooks(2, 8, model.config.silence))[0]
    assert (fixed.codes[2:] == torch.tensor(model.config.silence)[2:, None]).all()
    assert divergence(alone[1], alone[1]) == 10
    other = alone[1]._replace(codes=alone[1].codes.clone())
    other.codes[5, 7] += 1
    assert divergence(alone[1], other) == 7
    deaf = heard_by(model, [one], 3)[0]
    assert torch.equal(deaf.user[:3], one.user[:3]) and (deaf.user[3:] == -1).all()


def test_gates_see_what_they_are_named_after() -> None:
    rng, seconds = np.random.default_rng(0), np.arange(64000) / 16000
    noise, tone = rng.normal(size=64000) * 0.1, 0.1 * np.sin(2 * np.pi * 200 * seconds)
    late = np.where(seconds > 3, tone, 0)
    assert signal_values(noise, 16000)["flatness"] > 0.3 > signal_values(tone, 16000)["flatness"]
    assert signal_values(tone, 16000)["energy_cv"] < 0.1 < signal_values(late, 16000)["energy_cv"]
    assert signal_values(tone, 16000)["zero_crossings"] == pytest.approx(400 / 16000, rel=0.01)
    assert signal_values(late, 16000)["latency"] == pytest.approx(3, abs=0.05)
    assert all(np.isnan(value) for value in signal_values(np.zeros(100), 16000).values())
    text, codes = np.array([3] * 10 + [7] * 6 + [3, 8, 8] + [3] * 31), np.tile(np.arange(50) % 4, (2, 1))
    found = token_values(text, codes, pad=3)
    assert found["repetition"] == 6 and found["pads"] == 42 / 50 and found["entropy"] == pytest.approx(2, abs=0.01)
    assert token_values(text, np.vstack([codes, np.full((1, 50), -1)]), 3) == found
    assert word_values("five red people", "red five five")["overlap"] == pytest.approx(2 / 3)
    assert np.isnan(word_values("", "red")["overlap"])
    gate = Gate("x", low=1.0)
    assert gate.passes(np.array([0.5, 1.0, np.nan])).tolist() == [False, True, False]
    fitted = gate.calibrated(np.arange(1000.0))
    assert fitted.low == pytest.approx(24.975) and fitted.high == np.inf
    assert gate.calibrated(np.array([np.nan])) == gate and len({gate.name for gate in GATES}) == 9


# The stage


def test_a_run_screens_all_conditions_and_lets_the_named_ones_speak(finished: Path) -> None:
    read = {name: read_csv(finished / f"scores/tones.lm_{name}.csv") for name in OUTPUTS.values()}
    screened = read["nats"].groupby(["granularity", "order", "share", "repair", "seed"]).size()
    assert (screened == 3).all() and len(screened) == 1 + 9 * 2 * 2 + 2 + 2
    spoken = read["pruned_answers"].groupby(["granularity", "order", "seed"])["draw"].agg(["nunique", "size"])
    assert spoken.loc[("intact", "none", 0)].tolist() == [2, 4]
    assert spoken.loc[("heads", "acoustic_first", 0)].tolist() == [2, 4]  # confirmed
    assert spoken.loc[("heads", "random", 1)].tolist() == [1, 2] and len(spoken) == 5
    orders = read["orders"]
    assert (orders.groupby(["order", "seed"])["rank"].nunique() == LAYERS * HEADS).all()
    pruned = read["pruned_answers"].query("granularity == 'heads'")
    assert (pruned["removed"] == 3).all() and read["real_speech"]["words_heard"].notna().all()
    assert (read["pruned_answers"]["similarity_intact"].between(0, 1.001)).all()
    removal = read["removal"].set_index("share")
    assert removal["removed"].tolist() == [0, 6] and removal["exact"].astype(bool).all()
    dim, head = 32, 32 // HEADS
    assert removal.loc[0.0, "parameters"] - removal.loc[0.5, "parameters"] == 6 * 4 * head * dim
    assert removal.loc[0.0, "bytes"] - removal.loc[0.5, "bytes"] == pytest.approx(6 * 4 * head * dim * 4, abs=600)
    assert (removal["difference"] < 1e-4).all() and (removal[["peak_bytes", "step_seconds"]] > 0).all().all()
    books = read["codebook_answers"].set_index("reading")
    assert books.loc["a", "step_ratio"] == 1 > books.loc["d", "step_ratio"]
    index = read_csv(finished / "renders/tones/pruned/index.csv")
    assert index["order"].tolist() == ["none", "acoustic_first", "random"] and index["id"].nunique() == 1
    assert all((finished / "renders/tones/pruned" / file).is_file() for file in index["file"])


def test_a_job_that_was_ended_goes_on_and_says_the_same(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object, **_more: object) -> None:
        raise AssertionError("made again")

    for name in ("head_means", "head_gradients"):
        monkeypatch.setattr(bench_module, name, never)
    for name in ("speak", "costs"):
        monkeypatch.setattr(f"eqknobs.speaking.bench.{name}", never)
    monkeypatch.setattr("eqknobs.stages.lm_pruning.compute.removal_rows", lambda *_args: [])
    again = run(world, tmp_path / "run", Pieces(finished.parent / "pieces"))
    for name in ("orders", "nats", "pruned_answers", "real_speech"):
        file = f"scores/tones.lm_{name}.csv"
        assert (again / file).read_bytes() == (finished / file).read_bytes(), name


def test_tables_are_made_of_the_raw_rows_alone(finished: Path) -> None:
    at = context(finished)
    found = tabulate(at)
    rows, answers = found.tables["lm_pruning"], read_csv(finished / "scores/tones.lm_pruned_answers.csv")
    assert set(RAW) | {"orders"} == set(OUTPUTS.values())
    one = rows.query(
        "granularity == 'heads' and order == 'random' and repair == 'zero' and seed == 1 and share == .25"
    ).iloc[0]
    mine = answers.query("order == 'random' and seed == 1")
    assert one["answers"] == 2 and one["pad_share"] == pytest.approx(mine["pad_frames"].sum() / mine["frames"].sum())
    assert rows.query("answers == 0")["wer_prompt"].isna().all() and rows["nll_text"].notna().all()
    intact = rows.query("granularity == 'intact'").iloc[0]
    base = answers.query("granularity == 'intact' and draw == 0")
    apart = (
        mine["errors_prompt"].sum() / mine["words_prompt"].sum()
        - base["errors_prompt"].sum() / base["words_prompt"].sum()
    )
    assert one["delta_wer_prompt"] == pytest.approx(apart) and np.isnan(intact["delta_wer_prompt"])
    assert set(found.tables["lm_prunable"]["order"]) == {"acoustic_first", "random", "uniform"}
    strict = Context("tones", at.inputs, {**CFG, "unmeasurable_wer": 0.0}, at.own)
    assert tabulate(strict).tables["lm_prunable"].empty
    assert found.tables["lm_codebooks"]["codebooks"].tolist() == [3, 3] and len(found.tables["lm_gates"]) == 9
    facts = found.facts | {"comparisons": [r | {"p_holm": r["p"], "compared": 1} for r in found.comparisons]}
    lines = findings(at, facts)
    assert {line["topic"] for line in lines} == {"lm_pruning"}
    assert any("Heads that can be off before WER of the monologue against the prompt" in line["text"] for line in lines)
    assert {record["b"] for record in found.comparisons} == {"random", "intact"}


def test_the_page_plays_answers_side_by_side(finished: Path) -> None:
    cfg = {**CFG, "targets": ["tones"], "stages": {"lm_pruning": {"targets": ["tones"]}}}
    write_tables(Inputs.below(finished), cfg, finished / "tables")
    shown = show(context(finished))
    (answer,) = shown["answers"]
    names = [take["name"] for take in answer["takes"]]
    assert names == ["intact", "25% of heads off, most acoustic first", "25% of heads off, at random"]
    assert all(take["sound"].startswith("data:audio/mpeg;base64,") for take in answer["takes"]) and answer["told"]
    titles = {figure["title"] for figure in shown["drawn"]}
    assert {"Pruned heads: nats of held-out speech", "When heads go: most acoustic first", "Fewer codebooks"} <= titles
    assert len(shown["spoken"]["rows"]) == 5 and len(shown["removal"]["rows"]) == 2


def answered(order: str, share: float, errors: list[int], seed: int = 0, draw: int = 0) -> pd.DataFrame:
    kind = "intact" if order == "none" else "heads"
    about = {"granularity": kind, "order": order, "share": share, "repair": "zero", "seed": seed, "draw": draw}
    rows = [{"id": f"{i}", "speaker": "a", "errors_monologue": e, "words_monologue": 10} for i, e in enumerate(errors)]
    return pd.DataFrame(rows).assign(**about)


def test_how_far_is_the_largest_share_up_to_which_the_bound_holds() -> None:
    assert largest_share({0.1: 0.01, 0.2: 0.05, 0.3: 0.06, 0.4: 0.01}) == (0.2, 0.05)
    assert largest_share({0.1: 0.07, 0.2: 0.01}) == (0.0, 0.07)
    assert largest_share({0.1: float("nan")})[0] == 0


def test_differences_are_paired_by_prompt_and_draw() -> None:
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 9, 40)
    intact = pd.concat([answered("none", 0, hard.tolist()), answered("none", 0, [10] * 40, draw=1)])
    mine = answered("norm", 0.1, (hard + 1).tolist())
    found = paired(intact, mine, WER_MONOLOGUE, {"bootstrap": 200, "seed": 0})
    assert found["difference"] == pytest.approx(0.1) and found["low"] == pytest.approx(0.1) == found["high"]
    both = pd.concat([answered("random", 0.1, hard.tolist(), seed=s) for s in range(3)])
    pooled = paired(intact, both, WER_MONOLOGUE, {"bootstrap": 200, "seed": 0})
    assert pooled["difference"] == 0 and pooled["clips"] == 40


def test_gates_are_calibrated_on_the_intact_model(finished: Path) -> None:
    answers = read_csv(finished / "scores/tones.lm_pruned_answers.csv")
    real = read_csv(finished / "scores/tones.lm_real_speech.csv")
    table = gates_table(answers, real).set_index("gate")
    intact = answers[answers["granularity"] == "intact"]
    assert table.loc["flatness", "intact"] == (intact["flatness"].dropna() <= 0.3).mean()
    assert table.loc["pads", "speech"] == (real["pads"] <= 0.95).mean() and np.isnan(table.loc["pads", "low"])


# The configuration


def test_the_typed_configuration_has_the_keys_of_the_schema() -> None:
    section = schema()["properties"]["lm_pruning"]
    below = section["properties"]
    for typed, found, ours in (
        (PruningCfg, section, {"model", "judges", "device", "content"}),
        (PromptsCfg, below["prompts"], set()),
        (HeadsCfg, below["heads"], set()),
        (PartsCfg, below["weights"], set()),
        (PartsCfg, below["layers"], set()),
        (RemovalCfg, below["removal"], set()),
        (CodebooksCfg, below["codebooks"], set()),
    ):
        known = set(found["properties"]) - {"models"}
        assert set(typed.__annotations__) - ours == known
        assert typed.__required_keys__ - ours == set(found["required"]) - {"models"}


def test_checks_say_what_is_missing() -> None:
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())

    def refused(over: dict, message: str) -> None:
        config = merge(copy.deepcopy(default), over)
        with pytest.raises(EqknobsError, match=message):
            check(config)

    refused({"lm_pruning": {"models": ["nobody"]}}, "names 'nobody', which is not under models")
    refused({"lm_pruning": {"models": ["tiny-mimi"]}}, "tiny-mimi is of kind mimi, not moshi")
    refused({"lm_pruning": {"prompts": {"sentences": None}}}, "prompts.sentences: name a folder")
    refused({"lm_layers": None}, "its orders need the probes of tiny-moshi's heads; list it under lm_layers.models")
    check(merge(default, {"lm_pruning": None}))
