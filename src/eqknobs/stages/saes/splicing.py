"""What is lost downstream: a Whisper that goes on from an SAE's reconstruction of one of its layers.

Arms: `unspliced`; `mean` (every frame is the train frames' mean: all of the layer lost); `sae` (reconstructions);
`untrained` (the same dictionary before its training, the k·n largest activations of a clip: what any of that width and
sparsity keeps). The model transcribes, tells the probability of no speech, and the likelihood of the text. Frames that
stand for padding pass as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.sae.base import SAE, new_sae
from eqknobs.sae.firing import clip_codes
from eqknobs.sound.judges import text_errors

Edit = Callable[[Tensor], Tensor]


class Spoken(NamedTuple):
    """A clip: sound float32 [samples] at the model's rate, and its words ("" where it has none)."""

    id: str
    speaker: str
    split: str
    wav: np.ndarray
    text: str


def rebuilt(sae: SAE, k: float = 0) -> Edit:
    """The edit [1, frames, d] -> its reconstruction; k: the code is the clip's k·n largest activations, 0: own rule."""

    def edit(acts: Tensor) -> Tensor:
        raw = acts[0].detach().cpu().float().numpy()
        back = sae.decode(clip_codes(sae, raw, k).toarray(), raw)
        return torch.from_numpy(np.asarray(back, np.float32)).to(acts)[None]

    return edit


def arms(saes: Mapping[tuple[str, int], SAE], mean: np.ndarray) -> dict[tuple[str, str, int], Edit | None]:
    """The edit of every (arm, SAE's name, seed); mean: of the train frames, [d]. Those without an SAE have seed −1."""
    level = torch.from_numpy(np.asarray(mean, np.float32))
    found: dict[tuple[str, str, int], Edit | None] = {("unspliced", "", -1): None}
    found["mean", "", -1] = lambda acts: level.to(acts).expand_as(acts)
    for (name, seed), sae in sorted(saes.items()):
        found["sae", name, seed] = rebuilt(sae)
        fresh = new_sae(sae.config, sae.mean, sae.std).requires_grad_(False).eval()
        k = getattr(sae.config, "k", 0) or getattr(sae.config, "l0", 0)
        found["untrained", name, seed] = rebuilt(fresh, k)
    return found


def spliced_scores(
    model: Any, site: str, saes: Mapping[tuple[str, int], SAE], mean: np.ndarray, clips: Sequence[Spoken]
) -> pd.DataFrame:
    """One row a (arm, SAE, seed, clip): arm, sae, seed, id, speaker, split, transcript, errors, words (against the
    text), nats and tokens of the text, no_speech_prob; those of a text are NaN where a clip has none.

    model: of kind whisper; saes: (name, seed) -> SAE of the site; mean [d]: of the site's train frames. Raises
    EqknobsError for a model that does not transcribe, or no clips.
    """
    if not hasattr(model, "no_speech_prob"):
        raise EqknobsError(f"model {model.name} does not transcribe; what is lost downstream needs kind whisper")
    if not clips:
        raise EqknobsError(f"no clips to splice {model.name}.{site} in; raise the number of clips")
    rows: list[dict[str, Any]] = []
    for (arm, name, seed), edit in arms(saes, mean).items():
        for clip in clips:
            with _spliced(model, site, edit):
                heard = model.hear([clip.wav])
            said = model.transcribe(heard)[0]
            errors, words = text_errors(clip.text, said)
            nats, tokens = (float(x[0]) for x in model.nll(heard, [clip.text])) if clip.text else (np.nan, np.nan)
            keys = {"arm": arm, "sae": name, "seed": seed, "id": clip.id, "speaker": clip.speaker, "split": clip.split}
            found = {"transcript": said, "errors": errors, "words": words, "nats": nats, "tokens": tokens}
            rows.append(keys | found | {"no_speech_prob": float(model.no_speech_prob(heard)[0])})
    return pd.DataFrame(rows)


def _spliced(model: Any, site: str, edit: Edit | None) -> AbstractContextManager[None]:
    return nullcontext() if edit is None else model.editing(site, edit, clip_only=True)
