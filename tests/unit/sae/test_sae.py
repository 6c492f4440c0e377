import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE, VARIANTS, make_config, new_sae, train_grid, train_sae, training
from eqknobs.sae.rms_l1 import rms_normalise
from eqknobs.sae.training import Trainer, epoch_order
from eqknobs.sae.unit_norm import geometric_median
from eqknobs.stages.saes import compute
from eqknobs.stages.saes.compute import match_features, score_saes
from helpers.synthetic import write_cache

D, PLANTED, ACTIVE = 24, 48, 3
MEAN, STD = np.linspace(-8, 8, D), np.linspace(0.5, 4, D)
TOPK = {"variant": "topk", "d_sae": 64, "k": ACTIVE, "aux_k": 16, "dead_epochs": 2}
TOPK |= {"lr": 4e-3, "batch_size": 128, "epochs": 12}
BATCHTOPK = TOPK | {"variant": "batchtopk"}
JUMPRELU = {"variant": "jumprelu", "d_sae": 64, "l0": ACTIVE, "lr": 4e-3, "batch_size": 128, "epochs": 12}
RMS = {"variant": "rms_l1", "d_sae": 64, "l1": 0.05, "l1_on": "h", "lr": 2e-3, "batch_size": 256, "epochs": 6}
SPEAKERS = [("a", "train", 1500), ("b", "train", 1500), ("c", "val", 400), ("d", "test", 300), ("e", "test", 200)]
UTTERANCES = [(f"{s}-0", s, split, frames) for s, split, frames in SPEAKERS]


