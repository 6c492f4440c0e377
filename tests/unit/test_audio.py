import numpy as np
import pytest
import soundfile as sf

from eqknobs.audio import read_audio, write_flac
from eqknobs.errors import EqknobsError


def tone(hertz: float, seconds: float = 1.0, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 44100, 96000])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_any_rate_becomes_the_wanted_one(tmp_path, rate, suffix):
    path = tmp_path / f"tone.{suffix}"
    sf.write(path, tone(440, rate=rate), rate)
    wav = read_audio(path, 16000)
    assert wav.dtype == np.float32 and wav.shape == (16000,)
    # Apart from the ends, where the resampler sees zeros, this is the tone sampled at 16 kHz.
    assert np.abs(wav - tone(440))[400:-400].max() < 2e-3


def test_stereo_is_averaged(tmp_path):
    left, right = tone(300), tone(500)
    sf.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    assert read_audio(tmp_path / "stereo.wav", 16000) == pytest.approx((left + right) / 2, abs=1e-6)


def test_unicode_and_spaces_in_paths(tmp_path):
    path = tmp_path / "Größe ünd 音声" / "a clip.flac"
    write_flac(path, tone(440), 16000)
    assert len(read_audio(path, 16000)) == 16000


def test_flac_round_trip_is_exact_to_16_bits_and_clips(tmp_path):
    wav = np.array([0, 1 / 32768, -1, 0.25, 3.0, -7.0])
    write_flac(tmp_path / "a.flac", wav, 16000)
    assert read_audio(tmp_path / "a.flac", 16000).tolist() == [0, 1 / 32768, -1, 0.25, 32767 / 32768, -1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.flac"]


def test_nothing_is_written_for_nan(tmp_path):
    with pytest.raises(EqknobsError, match="NaN"):
        write_flac(tmp_path / "a.flac", np.array([0.0, np.nan]), 16000)
    assert not list(tmp_path.iterdir())


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def bad_files(folder):
    noise = np.random.default_rng(0).normal(0, 0.1, 48000)
    (folder / "text.wav").write_text("this is not audio\n")
    (folder / "nothing.flac").touch()
    sf.write(folder / "empty.wav", noise[:0], 16000)
    for name in ("cut.flac", "cut.wav"):
        sf.write(folder / name, noise, 16000)
        truncate(folder / name)
    sf.write(folder / "nan.wav", np.array([0.1, np.nan]), 16000, subtype="FLOAT")
    return {
        "text.wav": "not readable",
        "nothing.flac": "not readable",
        "empty.wav": "no samples",
        "cut.flac": "not readable|cut short",
        "cut.wav": "cut short",
        "nan.wav": "NaN",
        "absent.wav": "no such",
    }


def test_bad_files_end_in_one_line_that_names_them(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(EqknobsError, match=message) as error:
            read_audio(tmp_path / name, 16000)
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_flac_cut_anywhere_is_refused(tmp_path, share):
    path = tmp_path / "cut.flac"
    sf.write(path, np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    truncate(path, share)
    with pytest.raises(EqknobsError):
        read_audio(path, 16000)


def test_wav_written_to_a_pipe_is_read(tmp_path):
    """Programs that stream cannot know the length and leave the largest size in the header."""
    path = tmp_path / "piped.wav"
    sf.write(path, tone(440), 16000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(read_audio(path, 16000)) == 16000
