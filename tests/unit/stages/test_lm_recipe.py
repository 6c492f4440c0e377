"""Recovery of a pruned speech LM: what is learnt, what stands beside it, how the recipe is chosen and written."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from eqknobs.compress import compress
from eqknobs.config import merge
from eqknobs.errors import EqknobsError
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.io import read_csv, read_json, write_json
from eqknobs.models.mimi import Mimi
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import save_net
from eqknobs.models.moshi.config import MoshiConfig
from eqknobs.packing.files import data_bytes
from eqknobs.packing.notes import NAME
from eqknobs.pieces import Pieces
from eqknobs.report.tables import write_tables
from eqknobs.sound.judges import Transcriber
from eqknobs.speaking.answers import speak
from eqknobs.speaking.bench import sampling
from eqknobs.speaking.clips import sounds, write_tokeniser
from eqknobs.speaking.grammar import part_of
from eqknobs.stages.lm_recipe import compute
from eqknobs.stages.lm_recipe.checks import check
from eqknobs.stages.lm_recipe.compute import RecipeCfg, best_pace, bounds, chosen, recover_and_score
from eqknobs.stages.lm_recipe.nets import Nets, Pace
from eqknobs.stages.lm_recipe.plan import INTACT, Condition, conditions
from eqknobs.stages.lm_recipe.section import show
from eqknobs.stages.lm_recipe.tables import findings, recovery_table, tabulate
from eqknobs.stages.speech_lm_training.training import TOKENISER, new_net
from eqknobs.talk import talk
from helpers import ROOT
from helpers.speech_lm_world import CODEC, SIZES, write_speech

LAYERS, HEADS = 2, 4
CHAIN = {
    "orders": ["norm", "random"],
    "seeds": 1,
    "shares": [0.25],
    "codebooks": [3],
    "bits": [4],
    "data": ["distilled", "sentences"],
}
CFG = {"bootstrap": 50, "seed": 0, "unmeasurable_wer": 99}


def order_table() -> pd.DataFrame:
    places = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    found = {("norm", 0): places, ("random", 0): places[::-1], ("random", 1): places[::2] + places[1::2]}
    rows = [(*key, rank, *place) for key, heads in found.items() for rank, place in enumerate(heads)]
    return pd.DataFrame(rows, columns=["order", "seed", "rank", "layer", "head"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, an untrained model, orders of its heads."""
    root = tmp_path_factory.mktemp("recipe")
    write_speech(root / "speech")
    (root / "model").mkdir()
    codec = Mimi({"name": "codec", "kind": "mimi", "path": str(CODEC), "device": "cpu"})
    write_tokeniser(root / TOKENISER)
    shape = SIZES | {"dim": 64, "layers": LAYERS, "heads": HEADS, "text_card": 136, "card": codec.config.codebook_size}
    net = new_net(MoshiConfig(**shape, **sounds(codec, 8)), 0).half().float()
    save_net(net.half(), root / "model", root / TOKENISER, str(CODEC))
    order_table().to_csv(root / "orders.csv", index=False)
    return root


