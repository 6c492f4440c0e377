import numpy as np
import pytest
import soundfile as sf

from eqknobs.audio import audio_seconds, read_audio, write_flac
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


def pages(content):
    """Where the pages of an Ogg file begin, and its end."""
    at = [0]
    while at[-1] < len(content):
        table = content[at[-1] + 27 : at[-1] + 27 + content[at[-1] + 26]]
        at.append(at[-1] + 27 + len(table) + sum(table))
    return at


@pytest.mark.parametrize("coding", ["VORBIS", "OPUS"])
def test_an_ogg_cut_within_a_page_is_refused_wherever(tmp_path, coding):
    path = tmp_path / "cut.ogg"
    sf.write(path, np.random.default_rng(0).normal(0, 0.1, 64000), 16000, format="OGG", subtype=coding)
    content = path.read_bytes()
    starts = pages(content)
    assert starts[-1] == len(content) and len(starts) > 5
    cuts = [start + part for start in starts[:-1] for part in (4, 5, 20, 27, 28, 40)] + [s + 2 for s in starts[2:-1]]
    for cut in [*cuts, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:cut])
        for read in (audio_seconds, lambda path: read_audio(path, 16000)):
            with pytest.raises(EqknobsError, match=r"cut\.ogg: (cut short|not readable)"):
                read(path)


@pytest.mark.parametrize("coding", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("samples", [1, 100, 1000, 64000])
def test_a_whole_ogg_is_read_with_junk_behind_too(tmp_path, coding, samples):
    path = tmp_path / "a.ogg"
    sf.write(path, np.random.default_rng(0).normal(0, 0.1, samples), 16000, format="OGG", subtype=coding)
    for junk in (b"", b"TAG" + bytes(125)):
        path.write_bytes(path.read_bytes() + junk)
        assert audio_seconds(path) == pytest.approx(samples / 16000, abs=1e-3)
        assert len(read_audio(path, 16000)) == pytest.approx(samples, abs=16)


@pytest.mark.parametrize("coding", ["VORBIS", "OPUS"])
def test_an_ogg_of_whole_pages_without_the_flag_for_its_end_is_read(tmp_path, coding):
    """So recorders of phones leave their files; a cut between two pages looks the same."""
    path = tmp_path / "a.ogg"
    sf.write(path, np.random.default_rng(0).normal(0, 0.1, 64000), 16000, format="OGG", subtype=coding)
    content = path.read_bytes()
    *_, before, last, _ = pages(content)
    assert content[last + 5] & 4 and not content[before + 5] & 4
    path.write_bytes(content[:last])
    assert 2 < audio_seconds(path) < 4
    assert len(read_audio(path, 16000)) == pytest.approx(16000 * audio_seconds(path), abs=16)


# --- what the header says and what there is ---


def header(path, kind, size):
    """Write a second of noise as `kind` with this size in its header; a size of None leaves it as it is."""
    wav = np.rint(3000 * np.random.default_rng(0).standard_normal(16000)).astype(np.int16)
    name, _, order = kind.partition(" ")
    sf.write(path, wav, 16000, format=name, subtype="PCM_16", endian=order or "FILE")
    content = bytearray(path.read_bytes())
    if size is not None:
        before, width = {"AIFF": (b"SSND", 4), "RF64": (b"ds64", 8), "W64": (b"data", 8), "CAF": (b"data", 8)}.get(
            name, (b"data", 4)
        )
        at = 8 if name == "AU" else content.index(before) + {"RF64": 16, "W64": 16}.get(name, 4)
        little = order == "LITTLE" or (name in ("WAV", "WAVEX", "RF64", "W64") and not order)
        content[at : at + width] = (size % 2 ** (8 * width)).to_bytes(width, "little" if little else "big")
    path.write_bytes(content)
    return wav / 32768


KINDS = ["WAV", "WAV BIG", "WAVEX", "RF64", "W64", "AIFF", "AU", "AU LITTLE", "CAF"]
STREAMED = [0, -1, 0x7F000000, 0x7FFFF000, 0x7FFFFF00, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@pytest.mark.parametrize("size", STREAMED, ids=hex)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_unknown_length_is_read_to_its_end(tmp_path, kind, size):
    """Programs that write to a pipe cannot know the length; what they put in its place differs."""
    wav = header(tmp_path / "piped", kind, size)
    assert np.array_equal(read_audio(tmp_path / "piped", 16000), wav.astype(np.float32))
    assert audio_seconds(tmp_path / "piped") == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [33000, 1_000_000, 0x7D000000])
def test_a_header_that_promises_more_in_earnest_is_refused(tmp_path, kind, size):
    header(tmp_path / "cut", kind, size)
    for read in (audio_seconds, lambda path: read_audio(path, 16000)):
        with pytest.raises(EqknobsError, match=r"cut: cut short \(320\d\d of \d+ bytes\)"):
            read(tmp_path / "cut")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [2, 1000, 31000])
