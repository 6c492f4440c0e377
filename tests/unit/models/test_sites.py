"""Which sites a model has, from its config.json alone; wildcard targets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eqknobs.config import merge, read_config, settle
from eqknobs.errors import EqknobsError
from eqknobs.models import KINDS, load_model
from eqknobs.models.sites import LAYERS, expand_targets, sites_of
from eqknobs.strict_yaml import read_yaml
from helpers.moshi_world import KYUTAI, write_kyutai, write_persona

ROOT = Path(__file__).resolve().parents[3]
MIMI = {"kind": "mimi", "path": str(ROOT / "resources/models/tiny-mimi"), "revision": None}
MOSHI = {"kind": "moshi", "path": str(ROOT / "resources/models/tiny-moshi"), "revision": None}


def of_config(folder: Path, kind: str, **config: int) -> dict:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    return {"kind": kind, "path": str(folder)}


def test_every_kind_is_known() -> None:
    assert LAYERS.keys() == KINDS.keys()


@pytest.mark.parametrize("model", [MIMI, MOSHI], ids=["mimi", "moshi"])
def test_sites_are_those_of_the_loaded_model(model: dict) -> None:
    loaded = load_model({"name": "x", "device": "cpu", **model})
    assert sites_of(model) == list(loaded.sites)


def test_sites_of_configs(tmp_path: Path) -> None:
    assert sites_of(of_config(tmp_path, "whisper", encoder_layers=2)) == ["layer.0", "layer.1"]
    assert sites_of(of_config(tmp_path, "hubert", num_hidden_layers=1)) == ["layer.0"]
    assert sites_of({"kind": "encodec", "path": "facebook/encodec_24khz"}) == ["encoder"]
    assert sites_of(of_config(tmp_path, "dac")) == ["encoder"]
    assert sites_of(of_config(tmp_path, "whisper")) is None  # says nothing
    assert sites_of({"kind": "whisper", "path": str(tmp_path / "nowhere")}) is None
    (tmp_path / "config.json").write_text("{")
    assert sites_of({"kind": "whisper", "path": str(tmp_path)}) is None


def test_sites_of_moshis(tmp_path: Path) -> None:
    both = ["embeddings"] + [f"{kind}.{i}" for i in range(KYUTAI.layers) for kind in ("residual", "heads")]
    assert sites_of({"kind": "moshi", "path": str(write_kyutai(tmp_path / "k"))}) == both
    assert sites_of({"kind": "moshi", "path": str(write_persona(tmp_path / "p"))}) == both  # its config says nothing
    raw = json.loads((tmp_path / "k/config.json").read_text())
    raw["eqknobs"] = {"heads": [[0, 1, 2, 3], [], [2]]}
    (tmp_path / "k/config.json").write_text(json.dumps(raw))
    assert sites_of({"kind": "moshi", "path": str(tmp_path / "k")}) == [site for site in both if site != "heads.1"]
    known = sites_of({"kind": "moshi", "path": "kyutai/moshiko-pytorch-bf16"})
    assert len(known) == 65 and known[-1] == "heads.31"


def test_sites_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked only when it may be, and only for its config.json."""
    file = Path(of_config(tmp_path, "whisper", encoder_layers=2)["path"]) / "config.json"
    asked = []

    def download(*args: str, **keys: str) -> str:
        asked.append((*args, *keys.values()))
        if args[0] == "no/such":
            raise ConnectionError("no network")
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = {"kind": "whisper", "path": "some/whisper", "revision": "abc"}
    assert sites_of(model) is None and not asked
    assert sites_of(model, fetch=True) == ["layer.0", "layer.1"]
    assert asked == [("some/whisper", "config.json", "abc")]
    with pytest.raises(
        EqknobsError, match=r"layer\.\*.: cannot know the layers of no/such .*list them, .* w\.layer\.0"
    ):
        expand_targets(["w.layer.*"], {"w": {"kind": "whisper", "path": "no/such"}})


def test_wildcards() -> None:
    models = {"t": MIMI, "l": MOSHI}
    layers = ["t.encoder_layer.0", "t.encoder_layer.1"]
    assert expand_targets(["t.encoder_layer.*"], models) == layers
    assert expand_targets(["t.encoder_layer.1", "t.encoder_transformer", "t.encoder_layer.*"], models) == [
        layers[1],
        "t.encoder_transformer",
        layers[0],
    ]
    heads = expand_targets(["l.heads.*"], models)
    assert heads == [f"l.{site}" for site in sites_of(MOSHI) if site.startswith("heads")] and len(heads) > 1
    assert expand_targets(["x.layer.*", "t.layer"], models) == ["x.layer.*", "t.layer"]  # other checks say more
    with pytest.raises(EqknobsError, match=r"no layers layer\.\*; its sites: encoder_transformer, encoder_layer\.0"):
        expand_targets(["t.layer.*"], models)


def test_a_configuration_has_its_wildcards_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.yaml").write_text("run: {targets: [tiny-mimi.encoder_layer.*]}\n")
    config = read_config(tmp_path / "run.yaml")
    assert config["run"]["targets"] == ["tiny-mimi.encoder_layer.0", "tiny-mimi.encoder_layer.1"]
    settle(config)  # a job's own Snakemake does it again
    assert len(config["run"]["targets"]) == 2
    for bad in ("tiny-mimi.*", "tiny-mimi.encoder_layer.*.0", "tiny-mimi.encoder_layer*"):
        (tmp_path / "run.yaml").write_text(f"run: {{targets: ['{bad}']}}\n")
        with pytest.raises(EqknobsError, match=r"run\.targets"):
            read_config(tmp_path / "run.yaml")


def test_a_budget_of_frames_is_for_what_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    base = read_yaml(ROOT / "config/config.yaml")
    with pytest.raises(EqknobsError, match=r"activations\.frames: keeps a part of each clip, but codec decodes whole"):
        settle(merge(base, {"activations": {"frames": 1000}}))
    changes = {"activations": {"frames": 1000}, "run": {"targets": ["m.residual.0"]}, "models": {"m": MOSHI}}
    settle(merge(base, changes))


def test_sites_are_known_without_torch() -> None:
    code = "import sys, eqknobs.config, eqknobs.models.sites as s; s.sites_of(%r); assert 'torch' not in sys.modules"
    for model in (MIMI, MOSHI):
        subprocess.run([sys.executable, "-c", code % model], check=True)
