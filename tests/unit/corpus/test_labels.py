import time
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.signal
import soundfile as sf
import soxr

from eqknobs.corpus import labels
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256, read_csv, write_csv
from helpers import ROOT

CFG = {"crepe": "tiny", "periodicity": 0.5, "floor_db": 40, "fmin": 50, "fmax": 550, "n_mels": 64}
LIBRISPEECH = ROOT.parent / "shared" / "librispeech"


def tone(hertz: float, samples: int, rate: int = 16000, level: float = 0.1) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


def switch(low: float, high: float, at: int, samples: int, rate: int) -> np.ndarray:
    """A tone that jumps from `low` to `high` Hz at sample `at`, without a jump in phase."""
    hertz = np.where(np.arange(samples) < at, low, high)
    return (0.1 * np.sin(2 * np.pi * np.cumsum(hertz) / rate)).astype(np.float32)


# (rate, hop): this project's codec, Mimi, HuBERT, EnCodec, DAC, and a hop that is no whole number of samples
LAYOUTS = [(16000, 640), (24000, 960), (16000, 320), (24000, 320), (44100, 512), (16000, Fraction(640, 3))]


@pytest.mark.parametrize(("rate", "hop"), LAYOUTS)
def test_windows_are_two_hops_centred_on_the_hop(rate, hop):
    wav = np.arange(1, 20 * int(hop) + 1, dtype=np.float32)
    blocks = np.concatenate([block for _, block in labels.windows(wav, hop, 20)])
    assert blocks.shape == (20, round(2 * hop))
    for t in (1, 7, 18):
        centre = blocks[t].mean() - 0.5  # samples are numbered from 1
        assert centre == pytest.approx((t + 0.5) * hop - 0.5, abs=1)
    outside = round(hop / 2)
    assert not blocks[0, : outside - 1].any() and blocks[0, outside + 1] > 0
    assert not blocks[19, -outside + 1 :].any()


def test_windows_in_blocks_are_the_same_windows(monkeypatch):
    wav = np.random.default_rng(0).normal(size=10000).astype(np.float32)
    whole = np.concatenate([block for _, block in labels.windows(wav, 320, 31)])
    monkeypatch.setattr(labels, "_BLOCK", 7)
    rows, blocks = zip(*labels.windows(wav, 320, 31))
    assert [row.start for row in rows] == [0, 7, 14, 21, 28]
    assert np.array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize(("rate", "hop"), LAYOUTS)
def test_tone_switch_moves_the_centroid_at_the_exact_frame(rate, hop):
    """The tone switches at the centre of frame 10's hop: 9 and before are low, 11 and after high, 10 in between."""
    at = round(10.5 * hop)
    wav = switch(1000, 3000, at, round(20 * hop), rate)
    centroid, _ = labels.centroid_and_rms(wav, rate, hop, 20)
    inner = np.arange(1, 19)  # the first and last window are half outside the clip
    # Frame 9's window ends at 10.5 hops, where the tone switches; frame 11's begins there.
    assert np.abs(centroid[inner[inner <= 9]] - centroid[3]).max() < 0.02 * 2000
    assert np.abs(centroid[inner[inner >= 11]] - centroid[15]).max() < 0.02 * 2000
    assert centroid[3] == pytest.approx(1000, rel=0.15) and centroid[15] == pytest.approx(3000, rel=0.15)
    gap = centroid[15] - centroid[3]
    assert 0.25 * gap < centroid[10] - centroid[3] < 0.75 * gap


@pytest.mark.parametrize(("rate", "hop"), LAYOUTS)
def test_level_step_moves_the_rms_at_the_exact_frame(rate, hop):
    samples = round(20 * hop)
    wav = np.full(samples, 0.1, np.float32)
    wav[round(10.5 * hop) :] = 0.01
    _, rms = labels.centroid_and_rms(wav, rate, hop, 20)
    assert rms[:10] == pytest.approx(-20, abs=0.05)  # the edge window counts only samples inside the clip
    assert rms[11:] == pytest.approx(-40, abs=0.35)  # one sample of the loud part may fall in at fractional hops
    assert rms[10] == pytest.approx(10 * np.log10((0.01 + 0.0001) / 2), abs=0.05)


def test_a_click_is_seen_by_two_windows_only():
    """A sample in the second half of hop 7 lies in the windows of frames 7 and 8."""
    wav = np.zeros(20 * 640, np.float32)
    wav[7 * 640 + 500] = 0.5
    _, rms = labels.centroid_and_rms(wav, 16000, 640, 20)
    assert np.flatnonzero(rms > -100).tolist() == [7, 8]


