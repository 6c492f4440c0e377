"""A speech LM in mixed precision: plans of equal bytes, weights against the file they come from, what is said then."""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from eqknobs.config import merge
from eqknobs.errors import EqknobsError
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.io import read_csv
from eqknobs.models.mimi import Mimi
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import find_files, load_net, save_net
from eqknobs.models.moshi.config import MoshiConfig
from eqknobs.models.moshi.likelihood import Said, nats
from eqknobs.packing.files import data_bytes
from eqknobs.packing.modules import bytes_resident, pack_modules
from eqknobs.packing.notes import NAME
from eqknobs.packing.plan import Plan, mean_bits, plan_bytes
from eqknobs.pieces import Pieces
from eqknobs.report.tables import write_tables
from eqknobs.schema import schema
from eqknobs.speaking.bench import PromptsCfg
from eqknobs.speaking.clips import sounds, write_tokeniser
from eqknobs.stages.lm_quantisation import plans
from eqknobs.stages.lm_quantisation.checks import check
from eqknobs.stages.lm_quantisation.compute import RAW, BestCfg, QuantisationCfg, Weights, quantise_and_score
from eqknobs.stages.lm_quantisation.plans import Condition, Guides, Plans
from eqknobs.stages.lm_quantisation.section import show
from eqknobs.stages.lm_quantisation.tables import findings, smallest, tabulate
from eqknobs.stages.speech_lm_training.training import TOKENISER, new_net
from helpers import ROOT
from helpers.speech_lm_world import CODEC, SIZES, write_speech

