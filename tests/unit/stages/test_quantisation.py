"""Plans of equal bytes, the codec of each plan against the file it would load as, and what tables make of it."""

import json
import math
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from eqknobs.errors import EqknobsError
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.io import file_sha256, read_csv, write_json
from eqknobs.models import load_model
from eqknobs.packing.allocation import Allocator
from eqknobs.packing.files import companions_of, write_packed
from eqknobs.packing.modules import bytes_resident, pack_modules
from eqknobs.packing.plan import Plan, Shape, mean_bits, packable, plan_bytes
from eqknobs.pieces import Pieces
from eqknobs.sound.metrics import mel_distance
from eqknobs.sound.renders import load_clip
from eqknobs.stages.quantisation import checks
from eqknobs.stages.quantisation import tables as quantisation
from eqknobs.stages.quantisation.compute import Network, _Run, make_plans, part_state, render_plans
from eqknobs.stages.quantisation.plans import in_decoder, latent_scores
from helpers.tiny_world import SITE, WIDTH, make_world

OPTIONS = {"group": None, "symmetric": True, "rounding": "mse", "rest": "float16"}
MAKING = {"parts": ["decoder", "codec"], "widths": [2, 4, 8], "budgets": [3], "roundings": ["mse", "nearest"]}
MAKING |= {"group": None, "symmetric": True, "rest": "float16", "keep": [], "random_plans": 2}
MAKING |= {"sensitivity_clips": 1, "segment_seconds": 0.2}
TRYING = {"parts": ["decoder", "codec"], "clips": 2, "heard_clips": 1, "heard_parts": ["codec"]}
TRYING |= {"heard_widths": [4], "heard_budgets": [3], "heard_random": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def maps(world) -> Path:
    values = {"composition": np.linspace(1, 0.1, WIDTH).tolist(), "fisher": np.linspace(0.2, 1, WIDTH).tolist()}
    write_json(world.root / "maps.json", {"maps": values, "chosen": "fisher"})
    return world.root / "maps.json"


@pytest.fixture(scope="module")
def made(world, maps) -> Path:
    """A folder in which both jobs have run."""
    root = world.root / "made"
    pieces = Pieces(root / "pieces")
    make_plans(world.manifest, world.cache, maps, root / "plans", root / "sens.csv", world.cfg | MAKING, pieces)
    tried = (root / "plans", root / "renders", root / "signal.csv", root / "time.csv")
    render_plans(world.manifest, world.cache, *tried, world.cfg | TRYING, pieces)
    return root


# --- plans -------------------------------------------------------------------------------------------------------


def allocator(sizes: list[int], widths: list[int]) -> Allocator:
    state = {f"t{i}": torch.zeros(4, size) for i, size in enumerate(sizes)}
    return Allocator(state, {name: Shape.of(value) for name, value in state.items()}, widths, OPTIONS)


def test_plans_of_one_budget_have_its_bytes(made, world):
    index = read_csv(made / "plans/index.csv")
    mixed = index[index["plan"] != "uniform"]
    assert set(mixed["plan"]) == {"guided", "map", "sensitivity", "inverted", "random"}
    for part, rows in mixed.groupby("part"):
        assert len(rows) == 6  # two of them random
        plans = [Plan.from_json(json.loads((made / "plans" / name).read_text())) for name in rows["file"]]
        assert len({tuple(plan.bits.values()) for plan in plans}) >= 5
        state = part_state(world.model().net, part)
        sizes = np.array([plan_bytes(state, plan) for plan in plans])
        limit = plan_bytes(state, plans[0].with_bits(dict.fromkeys(plans[0].bits, 3)))  # a budget of 3 bits
        assert (sizes <= limit).all() and (sizes > 0.995 * limit).all()
    uniform = index[index["plan"] == "uniform"]
    assert (uniform["bits_mean"] == uniform["budget"]).all()
    assert len(uniform) == 2 * 2 * 3  # parts, roundings, widths


def test_a_plans_file_is_what_compress_takes(made, world):
    index = read_csv(made / "plans/index.csv")
    shapes = {name: tuple(value.shape) for name, value in world.model().net.state_dict().items()}
    for row in index.itertuples():
        plan = Plan.from_json(json.loads((made / "plans" / row.file).read_text()))
        assert mean_bits(shapes, plan) == pytest.approx(row.bits_mean)
        assert all(in_decoder(name) for name in plan.bits) == (row.part == "decoder")


def test_the_wider_tensors_are_those_of_higher_scores():
    allocate = allocator([64] * 9, [2, 3, 4, 5, 6])
    scores = {f"t{i}": float(i) for i in range(9)}
    wider = allocate.by_score(scores, 4).bits
    bits = [wider[f"t{i}"] for i in range(9)]
    assert bits == sorted(bits) and bits[0] == 2 and bits[-1] == 6 and sum(bits) == 9 * 4
    turned = allocate.by_score({name: -score for name, score in scores.items()}, 4).bits
    assert [turned[f"t{i}"] for i in range(9)] == bits[::-1]


def test_measured_plans_are_the_best_of_all():
    allocate = allocator([64, 128, 64, 256], [2, 3, 4])
    rng = np.random.default_rng(3)
    for mean in (2.5, 3, 3.5):
        scale = rng.random(4) * 100
        damages = {f"t{i}": {w: float(scale[i] * 4.0**-w) for w in (2, 3, 4)} for i in range(4)}
        limit = allocate.budget(mean)
        plan = allocate.by_damage(damages, mean)
        assert allocate.bytes(plan.bits) <= limit

        def total(bits, damages=damages):
            return sum(damages[name][width] for name, width in bits.items())

        every = [dict(zip(damages, widths, strict=True)) for widths in product((2, 3, 4), repeat=4)]
        best = min(total(bits) for bits in every if allocate.bytes(bits) <= limit)
        # Greedy on the hull misses the best by what a last step costs at most, and beats uniform's interpolation.
        assert best <= total(plan.bits) <= best + max(d[2] - d[3] for d in damages.values())


def test_a_hull_steps_over_a_width_that_is_of_no_use():
    allocate = allocator([64, 64], [2, 3, 4])
    damages = {"t0": {2: 10.0, 3: 9.9, 4: 0.0}, "t1": {2: 4.0, 3: 1.0, 4: 0.5}}
    assert allocate.by_damage(damages, 3).bits == {"t0": 4, "t1": 2}  # not 3 and 3


def test_a_budget_lies_on_uniforms_line():
    allocate = allocator([640, 64], [2, 4, 8])
    at = {bits: allocate.bytes(dict.fromkeys(allocate.shapes, bits)) for bits in (2, 3, 4)}
    assert allocate.budget(3) == at[3] and allocate.budget(2.5) == round((at[2] + at[3]) / 2)
    plan = allocate.plan({"t0": 2, "t1": 8})
    assert plan_bytes(allocate.state, plan) - at[2] == allocate.cost("t1", 8)


def test_scores_follow_the_latents_that_a_tensor_makes_and_reads():
    width = 4
    values = np.array([1.0, 0.5, 0.0, 0.0])
    makes, reads = torch.zeros(width, 7), torch.zeros(6, width)
    makes[0], makes[2] = 1.0, 1.0  # half of its weight makes dimension 0
    reads[:, 1] = 2.0
    up = torch.zeros(width, 1, 3)  # a depthwise convolution: only its outputs are the latents
    up[3] = 1.0
    other = torch.ones(5, 6)
    tensors = {"far": other, "makes": makes, "between": other, "reads": reads, "up": up, "last": other}
    scores = latent_scores(values, tensors, {name: Shape.of(value) for name, value in tensors.items()})
    assert scores == {"far": 0.5, "makes": 0.5, "between": 0.5, "reads": 0.5, "up": 0.0, "last": 0.0}
    both = torch.eye(width)
    assert latent_scores(values, {"a": both}, {"a": Shape.of(both)})["a"] == pytest.approx(values.mean())
    turned = {"t": torch.zeros(9, width, 2)}  # a transposed convolution that makes latents
    turned["t"][:, 1] = 1
    assert latent_scores(values, turned, {"t": Shape.of(turned["t"], 1)})["t"] == 0.5
    assert latent_scores(values, {"x": other}, {"x": Shape.of(other)}) == {"x": values.mean()}


def test_what_a_listener_needs(world):
    """Other tensors than the decoder's change nothing that is decoded from tokens, each of the decoder's does."""
    model = world.model()
    tokens = model.tokens(load_clip(model, world.open(), next(world.clips("val").itertuples())).acts, SITE)
    before = model.decode_tokens(tokens, 8000)
    network = Network(model)
    for name in packable(model.net):
        plan = Plan.of(packable(model.net), {name: 2}, **OPTIONS)
        with network.one(plan, name):
            same = np.array_equal(model.decode_tokens(tokens, 8000), before)
        assert same != in_decoder(name), name
    assert np.array_equal(model.decode_tokens(tokens, 8000), before)  # all are back


def test_without_maps_there_are_no_plans_by_maps(world, tmp_path):
    cfg = world.cfg | MAKING | {"parts": ["decoder"], "segment_seconds": 0.1}
    make_plans(world.manifest, world.cache, None, tmp_path / "plans", tmp_path / "s.csv", cfg)
    assert set(read_csv(tmp_path / "plans/index.csv")["plan"]) == {"uniform", "sensitivity", "random"}


def test_sensitivity_is_of_each_tensor_alone(made, world):
    rows = read_csv(made / "sens.csv")
    model = world.model()
    shapes = packable(model.net)
    assert set(rows.loc[rows["part"] == "codec", "tensor"]) == set(shapes)
    assert set(rows.loc[rows["part"] == "decoder", "tensor"]) == {name for name in shapes if in_decoder(name)}
    clip = load_clip(model, world.open(), next(r for r in world.clips("val").itertuples() if r.id == rows["id"][0]))
    samples = round(0.2 * model.sample_rate)
    wav = clip.wav[(len(clip.wav) - samples) // 2 :][:samples]

    def sound():
        return model.decode_tokens(model.tokens(model.encode(wav, SITE), SITE, 4), samples)

    intact = sound()
    name = next(name for name in shapes if not in_decoder(name) and name.endswith("layers.0.mlp.fc1.weight"))
    plan = Plan.of(shapes, {name: 2}, **OPTIONS)
    model.net.state_dict()[name].copy_(plan.fake(name, model.net.state_dict()[name]))
    found = rows[(rows["part"] == "codec") & (rows["tensor"] == name) & (rows["bits"] == 2)]["mel_distance"].item()
    assert found == pytest.approx(mel_distance(intact, sound(), model.sample_rate), rel=1e-6)


# --- renders -----------------------------------------------------------------------------------------------------


def test_a_condition_is_bit_for_bit_the_codec_that_its_packed_folder_loads_as(made, world, tmp_path):
    index = read_csv(made / "plans/index.csv").set_index("condition")
    signal = read_csv(made / "signal.csv")
    plan = Plan.from_json(json.loads((made / "plans" / index.loc["codec.guided.3.mse", "file"]).read_text()))
    path = write_packed(tmp_path / "packed", world.model().net, plan, companions_of(world.root / "model"))
    loaded = load_model(world.cfg["model"] | {"path": str(tmp_path / "packed")})
    rows = signal[signal["condition"] == "codec.guided.3.mse"]
    assert (rows["bytes"] == path.stat().st_size).all()
    intact = world.model()
    for row in rows.itertuples():
        clip = load_clip(intact, world.open(), next(r for r in world.clips("test").itertuples() if r.id == row.id))
        acts = loaded.encode(clip.wav, SITE)
        tokens = loaded.tokens(acts, SITE, 4)
        wav = loaded.decode_tokens(tokens, len(clip.wav))
        assert row.mel_distance == pytest.approx(mel_distance(clip.wav, wav, 16000), rel=1e-8)
        assert row.tokens_flipped == (tokens != intact.tokens(clip.acts, SITE, 4)).sum()
        assert row.latent_sq_error == pytest.approx(np.square(acts - clip.acts, dtype=float).sum(), rel=1e-8)
    network = Network(world.model())
    with network.loaded(plan, "codec", tmp_path):
        held = network.net.state_dict()
        assert all(torch.equal(held[name], value) for name, value in loaded.net.state_dict().items())


def test_of_the_decoder_alone_the_sender_is_intact(made):
    signal = read_csv(made / "signal.csv")
    decoder = signal[signal["part"] == "decoder"]
    assert (decoder["tokens_flipped"] == 0).all() and (decoder["latent_sq_error"] == 0).all()
    codec = signal[(signal["part"] == "codec") & (signal["plan"] != "none")]
    assert (codec["latent_sq_error"] > 0).all() and (codec["tokens_flipped"] > 0).any()
    none = signal[signal["plan"] == "none"]
    assert (none["tokens_flipped"] == 0).all()
    assert none.groupby("id")["mel_distance"].nunique().eq(1).all()  # both parts are the same sound
    bytes_of = signal.groupby(["part", "plan", "budget", "rounding"], dropna=False)["bytes"].first()
    assert bytes_of["decoder"].max() < bytes_of["codec"].max()


def test_what_is_heard(made):
    index = read_csv(made / "renders/index.csv")
    plans = ["none", "uniform", "sensitivity", "guided", "inverted", "map", "random"]
    assert set(index["plan"]) == set(plans) and (index["part"] == "codec").all() and index["judged"].all()
    assert len(index) == len(plans) and all((made / "renders" / file).is_file() for file in index["file"])
    times = read_csv(made / "time.csv")
    assert set(times["plan"]) == set(plans) - {"none"} and (times[["decode_seconds", "decode_seconds_full"]] > 0).all(
        axis=None
    )


def test_memory_is_what_a_network_with_packed_linears_holds(made, world):
    signal = read_csv(made / "signal.csv").drop_duplicates("condition").set_index("condition")
    plan = Plan.from_json(json.loads((made / "plans/codec.uniform.4.mse.json").read_text()))
    network = Network(world.model())
    linears = network.linears(plan)
    assert linears.bits and all(isinstance(network.net.get_submodule(n[:-7]), nn.Linear) for n in linears.bits)
    before = bytes_resident(network.net)
    pack_modules(network.net, linears)
    saved = before - bytes_resident(network.net)
    assert saved > 0
    at = signal["bytes_resident"]
    assert at["codec.none"] - at["codec.uniform.4.mse"] == saved


def test_packing_for_time_leaves_the_network_as_it_was(made, world):
    network = Network(world.model())
    plan = Plan.from_json(json.loads((made / "plans/codec.uniform.4.mse.json").read_text()))
    before = {name: value.clone() for name, value in network.net.state_dict().items()}
    tokens = np.zeros((4, 5), dtype=np.int64)
    assert network.packed_seconds(plan, tokens, 4000) > 0
    after = network.net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def test_again_everything_is_the_same_and_nothing_is_packed(made, world, monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("packed or decoded again")

    (made / "again").mkdir()
    shutil.copytree(made / "renders", made / "again/renders")
    monkeypatch.setattr(Network, "write", never)
    out = (made / "plans", made / "again/renders", made / "again/signal.csv", made / "again/time.csv")
    render_plans(world.manifest, world.cache, *out, world.cfg | TRYING, Pieces(made / "pieces"))
    for name in ("signal.csv", "time.csv", "renders/index.csv"):
        assert (made / name).read_bytes() == (made / "again" / name).read_bytes()
    for file in read_csv(made / "renders/index.csv")["file"]:
        assert file_sha256(made / "renders" / file) == file_sha256(made / "again/renders" / file)


def test_shards_leave_what_the_whole_job_then_finds(made, world, monkeypatch):
    out = (made / "plans", made / "shards/renders", made / "shards/signal.csv", made / "shards/time.csv")
    pieces = Pieces(made / "shards/pieces")
    for which in (1, 0):
        render_plans(world.manifest, world.cache, *out, world.cfg | TRYING | {"shard": (which, 2)}, pieces)
    assert not out[1].exists() and not out[2].exists()
    measured = []
    monkeypatch.setattr(_Run, "measured", lambda self: measured.append(1))
    render_plans(world.manifest, world.cache, *out, world.cfg | TRYING, pieces)
    assert not measured and (made / "signal.csv").read_bytes() == out[2].read_bytes()
    for file in ["index.csv", *read_csv(made / "renders/index.csv")["file"]]:
        assert (made / "renders" / file).read_bytes() == (out[1] / file).read_bytes()
    assert [path.name for path in out[1].parent.glob("*renders*")] == ["renders"]


def test_the_parts_of_a_network_make_it_up(world):
    net = world.model().net
    assert set(part_state(net, "decoder")) < set(part_state(net, "codec"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [2.5]}, "2.5 does not lie between the widths, 3 and 8"),
        ({"heard_widths": [5]}, "quantisation.heard_widths: 5 is not under quantisation.widths"),
        ({"heard_budgets": [5.5]}, "quantisation.heard_budgets: 5.5 is not under quantisation.budgets"),
        ({"parts": ["decoder"]}, "quantisation.heard_parts: codec is not under quantisation.parts"),
    ],
)
def test_checks(change, message):
    own = {"widths": [3, 8], "budgets": [4], "parts": ["codec"], "codebooks": 4}
    own |= {"heard_widths": [8], "heard_budgets": [4], "heard_parts": ["codec"]}
    config = {"run": {"targets": ["m.encoder"]}, "models": {"m": {"kind": "dac", "path": "x"}}}
    checks.check(config | {"quantisation": None})
    checks.check(config | {"quantisation": own})
    with pytest.raises(EqknobsError, match=message):
        checks.check(config | {"quantisation": own | change})


# --- tables ------------------------------------------------------------------------------------------------------


def curve(points: list[tuple[float, float]], plan: str = "uniform", clips: int = 6) -> pd.DataFrame:
    """Rows of plans (bytes, mel distance): the clips differ in level, not in what a plan costs them."""
    rows = [
        {"id": f"c{i}", "speaker": f"s{i}", "split": "test", "part": "codec", "plan": plan, "rounding": "mse"}
        | {
            "condition": f"{plan}{size}",
            "budget": size / 100,
            "bytes": size,
            "mel_distance": value + i,
            "bits_mean": 3.0,
        }
        for size, value in points
        for i in range(clips)
    ]
    return pd.DataFrame(rows)


def test_uniforms_curve_between_two_plans_is_straight_in_log_bytes():
    rows = curve([(100, 9.0), (400, 5.0), (1600, 4.0)])
    found = quantisation.at_bytes(rows, 200, quantisation.MEL_DISTANCE)
    assert found is not None
    np.testing.assert_allclose(np.sort(found["mel_distance"]), 7.0 + np.arange(6))
    on = quantisation.at_bytes(rows, 403, quantisation.MEL_DISTANCE)
    assert on is not None and on["mel_distance"].min() == 5.0
    assert quantisation.at_bytes(rows, 50, quantisation.MEL_DISTANCE) is None
    assert quantisation.at_bytes(rows, 5000, quantisation.MEL_DISTANCE) is None
    assert quantisation.at_bytes(rows, 200, quantisation.DNSMOS) is None


def test_bytes_needed():
    sizes = np.array([1600.0, 400.0, 100.0])
    assert quantisation.bytes_needed(sizes, np.array([0.0, 0.1, 0.3]), 0.2) == pytest.approx(200)
    assert quantisation.bytes_needed(sizes, np.array([0.0, 0.4, 0.1]), 0.2) == pytest.approx(800)  # not what dips again
    assert quantisation.bytes_needed(sizes, np.array([0.0, 0.1, 0.2]), 0.2) == 100
    assert math.isnan(quantisation.bytes_needed(sizes, np.array([0.3, 0.1, 0.1]), 0.2))


def test_power_grows_with_precision():
    assert quantisation.power(-0.05, 0.05, 0.0) == pytest.approx(0.05)
    assert quantisation.power(-0.035, 0.035, 0.05) == pytest.approx(0.8, abs=0.01)  # 2.8 standard errors
    assert math.isnan(quantisation.power(0.0, 0.0, 0.05))


AT = Context("t", Inputs(".", []), {"bootstrap": 200, "seed": 0}, {"rounding": "mse"})


def test_equal_quality_takes_the_stricter_of_both_limits():
    none = curve([(6400, 4.0)], "none").assign(rounding=None, budget=np.nan)
    rows = pd.concat([none, curve([(1600, 4.0), (400, 4.1), (100, 9.0)]), curve([(200, 4.0)], "guided")])
    rows["speaker_similarity"] = 0.9
    rows.loc[rows["bytes"] <= 200, "speaker_similarity"] = 0.7
    rows.loc[rows["bytes"] <= 100, "speaker_similarity"] = 0.1
    found = quantisation.equal_quality(AT, rows, False).set_index("plan")
    uniform, guided = found.loc["uniform"], found.loc["guided"]
    assert uniform["bytes_full"] == 6400 and uniform["clips"] == uniform["heard_clips"] == 6
    assert uniform["bytes_needed_mel"] == pytest.approx(400 * 0.25 ** (0.1 / 4.9))
    assert uniform["bytes_needed_similarity"] == pytest.approx(400 * 0.25 ** (0.02 / 0.8))
    assert uniform["bytes_needed"] == max(uniform["bytes_needed_mel"], uniform["bytes_needed_similarity"])
    assert guided["bytes_needed_mel"] == pytest.approx(200 * 0.5 ** (0.2 / 5))
    assert guided["bytes_needed"] == guided["bytes_needed_similarity"] > 200
    assert (found["bytes_needed_low"] <= found["bytes_needed"] * (1 + 1e-9)).all()


def test_claims_are_held_against_uniforms_curve_random_and_inverted():
    mixed = [curve([(200, 6.0)], "guided"), curve([(200, 5.0)], "inverted")]
    for seed, value in ((0, 8.0), (1, 9.0)):
        mixed.append(curve([(200, value)], "random").assign(seed=seed))
    rows = pd.concat([curve([(100, 9.0), (400, 5.0)]), *mixed])
    found = {record["b"]: record for record in quantisation._compared(AT, rows, False)}
    assert {name: record["difference"] for name, record in found.items()} == pytest.approx(
        {"uniform": -1.0, "random": -2.5, "inverted": 1.0}
    )
    assert [found[name]["verdict"] for name in ("uniform", "random", "inverted")] == ["better", "better", "worse"]
    few = rows[rows["id"].isin([f"c{i}" for i in range(quantisation.FEWEST - 1)])]
    assert quantisation._compared(AT, few, False) == []
