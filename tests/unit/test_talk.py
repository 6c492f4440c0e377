"""`eqknobs talk` on tiny checkpoints: length, seeds, prompts, and what it refuses."""

import numpy as np
import pytest
import soundfile as sf
import torch

from eqknobs.cli import main
from helpers.moshi_world import PERSONA, TOKENIZER, write_codec, write_persona

SECONDS = 0.9


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny PersonaPlex, its codec, a recording at another rate with two channels, and a voice."""
    root = tmp_path_factory.mktemp("talk")
    write_persona(root / "model")
    write_codec(root / "codec")
    rng = np.random.default_rng(0)
    sf.write(root / "user.flac", 0.1 * rng.standard_normal((round(SECONDS * 16000), 2)), 16000)
    sf.write(root / "voice.wav", 0.1 * rng.standard_normal(12000), 24000)
    torch.manual_seed(0)
    voice = {"embeddings": torch.randn(5, 1, 1, PERSONA.dim), "cache": torch.randint(0, 96, (1, 17, 4))}
    torch.save(voice, root / "voice.pt")
    return root


def talk(world, out, *arguments, audio="user.flac"):
    models = ("--model", world / "model", "--codec", world / "codec", "--device", "cpu")
    main(["talk", *map(str, (*models, "--audio", world / audio, "--out", out, *arguments))])


def answer(world, tmp_path, *arguments):
    talk(world, tmp_path / "out.wav", *arguments)
    return (tmp_path / "out.wav").read_bytes()


def test_the_answer_is_as_long_as_what_is_heard(world, tmp_path, capsys):
    talk(world, tmp_path / "new" / "out.wav")
    wav, rate = sf.read(tmp_path / "new" / "out.wav")
    assert rate == 24000 and wav.shape == (round(SECONDS * 24000),) and wav.std() > 0
    said = capsys.readouterr().out
    assert said.endswith(f"wrote {tmp_path / 'new' / 'out.wav'}\n") and len(said.splitlines()[0].strip()) > 3
    for seconds in (0.3, 1.5):  # cut, or silence after it
        talk(world, tmp_path / "out.flac", "--seconds", seconds)
        assert sf.info(tmp_path / "out.flac").frames == seconds * 24000
    assert sf.info(tmp_path / "out.flac").format == "FLAC"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out.flac"]


def test_the_monologue_comes_piece_by_piece(world, tmp_path):
    from eqknobs.models.moshi.generate import Sampling
    from eqknobs.talk import talk as run

    cfg = {"name": "m", "kind": "moshi", "path": str(world / "model"), "codec": str(world / "codec"), "device": "cpu"}
    pieces = []
    run(cfg, world / "user.flac", tmp_path / "out.wav", sampling=Sampling(seed=1), say=pieces.append)
    assert len(pieces) > 3 and pieces[-1] == "\n" and "▁" not in "".join(pieces)


def test_seeds_prompts_and_voices_decide_the_answer(world, tmp_path):
    first = answer(world, tmp_path, "--seed", 3)
    assert first == answer(world, tmp_path, "--seed", 3)
    others = {
        "seed": ("--seed", 4),
        "temperature": ("--seed", 3, "--temperature", 1.5),
        "greedy": ("--greedy",),
        "prompt": ("--seed", 3, "--text-prompt", "you are a wise and friendly teacher"),
        "another prompt": ("--seed", 3, "--text-prompt", "you work for a bank"),
        "voice": ("--seed", 3, "--voice", world / "voice.pt"),
        "recorded voice": ("--seed", 3, "--voice", world / "voice.wav"),
        "nf4": ("--seed", 3, "--nf4"),
    }
    found = {name: answer(world, tmp_path, *arguments) for name, arguments in others.items()}
    assert len({first, *found.values()}) == 1 + len(others)
    assert found["greedy"] == answer(world, tmp_path, "--greedy", "--seed", 9)


def test_bad_input_ends_in_one_line_and_no_file(world, tmp_path, monkeypatch):
    (world / "bad.wav").write_text("no sound")
    (tmp_path / "file").write_text("")
    out = tmp_path / "out.wav"
    for arguments, audio, name, message in (
        ((), "absent.wav", out, "absent.wav: no such audio file"),
        ((), "bad.wav", out, "bad.wav: not readable"),
        ((), "user.flac", tmp_path / "out.mp3", "ends in .wav or .flac"),
        ((), "user.flac", world / "user.flac", "the recording itself"),
        ((), "user.flac", tmp_path / "file" / "out.wav", "folder cannot be made"),
        (("--seconds", 0), "user.flac", out, "--seconds: must be above 0"),
        (("--seconds", "nan"), "user.flac", out, "--seconds: must be above 0"),
        (("--seed", -1), "user.flac", out, "--seed"),
        (("--temperature", 0), "user.flac", out, "--temperature"),
        (("--greedy", "--temperature", 1), "user.flac", out, "leave out --temperature"),
        (("--voice", world / "no.pt"), "user.flac", out, "no.pt: no such voice"),
        (("--voice", world / "bad.wav"), "user.flac", out, "bad.wav: not readable"),
        (("--model", tmp_path / "none"), "user.flac", out, "no folder"),
        (("--model", world / "codec"), "user.flac", out, "config.json"),
        (("--codec", world / "model"), "user.flac", out, "codec"),
    ):
        with pytest.raises(SystemExit) as stop:
            talk(world, name, *arguments, audio=audio)
        assert message in str(stop.value) and "\n" not in str(stop.value), (arguments, audio, stop.value)
    (world / "torn.pt").write_bytes((world / "voice.pt").read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"torn\.pt: not a voice"):
        talk(world, out, "--voice", world / "torn.pt")
    whole = (world / "model" / TOKENIZER).read_bytes()
    (world / "model" / TOKENIZER).write_bytes(b"torn")
    with pytest.raises(SystemExit, match=rf"{TOKENIZER}; fetch it again"):
        talk(world, out)
    (world / "model" / TOKENIZER).write_bytes(whole)

    def full(*_args, **_keys):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("eqknobs.models.moshi.adapter.load_net", full)
    with pytest.raises(SystemExit, match=r"GPU is out of memory: .*nf4"):
        talk(world, out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_while_writing_leaves_the_earlier_answer(world, tmp_path, monkeypatch):
    (tmp_path / "out.wav").write_text("earlier")

    def full(*_args, **_keys):
        raise sf.SoundFileError("No space left on device")

    monkeypatch.setattr("eqknobs.audio.sf.write", full)
    with pytest.raises(SystemExit, match="cannot be written"):
        talk(world, tmp_path / "out.wav", "--seconds", 0.2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]