LAYERS, HEADS = 3, 4
CFG = {"bootstrap": 50, "seed": 0, "unmeasurable_wer": 99}  # an untrained model is not understood
OPTIONS = {"group": 16, "symmetric": True, "rounding": "nearest"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, an untrained model, and what probes read in its layers and heads."""
    root = tmp_path_factory.mktemp("packing")
    write_speech(root / "speech")
    (root / "model").mkdir()
    codec = Mimi({"name": "codec", "kind": "mimi", "path": str(CODEC), "device": "cpu"})
    write_tokeniser(root / TOKENISER)
    shape = SIZES | {"dim": 64, "layers": LAYERS, "heads": HEADS, "text_card": 136, "card": codec.config.codebook_size}
    save_net(new_net(MoshiConfig(**shape, **sounds(codec, 8)), 0), root / "model", root / TOKENISER, str(CODEC))
    rows = [(layer, head, "centroid") for layer in range(LAYERS) for head in range(HEADS)]
    heads = pd.DataFrame(rows, columns=["layer", "head", "property"])
    heads.assign(accuracy=np.arange(len(rows)) / 100).to_csv(root / "heads.csv", index=False)
    clip = {"id": "a", "speaker": "low", "split": "val", "frames": 10, "stream": "agent", "property": "centroid"}
    counts = {f"residual.{layer}": layer + 1 for layer in range(LAYERS)}
    layers = [clip | counts | {"labels": "true", "lag": 0}, clip | counts | {"labels": "shuffled", "lag": 0}]
    layers.append(clip | dict.fromkeys(counts, 9) | {"labels": "true", "lag": 1})
    pd.DataFrame(layers).to_csv(root / "layers.csv", index=False)
    return root


def opened(world: Path, **more: object) -> Moshi:
    return Moshi({"name": "tones", "path": str(world / "model"), "device": "cpu", **more})


@pytest.fixture(scope="module")
def model(world: Path) -> Moshi:
    return opened(world)


def config(world: Path) -> QuantisationCfg:
    asks = {"source": "sentences", "sentences": str(world / "speech"), "count": 2, "held_out": 3, "calibration": 2}
    return {
        "model": {"name": "tones", "kind": "moshi", "path": str(world / "model"), "device": "cpu"},
        "prompts": asks,
        "property": "centroid",
        "parts": ["temporal", "whole"],
        "widths": [2, 3, 4],
        "budgets": [3],
        "outside": 4,
        **OPTIONS,
        "random_plans": 2,
        "nf4": True,
        "answered": ["temporal:layer:*", "temporal:random:3:1", "temporal:nf4:*"],
        "best": {"count": 1, "budget": 3},
        "draws": 2,
        "batch": 2,
        "temperature": 0.5,
        "dnsmos": False,
        "listen": 1,
        "judges": {"asr": "tiny.en", "beam": 1},
        "seed": 0,
    }


def run(world: Path, folder: Path, pieces: Pieces) -> Path:
    out = {key: str(folder / f"scores/tones.{name}.csv") for key, name in RAW.items()}
    out |= {"plans": str(folder / "lm_quantisation/tones"), "sounds": str(folder / "renders/tones/quantised")}
    probes = {"layers": str(world / "layers.csv"), "heads": str(world / "heads.csv")}
    quantise_and_score(config(world), {**probes, "manifest": None, "codes": world / "codes.npz"}, out, pieces)
    return folder


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return run(world, folder / "run", Pieces(folder / "pieces"))


def context(finished: Path) -> Context:
    return Context("tones", Inputs.below(finished), CFG, {"targets": ["tones"]})


def said(model: Moshi) -> Said:
    codes = torch.arange(40).view(8, 5)
    return Said(model.prompt(), codes, torch.arange(5) + 4, codes + 7)


# Plans


def makes(model: Moshi) -> Plans:
    weights = Weights(model, None)
    return Plans(weights.state, weights.shapes, [2, 3, 4], OPTIONS, 4)


def test_plans_of_one_budget_have_equal_bytes_and_go_by_what_they_are_named_after(model: Moshi) -> None:
    made = makes(model)
    damages = {name: {2: float(i), 3: i / 4, 4: 0.0} for i, name in enumerate(made.shapes)}
    blocks = {name: {2: float(i), 3: i / 4, 4: 0.0} for i, name in enumerate(plans.blocks_of(made.shapes))}
    heads = plans.head_scores(torch.arange(12.0, dtype=torch.float64).view(3, 4), made.state, model.config)
    found = made.every(["temporal", "whole"], [3], Guides([0.1, 0.3, 0.2], heads, damages, blocks), 2, 0)
    by = {condition.name: condition.widths for condition in found}
    limits = {part: plan_bytes(made.state, by[f"{part}:uniform:3:0"]) for part in ("temporal", "whole")}
    for condition in found:
        if condition.budget == 3:
            size = plan_bytes(made.state, condition.widths)
            assert size <= limits[condition.part] and size > 0.97 * limits[condition.part], condition.name
    temporal = {n for n in made.shapes if plans.place_of(n)}
    outside = set(made.shapes) - temporal
    assert all({by[n].bits[t] for t in outside} == {4} for n in by if n.startswith("temporal"))
    assert len({by["whole:random:3:0"].bits[t] for t in outside}) > 1

    def mean(name: str, layer: int, kind: str | None = None) -> float:
        mine = [t for t in temporal if plans.place_of(t)[0] == layer and kind in (None, plans.place_of(t)[1])]
        return mean_bits(made.state, by[name].with_bits({t: by[name].bits[t] for t in mine}))

    first, last = mean("temporal:layer:3:0", 1), mean("temporal:layer:3:0", 0)
    assert first > mean("temporal:layer:3:0", 2) > last and mean("temporal:inverted:3:0", 0) == first
    assert [mean("temporal:head:3:0", layer, "mlp") for layer in range(3)] == [3, 3, 3]
    assert mean("temporal:head:3:0", 2, "attention") > mean("temporal:head:3:0", 0, "attention")
    assert mean("temporal:head_inverted:3:0", 0, "attention") > mean("temporal:head_inverted:3:0", 2, "attention")
    for names in plans.blocks_of(made.shapes).values():
        assert len({by["temporal:block:3:0"].bits[name] for name in names}) == 1
    assert len({json.dumps(plan.to_json()) for plan in by.values()}) == len(by)


def test_a_tensors_value_is_its_heads_by_their_weights() -> None:
    config = MoshiConfig(8, 1, 2, 64, 64, 1, 1, 64, text_card=8, card=8, silence=(1,) * 8, sine=(1,) * 8)
    stem = "transformer.layers.0.self_attn"
    rows = torch.zeros(24, 8)
    rows[0], rows[8 + 4] = 1, 2  # q of head 0, k of head 1
    columns = torch.zeros(8, 8)
    columns[:, 7] = 1
    state = {f"{stem}.in_proj.weight": rows, f"{stem}.out_proj.weight": columns, "text_emb.weight": columns}
    found = plans.head_scores(torch.tensor([[0.1, 0.6]], dtype=torch.float64), state, config)
    assert found == pytest.approx({f"{stem}.in_proj.weight": 0.5, f"{stem}.out_proj.weight": 0.6})


def test_probes_are_asked_of_every_layer_and_head(world: Path) -> None:
    layers, heads = read_csv(world / "layers.csv"), read_csv(world / "heads.csv")
    assert plans.layer_accuracies(layers, "centroid", LAYERS) == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(EqknobsError, match="no probe of rms reads all 3 layers; known are centroid"):
        plans.layer_accuracies(layers, "rms", LAYERS)
    with pytest.raises(EqknobsError, match="reads head 0 of layer 3"):
        plans.head_accuracies(heads, "centroid", LAYERS + 1, HEADS)


def test_the_best_plans_are_those_of_fewest_nats() -> None:
    names = ("layer", "head", "uniform", "random", "block")
    found = [Condition("temporal", name, 3) for name in names] + [Condition("whole", "sensitivity", 3)]
    nats_of = {c.name: float(value) for c, value in zip(found, (3, 1, 0, 0, 2, 0), strict=True)}
    assert [c.plan for c in plans.best(found, nats_of, 3, 2)] == ["head", "block"]


# Weights


def test_weights_are_those_that_the_packed_file_gives(world: Path, model: Moshi, tmp_path: Path) -> None:
    weights, row = Weights(model, None), said(model)
    plan = makes(model).allocator("whole").by_score({name: len(name) for name in weights.shapes}, 3)
    packed = load_net(find_files("x", str(world / "model")))
    pack_modules(packed, plan)
    save_net(packed, tmp_path / "packed", plan=plan)
    read = load_net(find_files("x", str(tmp_path / "packed")))
    with torch.no_grad():
        before, wanted = nats(model.net, [row]).audio, nats(read, [row])
        with weights.applied(plan):
            found = nats(model.net, [row])
        assert torch.equal(nats(model.net, [row]).audio.nan_to_num(), before.nan_to_num())
    assert torch.equal(found.text, wanted.text) and torch.equal(found.audio.nan_to_num(), wanted.audio.nan_to_num())
    assert not torch.allclose(found.audio, before, equal_nan=True)
    sizes = weights.sizes(plan)
    assert sizes["bytes"] == data_bytes(tmp_path / "packed" / NAME) and sizes["bits_mean"] <= 3
    assert sizes["bytes_resident"] == bytes_resident(read)


def test_a_model_that_is_loaded_in_nf4_is_packed_from_its_whole_weights(world: Path, model: Moshi) -> None:
    small = opened(world, nf4={"double": False}, dtype="float32")
    weights, row = Weights(small, "float32"), said(model)
    assert not weights.plain and set(weights.shapes) == set(Weights(model, None).shapes)
    plan = Plan.uniform(weights.shapes, 3, rest="float32", **OPTIONS)
    with torch.no_grad():
        before = nats(small.net, [row]).audio
        with weights.applied(plan):
            found = nats(small.net, [row]).audio
        assert torch.equal(nats(small.net, [row]).audio.nan_to_num(), before.nan_to_num())
        with Weights(model, None).applied(plan):
            assert torch.equal(found.nan_to_num(), nats(model.net, [row]).audio.nan_to_num())
        with Weights(model, None).nf4() as sizes:
            assert torch.allclose(nats(model.net, [row]).audio, before, atol=1e-4, equal_nan=True)
    assert sizes["bytes_resident"] == pytest.approx(bytes_resident(small.net), rel=0.001)


# The stage


def test_a_run_screens_all_plans_and_lets_the_named_ones_speak(finished: Path) -> None:
    read = {key: read_csv(finished / f"scores/tones.{name}.csv") for key, name in RAW.items()}
    screened = read["nats"].groupby(["part", "plan", "budget", "seed"]).size()
    assert (screened == 3).all() and len(screened) == 1 + (3 + 6 + 2) + (3 + 1 + 2) + 1
    assert (read["nats"].query("plan == 'intact'")["cosine"] > 0.99999).all()
    assert (read["nats"].query("plan != 'intact'")["cosine"] < 0.99999).all()
    spoken = read["answers"].groupby(["part", "plan", "seed"])["draw"].agg(["nunique", "size"])
    assert spoken.loc[("temporal", "intact", 0)].tolist() == [2, 4]
    assert spoken.loc[("temporal", "uniform", 0)].tolist() == [2, 4]  # the rival of the best
    assert spoken.loc[("temporal", "random", 1)].tolist() == [1, 2]
    assert (read["answers"].groupby("plan")["sure"].first()[["uniform", "random"]] == [1, 0]).all()
    sensitivity = read["sensitivity"]
    assert set(sensitivity["kind"]) == {"tensor", "block"} and (sensitivity["bits"].value_counts().nunique()) == 1
    wide = sensitivity.groupby("bits")["drift"].mean()
    assert wide[2] > wide[3] > wide[4] > 0
    index = read_csv(finished / "lm_quantisation/tones/index.csv")
    assert len(index) == len(screened) - 2  # not the intact model, not NF4
    for file in index["file"]:
        Plan.from_json(json.loads((finished / "lm_quantisation/tones" / file).read_text()))


def test_a_job_that_was_ended_goes_on_and_says_the_same(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object, **_more: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("eqknobs.stages.lm_quantisation.compute.QuantBench.measured", never)
    monkeypatch.setattr("eqknobs.speaking.bench.speak", never)
    again = run(world, tmp_path / "run", Pieces(finished.parent / "pieces"))
    for name in RAW.values():
        file = f"scores/tones.{name}.csv"
        assert (again / file).read_bytes() == (finished / file).read_bytes(), name


def test_tables_are_made_of_the_raw_rows_alone(finished: Path) -> None:
    at = context(finished)
    found = tabulate(at)
    rows, answers = found.tables["lm_quantisation"], read_csv(finished / "scores/tones.lm_quantised_answers.csv")
    one, mine = rows.query("plan == 'random' and seed == 1 and part == 'temporal'").iloc[0], answers.query("seed == 1")
    assert one["answers"] == 2 and one["nll_intact"] == pytest.approx(mine["nll_intact"].mean())
    base = answers.query("plan == 'intact' and draw == 0")
    apart = [part["errors_prompt"].sum() / part["words_prompt"].sum() for part in (mine, base)]
    assert one["delta_wer_prompt"] == pytest.approx(apart[0] - apart[1])
    assert rows.query("answers == 0")["wer_prompt"].isna().all() and rows["cosine"].notna().all()
    small = found.tables["lm_quantisable"].query("plan == 'layer'").iloc[0]
    assert small["bytes"] == rows.query("plan == 'layer'")["bytes"].iloc[0] or small["bound"] > 0.05
    rivals = {(r["a"], r["b"]) for r in found.comparisons if r["measure"] == "cosine"}
    assert {("layer", "inverted"), ("head", "head_inverted"), ("sensitivity", "uniform"), ("block", "random")} <= rivals
    facts = found.facts | {"comparisons": [r | {"p_holm": r["p"], "compared": 1} for r in found.comparisons]}
    lines = findings(at, facts)
    assert {line["topic"] for line in lines} == {"lm_quantisation"}
    assert any(line["text"].startswith("Smallest of") for line in lines)
    strict = Context("tones", at.inputs, {**CFG, "unmeasurable_wer": 0.0}, at.own)
    assert tabulate(strict).tables["lm_quantisable"].empty


def test_how_small_is_the_smallest_down_to_which_the_bound_holds() -> None:
    assert smallest({8: 0.01, 4: 0.05, 3: 0.06, 2: 0.01}) == (4, 0.05)
    assert np.isnan(smallest({4: 0.07, 3: 0.01})[0]) and smallest({4: 0.07, 3: 0.01})[1] == 0.07


def test_the_page_shows_plans_against_bytes(finished: Path) -> None:
    cfg = {**CFG, "targets": ["tones"], "stages": {"lm_quantisation": {"targets": ["tones"]}}}
    write_tables(Inputs.below(finished), cfg, finished / "tables")
    shown = show(context(finished))
    (answer,) = shown["answers"]
    names = [take["name"].split(", ", 1)[-1] for take in answer["takes"]]
    # the inverse is not among those that speak, the uniform plan is the best ones' rival
    assert names == ["intact", "uniform (temporal transformer)", "by layers' probes (temporal transformer)"]
    assert all(take["sound"].startswith("data:audio/mpeg;base64,") for take in answer["takes"]) and answer["told"]
    titles = {figure["title"] for figure in shown["drawn"]}
    assert {"Temporal transformer: cosine of the last layer", "One block alone at 2 bits"} <= titles
    assert len(shown["rows"]["rows"]) == 19 and shown["small"]["rows"]


# The configuration


def test_the_typed_configuration_has_the_keys_of_the_schema() -> None:
    section = schema()["properties"]["lm_quantisation"]
    below = section["properties"]
    ours = {"model", "judges", "seed", "device", "content"}
    for typed, found, more in ((QuantisationCfg, section, ours), (PromptsCfg, below["prompts"], set())):
        known = set(found["properties"]) - {"models"}
        assert set(typed.__annotations__) - more == known
        assert typed.__required_keys__ - more == set(found["required"]) - {"models"}
    assert set(BestCfg.__annotations__) == set(below["best"]["properties"])


def test_checks_say_what_is_missing() -> None:
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())

    def refused(over: dict, message: str) -> None:
        config = merge(copy.deepcopy(default), over)
        with pytest.raises(EqknobsError, match=message):
            check(config)

    refused({"lm_quantisation": {"models": ["tiny-mimi"]}}, "tiny-mimi is of kind mimi, not moshi")
    refused({"lm_layers": None}, "its plans need the probes of tiny-moshi's layers and heads")
    refused({"lm_quantisation": {"budgets": [2]}}, "2 is none of the widths that lie between others")
    refused({"lm_quantisation": {"best": {"budget": 4}}}, "best.budget: 4 is not under budgets")
    check(merge(copy.deepcopy(default), {"lm_layers": None, "lm_quantisation": {"parts": ["whole"]}}))
    check(merge(default, {"lm_quantisation": None}))
