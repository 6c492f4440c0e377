"""Transcribe a recording with a Whisper of a finished run, as it is and as the stage hallucination would have it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from eqknobs.audio import read_audio
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.explore import config_of
from eqknobs.io import read_json
from eqknobs.models import ModelCfg, load_model
from eqknobs.plan import model_config
from eqknobs.sae import SAE
from eqknobs.stages.hallucination.checks import hallucination_layers
from eqknobs.stages.hallucination.compute import GATES, gate
from eqknobs.stages.hallucination.edits import EDITED, Edit, Point, edit_of, edited, load_fitted


class Window(NamedTuple):
    """What is written of up to 30 s. start: seconds into the recording; before: untouched; after: steered."""

    start: float
    before: str
    after: str
    no_speech_prob: float  # of the untouched model


def transcribe(
    run: str | Path, model: str, audio: str | Path, steer: str = "none", device: str = "auto"
) -> list[Window]:
    """Every window of a recording as `model` of a run (`results/<run>`) writes it, before and after `steer`: an arm of
    the stage hallucination, at the point that it chose.

    Models that lie in folders are looked for from the working directory. Raises EqknobsError: no such run, model or
    arm, another model than the run's, sound that cannot be read.
    """
    run = Path(run)
    config = config_of(run)
    file = run / "hallucination" / f"{model}.json"
    if not file.is_file():
        known = sorted(path.stem for path in file.parent.glob("*.json"))
        raise EqknobsError(f"--model {model}: not under {file.parent}; it has {', '.join(known) or 'none'}")
    about = read_json(file)
    if steer not in about["arms"]:
        raise EqknobsError(f"--steer {steer}: no such arm in {file}; it has {', '.join(sorted(about['arms']))}")
    point = Point(**about["arms"][steer])
    edit = _edit(run, config, model, point)
    with gpu_lock(pick_device(device)):
        opened = load_model(cast(ModelCfg, {**model_config(config, model), "device": device}))
        if opened.revision != about["revision"]:
            raise EqknobsError(
                f"models.{model}: has weights {opened.revision}, {run} steered {about['revision']}; put those back, or "
                "run again"
            )
        return list(_windows(opened, read_audio(audio, opened.sample_rate), point, edit, about))


def _edit(run: Path, config: dict[str, Any], model: str, point: Point) -> Edit | None:
    """The edit of a point's layer; None of an arm without."""
    if point.arm not in EDITED or point.layer is None:
        return None
    home = hallucination_layers(config, model)[point.layer]
    folder = run / "saes" / home / config["hallucination"]["sae"] / f"seed{min(config['sae_seeds'])}"
    return edit_of(point, load_fitted(run / "hallucination" / f"{model}.npz")[point.layer], SAE.load(folder))


def _windows(model: Any, wav: np.ndarray, point: Point, edit: Edit | None, about: dict[str, Any]) -> Iterator[Window]:
    last = list(model.sites)[-1]
    site = last if edit is None else f"layer.{point.layer}"
    length, rate = model.window, model.sample_rate
    for start in range(0, len(wav), length):
        piece = wav[start : start + length]
        half = model.halfway([piece], list(dict.fromkeys([site, last])))

        def said(acts: torch.Tensor, site: str, symbols: bool = False) -> Any:
            return model.say(model.go_on(acts, site), blanks=about["blanks"], symbols=symbols)[0]

        before = said(half.acts[last], last)
        after = before
        with torch.inference_mode():
            if edit is not None:
                after = said(edited(half.acts[site], half.frames, edit, about["edit"] == "window"), site)
            elif point.arm == "muted_heads":
                with model.without_heads(about["heads"][: point.k]):
                    after = said(half.acts[last], last)
            elif point.arm == "symbols":
                after = said(half.acts[last], last, symbols=True)
        text = after.text
        if point.arm in GATES and not gate(point, before, piece, rate, about["logprob"]):
            text = ""
        yield Window(start / rate, before.text, text, before.no_speech_prob)
