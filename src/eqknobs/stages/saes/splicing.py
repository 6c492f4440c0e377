"""What is lost downstream: a Whisper that goes on from an SAE's reconstruction of one of its layers.

Words and likelihood are of the clip's text, or of what a reference model hears in the untouched clip (`reference`).

Arms: `unspliced`; `mean` (every frame is the train frames' mean: all of the layer lost); `sae` (reconstructions);
`untrained` (the same dictionary before its training, the k·n largest activations of a clip: what any of that width and
sparsity keeps). The model transcribes, tells the probability of no speech, and the likelihood of the text. Frames that
stand for padding pass as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from eqknobs.audio import read_clip
from eqknobs.corpus.cache import ActivationCache
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, write_csv
from eqknobs.models import ModelCfg, load_model
from eqknobs.sae.base import SAE, new_sae
from eqknobs.sae.firing import clip_codes
from eqknobs.sound.judges import text_errors
from eqknobs.sound.renders import pick_clips

Edit = Callable[[Tensor], Tensor]


class SplicingCfg(TypedDict):
    """What `score_splicing` reads."""

    model: ModelCfg
    site: str
    split: str
    clips: int  # of speech, and of each corpus of other sound
    reference: NotRequired[ModelCfg]  # whose transcript stands for the text
    content: NotRequired[dict[str, str]]


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
    text), nats and tokens of the text, no_speech_prob; those of a text are empty where a clip has none, and
    nothing is transcribed there.

    model: of kind whisper; saes: (name, seed) -> SAE of the site; mean [d]: of the site's train frames. Raises
    EqknobsError for a model that does not transcribe, or no clips.
    """
    if not hasattr(model, "no_speech_prob"):
        raise EqknobsError(f"model {model.name} does not transcribe; what is lost downstream needs kind whisper")
    if not clips:
        raise EqknobsError(f"no clips to splice {model.name}.{site} in; raise the number of clips")
    rows: list[dict[str, Any]] = []
    for (arm, name, seed), edit in tqdm(arms(saes, mean).items(), desc=f"splice {model.name}.{site}", unit="arm"):
        for clip in clips:
            with _spliced(model, site, edit):
                heard = model.hear([clip.wav])
            said, errors, words, nats, tokens = "", np.nan, np.nan, np.nan, np.nan
            if clip.text:
                said = model.transcribe(heard)[0]
                errors, words = text_errors(clip.text, said)
                nats, tokens = (float(x[0]) for x in model.nll(heard, [clip.text]))
            keys = {"arm": arm, "sae": name, "seed": seed, "id": clip.id, "speaker": clip.speaker, "split": clip.split}
            found = {"transcript": said, "errors": errors, "words": words, "nats": nats, "tokens": tokens}
            rows.append(keys | found | {"no_speech_prob": float(model.no_speech_prob(heard)[0])})
    return pd.DataFrame(rows)


def _spliced(model: Any, site: str, edit: Edit | None) -> AbstractContextManager[None]:
    return nullcontext() if edit is None else model.editing(site, edit, clip_only=True)


def _clips(
    manifest_csv: str | Path, corpus: str, rate: int, cfg: SplicingCfg, reference: Any | None = None
) -> list[Spoken]:
    """Clips of a corpus; corpus: "" for speech, whose clips must have a text, else the name of one that has no words.

    reference: a loaded Whisper whose transcripts are the texts. Raises EqknobsError for speech without texts.
    """
    found = []
    for row in pick_clips(read_csv(manifest_csv), cfg["split"], cfg["clips"]).itertuples():
        text = "" if corpus else _text(row, rate, reference)
        if not text and not corpus:
            lacks = f"has no text in {manifest_csv}; give texts, name a splicing.reference"
            raise EqknobsError(
                f"splicing: {row.id} {'says nothing to ' + reference.name if reference else lacks}; "
                "or set splicing: null"
            )
        name, speaker = (f"{corpus}-{value}" if corpus else str(value) for value in (row.id, row.speaker))
        found.append(Spoken(name, speaker, cfg["split"], read_clip(row, rate), text))
    return found


def _text(row: Any, rate: int, reference: Any | None) -> str:
    """What is said in a clip."""
    if reference is None:
        return str(row.text).strip()
    return str(reference.transcribe([read_clip(row, reference.sample_rate)])[0]).strip()


def score_splicing(
    speech_csv: str | Path,
    others: Mapping[str, str | Path],
    cache_h5: str | Path,
    sae_dirs: Mapping[tuple[str, int], Path],
    out_csv: str | Path,
    cfg: SplicingCfg,
) -> None:
    """Splice the SAEs of a target into the model as it transcribes; out_csv: see `spliced_scores`, and `reference`, the
    model whose transcripts the words are held against, or `text`.

    speech_csv, others: manifests of speech with texts and, by corpus, of sound without words; cache_h5: whose train
    mean is the arm `mean`; sae_dirs: (name, seed) -> folder. Raises EqknobsError as `spliced_scores`, and for speech
    without texts.
    """
    saes = {key: SAE.load(folder) for key, folder in sae_dirs.items()}
    with ActivationCache(cache_h5) as cache:
        mean = np.array(cache.mean)
    with gpu_lock(pick_device(cfg["model"].get("device") or "auto")):
        model = load_model(cfg["model"])
        reference = None
        if "reference" in cfg:
            reference = load_model({**cfg["reference"], "device": cfg["model"].get("device", "auto")})
        clips = _clips(speech_csv, "", model.sample_rate, cfg, reference)
        for corpus, manifest in sorted(others.items()):
            clips += _clips(manifest, corpus, model.sample_rate, cfg)
        rows = spliced_scores(model, cfg["site"], saes, mean, clips)
        write_csv(out_csv, rows.assign(reference=reference.name if reference else "text"))
