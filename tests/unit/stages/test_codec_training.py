"""Codec training: it learns, resumes exactly, quantises, and writes folders that transformers loads."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
from transformers import AutoFeatureExtractor, MimiModel

from eqknobs.errors import EqknobsError
from eqknobs.io import read_json
from eqknobs.stages.codec_training import codebooks, data, losses, network
from eqknobs.stages.codec_training import training as ct

MODEL = {
    "sampling_rate": 16000,
    "hidden_size": 32,
    "num_filters": 4,
    "upsampling_ratios": [4, 4, 5, 8],
    "codebook_size": 16,
    "codebook_dim": 16,
    "num_quantizers": 6,
    "vector_quantization_hidden_dimension": 16,
    "upsample_groups": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "sliding_window": 24,
    "layer_scale_initial_scale": 0.1,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Path:
    """Twelve two-second clips of gliding harmonic tones in sub-folders, flac and wav."""
    folder = tmp_path_factory.mktemp("tones") / "with space"
    rng = np.random.default_rng(0)
    time = np.arange(32000) / 16000
    for i in range(12):
        phase = 2 * np.pi * (rng.uniform(80, 300) * time + rng.uniform(-20, 20) * time**2)
        audio = sum(np.sin(k * phase) / k for k in range(1, 6)) * 0.1
        path = folder / f"voice{i % 3}" / f"{i}.{'flac' if i % 2 else 'wav'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, audio, 16000, subtype="PCM_16")
    return folder


def config(tones: Path, **changes) -> dict:
    base = {
        "seed": 3,
        "data": {str(tones): 1.0},
        "description": "tones",
        "model": MODEL,
        "batch": 4,
        "seconds": 0.5,
        "augment": 0.5,
        "noise": 0.2,
        "steps": 12,
        "learning_rate": 3e-3,
        "warmup": 3,
        "finetune_steps": 8,
        "finetune_learning_rate": 1e-3,
        "commitment": 0.25,
        "codebook_decay": 0.9,
        "semantic_dims": 2,
        "kmeans_frames": 200,
        "kmeans_iterations": 5,
        "log_every": 4,
        "export_every": 1000,
    }
    return base | changes


@pytest.fixture(scope="module")
def whole(tones, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    ct.train(config(tones), folder / "codec", folder / "checkpoint.pt")
    return folder / "codec"


def test_training_lowers_the_loss_on_held_out_clips(whole):
    log = pd.read_csv(whole / "log.csv")
    first, last = log[log.phase == "codec"].iloc[[0, -1]].unquantised
    assert last < 0.7 * first
    assert log[log.phase == "codec"].quantised.isna().all()
    tuned = log[log.phase == "quantiser"].quantised
    assert len(tuned) == 2
    assert tuned.notna().all()


@pytest.mark.parametrize("stop", [7, 12, 15])  # inside, between and after the two phases
def test_an_interrupted_run_ends_with_the_same_weights(tones, whole, tmp_path, stop):
    for end in (stop, None):
        ct.train(config(tones), tmp_path / "codec", tmp_path / "c.pt", stop_after=end)
    expected, found = (MimiModel.from_pretrained(f).state_dict() for f in (whole, tmp_path / "codec"))
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert found["decoder.decoder_seanet.layers.0.conv.weight"].abs().sum() > 0


def test_another_seed_gives_other_weights(tones, whole, tmp_path):
    ct.train(config(tones, seed=4), tmp_path / "codec", tmp_path / "c.pt")
    weights = [
        MimiModel.from_pretrained(f).decoder.decoder_seanet.layers[0].conv.weight for f in (whole, tmp_path / "codec")
    ]
    assert not torch.equal(*weights)


def test_the_second_phase_trains_encoder_decoder_projections_and_codebooks(tones, tmp_path):
    ct.train(config(tones), tmp_path / "codec", tmp_path / "c.pt", stop_after=13)
    before = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
    ct.train(config(tones), tmp_path / "codec", tmp_path / "c.pt")
    after = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[0] for k in changed} == {"encoder", "decoder", "quantizer"}
    for part in ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer"):
        for name in ("input_proj.weight", "output_proj.weight", "layers.0.codebook.embed_sum"):
            assert f"quantizer.{part}.{name}" in changed


def test_straight_through_quantises_as_the_model_does_and_passes_the_gradient(whole):
    model = MimiModel.from_pretrained(whole, dtype=torch.float32)
    latents = torch.randn(2, 32, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for count in (1, 3, 6):
        quantised, commitment = codebooks.quantise_straight_through(model, latents, count)
        torch.testing.assert_close(quantised, codebooks.quantise(model, latents, count))
    gradient = torch.autograd.grad(quantised.sum(), latents, retain_graph=True)[0]
    through = sum(
        part.output_proj(part.input_proj(latents)).sum()
        for part in (
            model.quantizer.semantic_residual_vector_quantizer,
            model.quantizer.acoustic_residual_vector_quantizer,
        )
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(through, latents)[0])
    assert torch.autograd.grad(commitment, latents)[0].abs().sum() > 0
    assert 0 < commitment.item() < 1.5


def test_a_codebook_moves_to_the_mean_of_what_chose_it(whole):
    book = (
        MimiModel.from_pretrained(whole, dtype=torch.float32)
        .quantizer.acoustic_residual_vector_quantizer.layers[0]
        .codebook
    )
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    chosen = torch.arange(40) % 4
    untouched = book.embed[5].clone()
    for _ in range(200):
        codebooks.move_codebook(book, rows, chosen, 0.9)
    for entry in range(4):
        torch.testing.assert_close(book.embed[entry], rows[chosen == entry].mean(0))
    assert book.cluster_usage[5] < 1e-6
    assert (book.embed[5].abs() <= untouched.abs() + 1e-6).all()  # an entry nobody chose does not blow up


def test_shares_decide_how_often_a_folder_is_drawn(tones):
    inner = str(tones / "voice0")
    speech = data.Speech({str(tones): 0.25, inner: 0.75}, 16000)
    assert speech.share.sum() == pytest.approx(1)
    counts = {}
    for clip, share in zip(speech.training, speech.share, strict=True):
        counts[clip.tobytes()] = share
    assert len(counts) == len(speech.training), "a file below two folders is read once"
    mine = {sf.read(p, dtype="int16")[0].tobytes() for p in Path(inner).iterdir()}
    assert sum(s for c, s in counts.items() if c in mine) == pytest.approx(0.75)
    with pytest.raises(EqknobsError, match="nowhere"):
        data.Speech({str(tones): 0.5, "nowhere": 0.5}, 16000)


def test_the_exported_folder_loads_in_half_precision_and_round_trips(whole):
    assert {p.name for p in whole.iterdir()} == {
        "config.json",
        "log.csv",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
    }
    assert MimiModel.from_pretrained(whole).dtype == torch.float16
    model = MimiModel.from_pretrained(whole, dtype=torch.float32).eval()
    extractor = AutoFeatureExtractor.from_pretrained(whole)
    assert extractor.sampling_rate == model.config.sampling_rate == 16000
    assert network.hop(model) == 1280
    audio = 0.1 * np.sin(np.arange(1280 * 10) / 20)
    inputs = extractor(raw_audio=audio, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        codes = model.encode(**inputs).audio_codes
        result = model(**inputs).audio_values
        own = network.decode(model, codebooks.quantise(model, network.encode(model, inputs["input_values"]), 6))
    assert codes.shape == (1, 6, 10)
    assert len(codes.unique()) > 4
    assert result.shape == (1, 1, 12800)
    torch.testing.assert_close(own, result)
    facts = read_json(whole / "training.json")
    assert facts["steps_done"] == 20
    assert facts["clips"] == 12


def test_channels_last_convolutions_give_the_same_numbers(whole):
    plain, fast = (MimiModel.from_pretrained(whole, dtype=torch.float32).eval() for _ in range(2))
    network.channels_last(fast)
    audio = torch.randn(2, 1, 6400, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.encode(plain, audio), network.encode(fast, audio), rtol=1e-4, atol=1e-4)
        latents = network.encode(plain, audio)
        torch.testing.assert_close(network.decode(plain, latents), network.decode(fast, latents), rtol=1e-4, atol=1e-4)


def test_each_codebook_lowers_the_residual():
    model = network.new_model(MODEL, 0)
    spread = torch.linspace(2, 0.1, 32)
    latents = torch.randn(600, 32, generator=torch.Generator().manual_seed(1)) * spread + 0.5
    errors = codebooks.fit_codebooks(model, latents, semantic_dims=2, iterations=8, seed=0)
    assert len(errors) == 6
    assert all(a > b for a, b in zip([1.0, *errors], errors, strict=False))
    quantised = codebooks.quantise(model, latents.T[None], 6)[0].T
    measured = ((latents - quantised).square().mean() / latents.square().mean()).item()
    assert measured == pytest.approx(errors[-1], rel=1e-3)


def test_unit_gain_initialisation_keeps_the_signal_alive_where_the_default_does_not():
    audio = torch.randn(2, 1, 12800, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        level = network.decode(m := network.new_model(MODEL, 0), network.encode(m, audio)).std().item()
    assert 0.01 < level < 30


def test_the_loss_is_zero_for_equal_and_grows_with_error():
    loss_of = losses.SpectralLoss(16000)
    audio = torch.randn(2, 1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    small, large = (loss_of(audio + level * torch.roll(audio, 400, -1), audio).item() for level in (0.1, 0.5))
    assert loss_of(audio, audio).item() == 0
    assert 0 < small < large


def test_the_learning_rate_warms_up_and_decays_in_both_phases(tones):
    cfg = config(tones, steps=100, finetune_steps=50, warmup=10)
    rates = [ct.learning_rate(cfg, s) for s in range(150)]
    assert max(rates[:100]) == pytest.approx(3e-3, rel=0.05)
    assert rates[0] < 0.2 * max(rates)
    assert rates[99] < 0.1 * max(rates)
    assert max(rates[100:]) == pytest.approx(1e-3, rel=0.15)


def test_speed_change_moves_the_frequency(tmp_path):
    for name in "ab":
        sf.write(tmp_path / f"{name}.wav", 0.3 * np.sin(2 * np.pi * 1000 * np.arange(64000) / 16000), 16000)
    speech = data.Speech({str(tmp_path): 1.0}, 16000)
    peaks = []
    for augment in (0.0, 1.0):
        batch = speech.batch(np.random.default_rng(0), 6, 16000, augment)
        assert batch.shape == (6, 1, 16000)
        peaks.append(torch.fft.rfft(batch[:, 0]).abs().argmax(1).double())
    assert (peaks[0] == 1000).all()
    assert peaks[1].min() < 950
    assert 1050 < peaks[1].max() <= 1201


@pytest.mark.parametrize(
    ("rate", "channels", "message"), [(8000, 1, "8000 Hz"), (16000, 2, r"2 channel")], ids=["8 kHz", "stereo"]
)
def test_other_audio_is_refused_by_name(tmp_path, rate, channels, message):
    for name in "ab":
        sf.write(tmp_path / f"{name}.wav", np.zeros((4000, channels)).squeeze(), rate)
    with pytest.raises(EqknobsError, match=rf"a\.wav: .*{message}"):
        data.Speech({str(tmp_path): 1.0}, 16000)


def test_float_files_sound_like_their_integer_twins(tmp_path):
    wav = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    for name, kind in (("a", "FLOAT"), ("b", "PCM_16")):
        sf.write(tmp_path / f"{name}.wav", np.rint(wav * 32768) / 32768, 16000, subtype=kind)
    first, second = data.Speech({str(tmp_path): 1.0}, 16000).clips
    assert np.array_equal(first, second) and first.max() > 9000


def test_linked_folders_of_speech_are_heard_too(tmp_path):
    for name in ("corpus/a", "elsewhere/b", "elsewhere/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sf.write(tmp_path / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(4000), 16000)
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "round").symlink_to(tmp_path / "corpus")
    assert len(data.Speech({str(tmp_path / "corpus"): 1.0}, 16000).clips) == 3


def test_text_named_wav_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(EqknobsError, match="fewer than two"):
        data.Speech({str(tmp_path): 1.0}, 16000)
    for name in "ab":
        (tmp_path / f"{name}.wav").write_text("not audio")
    with pytest.raises(EqknobsError, match=r"a\.wav: not readable"):
        data.Speech({str(tmp_path): 1.0}, 16000)


def test_a_checkpoint_of_another_model_is_refused(tones, tmp_path):
    ct.train(config(tones), tmp_path / "codec", tmp_path / "c.pt", stop_after=1)
    with pytest.raises(EqknobsError, match="another model or seed"):
        ct.train(config(tones, seed=9), tmp_path / "codec", tmp_path / "c.pt")
    assert not (tmp_path / "codec").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tones, tmp_path):
    with pytest.raises(EqknobsError, match="not finite"):
        ct.train(config(tones, learning_rate=1e30, warmup=1), tmp_path / "codec", tmp_path / "c.pt")


def test_too_few_frames_for_the_codebooks_are_refused():
    with pytest.raises(EqknobsError, match="10 latent frames for 16 entries"):
        codebooks.fit_codebooks(network.new_model(MODEL, 0), torch.randn(10, 32), 2, 3, 0)


ADVERSARIAL = {"channels": 4, "crops": 3, "learning_rate": 1e-3, "hinge": 0.1, "features": 0.5}


def test_an_export_can_be_trained_on_with_its_codebooks(tones, whole, tmp_path):
    cfg = config(tones, start=str(whole), steps=0, finetune_learning_rate=1e-4)
    ct.train(cfg, tmp_path / "codec", tmp_path / "c.pt")
    log, earlier = pd.read_csv(tmp_path / "codec/log.csv"), pd.read_csv(whole / "log.csv")
    assert set(log.phase) == {"quantiser"}
    assert log.quantised.iloc[-1] < earlier.quantised.iloc[-1]
    facts, before = (read_json(f / "training.json") for f in (tmp_path / "codec", whole))
    assert facts["before"] == before
    assert facts["residual_power_after_codebooks"] == before["residual_power_after_codebooks"]
    assert "start" not in facts["config"]


@pytest.mark.parametrize("start", ["nowhere", "other"])
def test_a_start_that_does_not_fit_is_refused(tones, whole, tmp_path, start):
    folder = whole if start == "other" else tmp_path / "nowhere"
    cfg = config(tones, start=str(folder), model=MODEL | {"num_filters": 8})
    with pytest.raises(EqknobsError, match=r"codec_training\.start: .*no codec of this architecture"):
        ct.train(cfg, tmp_path / "codec", tmp_path / "c.pt")
    assert not (tmp_path / "codec").exists()


def test_without_first_phase_there_must_be_a_start(tones, tmp_path):
    with pytest.raises(EqknobsError, match="steps: 0 needs a start"):
        ct.train(config(tones, steps=0), tmp_path / "codec", tmp_path / "c.pt")


def test_an_interrupted_run_against_a_discriminator_ends_with_the_same_weights(tones, whole, tmp_path):
    cfg = config(tones, adversarial=ADVERSARIAL)
    for name, stops in (("one", (None,)), ("two", (15, None))):
        for stop in stops:
            ct.train(cfg, tmp_path / name, tmp_path / f"{name}.pt", stop_after=stop)
    one, two, plain = (MimiModel.from_pretrained(f).state_dict() for f in (tmp_path / "one", tmp_path / "two", whole))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], plain[k]) for k in one)


def test_a_discriminator_of_no_weight_changes_nothing(tones, whole, tmp_path):
    ct.train(
        config(tones, adversarial=ADVERSARIAL | {"hinge": 0, "features": 0}), tmp_path / "codec", tmp_path / "c.pt"
    )
    plain, found = (MimiModel.from_pretrained(f).state_dict() for f in (whole, tmp_path / "codec"))
    assert all(torch.equal(plain[k], found[k]) for k in plain)


def test_the_discriminator_learns_and_the_codec_can_follow_it(tones):
    """Tones against noise of their level: told apart after some steps; then what it says is worth descending."""
    speech = data.Speech({str(tones): 1.0}, 16000)
    judge = losses.Discriminator(4, 0)
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
    found = []
    for step in range(30):
        rng = np.random.default_rng(step)
        real = speech.batch(rng, 4, 8000, 0.0)
        fake = real.std() * torch.from_numpy(rng.standard_normal(real.shape, dtype=np.float32))
        loss = losses.discriminator_loss(judge(real), judge(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[0] == pytest.approx(2, rel=0.1)
    assert found[-1] < 0.5 * found[0]
    fake.requires_grad_(True)
    hinge, features = losses.generator_losses(judge(real), judge(fake))
    gradient = torch.autograd.grad(hinge, fake, retain_graph=True)[0]
    with torch.no_grad():
        after, _ = losses.generator_losses(judge(real), judge(fake - 1e-3 * gradient / gradient.norm()))
    assert after < hinge
    assert losses.generator_losses(judge(real), judge(real))[1].item() == 0 < features.item()
