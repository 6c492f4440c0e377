"""SAELens's folders: its own formulas on our files give our codes, and the files come back.

`saelens` writes out what SAELens 6.54 does with a folder (`process_sae_in`, `encode`, `decode` in its `saes/sae.py`,
`saes/topk_sae.py`, `saes/jumprelu_sae.py`); the slow test lets SAELens do it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import eqknobs
from eqknobs.cli import main
from eqknobs.errors import EqknobsError
from eqknobs.sae import SAE, make_config
from eqknobs.sae.export import export_saelens, import_saelens
from helpers import ROOT
from helpers.saes import VARIANTS, D, K, M, latents, write_sae

PEERS = ROOT / ".venv-peers"
CLOSE = 1e-4  # relative to the largest value
METADATA = {"model_name": "mimi", "hook_name": "latent"}


@pytest.fixture(params=VARIANTS)
def case(request, tmp_path) -> tuple[SAE, Path]:
    """An SAE of each variant, and its folder exported by the command."""
    sae = write_sae(tmp_path / "sae", request.param)
    main(["export-sae", str(tmp_path / "sae"), str(tmp_path / "out"), "--model", "mimi", "--hook", "latent"])
    return sae, tmp_path / "out"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")


def rewrite(folder: Path, cfg: Any, tensors: dict[str, np.ndarray]) -> None:
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}, folder / "w")
    (folder / "w").rename(folder / "sae_weights.safetensors")


def saelens(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, M] and reconstructions [N, D] of a SAELens folder."""
    cfg, w = read(folder)
    sae_in = x - w["b_dec"] * cfg["apply_b_dec_to_input"]
    hidden_pre = sae_in @ w["W_enc"] + w["b_enc"]
    acts = np.maximum(hidden_pre, 0)
    if cfg["architecture"] == "topk":
        assert cfg["rescale_acts_by_decoder_norm"] is False
        kept = np.argpartition(-hidden_pre, cfg["k"], axis=-1)[:, : cfg["k"]]
        acts = np.zeros_like(acts)
        np.put_along_axis(acts, kept, np.maximum(np.take_along_axis(hidden_pre, kept, -1), 0), -1)
    elif cfg["architecture"] == "jumprelu":
        acts = acts * (hidden_pre > w["threshold"])
    else:
        acts = acts / np.sqrt((acts * acts).mean(-1, keepdims=True) + cfg["eps"])
    return acts, acts @ w["W_dec"] + w["b_dec"]


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def assert_equal(found: tuple[np.ndarray, np.ndarray], sae: SAE, raw: np.ndarray) -> None:
    """Codes and reconstructions, each dimension by its own scale."""
    codes, rebuilt = sae.encode(raw), sae(raw)
    assert 0 < (codes > 0).sum() < codes.size
    assert difference(found[0], codes) < CLOSE
    std = sae.std.numpy()
    assert difference(found[1] / std, rebuilt / std) < CLOSE


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_saelens_formulas_on_the_export_give_our_codes_and_reconstructions(case):
    sae, out = case
    raw, _, _ = latents()
    assert_equal(saelens(out, raw), sae, raw)


