"""A depformer that is shortened for good: saved, loaded, packed, planned, and heard."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eqknobs.compress import compress, unpack
from eqknobs.errors import EqknobsError
from eqknobs.io import read_json, write_json
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import find_files, load_net, save_net
from eqknobs.models.moshi.generate import GREEDY, Prompt
from eqknobs.models.moshi.interventions import first_codebooks, remove_codebooks
from eqknobs.models.moshi.memory import read_shapes, weights
from eqknobs.packing.modules import bytes_resident
from eqknobs.talk import reply
from helpers.moshi_world import KYUTAI, random_codes, write_codec, write_kyutai


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, and the same with three steps, saved."""
    root = tmp_path_factory.mktemp("shortened")
    files = find_files("m", str(write_kyutai(root / "whole")))
    write_codec(root / "codec")
    net = load_net(files)
    remove_codebooks(net, 3)
    save_net(net, root / "short", files.tokenizer, "../codec")
    return root


def test_a_saved_model_is_the_shortened_one(world: Path) -> None:
    net, whole = (load_net(find_files("m", str(world / name))) for name in ("short", "whole"))
    assert net.steps == 3 and whole.steps == 8 and read_json(world / "short/config.json")["dep_q"] == 3
    codes = random_codes(1, 6, KYUTAI.text_card)
    with torch.no_grad(), first_codebooks(whole, 3):
        wanted, found = whole(codes), net(codes)
    assert torch.equal(found.text, wanted.text) and found.audio.shape[1] == 3
    assert torch.equal(found.audio.nan_to_num(), wanted.audio.nan_to_num())
    assert whole.steps == 8
    shapes = read_shapes({"name": "m", "path": str(world / "short")})
    assert sum(weights(shapes, 4, None).values()) == bytes_resident(net)
    with pytest.raises(EqknobsError, match="codebooks: 1 to 3, got 4"):
        remove_codebooks(net, 4)


def test_it_is_packed_and_unpacked_as_any_other(world: Path, tmp_path: Path) -> None:
    compress(str(world / "short"), "uniform:4", tmp_path / "packed", group=32)
    unpack(tmp_path / "packed", tmp_path / "plain")
    packed, plain = (load_net(find_files("m", str(tmp_path / name))) for name in ("packed", "plain"))
    codes = random_codes(1, 4, KYUTAI.text_card)
    assert packed.steps == plain.steps == 3
    with torch.no_grad():
        assert torch.equal(packed(codes).audio.nan_to_num(), plain(codes).audio.nan_to_num())


def test_it_speaks_with_the_codebooks_that_are_left(world: Path) -> None:
    model = Moshi({"name": "m", "path": str(world / "short"), "device": "cpu"})
    heard = np.zeros(4 * model.hop, dtype=np.float32)
    answer = model.converse(heard)
    assert (answer.codes[0, 3:] == -1).all() and (answer.codes[0, :3] >= 0).all()
    wav = reply(model, heard, Prompt(), GREEDY, lambda _piece: None)
    assert np.array_equal(wav, model.speech(answer.codes[0, :3], len(heard)))


def test_more_steps_than_codebooks_are_refused(world: Path) -> None:
    folder = world / "odd"
    files = find_files("m", str(world / "whole"))
    save_net(load_net(files), folder, files.tokenizer, "../codec")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"dep_q": 9})
    with pytest.raises(EqknobsError, match="n_q 16 and dep_q 9, supported are two speakers"):
        load_net(find_files("m", str(folder)))
