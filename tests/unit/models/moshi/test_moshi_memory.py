"""The memory plan: against published sizes, against what loading really allocates, and as a gate."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import MimiConfig, MimiModel

from eqknobs.cli import main
from eqknobs.config import DEFAULT, merge
from eqknobs.errors import EqknobsError
from eqknobs.models import load_model
from eqknobs.models.moshi import memory
from eqknobs.models.moshi.checkpoint import save_net
from eqknobs.models.moshi.config import Nf4
from eqknobs.models.moshi.interventions import remove_heads
from eqknobs.models.moshi.memory import GIB, KNOWN, MIMI_BYTES, SEVEN_B, Shapes, plan, require, weights
from helpers import ROOT
from helpers.moshi_world import KYUTAI, write_codec, write_kyutai, write_persona

SHAPES = Shapes(SEVEN_B, (32,) * 32, {})
TEMPORAL, TEXT, DEPFORMER = "temporal transformer", "embeddings and text head", "depformer"


def gib(size: float) -> float:
    return round(size / GIB, 2)


def known(**keys):
    return {"name": "known", "path": "kyutai/moshiko-pytorch-bf16", "revision": None, **keys}


def test_the_7b_models_have_the_sizes_that_are_known_of_them():
    linears = sum(n for part, _, n, linear in memory.parameters(SEVEN_B, (32,) * 32) if part == TEMPORAL and linear)
    assert round(linears / 1e9, 3) == 6.577
    full, packed = weights(SHAPES, 2, None), weights(SHAPES, 2, Nf4())
    assert gib(full[TEMPORAL]) == 12.25 and gib(packed[TEMPORAL]) == 3.16
    assert gib(full[TEXT]) == gib(packed[TEXT]) == 0.74
    assert gib(full[DEPFORMER]) == gib(packed[DEPFORMER]) == 1.33
    assert gib(weights(SHAPES, 2, None, dep_q=16)[DEPFORMER]) == 2.60  # as in PersonaPlex's file
    assert gib(plan(known(), 3000 / 12.5).parts["keys and values"]) == 1.46
    assert plan(known(), 9999).parts["keys and values"] == plan(known(), 3000 / 12.5).parts["keys and values"]
    assert sum(full.values()) == 15_375_458_304  # kyutai/moshiko-pytorch-bf16: "15.4 GB"


def test_the_codec_is_as_large_as_a_mimi_of_default_size():
    with torch.device("meta"):
        net = MimiModel(MimiConfig())
    assert sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()]) == MIMI_BYTES


def allocated(net) -> int:
    """Bytes of every parameter, with all that belongs to packed ones."""
    total = 0
    for parameter in net.parameters():
        total += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors = [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
            total += sum(t.numel() * t.element_size() for t in tensors)
    return total


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    return {"kyutai": write_kyutai(root / "k"), "persona": write_persona(root / "p"), "codec": write_codec(root / "c")}


@pytest.mark.parametrize("name", ["kyutai", "persona"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("nf4", [False, True, {"double": False}, {"linears": ["*"], "block": 128}])
def test_weights_are_planned_to_the_byte(folders, name, dtype, nf4):
    cfg = {"name": "m", "kind": "moshi", "path": str(folders[name]), "codec": str(folders["codec"]), "device": "cpu"}
    cfg |= {"dtype": dtype, "nf4": nf4}
    parts = plan(cfg, 4.0).parts
    model = load_model(cfg)
    assert parts[TEMPORAL] + parts[TEXT] + parts[DEPFORMER] == allocated(model.net)
    codec = sum(t.numel() * t.element_size() for t in [*model.codec.net.parameters(), *model.codec.net.buffers()])
    assert abs(parts["codec"] - codec) < 0.01 * codec


@pytest.mark.parametrize("nf4", [None, True])
def test_what_a_saved_model_has_lost_or_packed_is_planned_to_the_byte(folders, tmp_path, nf4):
    cfg = {"name": "m", "kind": "moshi", "path": str(folders["kyutai"]), "codec": str(folders["codec"])}
    model = load_model(cfg | {"device": "cpu", "nf4": nf4})
    remove_heads(model.net, {0: [0, 1], 1: [0, 1, 2, 3]})
    save_net(model.net, tmp_path / "less")
    cfg |= {"path": str(tmp_path / "less"), "dtype": "float32"}
    parts = plan(cfg, 4.0).parts
    assert sum(parts[part] for part in (TEMPORAL, TEXT, DEPFORMER)) == allocated(
        load_model(cfg | {"device": "cpu"}).net
    )
    whole = plan(cfg | {"path": str(folders["kyutai"])}, 4.0).parts["keys and values"]
    assert parts["keys and values"] == whole * 6 // 12


def test_a_plan_above_the_card_is_refused_with_what_to_lower():
    assert require(known(nf4=True), 35, 12).total < 9 * GIB
    with pytest.raises(EqknobsError) as error:
        require(known(), 35, 12)
    text = str(error.value)
    assert "16." in text and "hardware.vram_gb = 12" in text and "nf4: true (7.4" in text and "\n" not in text
    assert "dtype" not in text and "seconds (" not in text  # neither would help
    with pytest.raises(EqknobsError, match=r"dtype: bfloat16 \(") as error:
        require(known(nf4=True, dtype="float32"), 35, 8)
    with pytest.raises(EqknobsError, match=r"or by (\d+) seconds") as error:
        require(known(nf4=True), 2400, 12)
    seconds = int(str(error.value).split(" seconds (")[0].split()[-1])
    assert require(known(nf4=True), seconds, 12).total <= 12 * GIB < plan(known(nf4=True), seconds + 1).total
    with pytest.raises(EqknobsError, match="take a larger card"):
        require(known(nf4={"linears": ["*"]}), 0.5, 2)


def test_a_model_that_is_not_at_hand_is_named(tmp_path):
    with pytest.raises(EqknobsError, match="shapes of someone/else are not known"):
        plan(known(path="someone/else"), 10)
    with pytest.raises(EqknobsError, match="whole checkpoint"):
        plan(known(path=str(tmp_path)), 10)


@pytest.mark.parametrize(
    "change", ["{", "[]", {"moshi_name": None}, {"eqknobs": []}, {"eqknobs": {"heads": [1, 2, 3]}}]
)
def test_a_broken_config_ends_in_one_line(folders, tmp_path, change):
    config = json.loads((folders["kyutai"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(change if isinstance(change, str) else json.dumps(config | change))
    (tmp_path / "model.safetensors").symlink_to(folders["kyutai"] / "model.safetensors")
    with pytest.raises(EqknobsError, match=r"^models\.known: .*config\.json"):
        plan(known(path=str(tmp_path)), 10)


def test_a_torn_codec_ends_in_one_line(folders, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(EqknobsError, match=r"models\.known\.codec: cannot read .*fetch it again"):
        plan(known(codec=str(tmp_path)), 10)


def write(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(merge(yaml.safe_load((ROOT / "config/personaplex.yaml").read_text()), changes)))
    return path


def test_the_command_prints_the_plan_and_refuses(tmp_path, capsys):
    main(["vram", "--config", str(ROOT / "config/personaplex.yaml"), "--seconds", "20"])
    said = capsys.readouterr().out
    assert "nvidia/personaplex-7b-v1" in said and "3.16 GiB" in said and "fits hardware.vram_gb = 12" in said
    for arguments, message in (
        ([str(write(tmp_path / "a.yaml", hardware={"vram_gb": 6}))], "do not fit hardware.vram_gb = 6"),
        ([str(write(tmp_path / "b.yaml", models={"personaplex": {"nf4": False}}))], "nf4: true"),
        ([str(write(tmp_path / "c.yaml")), "--seconds", "-1"], "above 0"),
        ([str(write(tmp_path / "d.yaml", hardware={"vram_gb": "much"}))], "hardware.vram_gb: 'much' is not of type"),
        ([str(tmp_path / "none.yaml")], "cannot be read"),
        ([str(ROOT / "config/librispeech-mimi.yaml")], "no model of kind moshi in use"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["vram", "--config", *arguments])
        assert message in str(stop.value) and "\n" not in str(stop.value), arguments


def config(**changes) -> dict:
    base = merge(yaml.safe_load(DEFAULT.read_text()), yaml.safe_load((ROOT / "config/moshiko.yaml").read_text()))
    return merge(base, changes)


def test_the_gate_of_the_workflow(folders, monkeypatch):
    small = {"vram_gb": 4}
    memory.check(config())
    memory.check(config(hardware=small | {"device": "cpu"}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    memory.check(config(hardware=small | {"device": "auto"}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for device in ("auto", "cuda"):
        with pytest.raises(EqknobsError, match="do not fit"):
            memory.check(config(hardware=small | {"device": device}))
    memory.check(config(hardware=small, run={"targets": ["tiny-mimi.encoder_transformer"]}))  # Moshi does not run
    memory.check(config(hardware=small, models={"moshiko": {"path": "someone/else"}}))  # not known before its download
    with pytest.raises(EqknobsError, match="layers 0 to 31"):
        memory.check(config(run={"targets": ["moshiko.residual.32"]}))
    tiny = {"moshiko": {"path": str(folders["kyutai"])}}
    with pytest.raises(EqknobsError, match=f"layers 0 to {KYUTAI.layers - 1}"):
        memory.check(config(run={"targets": ["moshiko.heads.3"]}, models=tiny))


def test_known_checkpoints_are_those_of_the_configurations():
    for name in ("moshiko", "personaplex"):
        text = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text())
        assert text["models"][name]["path"] in KNOWN
        assert plan({"name": name, **text["models"][name]}, 35).total < 12 * GIB


def test_the_documents_table_is_the_plan():
    columns = [(20, True), (20, {"linears": ["*"]}), (35, True), (240, True), (20, None)]
    plans = [plan(known(nf4=nf4), seconds) for seconds, nf4 in columns]
    document = (ROOT / "docs/moshi.md").read_text()
    for part in plans[0].parts:
        assert f"| {part} | {' | '.join(f'{p.parts[part] / GIB:.2f}' for p in plans)} |" in document
    assert f"| total | {' | '.join(f'{p.total / GIB:.2f}' for p in plans)} |" in document
    for seconds, fits in ((1902, True), (1903, False)):
        assert (plan(known(nf4=True), seconds).total <= 12 * GIB) == fits