def test_any_kind_cut_short_is_refused(tmp_path, kind, missing):
    header(tmp_path / "cut", kind, None)
    content = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) - missing])
    with pytest.raises(EqknobsError, match="cut short"):
        read_audio(tmp_path / "cut", 16000)


def test_chunks_around_the_sound_are_no_sound(tmp_path):
    wav = header(tmp_path / "a.wav", "WAV", None)
    content = (tmp_path / "a.wav").read_bytes()
    note = b"LIST" + (5).to_bytes(4, "little") + b"notes\0"
    at = content.index(b"data")
    (tmp_path / "a.wav").write_bytes(content[:at] + note + content[at:] + note)
    assert np.array_equal(read_audio(tmp_path / "a.wav", 16000), wav.astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "junk"),
    [("WAV", 0), ("WAV BIG", 0), ("WAVEX", 0), ("RF64", 0), ("W64", 0), ("WAV", 99), ("WAV BIG", 99), ("WAVEX", 99)],
)
def test_a_size_of_0_before_other_chunks_is_no_stream(tmp_path, kind, junk):
    """An empty recording with its notes, not a stream of them."""
    name, _, order = kind.partition(" ")
    sf.write(tmp_path / "a.wav", np.zeros(0), 16000, format=name, subtype="PCM_16", endian=order or "FILE")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content = content[: content.index(b"data") + (24 if name == "W64" else 8)]
    for note in (b"n" * 3000, b"notes"):
        if name == "W64":
            content += b"list" + bytes(12) + (24 + len(note)).to_bytes(8, "little") + note + bytes(-len(note) % 8)
        else:
            content += b"LIST" + len(note).to_bytes(4, "big" if order else "little") + note + bytes(len(note) % 2)
    if name in ("WAV", "WAVEX"):
        content[4:8] = (len(content) - 8).to_bytes(4, "big" if order else "little")
    (tmp_path / "a.wav").write_bytes(content + bytes(junk))  # behind the file's own end
    assert audio_seconds(tmp_path / "a.wav") == 0
    with pytest.raises(EqknobsError, match="holds no samples"):
        read_audio(tmp_path / "a.wav", 16000)


def test_a_stream_of_text_or_silence_is_no_chunk(tmp_path):
    for sound in (bytes(32000), b"text" * 8000):
        wav = header(tmp_path / "a.wav", "WAV", 0)
        content = (tmp_path / "a.wav").read_bytes()
        (tmp_path / "a.wav").write_bytes(content[: -2 * len(wav)] + sound)
        assert audio_seconds(tmp_path / "a.wav") == 1.0


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path):
    path = tmp_path / "piped.flac"
    wav = header(path, "FLAC", None)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the number of samples: 36 bits
    path.write_bytes(content)
    assert np.array_equal(read_audio(path, 16000), wav.astype(np.float32)) and audio_seconds(path) == 1.0


@pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM", "MS_ADPCM", "ULAW", "PCM_U8", "DOUBLE"])
def test_every_coding_of_wav_is_read(tmp_path, subtype):
    sf.write(tmp_path / "a.wav", tone(440), 16000, subtype=subtype)
    wav = read_audio(tmp_path / "a.wav", 16000)
    assert 16000 <= len(wav) < 17000 and len(wav) / 16000 == audio_seconds(tmp_path / "a.wav")
    assert np.abs(np.fft.rfft(wav[:16000])).argmax() == 440 and 0.25 < wav.std() < 0.4


def test_a_long_file_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("eqknobs.audio._BLOCK", 1000)
    wav = header(tmp_path / "a.flac", "FLAC", None)
    assert np.array_equal(read_audio(tmp_path / "a.flac", 16000), wav.astype(np.float32))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("peak", "likely"),
    [
        (2.1, r"a mixdown far over it\?\); turn it down"),
        (127.0, r"an 8-bit scale\?\); divide them by 128"),
        (25782.0, r"a 16-bit scale\?\); divide them by 32768"),
        (2.0**23, r"a 24-bit scale\?\); divide them by 8388608"),
        (2.0**31, r"a 32-bit scale\?\); divide them by 2147483648"),
        (1e30, r"damaged\?\); replace or remove"),
    ],
)
def test_float_samples_on_another_scale_are_refused_with_the_likely_one(tmp_path, peak, likely, channels):
    wav = np.stack([tone(440) * 2 * peak, tone(440)], axis=1)[:, :channels]
    sf.write(tmp_path / "a.wav", wav, 16000, subtype="FLOAT")
    with pytest.raises(EqknobsError, match=rf"a\.wav: samples up to .* where full scale is 1 \({likely}"):
        read_audio(tmp_path / "a.wav", 16000)


def test_a_mixdown_a_little_over_full_scale_is_taken_as_it_is(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440) * 3.6, 16000, subtype="FLOAT")
    assert np.array_equal(read_audio(tmp_path / "a.wav", 16000), tone(440) * np.float32(3.6))


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.wav", tone(440), 16000)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(EqknobsError, match=r"a\.wav: cannot be read \(Permission denied\)"):
        read_audio(tmp_path / "a.wav", 16000)