@pytest.mark.parametrize(("rate", "hop"), [(16000, 640), (24000, 960), (24000, 320)])
def test_pitch_step_is_at_the_exact_frame(rate, hop):
    """An octave up between the hops of frames 99 and 100: CREPE's 64 ms window is centred where ours is."""
    boundary, frames = 100, 115  # late in the clip, so that a wrong hop would drift away
    wav = switch(120, 240, boundary * hop, frames * hop, rate)
    pitch, periodicity = labels.pitch_track(wav, rate, hop, frames)
    # Frame 99 hears mostly 120 Hz and frame 100 mostly 240 Hz, even where CREPE's window spans five hops.
    true = np.where(np.arange(frames) < boundary, 120, 240)
    assert np.abs(12 * np.log2(pitch / true))[2:-2].max() < 0.5
    assert np.median(periodicity) > 0.8


def test_pitch_of_frame_t_is_crepe_on_the_window_around_its_centre():
    """Bit for bit the probabilities that torchcrepe's own framing gives when its frames are shifted by half a hop."""
    import torch

    torchcrepe = labels._torchcrepe()
    wav = switch(110, 330, 8000, 16000, 16000)
    frames, hop = 25, 640
    pitch, periodicity = labels.pitch_track(wav, 16000, hop, frames, fmin=32, fmax=1900)
    shifted = torch.from_numpy(wav[hop // 2 :])[None]  # torchcrepe centres frame t at t·hop
    with torch.no_grad():
        batch = next(iter(torchcrepe.preprocess(shifted, 16000, hop)))[1:-2]
        probability = torchcrepe.infer(batch, "tiny", "cpu")
    assert periodicity[1 : 1 + len(batch)] == pytest.approx(probability.max(dim=1).values.numpy(), abs=1e-3)
    cents = 1200 * np.log2(pitch[1 : 1 + len(batch)] / 10)
    assert np.abs(cents - (1997.379 + 20 * probability.argmax(dim=1).numpy())).max() < 60


def test_fast_crepe_is_torchcrepe():
    import torch

    segments = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 1024)).astype(np.float32))
    with torch.no_grad():
        expected = labels._torchcrepe().infer(segments, "tiny", "cpu")
        assert torch.allclose(labels._crepe(segments, "tiny"), expected, atol=1e-5)


def test_torchcrepe_leaves_no_stand_in_behind():
    import importlib.util
    import sys

    labels._torchcrepe()
    assert "torchaudio" not in sys.modules or sys.modules["torchaudio"].__spec__ is not None
    importlib.util.find_spec("torchaudio")  # raises ValueError for a module without a spec


def test_pitch_is_deterministic_and_between_crepe_bins():
    wav = tone(200 * 2 ** (7 / 1200), 16000)
    first, _ = labels.pitch_track(wav, 16000, 640, 25)
    again, _ = labels.pitch_track(wav, 16000, 640, 25)
    assert np.array_equal(first, again)
    assert 1200 * np.log2(first[2:-2] / wav_hertz(7)) == pytest.approx(0, abs=15)


def wav_hertz(cents: float) -> float:
    return 200 * 2 ** (cents / 1200)


def test_pitch_is_asked_of_wanted_frames_only():
    wav = np.sin(2 * np.pi * 200 * np.arange(16000) / 16000).astype(np.float32)
    wanted = np.arange(25) % 3 == 0
    whole, some = (labels.pitch_track(wav, 16000, 640, 25, wanted=mask) for mask in (None, wanted))
    for one, other in zip(whole, some, strict=True):
        assert one[wanted] == pytest.approx(other[wanted], rel=1e-5)
        assert not other[~wanted].any() and one[~wanted].all()
    assert not np.any(labels.pitch_track(wav, 16000, 640, 25, wanted=np.zeros(25, bool)))


