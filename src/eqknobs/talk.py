"""Talk to a Moshi model: a sound file is the user, the answer is another sound file of the same length."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from eqknobs.audio import read_audio, write_flac
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import require_output
from eqknobs.models import ModelCfg, load_model
from eqknobs.models.base import inference
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.generate import Dialogue, Prompt, Sampling

MIMI_RATE = 24000  # Hz
KINDS = {".wav": "WAV", ".flac": "FLAC"}


def talk(
    cfg_model: ModelCfg,
    audio: str | Path,
    out: str | Path,
    text_prompt: str | None = None,
    voice: str | Path | None = None,
    seconds: float | None = None,
    sampling: Sampling | None = None,
    say: Callable[[str], object] = lambda piece: print(piece, end="", flush=True),
) -> None:
    """Let a model hear `audio` and write what it says meanwhile to `out` (.wav or .flac, 16 bits).

    cfg_model: of a moshi. voice: a `.pt` voice of PersonaPlex or a recording of one. seconds: length
    of the conversation; the recording is cut, or silence follows it. say: gets the monologue piece by piece.

    Everything is checked that can be before the model is loaded. Raises EqknobsError: bad files or values, no GPU.
    """
    audio, out = Path(audio), Path(out)
    if out.suffix.lower() not in KINDS:
        raise EqknobsError(f"--out {out}: write to a name that ends in {' or '.join(KINDS)}")
    if out.exists() and audio.exists() and out.samefile(audio):
        raise EqknobsError(f"--out {out}: is the recording itself; name another file")
    require_output(out)
    if seconds is not None and not 0 < seconds < float("inf"):
        raise EqknobsError(f"--seconds: must be above 0, got {seconds:g}")
    recording = voice if voice is not None and Path(voice).suffix != ".pt" else None
    for file in [audio, *([recording] if recording is not None else [])]:
        read_audio(file, MIMI_RATE)  # only to find out whether it can be read: the model's rate is not known yet
    if voice is not None and recording is None and not Path(voice).is_file():
        raise EqknobsError(f"{voice}: no such voice; give a .pt file of PersonaPlex or a recording")
    with gpu_lock(pick_device(cfg_model.get("device") or "auto")):
        model = load_model(cfg_model)
        if not isinstance(model, Moshi):
            raise EqknobsError(f"models.{model.name}.kind: only a moshi can be talked to")
        rate = model.sample_rate
        heard = read_audio(audio, rate)
        if seconds is not None:
            length = max(1, round(seconds * rate))
            heard = np.pad(heard[:length], (0, max(0, length - len(heard))))
        prompt = model.prompt(text_prompt, voice if recording is None else read_audio(recording, rate))
        answer = reply(model, heard, prompt, sampling or Sampling(), say)
        write_flac(out, answer, rate, KINDS[out.suffix.lower()])


def reply(
    model: Moshi, heard: np.ndarray, prompt: Prompt, sampling: Sampling, say: Callable[[str], object]
) -> np.ndarray:
    """The agent's voice [samples] while the user says `heard` [samples]; `say` gets its text token by token."""
    codes = model.codes(heard)
    tokeniser = model.tokeniser()
    spoken = []
    with inference():
        dialogue = Dialogue(model.net, codes.shape[1], 1, prompt, sampling)
        for frame in codes.to(model.device).T:
            step = dialogue.step(frame[None])
            spoken.append(step.codes[0])
            if piece := model.piece(tokeniser, int(step.text)):
                say(piece)
        say("\n")
    return model.speech(torch.cat(spoken, dim=1)[: model.net.steps], len(heard))  # no others are said
