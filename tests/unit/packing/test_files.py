"""Packed folders: bit for bit there and back, bytes as planned, bad files in one line; models load them by path."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from eqknobs.errors import EqknobsError
from eqknobs.models import load_model
from eqknobs.packing.files import (
    NAME,
    PackedFile,
    data_bytes,
    is_packed_folder,
    pack_state,
    read_packed,
    source_state,
    write_file,
    write_packed,
)
from eqknobs.packing.notes import KEY
from eqknobs.packing.plan import Plan, packable, plan_bytes
from eqknobs.packing.quantise import Packed
from helpers import ROOT
from helpers.tiny_world import RATE, save_codec

TINY = ROOT / "resources/models/tiny-mimi"


def model_of(kind, path):
    return load_model({"name": "m", "kind": kind, "path": str(path), "revision": None, "device": "cpu"})


def encodec(folder):
    EncodecModel(
        EncodecConfig(
            sampling_rate=RATE,
            hidden_size=24,
            num_filters=4,
            codebook_size=64,
            codebook_dim=24,
            target_bandwidths=[1.2, 2.4],
        )
    ).save_pretrained(folder)


def dac(folder):
    sizes = dict(encoder_hidden_size=4, downsampling_ratios=[2, 4, 5, 8], decoder_hidden_size=32, n_codebooks=4)
    DacModel(DacConfig(**sizes, codebook_size=64, sampling_rate=RATE)).save_pretrained(folder)


def hubert(folder):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    HubertModel(HubertConfig(**sizes, conv_dim=[8] * 7, num_conv_pos_embeddings=4)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def whisper(folder):
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = WhisperConfig(**sizes, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=80, pad_token_id=0)
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


@pytest.fixture
def packed(tmp_path):
    """A packed folder of a tiny random codec, the network and the plan."""
    net = model_of("mimi", save_codec(tmp_path / "plain")).net
    plan = Plan.uniform(packable(net), 3, group=16)
    write_packed(tmp_path / "packed", net, plan)
    return tmp_path / "packed", net, plan


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rest", ["float16", "float32"])
def test_there_and_back_bit_for_bit(tmp_path, symmetric, rest):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (9, 70), "b": (3, 4, 5), "c": (11,), "d": (6, 6), "e.codes": (2, 2)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["count"] = torch.tensor([3, 4])
    state["d"] = state["d"].t()  # not contiguous
    plan = Plan({"a": 3, "b": 5, "d": 8}, group=32, symmetric=symmetric, rounding="mse", rest=rest, transposed=("b",))
    tensors = pack_state(state, plan)
    write_file(tmp_path / NAME, tensors, plan)
    with PackedFile(tmp_path / NAME) as file:
        assert file.plan == plan and set(file.names) == set(state)
        for name, value in tensors.items():
            again = file.get(name)
            assert file.shape(name) == tuple(state[name].shape)
            if isinstance(value, Packed):
                assert {k: v for k, v in vars(again).items() if not isinstance(v, torch.Tensor)} == {
                    k: v for k, v in vars(value).items() if not isinstance(v, torch.Tensor)
                }
                assert again.parts().keys() == value.parts().keys()
                assert all(torch.equal(part, value.parts()[key]) for key, part in again.parts().items())
            else:
                assert torch.equal(again, value) and again.dtype == value.dtype
    assert data_bytes(tmp_path / NAME) == plan_bytes(state, plan)
    state = read_packed(tmp_path)
    assert all(torch.equal(state[n], v.dequantise()) for n, v in tensors.items() if isinstance(v, Packed))
    assert state["c"].dtype == torch.float32 and state["count"].dtype == torch.int64


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_bytes_of_the_bundled_codec_are_as_planned(tmp_path, bits):
    net = model_of("mimi", TINY).net
    plan = Plan.uniform(packable(net), bits, group=64, symmetric=bits % 2 == 0)
    file = write_packed(tmp_path / "p", net, plan)
    assert data_bytes(file) == plan_bytes(net.state_dict(), plan)
    assert plan_bytes({name: tuple(t.shape) for name, t in net.state_dict().items()}, plan) == data_bytes(file)
    assert file.stat().st_size < data_bytes(file) + 60_000


def test_the_same_plan_gives_the_same_bytes(packed, tmp_path):
    folder, net, plan = packed
    again = write_packed(tmp_path / "again", net, plan)
    assert again.read_bytes() == (folder / NAME).read_bytes()
    write_packed(tmp_path / "again", net, plan.with_bits(dict.fromkeys(plan.bits, 2)))  # replaces
    assert again.stat().st_size < (folder / NAME).stat().st_size
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_from_a_folder_by_the_names_of_its_file(tmp_path):
    plain = save_codec(tmp_path / "plain")
    state = load_file(plain / "model.safetensors")
    names = [name for name, tensor in state.items() if tensor.dim() > 1]
    write_packed(tmp_path / "packed", plain, Plan.uniform(names, 6, rest="float32"))
    assert (tmp_path / "packed/config.json").read_bytes() == (plain / "config.json").read_bytes()
    again = read_packed(tmp_path / "packed")
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in set(state) - set(names))
    model_of("mimi", tmp_path / "packed")


@pytest.mark.parametrize(
    ("kind", "make"),
    [("mimi", save_codec), ("encodec", encodec), ("dac", dac), ("hubert", hubert), ("whisper", whisper)],
)
def test_models_load_packed_folders_by_their_path(tmp_path, kind, make):
    torch.manual_seed(0)
    make(tmp_path / "plain")
    plain = model_of(kind, tmp_path / "plain")
    plan = Plan.uniform(packable(plain.net), 5, group=16, rest="float32")
    assert len(plan.bits) > 10
    extra = [p for p in (tmp_path / "plain").iterdir() if p.name == "preprocessor_config.json"]
    write_packed(tmp_path / "packed", plain.net, plan, extra)
    loaded = model_of(kind, tmp_path / "packed")
    state, wanted = loaded.net.state_dict(), plain.net.state_dict()
    for name, tensor in wanted.items():
        expected = plan.fake(name, tensor) if name in plan.bits else tensor
        assert torch.equal(state[name], expected), name
    assert loaded.revision != plain.revision and len(loaded.revision) == 12
    site = next(iter(loaded.sites))
    wave = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    acts = loaded.encode(wave, site)
    assert np.isfinite(acts).all() and not np.array_equal(acts, plain.encode(wave, site))


def test_revision_and_kind_of_a_packed_folder_are_checked(packed):
    folder, _, _ = packed
    cfg = {"name": "m", "kind": "mimi", "path": str(folder), "revision": None, "device": "cpu"}
    revision = load_model(cfg).revision
    load_model(cfg | {"revision": revision})
    with pytest.raises(EqknobsError, match=f"has weights {revision}, not 123"):
        load_model(cfg | {"revision": "123"})
    with pytest.raises(EqknobsError, match="is of type 'mimi', not 'dac'"):
        load_model(cfg | {"kind": "dac"})
    shutil.copy(folder.parent / "plain/model.safetensors", folder)
    with pytest.raises(EqknobsError, match=r"holds packed.safetensors beside model.safetensors"):
        load_model(cfg)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path):
    save_file({"a": torch.zeros(2)}, path)


def edited(path, change):
    """The file with other notes or tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[KEY])
    tensors = load_file(path)
    change(said, tensors)
    save_file(tensors, path, {KEY: json.dumps(said)})