def planted_acts(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse non-negative combinations of unit directions, then stretched and shifted like real latents."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((PLANTED, D))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    frames = sum(utterance[3] for utterance in UTTERANCES)
    codes = np.zeros((frames, PLANTED))
    for row in codes:
        row[rng.choice(PLANTED, ACTIVE, replace=False)] = rng.uniform(0.5, 1.5, ACTIVE)
    return (codes @ directions) * STD * 5 + MEAN, directions


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Caches with planted and with structure-free latents, and topk SAEs trained on them."""
    folder = tmp_path_factory.mktemp("sae")
    acts, _ = planted_acts()
    write_cache(folder / "planted.h5", acts, UTTERANCES)
    # Same marginals and covariances' diagonal, but no directions: each dimension is shuffled over frames by itself.
    control = np.random.default_rng(1).permuted(acts, axis=0)
    write_cache(folder / "control.h5", control, UTTERANCES)
    for name, seed in (("planted", 0), ("planted", 1), ("control", 0)):
        train_sae(folder / f"{name}.h5", folder / name / f"seed{seed}", TOPK, seed)
    return folder


def recovery(folder: Path) -> float:
    """Mean cosine of each planted direction, z-scored, with its nearest decoder direction."""
    _, directions = planted_acts()
    sae = SAE.load(folder)
    wanted = directions * STD * 5 / sae.std.numpy()
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    rows = sae.W_dec.numpy() / np.linalg.norm(sae.W_dec.numpy(), axis=1, keepdims=True)
    return float((wanted @ rows.T).max(1).mean())


def trainer(folder: Path, cfg: dict, epochs: int | None = None) -> tuple[Trainer, np.ndarray]:
    """A trainer on the planted latents and their train rows."""
    acts, _ = planted_acts()
    rows = np.arange(3000)
    config = make_config({"d_in": D} | cfg)
    steps = -(-len(rows) // config.batch_size) * (epochs or config.epochs)
    found = Trainer(config, acts[rows].mean(0), acts[rows].std(0), len(rows), steps)
    found.start(acts[rows].astype(np.float32))
    return found, acts.astype(np.float32)


def run_epoch(found: Trainer, acts: np.ndarray, epoch: int) -> None:
    for batch in epoch_order(np.arange(3000), found.config.seed, epoch, found.config.batch_size):
        found.step(torch.from_numpy(acts[batch]))
    found.end_epoch(acts[:3000], acts[3000:3400])


def test_topk_recovers_planted_directions_above_the_control(trained):
    found, chance = recovery(trained / "planted/seed0"), recovery(trained / "control/seed0")
    assert found > 0.85
    assert chance < 0.7
    log = pd.read_csv(trained / "planted/seed0/log.csv")
    assert list(log) == "epoch step loss fvu l0 dead_share val_fvu val_l0".split()
    assert len(log) == TOPK["epochs"] and log["val_fvu"].iloc[-1] < 0.25
    assert (log["val_l0"] <= ACTIVE).all()


def test_topk_form(trained):
    sae = SAE.load(trained / "planted/seed0")
    assert sae.W_dec.norm(dim=1).numpy() == pytest.approx(np.ones(64), abs=1e-5)
    acts, _ = planted_acts()
    code = sae.encode(acts[:50])
    assert isinstance(code, np.ndarray) and code.dtype == np.float32 and code.shape == (50, 64)
    assert (code >= 0).all() and ((code > 0).sum(1) <= ACTIVE).all()
    z = (acts[:50] - sae.mean.numpy()) / sae.std.numpy()
    h = np.maximum((z - sae.b_dec.numpy()) @ sae.W_enc.numpy().T + sae.b_enc.numpy(), 0)
    h[h < np.sort(h, axis=1)[:, -ACTIVE, None]] = 0
    assert code == pytest.approx(h, abs=1e-3)
    assert isinstance(sae.encode(torch.tensor(acts[:2])), torch.Tensor)


@pytest.mark.parametrize(
    ("cfg", "least"),
    [(BATCHTOPK, 0.85), (JUMPRELU, 0.8), (RMS | {"l1": 2, "lr": 4e-3, "batch_size": 128, "epochs": 30}, 0.9)],
)
def test_every_variant_recovers_planted_directions_above_the_control(trained, tmp_path, cfg, least):
    for name in ("planted", "control"):
        train_sae(trained / f"{name}.h5", tmp_path / name, cfg, 0)
    found, chance = recovery(tmp_path / "planted"), recovery(tmp_path / "control")
    assert found > least
    assert chance < found - 0.1


def test_start_is_gao(trained):
    found, acts = trainer(trained, TOPK)
    sae = found.sae
    assert torch.equal(sae.W_enc, sae.W_dec * sae._encoder_start)
    z = (acts[:3000] - sae.mean.numpy()) / sae.std.numpy()
    distance = [np.linalg.norm(z - y, axis=1).sum() for y in (sae.b_dec.detach().numpy(), 0 * z[0])]
    assert distance[0] <= distance[1]
    assert found.optimiser.param_groups[0]["eps"] == 6.25e-10
    # The gradient along a decoder direction must not reach Adam.
    seen = []
    step = found.optimiser.step
    found.optimiser.step = lambda: (seen.append((sae.W_dec.grad * sae.W_dec).sum(1).abs().max()), step())
    run_epoch(found, acts, 0)
    assert max(seen) < 1e-5


@pytest.mark.parametrize(
    "cfg",
    [TOPK, BATCHTOPK, JUMPRELU, JUMPRELU | {"bandwidth": 0.1}],
    ids=["topk", "batchtopk", "jumprelu", "jumprelu, thin"],
)
def test_the_sparse_step_equals_the_dense_one(trained, cfg, monkeypatch):
    """The same loss and gradients, AuxK included, whichever products compute them."""
    found, acts = trainer(trained, cfg | {"aux_k": 8})
    found.sae.b_enc.data += 0.01 * torch.arange(64)
    z = found.sae._normalised(torch.from_numpy(acts[:300]))
    dead = torch.tensor([3, 5, 9, 60])
    results = []
    for dense in (False, True):
        if dense:
            monkeypatch.setattr(type(found.sae), "_select", lambda self, h: None)
        found.optimiser.zero_grad()
        step = found.sae._step(z, dead)
        step.loss.backward()
        grads = [p.grad.clone() for p in found.sae.parameters()]
        results.append([step.loss.detach(), step.squared, torch.tensor(step.active), step.fired.double(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [50, 300, 2000])
def test_batchtopk_thresholds_are_calibrated_however_short_the_run(steps):
    """Peers average thresholds over steps, and are far off after short runs (L0 86 in place of 8)."""
    found, acts = trainer(None, BATCHTOPK | {"k": 8, "lr": 1e-3}, epochs=-(-steps // 24))
    generator = np.random.default_rng(0)
    for _ in range(steps):
        found.step(torch.from_numpy(acts[generator.integers(0, 3000, 128)]))
    found.end_epoch(acts[:3000], acts[:3000])
    assert found.log[-1]["val_l0"] == pytest.approx(8, rel=0.02)


def test_jumprelu_reaches_its_target_l0(trained, tmp_path):
    for target in (3, 6):
        train_sae(trained / "planted.h5", tmp_path / str(target), JUMPRELU | {"l0": target}, 0)
        log = pd.read_csv(tmp_path / str(target) / "log.csv")
        assert log["l0"].iloc[-1] == pytest.approx(target, rel=0.1)
        assert log["val_l0"].iloc[-1] == pytest.approx(target, rel=0.2)
        sae = SAE.load(tmp_path / str(target))
        assert (sae.threshold >= 0).all() and sae.threshold.dtype == torch.float32
        code = sae.encode(planted_acts()[0][:200])
        assert ((code == 0) | (code > sae.threshold.numpy())).all()


def test_a_grid_shares_the_pass_and_equals_single_runs(trained, tmp_path):
    cfg = TOPK | {"epochs": 3}
    train_grid(trained / "planted.h5", tmp_path / "grid", cfg | {"grid": {"d_sae": [32, 64], "k": [2, 4]}}, 0)
    front = pd.read_csv(tmp_path / "grid/front.csv")
    assert list(front) == ["d_sae", "k", "val_fvu", "val_l0", "dead_share"] and len(front) == 4
    assert sorted(p.name for p in (tmp_path / "grid").iterdir() if p.is_dir()) == sorted(
        f"d_sae{d}.k{k}" for d in (32, 64) for k in (2, 4)
    )
    train_sae(trained / "planted.h5", tmp_path / "one", cfg | {"d_sae": 32, "k": 4}, 0)
    name = "sae.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "grid/d_sae32.k4" / name).read_bytes()
    assert front["val_fvu"].iloc[3] < front["val_fvu"].iloc[0]
    with pytest.raises(EqknobsError, match="one batch_size"):
        train_grid(trained / "planted.h5", tmp_path / "bad", cfg | {"grid": {"batch_size": [32, 64]}}, 0)


def test_logging_does_not_change_training(trained):
    """A peer's logging changes its training state; here an epoch ended ten times leaves the same weights."""
    weights = []
    for times in (1, 10):
        found, acts = trainer(trained, BATCHTOPK)
        for epoch in range(2):
            run_epoch(found, acts, epoch)
            for _ in range(times - 1):
                found._evaluate(acts[3000:3400])
                found.end_epoch(acts[:3000], acts[3000:3400])
        weights.append([p.detach().clone() for p in found.sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_geometric_median_resists_outliers():
    points = torch.zeros(101, 2)
    points[:10] = 1000.0
    assert geometric_median(points).norm() < 1 < points.mean(0).norm()


@pytest.mark.parametrize("cfg", [TOPK, BATCHTOPK], ids=["topk", "batchtopk"])
def test_auxk_revives_dead_features_within_an_epoch(trained, cfg):
    """Features pushed far below zero never fire by themselves; the dead window is counted in epochs."""
    fired = {}
    for aux_k in (0, 16):
        found, acts = trainer(trained, cfg | {"aux_k": aux_k, "batch_size": 64}, epochs=14)
        found.sae.b_enc.data[32:] = -2.5 * found.sae._encoder_start
        run_epoch(found, acts, 0)
        assert found.dead().sum() == 0  # one epoch is within the window of two
        run_epoch(found, acts, 1)
        dead = found.dead()
        assert dead.sum() > 15
        run_epoch(found, acts, 2)
        fired[aux_k] = (~found.dead())[dead].double().mean().item()
    assert fired[16] > 0.5 > fired[0]


def test_the_normaliser_is_part_of_the_artefact(trained):
    """The blog's bug: an SAE trained on z-scored latents met raw ones and gave mush.

    `encode` takes raw latents and is the only way in; what the bug did is reproduced through the private core.
    """
    sae = SAE.load(trained / "planted/seed0")
    acts, _ = planted_acts()
    raw = acts[-500:]

    def fvu(reconstruction: np.ndarray) -> float:
        z = (raw - sae.mean.numpy()) / sae.std.numpy()
        z_hat = (reconstruction - sae.mean.numpy()) / sae.std.numpy()
        return float(((z - z_hat) ** 2).sum() / (z**2).sum())

    assert fvu(sae(raw)) < 0.25
    assert fvu(sae.decode(sae.encode(raw))) < 0.25
    tensor = torch.tensor(raw, dtype=torch.float32)
    bug = sae._reconstruct(sae._code(tensor)) * sae.std + sae.mean
    assert fvu(bug.numpy()) > 1.0
    assert fvu(sae((raw - MEAN) / STD)) > 0.5  # z-scoring twice does not go unnoticed either
    for kind in (SAE, *VARIANTS.values()):
        public = {name for name in dir(kind) if not name.startswith("_")} - set(dir(torch.nn.Module))
        assert public <= {"encode", "decode", "save", "load", "Config", "config"}


def test_a_file_without_its_normaliser_is_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    source = trained / "planted/seed0"
    tensors = load_file(source / "sae.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file({k: v for k, v in tensors.items() if k != "std"}, tmp_path / "sae.safetensors")
    with pytest.raises(EqknobsError, match="normaliser"):
        SAE.load(tmp_path)
    save_file(tensors | {"std": torch.zeros(D)}, tmp_path / "sae.safetensors")
    with pytest.raises(EqknobsError, match="std above 0"):
        SAE.load(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(EqknobsError, match="not an SAE"):
        SAE.load(tmp_path)
    with pytest.raises(EqknobsError, match="not an SAE"):
        SAE.load(tmp_path / "missing")
    with pytest.raises(EqknobsError, match="width 7"):
        SAE.load(source).encode(np.zeros((2, 7)))


def test_rms_l1(trained, tmp_path):
    out = {}
    for on, l1 in (("h", 0.0), ("h", 0.05), ("f", 0.5)):
        folder = tmp_path / f"{on}{l1}"
        train_sae(trained / "planted.h5", folder, RMS | {"l1": l1, "l1_on": on}, 0)
        out[on, l1] = pd.read_csv(folder / "log.csv")
        assert json.loads((folder / "config.json").read_text())["l1_on"] == on
    plain = out["h", 0.0]
    assert plain["val_fvu"].iloc[-1] < 0.2 < plain["fvu"].iloc[0]
    assert out["f", 0.5]["val_l0"].iloc[-1] < plain["val_l0"].iloc[-1]
    sae = SAE.load(folder)
    code = sae.encode(planted_acts()[0][:100])
    assert (code**2).mean(1) == pytest.approx(np.ones(100), abs=1e-4)
    # f ignores the scale of h (which is why an L1 on h can be dodged); the eps only matters for a silent code.
    h = torch.rand(4, 64)
    assert torch.allclose(rms_normalise(h), rms_normalise(7 * h), atol=1e-4)
    assert torch.equal(rms_normalise(torch.zeros(1, 64)), torch.zeros(1, 64))


@pytest.mark.parametrize("cfg", [TOPK, BATCHTOPK, JUMPRELU, RMS], ids=lambda cfg: cfg["variant"])
def test_a_killed_run_resumes_to_the_same_bytes(trained, tmp_path, monkeypatch, cfg):
    cfg = cfg | {"epochs": 5}
    train_sae(trained / "planted.h5", tmp_path / "whole", cfg, 3)

    class Killed(BaseException):
        pass

    save = training._save_checkpoint

    def dying(path, state):
        save(path, state)
        if len(state[0]["log"]) == 3:
            raise Killed

    monkeypatch.setattr(training, "_save_checkpoint", dying)
    with pytest.raises(Killed):
        train_sae(trained / "planted.h5", tmp_path / "cut", cfg, 3)
    assert not (tmp_path / "cut").exists() and len(list(tmp_path.glob("cut.checkpoint-*.pt"))) == 1
    monkeypatch.setattr(training, "_save_checkpoint", save)
    epochs = []
    original = training.epoch_order
    monkeypatch.setattr(training, "epoch_order", lambda *a: (epochs.append(a[2]), original(*a))[1])
    train_sae(trained / "planted.h5", tmp_path / "cut", cfg, 3)
    assert epochs == [3, 4]
    for name in ("sae.safetensors", "config.json", "log.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob("*.pt"))


def test_a_checkpoint_of_another_config_is_not_used(trained, tmp_path):
    stale = tmp_path / "out.checkpoint-000000000000.pt"
    stale.write_bytes(b"of an older config")
    train_sae(trained / "planted.h5", tmp_path / "out", RMS | {"epochs": 1}, 0)
    assert not stale.exists() and (tmp_path / "out/sae.safetensors").exists()


def test_scores(trained, tmp_path):
    folders = {"topk": {seed: trained / f"planted/seed{seed}" for seed in (0, 1)}}
    folders["odd"] = {0: trained / "planted/seed0", 1: trained / "control/seed0"}
    folders["one"] = {0: trained / "planted/seed0"}
    score_saes(trained / "planted.h5", folders, tmp_path / "s.csv", tmp_path / "s.json", {"seed": 0})
    scores, details = pd.read_csv(tmp_path / "s.csv"), json.loads((tmp_path / "s.json").read_text())
    rows = scores[(scores["sae"] == "topk") & (scores["seed"] == 0)]
    assert list(rows["id"]) == ["c-0", "d-0", "e-0"] and list(rows["split"]) == ["val", "test", "test"]
    sae, acts = SAE.load(folders["topk"][0]), planted_acts()[0]
    z = (acts - sae.mean.numpy()) / sae.std.numpy()
    z_hat = (sae(acts) - sae.mean.numpy()) / sae.std.numpy()
    val = slice(3000, 3400)
    assert rows["sq_error"].iloc[0] == pytest.approx(((z - z_hat)[val] ** 2).sum(), rel=1e-4)
    assert rows["sq_total"].iloc[0] == pytest.approx((z[val] ** 2).sum(), rel=1e-4)
    assert rows["l0_sum"].iloc[0] == (sae.encode(acts[val]) > 0).sum()
    firing = (sae.encode(acts[val]) > 0).mean(0)
    detail = details["saes"]["topk"]["0"]
    assert detail["dead_share"] == (firing == 0).mean() and detail["frames"] == 400
    histogram, _ = np.histogram(np.log10(firing[firing > 0]), bins=detail["density"]["log10_edges"])
    assert detail["density"]["counts"] == histogram.tolist()
    same, other = details["cross_seed"]["topk"], details["cross_seed"]["odd"]
    assert same["cosine"] > 0.75 > other["cosine"] and same["iou"] > 2 * same["iou_null"] > 0
    assert same["iou"] > same["iou_untrained"] + 0.1
    assert same["cosine_p"] == same["iou_p"] == 0.01
    assert other["cosine"] < same["cosine"] - 0.15
    assert details["cross_seed"]["one"] is None


def test_scores_are_kept_by_what_an_sae_is(trained, tmp_path, monkeypatch):
    folders = {"topk": {seed: trained / f"planted/seed{seed}" for seed in (0, 1)}}
    made, pieces = [], Pieces(tmp_path / "pieces")
    for name in ("_scored", "match_features"):
        own = getattr(compute, name)
        monkeypatch.setattr(compute, name, lambda *args, name=name, own=own: made.append(name) or own(*args))

    def score(out, saes, store=pieces, **cfg):
        made.clear()
        score_saes(
            trained / "planted.h5", saes, tmp_path / f"{out}.csv", tmp_path / f"{out}.json", {"seed": 0} | cfg, store
        )
        return (tmp_path / f"{out}.csv").read_bytes() + (tmp_path / f"{out}.json").read_bytes(), made.copy()

    plain, names = score("plain", folders, None)
    assert names == ["_scored", "_scored", "match_features"] and score("first", folders) == (plain, names)
    assert score("again", folders) == (plain, [])
    assert score("renamed", {"other": folders["topk"]})[1] == []
    assert score("one", {"topk": {0: folders["topk"][0]}})[1] == ["match_features"]
    assert score("seeded", folders, seed=1)[1] == ["match_features"]
    assert score("coded", folders, content={"code": "other"})[1] == names
    more = {"topk": folders["topk"] | {2: trained / "control/seed0"}}
    assert score("more", more)[1] == ["_scored", "match_features"]


def test_matching_says_chance_when_it_is_chance(trained):
    """Two SAEs that were never trained share nothing: their cosine lies in its null, their match is the baseline."""
    with ActivationCache(trained / "planted.h5") as cache:
        saes = {s: new_sae(make_config({"d_in": D, "seed": s} | TOPK), cache.mean, cache.std) for s in (5, 6)}
        found = match_features(cache, saes, 0)
        assert abs(found["cosine"] - found["cosine_null"]) < 0.03 and found["cosine_p"] > 0.01
        assert found["iou"] == found["iou_untrained"] and found["cosine"] == found["cosine_untrained"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"variant": "gated"}, "unknown variant"),
        ({"k": 65}, "k between 1 and d_sae"),
        ({"variant": "batchtopk", "k": 0}, "k between 1 and d_sae"),
        ({"variant": "rms_l1", "l1": 0.1, "l1_on": "x", "k": None, "aux_k": None, "dead_epochs": None}, "l1_on"),
        ({"variant": "jumprelu", "k": None}, "l0 between"),
        ({"l2": 1}, "unknown keys"),
        ({"lr": 1e30}, "lower lr"),
    ],
)
def test_bad_config_is_one_line_and_writes_nothing(trained, tmp_path, change, match):
    with pytest.raises(EqknobsError, match=match):
        train_sae(trained / "planted.h5", tmp_path / "out", TOPK | change, 0)
    assert not (tmp_path / "out").exists()


SCALES = ["zscore", "raw", "scalar", "unit_norm"]


@pytest.mark.parametrize("scale", SCALES)
def test_input_scales_take_and_return_raw_latents_and_survive_the_file(trained, tmp_path, scale) -> None:
    with ActivationCache(trained / "planted.h5") as cache:
        raw = np.array(cache.acts[:200])
        train_sae(trained / "planted.h5", tmp_path / "sae", BATCHTOPK | {"input_scale": scale, "epochs": 4}, 0)
        size = np.sqrt(np.square(np.array(cache.acts[cache.rows("train")], np.float64)).sum(1).mean())
    sae = SAE.load(tmp_path / "sae")
    z = sae._normalised(torch.from_numpy(raw)).numpy()
    wanted = {
        "zscore": (raw - sae.mean.numpy()) / sae.std.numpy(),
        "raw": raw,
        "scalar": raw / size,
        "unit_norm": raw / np.linalg.norm(raw, axis=1, keepdims=True),
    }[scale]
    np.testing.assert_allclose(z, wanted, rtol=1e-4, atol=1e-5)
    error = np.square(raw - sae(raw)).sum() / np.square(raw - raw.mean(0)).sum()
    assert error < 0.6
    assert ("input_scale" in json.loads((tmp_path / "sae/config.json").read_text())) == (scale != "zscore")


def test_unit_norm_rebuilds_a_frame_at_its_own_norm_and_codes_alone_do_not_hold_it(trained, tmp_path) -> None:
    sae = new_sae(
        make_config({"variant": "topk", "d_in": D, "d_sae": 64, "k": 4, "input_scale": "unit_norm"}),
        np.zeros(D),
        np.ones(D),
    )
    raw = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)
    np.testing.assert_allclose(sae.encode(10 * raw), sae.encode(raw), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sae(10 * raw), 10 * sae(raw), rtol=1e-4, atol=1e-5)
    with pytest.raises(EqknobsError, match="do not hold a frame's norm"):
        sae.decode(sae.encode(raw))


def test_fvu_is_in_one_unit_whatever_the_scale(trained, tmp_path) -> None:
    for scale in ("zscore", "scalar"):
        train_sae(trained / "planted.h5", tmp_path / scale, TOPK | {"input_scale": scale, "epochs": 4}, 0)
    score_saes(
        trained / "planted.h5",
        {s: {0: tmp_path / s} for s in ("zscore", "scalar")},
        tmp_path / "s.csv",
        tmp_path / "s.json",
        {"seed": 0},
    )
    rows = pd.read_csv(tmp_path / "s.csv")
    totals = rows.pivot(index="id", columns="sae", values="sq_total")
    np.testing.assert_allclose(totals["zscore"], totals["scalar"], rtol=1e-5)
    assert set(rows["input_scale"]) == {"zscore", "scalar"}
    clip = rows[(rows["sae"] == "scalar") & (rows["id"] == "d-0")].iloc[0]
    with ActivationCache(trained / "planted.h5") as cache:
        at = cache.utterances.set_index("id").loc["d-0"]
        raw = np.array(cache.acts[at.start : at.start + at.frames])
        wanted = np.square((raw - SAE.load(tmp_path / "scalar")(raw)) / cache.std).sum()
    np.testing.assert_allclose(clip["sq_error"], wanted, rtol=1e-3)


def test_an_unknown_input_scale_is_one_line() -> None:
    with pytest.raises(EqknobsError, match="input_scale one of"):
        make_config({"variant": "topk", "d_in": D, "d_sae": 64, "k": 4, "input_scale": "cosine"})
