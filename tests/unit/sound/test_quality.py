"""DNSMOS: that it is the published judge, and that it hears noise."""

import math

import numpy as np
import pytest

from eqknobs.audio import read_audio
from eqknobs.errors import EqknobsError
from eqknobs.pieces import Pieces
from eqknobs.sound import judges, quality
from eqknobs.sound.judges import RATE
from eqknobs.sound.quality import Quality, dnsmos
from helpers import ROOT


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    files = sorted((ROOT / "resources/corpus").rglob("*.flac"))
    if not files:
        pytest.skip("the bundled corpus is not here")
    return read_audio(files[0], RATE)


@pytest.fixture(scope="module")
def judge() -> Quality:
    return Quality()


def noisy(wav: np.ndarray, snr: float) -> np.ndarray:
    """With white noise, that many dB below the clip."""
    noise = np.random.default_rng(0).standard_normal(len(wav)) * wav.std() / 10 ** (snr / 20)
    return (wav + noise).astype(np.float32)


def test_noise_is_heard(clip: np.ndarray, judge: Quality) -> None:
    clean, some, much = (judge.rate(wav) for wav in (clip, noisy(clip, 10), noisy(clip, 0)))
    assert 5 > clean > some + 0.3 > much + 0.5 > 1


@pytest.mark.parametrize("seconds", [0.5, 4.4, 9.01, 10.5, 16.9, 26])
def test_it_is_the_published_judge(clip: np.ndarray, judge: Quality, seconds: float) -> None:
    """In each way in which clips are doubled and windows counted; its rounding skips windows from 16 s on."""
    from speechmos import dnsmos as published

    wav = np.resize(clip, int(seconds * RATE))
    assert judge.rate(wav) == pytest.approx(published.run(wav, RATE)["ovrl_mos"], abs=1e-4)


def test_any_sound_has_a_mark_but_an_empty_one(clip: np.ndarray, judge: Quality) -> None:
    loud, silent = judge.rate(3 * clip / np.abs(clip).max()), judge.rate(np.zeros(100, np.float32))
    assert 1 < loud < 5 and 1 < silent < 5
    assert math.isnan(judge.rate(np.zeros(0, np.float32)))


def test_other_weights_are_another_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "DNSMOS_SHA256", "0" * 64)
    with pytest.raises(EqknobsError, match="not the pinned file of speechmos"):
        Quality()


def test_without_the_package_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "find_spec", lambda name: None)
    with pytest.raises(EqknobsError, match="speechmos is missing"):
        Quality()


def test_a_known_sound_is_not_rated_again(clip: np.ndarray, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, wav = Pieces(tmp_path), clip[:RATE]
    (mark,) = dnsmos([wav], RATE, pieces)
    monkeypatch.setattr(Quality, "session", None)
    assert dnsmos([wav.copy()], RATE, pieces) == [mark]
    with pytest.raises(AttributeError):
        dnsmos([wav[1:]], RATE, pieces)


def test_sounds_of_a_model_are_rated_at_its_own_rate(clip: np.ndarray, judge: Quality) -> None:
    import soxr

    upsampled = soxr.resample(clip, RATE, 24000)
    assert dnsmos([upsampled], 24000)[0] == pytest.approx(judge.rate(clip), abs=0.1)