def first(said):
    return min(said["tensors"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "not a readable packed file"),
        (lambda path: path.write_bytes(b""), "not a readable packed file"),
        (lambda path: path.write_bytes(b"\0" * 4000), "not a readable packed file"),
        (foreign, "not a packed model"),
        (lambda path: save_file({"a": torch.zeros(2)}, path, {KEY: "{"}), "notes cannot be read"),
        (lambda path: edited(path, lambda said, _: said.update(version=9)), "version 9 of the format"),
        (lambda path: edited(path, lambda said, _: said.pop("plan")), "notes cannot be read"),
        (lambda path: edited(path, lambda said, _: said["tensors"][first(said)].pop("bits")), "notes cannot be read"),
        (lambda path: edited(path, lambda said, _: said["tensors"][first(said)].update(bits=12)), "2 to 8, got 12"),
        (lambda path: edited(path, lambda said, _: said["tensors"][first(said)].update(bits=4)), "cannot be read"),
        (lambda path: edited(path, lambda said, _: said["tensors"][first(said)].update(shape=[3])), "cannot be read"),
        (lambda path: edited(path, lambda said, _: said["tensors"][first(said)].update(shape=7)), "cannot be read"),
        (lambda path: edited(path, lambda said, _: said["tensors"][first(said)].update(axis=5)), "cannot be read"),
        (lambda path: edited(path, lambda said, t: t.pop(f"{first(said)}.scales")), "lacks .*scales"),
        (
            lambda path: edited(path, lambda said, t: t.update({f"{first(said)}.scales": torch.zeros(2, 2)})),
            "scales are torch.float32",
        ),
    ],
)
def test_bad_files_are_one_line(packed, damage, message):
    folder, _, _ = packed
    damage(folder / NAME)
    for read in (read_packed, lambda path: model_of("mimi", path)):
        with pytest.raises(EqknobsError, match=message) as seen:
            read(folder)
        assert "\n" not in str(seen.value) and NAME in str(seen.value)


def test_another_models_tensors_are_refused(packed, tmp_path):
    """Packed whole and well, but not what config.json describes."""
    folder, _, _ = packed
    linear = nn.Linear(4, 4)
    file = write_packed(tmp_path / "other", linear, Plan({"weight": 4}))
    shutil.copy(file, folder / NAME)
    with pytest.raises(EqknobsError, match=r"the weights of .* lack \d+ tensors"):
        model_of("mimi", folder)


def test_what_is_not_written(packed, tmp_path):
    _, net, plan = packed
    name = next(iter(plan.bits))
    out = tmp_path / "out"
    with pytest.raises(EqknobsError, match=r"no tensor nope .*another model's plan"):
        write_packed(out, net, plan.with_bits({"nope": 3}))
    with torch.no_grad():
        kept = net.get_parameter(name)[0].clone()
        net.get_parameter(name)[0] = torch.nan
    with pytest.raises(EqknobsError, match=f"{name}: .*NaN"):
        write_packed(out, net, plan)
    with torch.no_grad():
        net.get_parameter(name)[0] = kept * 1e6
    with pytest.raises(EqknobsError, match=f"{name}: has values beyond float16; set the plan's rest to float32"):
        write_packed(out, net, plan.with_bits({}))
    with pytest.raises(EqknobsError, match=r"has no model.safetensors"):
        source_state(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(EqknobsError, match="not a readable safetensors file"):
        source_state(tmp_path)
    assert not out.exists() and not is_packed_folder(tmp_path)
