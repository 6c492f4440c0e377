import math

import numpy as np
import pytest
import scipy.signal

from eqknobs.sound import metrics

RATE = 16000


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE, level: float = 0.1) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def voice(hertz: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    """A pulse train through one formant: periodic with many harmonics, like a vowel."""
    phase = np.arange(round(seconds * rate)) * hertz / rate
    pulses = np.diff(np.floor(phase), prepend=-1)
    poles = np.exp(-2 * np.pi * 80 / rate + 2j * np.pi * 700 / rate * np.array([1, -1]))
    return (0.1 * scipy.signal.lfilter([1], np.poly(poles).real, pulses)).astype(np.float32)


def speech_like(seed: int = 0, seconds: float = 2.0) -> np.ndarray:
    """Noise whose level and colour move."""
    rng = np.random.default_rng(seed)
    n = round(seconds * RATE)
    t = np.arange(n) / RATE
    low = scipy.signal.lfilter([1], [1, -0.95], rng.normal(0, 0.01, n))
    mix = 0.5 + 0.5 * np.sin(2 * np.pi * 1.3 * t)
    return (mix * low + (1 - mix) * rng.normal(0, 0.05, n)).astype(np.float32)


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
def test_centroid_of_a_tone_is_its_frequency(rate):
    assert metrics.clip_centroid(tone(1000, rate=rate), rate) == pytest.approx(1000, rel=0.05)


def test_centroid_of_white_noise_is_half_of_nyquist():
    noise = np.random.default_rng(0).normal(0, 0.1, 5 * RATE).astype(np.float32)
    assert metrics.clip_centroid(noise, RATE) == pytest.approx(4000, rel=0.02)


def test_centroid_does_not_depend_on_level_and_ignores_quiet_frames():
    wav = tone(1000)
    assert metrics.clip_centroid(wav * 0.01, RATE) == pytest.approx(metrics.clip_centroid(wav, RATE), rel=1e-4)
    hiss = np.random.default_rng(0).normal(0, 1e-4, RATE).astype(np.float32)  # 57 dB below the tone
    quiet = metrics.clip_centroid(np.concatenate([wav, hiss]), RATE)
    assert quiet == pytest.approx(metrics.clip_centroid(wav, RATE), rel=0.03)
    loud = metrics.clip_centroid(np.concatenate([wav, hiss * 300]), RATE)
    assert loud > 2000


def test_silence_has_no_centroid():
    assert math.isnan(metrics.clip_centroid(np.zeros(RATE, np.float32), RATE))


def test_frame_correlation_is_one_for_itself_and_falls_for_another_clip():
    a = speech_like(0)
    assert metrics.frame_centroid_correlation(a, a * 0.3, RATE) == pytest.approx(1, abs=1e-6)
    assert metrics.frame_centroid_correlation(a, a[::-1].copy(), RATE) < 0.7
    noise = np.random.default_rng(5).normal(0, 0.1, len(a)).astype(np.float32)
    assert abs(metrics.frame_centroid_correlation(a, noise, RATE)) < 0.4


def test_frame_correlation_is_nan_when_undefined():
    a = speech_like()
    assert math.isnan(metrics.frame_centroid_correlation(a[:100], a[:100], RATE))
    assert math.isnan(metrics.frame_centroid_correlation(a, np.zeros_like(a), RATE))


@pytest.mark.parametrize("gain_db", [-12.0, 6.0])
def test_mel_distance_of_a_gain_is_the_gain(gain_db):
    noise = np.random.default_rng(0).normal(0, 0.05, RATE).astype(np.float32)
    louder = noise * np.float32(10 ** (gain_db / 20))
    assert metrics.mel_distance(noise, louder, RATE) == pytest.approx(abs(gain_db), abs=0.01)


def test_mel_distance_orders_damage_and_stops_at_its_floor():
    a = speech_like()
    assert metrics.mel_distance(a, a, RATE) == 0
    rng = np.random.default_rng(1)
    small, large = (
        metrics.mel_distance(a, a + rng.normal(0, s, len(a)).astype(np.float32), RATE) for s in (1e-3, 1e-1)
    )
    assert 0 < small < large
    assert metrics.mel_distance(a, np.zeros_like(a), RATE) <= 80


def test_renders_of_another_length_are_cut_or_padded():
    a = speech_like()
    longer = np.concatenate([a, np.ones(500, np.float32)])
    assert metrics.mel_distance(a, longer, RATE) == 0
    assert metrics.frame_centroid_correlation(a, longer, RATE) == pytest.approx(1)
    assert metrics.mel_distance(a, a[: len(a) // 2], RATE) > 10


def test_loudness():
    wav = tone(1000, level=0.1)
    expected = 20 * math.log10(0.1 / math.sqrt(2))
    assert metrics.loudness_db(wav) == pytest.approx(expected, abs=0.05)
    assert metrics.loudness_db(wav * 2) - metrics.loudness_db(wav) == pytest.approx(6.02, abs=0.01)
    padded = np.concatenate([wav, np.zeros(4 * RATE, np.float32)])  # pauses do not count
    assert metrics.loudness_db(padded) == pytest.approx(expected, abs=0.1)
    assert metrics.loudness_db(np.zeros(RATE, np.float32)) == -100


@pytest.mark.parametrize("rate", [16000, 24000])
def test_f0_error_is_the_interval_in_cents(rate):
    a, b = voice(150, rate=rate), voice(150 * 2 ** (3 / 12), rate=rate)
    assert metrics.f0_error_cents(a, b, rate) == pytest.approx(300, abs=15)
    assert metrics.f0_error_cents(a, a * 0.5, rate) == pytest.approx(0, abs=1)


def test_f0_error_needs_voiced_frames():
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    assert math.isnan(metrics.f0_error_cents(voice(150), noise, RATE))
    assert math.isnan(metrics.f0_error_cents(voice(150, 0.1), voice(150, 0.1), RATE))