def test_files_are_what_saelens_reads(case):
    sae, out = case
    variant = sae.config.variant
    assert {path.name for path in out.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    cfg, tensors = read(out)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
    if variant in ("batchtopk", "jumprelu"):
        shapes["threshold"] = (M,)
        assert np.array_equal(tensors["threshold"], np.broadcast_to(sae.threshold.numpy(), M))
    assert {name: t.shape for name, t in tensors.items()} == shapes
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    metadata = cfg.pop("metadata")
    special = {"topk": {"k": K, "rescale_acts_by_decoder_norm": False}, "rms_l1": {"eps": 1e-8}}
    assert cfg == {
        "architecture": "jumprelu" if variant == "batchtopk" else variant,
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    } | special.get(variant, {})
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6
    assert metadata["sae_lens_training_version"] is None
    assert metadata["training_architecture"] == variant
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert make_config(metadata["eqknobs"]) == sae.config


def test_round_trip(case, tmp_path):
    sae, out = case
    raw, _, _ = latents()
    again = import_saelens(out)
    assert_equal((again.encode(raw), again(raw)), sae, raw)
    assert (again.std == 1).all() and not again.b_dec.any()
    assert not any(p.requires_grad for p in again.parameters())
    if sae.config.variant == "batchtopk":
        assert (again.config.variant, again.config.d_sae) == ("jumprelu", M)
    else:
        assert again.config == sae.config
    again.save(tmp_path / "again")
    export_saelens(tmp_path / "again", tmp_path / "out2", METADATA)
    for name, tensor in read(out)[1].items():
        assert difference(read(tmp_path / "out2")[1][name], tensor) < CLOSE


def test_import_of_a_folder_that_leaves_the_input_as_it_is(case):
    """`apply_b_dec_to_input` false, no metadata of ours: what others may have trained."""
    sae, out = case
    raw, _, _ = latents()
    cfg, w = read(out)
    if sae.config.variant != "rms_l1":  # nobody else writes those, and l1 is not in SAELens's part
        del cfg["metadata"]["eqknobs"]
    w["b_enc"] = w["b_enc"] - w["b_dec"].astype(np.float64) @ w["W_enc"]
    rewrite(out, cfg | {"apply_b_dec_to_input": False}, w)
    again = import_saelens(out)
    assert_equal((again.encode(raw), again(raw)), sae, raw)


def test_import_takes_thresholds_below_0_for_the_relu_they_are(tmp_path):
    write_sae(tmp_path / "sae", "jumprelu")
    export_saelens(tmp_path / "sae", tmp_path / "out", METADATA)
    cfg, w = read(tmp_path / "out")
    rewrite(tmp_path / "out", cfg, w | {"threshold": w["threshold"] - 6})
    raw, _, _ = latents()
    wanted, _ = saelens(tmp_path / "out", raw)
    assert difference(import_saelens(tmp_path / "out").encode(raw), wanted) < CLOSE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm True"),
        ({"d_in": D + 1}, "not a SAELens folder"),
        ({"k": 0}, "k between 1 and d_sae"),
        ({"metadata": None}, "not a SAELens folder"),
    ],
)
def test_import_refuses_what_it_cannot_express(tmp_path, changes, message):
    write_sae(tmp_path / "sae", "topk")
    export_saelens(tmp_path / "sae", tmp_path / "out", METADATA)
    cfg, tensors = read(tmp_path / "out")
    rewrite(tmp_path / "out", cfg | changes, tensors)
    with pytest.raises(EqknobsError, match=message):
        import_saelens(tmp_path / "out")


@pytest.mark.parametrize("damage", ["no folder", "no weights", "half the weights", "no W_enc", "a list"])
def test_import_of_a_broken_folder_is_one_error(tmp_path, damage):
    write_sae(tmp_path / "sae", "topk")
    export_saelens(tmp_path / "sae", tmp_path / "out", METADATA)
    weights = tmp_path / "out/sae_weights.safetensors"
    if damage == "no folder":
        (tmp_path / "out").rename(tmp_path / "elsewhere")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[:999])
    elif damage == "no W_enc":
        cfg, tensors = read(tmp_path / "out")
        rewrite(tmp_path / "out", cfg, {name: t for name, t in tensors.items() if name != "W_enc"})
    else:
        (tmp_path / "out/cfg.json").write_text("[]")
    with pytest.raises(EqknobsError, match="not a SAELens folder"):
        import_saelens(tmp_path / "out")


def test_export_is_byte_stable_and_replaces_an_earlier_one(tmp_path):
    write_sae(tmp_path / "sae", "topk")
    write_sae(tmp_path / "other", "jumprelu")
    (tmp_path / "empty").mkdir()
    for source, out in (("sae", "a"), ("other", "b"), ("sae", "b"), ("sae", "empty")):
        export_saelens(tmp_path / source, tmp_path / out, {"model_name": "mimi", "hook_name": None})
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") == snapshot(tmp_path / "empty")
    assert "hook_name" not in read(tmp_path / "a")[0]["metadata"]


def bad(tmp_path: Path, what: str) -> tuple[str, str]:
    """Arguments FOLDER and OUT with something wrong."""
    sae, out = tmp_path / "sae", tmp_path / "new/out"
    changes = {
        "weights not finite": {"b_enc": np.full(M, np.nan)},
        "out of range": {"W_dec": np.full((M, D), 3e38)},
        "negative threshold": {"threshold": np.full(M, -1.0)},
    }
    write_sae(sae, "jumprelu", **changes.get(what, {}))
    if what == "no folder":
        sae = tmp_path / "typo"
    elif what == "no weights":
        (sae / "sae.safetensors").unlink()
    elif what == "half the weights":
        (sae / "sae.safetensors").write_bytes((sae / "sae.safetensors").read_bytes()[:999])
    elif what == "no normaliser":
        tensors = load_file(sae / "sae.safetensors")
        del tensors["std"]
        save_file(tensors, sae / "sae.safetensors")
    elif what == "config not JSON":
        (sae / "config.json").write_text("{")
    elif what == "out is the SAE's folder":
        out = sae
    elif what == "out holds other files":
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.tex").write_text("years of work")
        out = tmp_path / "mine"
    elif what == "out is a file":
        out = sae / "config.json"
    elif what == "out is below a file":
        out = sae / "config.json/out"
    return str(sae), str(out)


