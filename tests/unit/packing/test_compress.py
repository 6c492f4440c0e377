"""`eqknobs compress` and `eqknobs unpack`: a smaller folder that loads, the same sounds from it, errors before work."""

import json

import numpy as np
import pytest
import torch
from transformers import MimiModel

from eqknobs.cli import main
from eqknobs.models import load_model
from eqknobs.models.moshi.checkpoint import find_files, load_net
from eqknobs.packing.files import NAME, PackedFile
from eqknobs.packing.plan import Plan, packable
from helpers import ROOT

TINY, MOSHI = (ROOT / "resources/models" / name for name in ("tiny-mimi", "tiny-moshi"))


def compress(model, plan, out, *options):
    main(["compress", "--model", str(model), "--plan", str(plan), "--out", str(out), *options])


def failing(capsys, *args):
    with pytest.raises(SystemExit) as seen:
        main([*map(str, args)])
    return str(seen.value) + capsys.readouterr().err


def codec(path):
    return load_model({"name": "m", "kind": "mimi", "path": str(path), "revision": None, "device": "cpu"})


def test_a_codec_packed_and_unpacked(tmp_path, capsys):
    """The packed folder, the unpacked one and transformers' own reading of that give the same numbers."""
    compress(TINY, "uniform:4", tmp_path / "packed", "--group", "32", "--rounding", "mse")
    assert "74 of 74 tensors at 4.00 bits" in capsys.readouterr().out
    assert (tmp_path / "packed" / NAME).stat().st_size < (TINY / "model.safetensors").stat().st_size * 0.3
    assert (tmp_path / "packed/config.json").read_bytes() == (TINY / "config.json").read_bytes()
    main(["unpack", str(tmp_path / "packed"), "--out", str(tmp_path / "plain")])
    packed, plain = codec(tmp_path / "packed"), codec(tmp_path / "plain")
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    acts = packed.encode(wave, "encoder_transformer")
    assert np.array_equal(acts, plain.encode(wave, "encoder_transformer"))
    assert not np.array_equal(acts, codec(TINY).encode(wave, "encoder_transformer"))
    for codebooks in (None, 8):
        sounds = [m.decode(acts, "encoder_transformer", len(wave), codebooks) for m in (packed, plain)]
        assert np.array_equal(*sounds)
    net, info = MimiModel.from_pretrained(tmp_path / "plain", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = packed.net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert (tmp_path / "plain/preprocessor_config.json").is_file()


def test_a_plan_from_a_file(tmp_path, monkeypatch, capsys):
    shapes = packable(codec(TINY).net, codebooks=False)
    plan = Plan.of(shapes, {name: 2 + i % 7 for i, name in enumerate(shapes)}, symmetric=False, rest="float32")
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    monkeypatch.chdir(ROOT)  # where bundled models are known by their names
    compress("tiny-mimi", tmp_path / "plan.json", tmp_path / "packed")
    assert PackedFile(tmp_path / "packed" / NAME).plan == plan
    assert f"{len(shapes)} of 74 tensors" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [["codebooks"], ["embeddings", "codebooks"]])
def test_what_is_kept_stays(tmp_path, keep):
    compress(MOSHI, "uniform:8", tmp_path / "m", "--kind", "moshi", *(x for name in keep for x in ("--keep", name)))
    names = PackedFile(tmp_path / "m" / NAME).packed
    assert any("emb" in name for name in names) == ("embeddings" not in keep)


def test_a_speech_lm_packed_and_unpacked(tmp_path):
    compress(MOSHI, "uniform:4", tmp_path / "deep/packed", "--group", "64", "--zero-points")
    main(["unpack", str(tmp_path / "deep/packed"), "--out", str(tmp_path / "plain")])
    codes = torch.randint(0, 130, (1, 17, 5), generator=torch.Generator().manual_seed(0))
    files = [find_files("m", str(tmp_path / where)) for where in ("deep/packed", "plain")]
    with torch.inference_mode():
        packed, plain = (load_net(found)(codes).text for found in files)
    assert torch.equal(packed, plain) and all(found.tokenizer for found in files)
    for found in files:  # still knows its codec
        named = json.loads(found.config.read_text())["eqknobs"]["codec"]
        assert (found.config.parent / named).resolve() == TINY


def test_errors_come_before_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eqknobs.compress.load_model", None)  # nothing is loaded
    base = ["compress", "--model", TINY, "--plan"]
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "bert"}')
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    (tmp_path / "bad.json").write_text('{"bits": {"a": 11}}')
    (tmp_path / "no.json").write_text("bits")
    (tmp_path / "gptq.json").write_text('{"bits": {}, "rounding": "gptq"}')
    new = ["--out", tmp_path / "new"]
    for args, message in (
        ([*base, "uniform:4", "--out", full], "is there already and not empty"),
        ([*base, "uniform:4", "--out", full / "mine"], "is there already and not empty"),
        ([*base, "uniform:4", "--out", full / "mine/below"], "cannot be made"),
        ([*base, "uniform:9", *new], "2 to 8 bits, as in uniform:4"),
        ([*base, "uniform:", *new], "2 to 8 bits, as in uniform:4"),
        ([*base, "nope.json", *new], "cannot be read as JSON"),
        ([*base, tmp_path / "no.json", *new], "cannot be read as JSON"),
        ([*base, tmp_path / "gptq.json", *new], "gptq needs calibration data"),
        ([*base, tmp_path / "bad.json", *new], "a: bits must be a whole number, 2 to 8, got 11"),
        ([*base, tmp_path / "bad.json", *new, "--group", "3"], "leave out the options of uniform plans"),
        ([*base, "uniform:4", *new, "--group", "0"], "group must be a whole number above 0"),
        ([*base, "uniform:4", *new, "--kind", "mimo"], "kind 'mimo', which is not known; name one of mimi, encodec"),
        (
            [*base, "uniform:4", *new, "--kind", "speechtokenizer"],
            "is not in transformers' format and cannot be packed",
        ),
        (["compress", "--model", ROOT, "--plan", "uniform:4", *new], "cannot read"),
        (["compress", "--model", strange, "--plan", "uniform:4", *new], "kind 'bert', which is not known"),
        (["unpack", TINY, *new], "give a folder that eqknobs compress wrote"),
        (["unpack", tmp_path / "none", *new], "give a folder that eqknobs compress wrote"),
    ):
        found = failing(capsys, *args)
        assert message in found and found.startswith("error: ") and found.strip().count("\n") == 0
    assert not (tmp_path / "new").exists()


def test_a_packed_folder_is_not_packed_again_and_others_plans_are_refused(tmp_path, capsys):
    compress(TINY, "uniform:8", tmp_path / "packed")
    new = ["--out", tmp_path / "new"]
    base = ["compress", "--plan", "uniform:4", *new, "--model"]
    assert "is packed already" in failing(capsys, *base, tmp_path / "packed")
    (tmp_path / "plan.json").write_text('{"bits": {"transformer.layers.0.x": 3}}')
    message = failing(capsys, "compress", "--model", TINY, "--plan", tmp_path / "plan.json", *new)
    assert "no tensor transformer.layers.0.x" in message and not (tmp_path / "new").exists()
    file = tmp_path / "packed" / NAME
    file.write_bytes(file.read_bytes()[:-5])
    assert "not a readable packed file" in failing(capsys, "unpack", tmp_path / "packed", *new)
    assert not (tmp_path / "new").exists()