def test_masks_follow_level_and_periodicity():
    """Loud tone, the same 30 dB lower, noise, the tone 50 dB lower, silence."""
    part = 10 * 640
    noise = np.random.default_rng(0).normal(0, 0.05, part).astype(np.float32)
    levels = [tone(200, part), tone(200, part, level=0.1 * 10**-1.5), noise, tone(200, part, level=0.1 * 10**-2.5)]
    wav = np.concatenate([*levels, np.zeros(part, np.float32)])
    out = labels.label_utterance(wav, 16000, Fraction(640, 16000), 50, CFG)
    middle = np.arange(50).reshape(5, 10)[:, 2:-2]
    assert out["energetic"][middle].all(axis=1).tolist() == [True, True, True, False, False]
    assert not out["energetic"][middle[3:]].any()
    assert out["voiced"][middle[:2]].all() and not out["voiced"][middle[2:]].any()
    assert np.array_equal(np.isnan(out["pitch"]), ~out["voiced"])
    assert out["pitch"][middle[0]] == pytest.approx(200, rel=0.02)
    assert {name: values.shape for name, values in out.items()} == dict.fromkeys(out, (50,))


def test_float_and_exact_hops_agree():
    wav = tone(300, 8000, 24000)
    exact = labels.label_utterance(wav, 24000, Fraction(1, 75), 25, CFG)
    rounded = labels.label_utterance(wav, 24000, 1 / 75, 25, CFG)
    assert all(np.array_equal(exact[name], rounded[name], equal_nan=True) for name in exact)


def test_no_voice_no_voiced_frames():
    noise = np.random.default_rng(0).normal(0, 0.05, 32000).astype(np.float32)
    out = labels.label_utterance(noise, 16000, 0.04, 50, CFG)
    assert not out["voiced"].any() and np.isnan(out["pitch"]).all() and out["energetic"].all()
    silence = labels.label_utterance(np.zeros(6400, np.float32), 16000, 0.04, 10, CFG)
    assert not silence["energetic"].any() and not silence["voiced"].any()
    assert (silence["rms"] == labels.SILENCE_DB).all()


def test_the_model_rate_does_not_matter_for_what_both_rates_hold():
    noise = np.random.default_rng(0).normal(0, 0.05, 16000)
    wav = scipy.signal.lfilter(*scipy.signal.butter(4, 5000, fs=16000), noise).astype(np.float32)
    at_16, _ = labels.centroid_and_rms(wav, 16000, 640, 25)
    at_24, _ = labels.centroid_and_rms(soxr.resample(wav, 16000, 24000), 24000, 960, 25)
    assert at_24[1:-1] == pytest.approx(at_16[1:-1], rel=0.01)


def test_logmel_finds_the_band_of_a_tone():
    import librosa

    mel = labels.logmel(switch(500, 2500, 10 * 640 + 320, 20 * 640, 16000), 16000, 640, 20)
    assert mel.shape == (20, 64) and mel.dtype == np.float32 and np.isfinite(mel).all()
    centres = librosa.mel_frequencies(n_mels=66, fmin=0, fmax=8000)[1:-1]
    hertz = centres[mel.argmax(axis=1)]
    assert np.abs(hertz[1:10] - 500).max() < 60 and np.abs(hertz[11:19] - 2500).max() < 150