@pytest.mark.parametrize(
    "what",
    [
        "no folder",
        "no weights",
        "half the weights",
        "no normaliser",
        "config not JSON",
        "weights not finite",
        "out of range",
        "negative threshold",
        "out is the SAE's folder",
        "out holds other files",
        "out is a file",
        "out is below a file",
    ],
)
def test_command_with_bad_input_leaves_everything_as_it_was(tmp_path, what):
    arguments = bad(tmp_path, what)
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["export-sae", *arguments])
    assert isinstance(ended.value.code, str)  # Python prints it on stderr and ends with status 1
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code
    assert snapshot(tmp_path) == before


def test_export_that_breaks_off_keeps_the_earlier_one(tmp_path, monkeypatch):
    write_sae(tmp_path / "sae", "topk")
    export_saelens(tmp_path / "sae", tmp_path / "out", METADATA)
    before = snapshot(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eqknobs.sae.export.write_json", full)
    with pytest.raises(EqknobsError, match="disk full"):
        export_saelens(tmp_path / "sae", tmp_path / "out", {})
    assert snapshot(tmp_path) == before


def test_command_as_a_process(tmp_path):
    command = [sys.executable, "-m", "eqknobs.cli", "export-sae", "typo", "out"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: typo is not an SAE") and failed.stderr.count("\n") == 1
    assert snapshot(tmp_path) == {}


def test_command_says_what_it_wrote_and_how_it_is_used(tmp_path, capsys):
    write_sae(tmp_path / "sae", "topk")
    main(["export-sae", str(tmp_path / "sae"), str(tmp_path / "out")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    assert not {"model_name", "hook_name"} & set(read(tmp_path / "out")[0]["metadata"])
    with pytest.raises(SystemExit) as ended:
        main(["export-sae"])
    assert ended.value.code == 2


IN_SAELENS = """
import importlib.util, sys
import numpy as np, torch
from sae_lens import SAE
spec = importlib.util.spec_from_file_location("saelens_rms", sys.argv[1])
sys.modules["saelens_rms"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x = torch.from_numpy(np.load("raw.npy"))
for variant in sys.argv[2:]:
    sae = SAE.load_from_disk(f"{variant}/out")
    with torch.no_grad():
        np.savez(f"{variant}/saelens.npz", codes=sae.encode(x), rebuilt=sae(x), batched=sae(x[None])[0])
    assert (sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name) == ("mimi", "latent")
    assert isinstance(sae, module.RmsL1SAE) == (variant == "rms_l1")
    sae.save_model(f"{variant}/saved")
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError:
        assert variant in ("topk", "rms_l1")
"""


@pytest.mark.slow
def test_saelens_itself_loads_the_export(tmp_path):
    """And what SAELens saves again, we read."""
    if not PEERS.exists():
        pytest.skip("needs .venv-peers with sae-lens; see benchmarks/make_peers_env.sh")
    raw, _, _ = latents()
    np.save(tmp_path / "raw.npy", raw)
    saes = {variant: write_sae(tmp_path / variant, variant) for variant in VARIANTS}
    for variant in VARIANTS:
        export_saelens(tmp_path / variant, tmp_path / variant / "out", METADATA)
    module = Path(eqknobs.__file__).parent / "sae/saelens_rms.py"
    subprocess.run(
        [PEERS / "bin/python", "-c", IN_SAELENS, module, *VARIANTS],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
    )
    for variant, sae in saes.items():
        found = np.load(tmp_path / variant / "saelens.npz")
        assert_equal((found["codes"], found["rebuilt"]), sae, raw)
        assert difference(found["batched"], found["rebuilt"]) < CLOSE
        again = import_saelens(tmp_path / variant / "saved")
        assert_equal((again.encode(raw), again(raw)), sae, raw)