def config(world: Path) -> RecipeCfg:
    return {
        "model": {"name": "tones", "kind": "moshi", "path": str(world / "model"), "device": "cpu"},
        "prompts": {"sentences": str(world / "speech"), "val": 1, "count": 2},
        **{key: value for key, value in CHAIN.items() if key != "data"},
        "group": 16,
        "symmetric": True,
        "rounding": "nearest",
        "training": {"data": CHAIN["data"], "prompts": 4, "steps": [4], "batch": 2, "learning_rate": [0.01]},
        "margin": 0.05,
        "draws": 1,
        "batch": 4,
        "temperature": 0.5,
        "listen": 1,
        "judges": {"asr": "tiny.en", "beam": 1},
        "bootstrap": CFG["bootstrap"],
        "seed": CFG["seed"],
    }


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, with a margin that everything keeps, so that the smallest model is the recipe."""
    folder = tmp_path_factory.mktemp("finished")
    out = {
        "answers": str(folder / "run/scores/tones.lm_recipe_answers.csv"),
        "paces": str(folder / "run/scores/tones.lm_recipe_paces.csv"),
        "recipe": str(folder / "run/lm/tones/recipe.json"),
        "whole": str(folder / "run/lm/tones/whole"),
        "model": str(folder / "run/lm/tones/recipe"),
        "sounds": str(folder / "run/renders/tones/recipe"),
    }
    inputs = {"orders": str(world / "orders.csv"), "codes": world / "codes.npz"}
    with pytest.MonkeyPatch.context() as patch:  # a recogniser takes long over what an untrained model says
        patch.setattr(Transcriber, "transcribe", lambda _self, wav: "the red horse" if wav.std() > 0.01 else "horse")
        recover_and_score(config(world) | {"margin": 1e9}, inputs, out, Pieces(folder / "pieces"))
    return folder / "run"


def nets(world: Path, **training: Any) -> Nets:
    cfg = config(world)
    cfg["training"] = cfg["training"] | training
    return compute.opened(cfg, world / "codes.npz", Pieces(None))[0]


def context(finished: Path) -> Context:
    return Context("tones", Inputs.below(finished), CFG, {"targets": ["tones"]})


def test_what_is_tried_goes_from_the_intact_model_to_the_whole_stack() -> None:
    found = conditions(CHAIN, order_table())
    assert found[0] == INTACT and len({c.name for c in found}) == len(found)
    steps = {(c.state, c.order, c.trained, c.codebooks, c.bits) for c in found}
    for order, data in (("norm", ["none", "distilled", "sentences"]), ("random", ["none", "distilled"])):
        mine = [c for c in found if c.order == order and not c.codebooks and not c.bits]
        assert [c.trained for c in mine] == data and all(len(c.heads) == 2 for c in mine)
    assert {("trained", "none", one, 0, 0) for one in CHAIN["data"]} <= steps  # the control
    assert ("packed", "none", "none", 0, 4) in steps and ("packed", "norm", "distilled", 3, 4) in steps
    assert {c.order for c in found if c.bits or c.codebooks} == {"none", "norm"}
    with pytest.raises(EqknobsError, match="made no order random 2"):
        conditions(CHAIN | {"orders": ["norm", "random"], "seeds": 4}, order_table())


def test_training_on_its_own_answers_makes_a_pruned_model_find_them_likelier(world: Path) -> None:
    made = nets(world, steps=[12], batch=4)
    net = made.of(Condition("norm", 0, 0.25, heads=((0, 0), (0, 1))))
    assert [len(kept) for kept in net.heads] == [2, 4]
    losses = made.tune(copy.deepcopy(net), "distilled", 0)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert torch.equal(made.whole.text_linear.weight, nets(world).whole.text_linear.weight)  # the teacher stays
    assert all(part_of(row.told or "") == "train" for row in made.asked())


def test_a_model_that_will_say_three_codebooks_is_trained_without_the_others(world: Path, monkeypatch) -> None:
    made, seen = nets(world, steps=[1]), []
    monkeypatch.setattr("eqknobs.stages.lm_recipe.nets.descend", lambda *args: seen.append(args[4:]) or 0.0)
    made.tune(copy.deepcopy(made.of(INTACT)), "distilled", 3)
    (codes, dialogue), agent = seen[0], made.model.config.agent
    inside = codes.transpose(1, 2)[dialogue]
    assert (inside[:, agent.start : agent.start + 3] >= 0).all()
    assert (inside[:, agent.start + 3 : agent.stop] == -1).all()
    assert (made.distilled()[0][0] >= -1).all() and (made.distilled()[0][0][agent, -1] >= 0).all()  # kept whole


def test_training_is_repeated_to_the_bit_and_kept(world: Path, tmp_path: Path) -> None:
    condition = Condition(trained="sentences")
    first, again = (nets(world).of(condition).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert all(torch.equal(value, value.half().float()) for value in first.values())  # as the file will have it
    assert not torch.equal(first["text_linear.weight"], nets(world).whole.text_linear.weight)


def test_the_recipe_is_the_smallest_that_keeps_the_margin() -> None:
    sizes = {INTACT.name: 9.0, "a": 5.0, "b": 4.0, "c": 3.0}
    found = {INTACT.name: {"x": 0.0, "y": 0.0}, "a": {"x": 0.05, "y": 0.01}, "b": {"x": 0.01, "y": 0.06}}
    assert chosen(found | {"c": {"x": float("nan"), "y": 0.0}}, sizes, 0.05) == "a"
    assert chosen({key: found[key] for key in (INTACT.name, "b")}, sizes, 0.05) == INTACT.name


def test_bounds_are_of_pairs_with_the_intact_model() -> None:
    def rows(name: str, errors: list[int]) -> list[dict[str, Any]]:
        ids = [{"condition": name, "id": f"p{i}", "speaker": "x", "draw": 0} for i in range(len(errors))]
        counts = [
            {"errors_monologue": e, "words_monologue": 10, "errors_prompt": 0, "words_prompt": 10} for e in errors
        ]
        return [a | b for a, b in zip(ids, counts, strict=True)]

    table = pd.DataFrame(rows(INTACT.name, [0, 5, 2]) + rows("worse", [1, 6, 3]))
    found = bounds(table, CFG)
    assert found["worse"]["wer_monologue"] == pytest.approx(0.1) and found["worse"]["wer_prompt"] == 0


def test_every_model_answers_and_the_table_pairs_it(finished: Path) -> None:
    answers = read_csv(finished / "scores/tones.lm_recipe_answers.csv")
    every = conditions(CHAIN, order_table())
    assert set(answers["condition"]) == {c.name for c in every} and set(answers["split"]) == {"val", "test"}
    made = tabulate(context(finished))
    table = made.tables["lm_recipe"]
    assert len(table) == 2 * len(every)
    test = table[table["split"] == "test"]
    intact, whole = test.iloc[0], test[(test["codebooks"] == 8) & (test["bits"] == 0)]
    assert intact["state"] == "intact" and np.isnan(intact["delta_wer_prompt"]) and intact["step_ratio"] == 1
    pruned = whole[whole["heads_removed"] > 0]
    assert (pruned["heads_removed"] == 2).all() and (pruned["bytes"] < intact["bytes"]).all()
    packed = test[test["bits"] == 4]
    assert (packed["bytes"] < 0.5 * intact["bytes"]).all() and (packed["bits_mean"] == 4).all()
    assert table.groupby("split")["chosen"].sum().eq(1).all()
    pairs = {(r["a"], r["b"], r["order"], r["data"]) for r in made.comparisons}
    assert {("trained", "untrained", "norm", "distilled"), ("trained", "untrained", "none", "sentences")} <= pairs
    assert ("norm", "random", "norm", "distilled") in pairs


def test_the_recipe_is_a_model_that_compress_writes_and_talk_speaks_from(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    recipe, folder = read_json(finished / "lm/tones/recipe.json"), finished / "lm/tones/recipe"
    table = tabulate(context(finished)).tables["lm_recipe"]
    row = table[(table["chosen"] == 1) & (table["split"] == "test")].iloc[0]
    assert (recipe["order"], recipe["trained"], recipe["codebooks"], recipe["bits"]) == ("norm", "distilled", 3, 4)
    assert data_bytes(folder / NAME) == row["bytes"] == recipe["bytes"] == table["bytes"].min()
    write_json(tmp_path / "plan.json", recipe["plan"])
    compress(str(finished / "lm/tones/whole"), str(tmp_path / "plan.json"), tmp_path / "again")
    assert (tmp_path / "again" / NAME).read_bytes() == (folder / NAME).read_bytes()
    model = Moshi({"name": "small", "path": str(folder), "device": "cpu"})
    assert model.net.steps == 3 and sum(map(len, model.net.heads)) == LAYERS * HEADS - 2
    cfg = config(world) | {"margin": 1e9}
    _, benches = compute.opened(cfg, world / "codes.npz", Pieces(None))
    asked = benches["test"].speech["asked"]
    condition = next(c for c in conditions(CHAIN, order_table()) if c.name == recipe["condition"])
    judged = benches["test"].answers(condition, 0)
    written = speak(model, asked, sampling(benches["test"].cfg, 0), cfg["batch"])
    assert all(torch.equal(a.text, b.text) and torch.equal(a.codes, b.codes) for a, b in zip(judged, written))
    clip = next((world / "speech").glob("*/*.flac"))
    talk(
        {"name": "small", "kind": "moshi", "path": str(folder), "device": "cpu"}, clip, tmp_path / "a.wav", seconds=0.8
    )
    assert (tmp_path / "a.wav").stat().st_size > 16000


def test_findings_say_what_was_chosen_and_the_page_plays_it(finished: Path) -> None:
    cfg = {**CFG, "targets": ["tones"], "stages": {"lm_recipe": {"targets": ["tones"]}}}
    write_tables(Inputs.below(finished), cfg, finished / "tables")
    facts = read_json(finished / "tables/summary.json")["targets"]["tones"]
    at = Context("tones", Inputs.below(finished), CFG, {"targets": ["tones"]}, facts)
    lines = findings(at, facts)
    assert lines[0]["text"].startswith("Chosen on 1 val prompts") and "3 codebooks; 4 bits" in lines[0]["text"]
    assert any("training on its own answers" in line["text"] for line in lines)
    shown = show(at)
    names = [take["name"] for take in shown["answers"][0]["takes"]]
    assert names[0] == "intact" and names[-1].endswith("(the recipe)") and len(names) == 7
    assert len(shown["test"]["rows"]) == len(shown["val"]["rows"])


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        ({"models": ["nobody"]}, "lm_recipe.models: names 'nobody'"),
        ({"orders": ["norm", "damage"]}, "lm_recipe.orders: damage is not under lm_pruning.heads.orders"),
        ({"seeds": 9}, "lm_recipe.seeds: 9 drawn orders"),
    ],
)
def test_bad_configurations_end_in_one_line(edit: dict[str, Any], line: str) -> None:
    whole = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    check(whole)
    whole["lm_pruning"]["heads"]["orders"] = ["norm", "random"]
    with pytest.raises(EqknobsError, match=line):
        check(merge(whole, {"lm_recipe": {"orders": ["norm", "random"]} | edit}))
    with pytest.raises(EqknobsError, match=r"list tiny-moshi under lm_pruning\.models"):
        check(whole | {"lm_pruning": None})


def test_the_pace_is_the_one_of_fewest_wrong_words() -> None:
    def row(steps: int, rate: float, errors: int) -> dict[str, Any]:
        counts = {"errors_monologue": errors, "errors_prompt": 1, "words_monologue": 10, "words_prompt": 10}
        return {"steps": steps, "learning_rate": rate, **counts}

    rows = pd.DataFrame([row(60, 0.1, 3), row(60, 0.3, 2), row(240, 0.1, 2), row(240, 0.3, 5)])
    assert best_pace(rows) == Pace(60, 0.3)  # of equals the shortest


def test_recovery_is_net_of_what_training_does_to_the_intact_model(finished: Path) -> None:
    def answers(state: tuple[str, str], errors: list[int]) -> list[dict[str, Any]]:
        order, trained = state
        about = {"split": "test", "order": order, "seed": 0, "share": 0.25 * (order != "none"), "trained": trained}
        about |= {"kept": 0, "bits": 0, "draw": 0, "speaker": "x"}
        words = {"words_monologue": 10, "errors_prompt": 0, "words_prompt": 10}
        return [{**about, **words, "id": f"p{i}", "errors_monologue": e} for i, e in enumerate(errors)]

    rows = answers(("none", "none"), [1, 2, 1, 0, 1]) + answers(("none", "distilled"), [0, 1, 0, 0, 0])
    rows += answers(("norm", "none"), [5, 6, 5, 4, 5]) + answers(("norm", "distilled"), [1, 2, 2, 1, 0])
    pace = {"steps": 4, "learning_rate": 0.01}
    found = recovery_table(context(finished), pd.DataFrame(rows), pd.DataFrame(), pace)
    row = found[(found["split"] == "test") & (found["measure"] == "wer_monologue")].iloc[0]
    assert (row["before"], row["after"]) == (0.5, pytest.approx(0.12))
    assert row["change"] == pytest.approx(-0.38) and row["control"] == pytest.approx(-0.08)
    assert row["net"] == pytest.approx(-0.3) and row["net_low"] <= row["net"] <= row["net_high"] < 0
    assert row["verdict"] == "better"


def test_every_pace_that_was_tried_stands_in_the_table(world: Path, finished: Path) -> None:
    found = tabulate(context(finished)).tables["lm_recovery"]
    assert set(found["split"]) == {"val", "test"} and (found["chosen"] == 1).all()
    assert found.loc[(found["split"] == "test") & (found["measure"] == "wer_prompt"), "net"].notna().all()
    made = nets(world, steps=[2, 1], learning_rate=[0.1, 0.01])
    assert made.paces == [Pace(1, 0.01), Pace(1, 0.1), Pace(2, 0.01), Pace(2, 0.1)] and made.pace == made.paces[0]
    slow = made.of(Condition(trained="distilled")).text_linear.weight
    made.pace = made.paces[1]
    assert not torch.equal(slow, made.of(Condition(trained="distilled")).text_linear.weight)