def make_cache(folder: Path, clips: dict[str, np.ndarray], rate: int, hop: int) -> tuple[Path, Path]:
    """A manifest and the part of an activation cache that labels read."""
    rows, table, start = [], [], 0
    for name, wav in clips.items():
        sf.write(folder / f"{name}.wav", wav, rate, subtype="FLOAT")
        path = folder / f"{name}.wav"
        digest = file_sha256(path)
        row = {"id": name, "path": str(path), "speaker": "1", "split": "train", "sha256": digest, "text": ""}
        rows.append(row)
        frames = -(-len(wav) // hop)
        table.append((name, "1", "train", digest, start, frames, len(wav)))
        start += frames
    write_csv(folder / "manifest.csv", pd.DataFrame(rows))
    with h5py.File(folder / "cache.h5", "w") as file:
        file.create_dataset("activations", data=np.zeros((start, 4), np.float32))
        for column, values in zip(("id", "speaker", "split", "sha256", "start", "frames", "samples"), zip(*table)):
            kind = h5py.string_dtype() if isinstance(values[0], str) else np.int64
            file.create_dataset(f"utterances/{column}", data=list(values), dtype=kind)
        file.attrs.update({"sample_rate": rate, "hop": hop, "frame_rate": rate / hop})
    return folder / "manifest.csv", folder / "cache.h5"


def test_write_labels_aligns_rows_with_the_cache(tmp_path):
    clips = {"007": tone(150, 10 * 960 + 1, 24000), "é b": switch(1000, 4000, 5 * 960, 11 * 960, 24000)}
    manifest, cache = make_cache(tmp_path, clips, 24000, 960)
    labels.write_labels(manifest, cache, tmp_path / "labels.h5", CFG)
    with h5py.File(tmp_path / "labels.h5") as file:
        assert file["utterances/id"].asstr()[:].tolist() == ["007", "é b"]
        assert file["utterances/start"][:].tolist() == [0, 11]
        for start, (_, wav) in zip((0, 11), clips.items()):
            rows = slice(start, start + 11)
            expected = labels.label_utterance(wav, 24000, Fraction(960, 24000), 11, CFG)
            for name, values in expected.items():
                assert file[name].shape == (22,) and file[name].dtype == values.dtype
                assert np.array_equal(file[name][rows], values, equal_nan=values.dtype != bool)
            assert np.array_equal(file["logmel"][rows], labels.logmel(wav, 24000, 960, 11))
        assert file["logmel"].shape == (22, 64)


@pytest.mark.parametrize("first", [False, True], ids=["whole clips", "runs of frames"])
def test_shards_label_into_one_file_and_what_a_killed_job_labelled_stays(tmp_path, monkeypatch, first):
    clips = {name: tone(150 + 20 * i, 9600 + 700 * i) for i, name in enumerate("abcde")}
    manifest, cache = make_cache(tmp_path, clips, 16000, 640)
    if first:
        with h5py.File(cache, "r+") as file:
            frames = file["utterances/frames"][:]
            file["utterances/first"], file["utterances/clip_frames"] = np.full(5, 2), frames + 2
    labels.write_labels(manifest, cache, tmp_path / "whole.h5", CFG)
    label, seen = labels.label_utterance, []
    monkeypatch.setattr(labels, "label_utterance", lambda *args: seen.append(len(args[0])) or label(*args))
    for which in (1, 0):
        labels.label_shard(manifest, cache, tmp_path / "labels.h5", CFG, (which, 3))
    assert len(seen) == 3 and not (tmp_path / "labels.h5").exists()  # the third never ran
    labels.write_labels(manifest, cache, tmp_path / "labels.h5", CFG)
    assert len(seen) == len(set(seen)) == 5
    assert (tmp_path / "labels.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not list(tmp_path.glob("*.part-*"))


def test_write_labels_refuses_audio_that_changed_and_leaves_nothing(tmp_path):
    manifest, cache = make_cache(tmp_path, {"a": tone(150, 9600), "b": tone(150, 9600)}, 16000, 640)
    table = read_csv(manifest)
    sf.write(tmp_path / "b.wav", tone(160, 9600), 16000, subtype="FLOAT")  # as long as before
    with pytest.raises(EqknobsError, match=r"b\.wav: changed since the manifest was drawn"):
        labels.write_labels(manifest, cache, tmp_path / "labels.h5", CFG)
    write_csv(manifest, table.assign(sha256=table["path"].map(file_sha256)))  # drawn again, but not encoded again
    with pytest.raises(EqknobsError, match=r"b\.wav: .*cache\.h5 was made from another sound"):
        labels.write_labels(manifest, cache, tmp_path / "labels.h5", CFG)
    write_csv(manifest, table[:1])
    with pytest.raises(EqknobsError, match="utterance b is not in"):
        labels.write_labels(manifest, cache, tmp_path / "labels.h5", CFG)
    assert not (tmp_path / "labels.h5").exists() and not list(tmp_path.glob(".labels*"))


@pytest.mark.skipif(not LIBRISPEECH.is_dir(), reason="no real speech here")
def test_real_speech_is_labelled_in_seconds_and_pitch_fits_the_sex():
    import torch

    from eqknobs.audio import read_audio
    from eqknobs.corpus.files import librispeech_sexes

    labels.pitch_track(np.zeros(640, np.float32), 16000, 640, 1)  # imports and weights
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sexes = librispeech_sexes(LIBRISPEECH)
    pitches: dict[str, list[float]] = {"F": [], "M": []}
    seconds, began = 0.0, time.process_time()
    for path in sorted(LIBRISPEECH.rglob("*.flac"))[:8]:
        wav = read_audio(path, 16000)[: 6 * 16000]
        out = labels.label_utterance(wav, 16000, Fraction(1, 25), len(wav) // 640, CFG)
        assert 0.2 < out["voiced"].mean() < 0.9
        pitches[sexes[path.parts[-3]]].append(float(np.nanmedian(out["pitch"])))
        seconds += len(wav) / 16000
    used = time.process_time() - began
    torch.set_num_threads(threads)
    assert used / seconds < 2 / 15  # 15 minutes of speech in two, on one core
    assert np.median(pitches["F"]) > 150 > np.median(pitches["M"])
