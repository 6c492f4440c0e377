"""What a speech LM holds in mind while each clip is heard from its user, and while its agent says it itself.

A *turn* is a clip in one of the two streams, the other being silent: the rows of `turns.csv`, so that one cache of a
site holds both streams, one labels file the labels of both. The agent says a clip with its monologue: text tokens that
run `lead` frames ahead of the words. When words are spoken tells a JSON file beside the sound (`text`, and `frames`,
the 80 ms frames in which they begin and, last, end), else the recogniser.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import h5py
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from eqknobs.audio import read_clip
from eqknobs.corpus.activations import ActivationsCfg, cache_sites
from eqknobs.corpus.labels import LabelsCfg, write_labels
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_csv, read_json, write_csv, write_json
from eqknobs.models import Model, ModelCfg
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.config import FRAME_RATE
from eqknobs.models.moshi.monologue import monologue
from eqknobs.models.moshi.randomise import randomise
from eqknobs.pieces import Pieces
from eqknobs.sound.judges import RATE, Transcriber

STREAMS = ("user", "agent")
SPEAKS = (*STREAMS, "nobody")
NONE = -1  # no token

Words = list[tuple[str, float, float]]  # each with the seconds in which it begins and ends


class TurnsCfg(TypedDict):
    """model: see `load_model`; lead: frames; frames: a budget (see `cache_activations`), absent for all of them."""

    model: ModelCfg
    asr: str
    beam: int
    lead: int
    seed: int
    frames: NotRequired[int]
    device: NotRequired[str]
    content: NotRequired[dict[str, str]]


class CachesCfg(ActivationsCfg, total=False):
    """What decides the caches besides model and site."""

    network: str  # trained | random
    tokens: str  # what is written and spoken


class TurnLabelsCfg(LabelsCfg):
    """Those of frames, and how many text tokens are told apart."""

    tokens: int


def cache_turns(
    manifest_csv: str | Path, out_turns: str | Path, out_index: str | Path, cfg: TurnsCfg, pieces: Pieces | None = None
) -> None:
    """Cache every residual layer, the summed embeddings and all heads of a model, and the layers of a random network.

    out_turns: the manifest with a row for each clip and stream, `id` `<clip>.<stream>`. out_index: JSON, `caches`
    (network, trained or random -> site -> HDF5 file as `cache_activations` writes it, as seen from the index's folder)
    and `tokens` (turn -> `spoken`, the piece of text that sounds in each frame, or null, and `written`, the text tokens
    of the monologue; of the user none), `silent` (those of them that stand for no text), `heads` (the numbers of each
    layer's). The caches are no outputs of the job: a run that was killed goes on.
    Raises EqknobsError as `cache_sites`.
    """
    manifest = read_csv(manifest_csv)
    turns = pd.concat([manifest.assign(stream=s, id=manifest["id"] + f".{s}", clip=manifest["id"]) for s in STREAMS])
    write_csv(out_turns, turns.sort_values("id", ignore_index=True))
    words = word_times(manifest, cfg, pieces)
    with gpu_lock(pick_device(cfg["model"].get("device") or "auto")):
        write_json(out_index, _cached(Moshi(cfg["model"]), manifest, words, out_turns, Path(out_index).parent, cfg))


def _cached(
    model: Moshi, manifest: pd.DataFrame, words: dict[str, Words], turns_csv: str | Path, home: Path, cfg: TurnsCfg
) -> dict[str, Any]:
    """The index of the caches, which it makes below `home`."""
    codes, tokens = _said(model, manifest, words, cfg["lead"])

    def encode(turn: Any, sites: list[str]) -> dict[str, np.ndarray]:
        text = torch.tensor(tokens[turn.id]["written"]) if turn.stream == "agent" else None
        return model.activations(model.turn(codes[turn.clip], turn.stream, text), sites)

    networks = {"trained": list(model.sites), "random": [site for site in model.sites if site.startswith("residual")]}
    index: dict[str, dict[str, str]] = {}
    for network, sites in networks.items():
        if network == "random":
            randomise(model.net, cfg["seed"])
        index[network] = {site: f"caches/{network}.{site}.h5" for site in sites}
        made_by: CachesCfg = {"seed": cfg["seed"], "network": network, "tokens": json.dumps(tokens)}
        if "frames" in cfg:
            made_by["frames"] = cfg["frames"]
        if "content" in cfg:
            made_by["content"] = cfg["content"]
        outs = {site: home / file for site, file in index[network].items()}
        cache_sites(turns_csv, outs, cast(Model, model), cfg["model"], made_by, encode)
    silent = [model.config.pad, model.config.epad]  # tokens that stand for no text
    return {
        "caches": index,
        "heads": [list(left) for left in model.net.heads],
        "tokens": tokens,
        "silent": silent,
    }


def read_index(index_json: str | Path) -> dict[str, Any]:
    """The index that `cache_turns` writes, with the places of its caches as they are seen from here."""
    index, home = read_json(index_json), Path(index_json).parent
    places = {network: {site: str(home / file) for site, file in of.items()} for network, of in index["caches"].items()}
    return {**index, "caches": places}


def _said(
    model: Moshi, manifest: pd.DataFrame, words: dict[str, Words], lead: int
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Codes of every clip, and the tokens of every turn as in the index of `cache_turns`."""
    tokeniser, codes, tokens = model.tokeniser(), {}, {}
    for clip in tqdm(list(manifest.itertuples()), desc="codes", unit="clip"):
        codes[clip.id] = found = model.codes(read_clip(clip, model.sample_rate))
        frames, said = found.shape[1], words[clip.id]
        pieces = [tokeniser.encode(word) for word, _, _ in said]
        starts = [round(begin * FRAME_RATE) - lead for _, begin, _ in said]
        spoken = spoken_tokens(pieces, [(begin, end) for _, begin, end in said], frames)
        sounds = [None if token == NONE else tokeniser.id_to_piece(token) for token in spoken.tolist()]
        written = monologue(pieces, starts, frames, model.config).tolist()
        tokens[f"{clip.id}.user"] = {"spoken": sounds, "written": [model.config.pad] * frames}
        tokens[f"{clip.id}.agent"] = {"spoken": sounds, "written": written}
    return codes, tokens


def word_times(manifest: pd.DataFrame, cfg: TurnsCfg, pieces: Pieces | None = None) -> dict[str, Words]:
    """The words of each clip and when they are spoken: from the JSON beside the sound, else from the recogniser.

    Raises EqknobsError where that JSON does not hold a frame for each word and one for the end.
    """
    judge, found = None, {}
    for clip in tqdm(list(manifest.itertuples()), desc="words", unit="clip"):
        beside = Path(str(clip.path)).with_suffix(".json")
        if beside.is_file():
            found[str(clip.id)] = _aligned(beside)
            continue
        device = cfg["model"].get("device") or "auto"
        judge = judge or Transcriber({"asr": cfg["asr"], "beam": cfg["beam"], "device": device}, pieces)
        found[str(clip.id)] = judge.word_times(read_clip(clip, RATE))
    return found


def _aligned(file: Path) -> Words:
    facts = read_json(file)
    words, frames = str(facts.get("text", "")).split(), facts.get("frames", [])
    if len(frames) != len(words) + 1:
        raise EqknobsError(f"{file}: {len(words)} words, {len(frames)} frames; give each word's first and the end")
    return [(word, a / FRAME_RATE, b / FRAME_RATE) for word, a, b in zip(words, frames, frames[1:])]


def spoken_tokens(words: Sequence[Sequence[int]], times: Sequence[tuple[float, float]], frames: int) -> np.ndarray:
    """The text token that sounds in each frame, int64 [frames]; `NONE` between words. The tokens of a word share its
    seconds evenly."""
    found, centres = np.full(frames, NONE), (np.arange(frames) + 0.5) / FRAME_RATE
    for tokens, (begin, end) in zip(words, times, strict=True):
        inside = np.flatnonzero((centres >= begin) & (centres < end))
        if len(tokens) and len(inside):
            place = (centres[inside] - begin) / (end - begin) * len(tokens)
            found[inside] = np.array(tokens)[place.astype(int).clip(max=len(tokens) - 1)]
    return found


def label_turns(turns_csv: str | Path, index_json: str | Path, out_h5: str | Path, cfg: TurnLabelsCfg) -> None:
    """Label the frames of the turns: as `write_labels`, and `token`, `who` and `written`.

    token: code of the piece of text that sounds, of the `cfg["tokens"]` most frequent ones of train, else −1; who:
    user, agent or nobody (frames that are not energetic); written: whether the monologue has a token of text there.
    """
    index, turns = read_index(index_json), read_csv(turns_csv).set_index("id")
    cache = index["caches"]["trained"]["embeddings"]
    with atomic_path(out_h5) as unfinished:
        write_labels(turns_csv, cache, unfinished, cfg)
        with h5py.File(unfinished, "r+") as file:
            table = file["utterances"]
            ids, frames = table["id"].asstr()[:], table["frames"][:]
            first = table["first"][:] if "first" in table else np.zeros_like(frames)
            cuts = [slice(begin, begin + count) for begin, count in zip(first.tolist(), frames.tolist())]
            spoken = [index["tokens"][turn]["spoken"][cut] for turn, cut in zip(ids, cuts)]
            train = (turns["split"].loc[ids] == "train").to_numpy()
            heard = Counter(piece for said, learnt in zip(spoken, train) if learnt for piece in said if piece)
            names = sorted(piece for piece, _ in sorted(heard.items(), key=lambda p: (-p[1], p[0]))[: cfg["tokens"]])
            code = {piece: i for i, piece in enumerate(names)}
            file["token"] = np.array([code.get(piece, NONE) for said in spoken for piece in said], np.int32)
            file["token"].attrs["names"] = names
            streams = np.repeat([STREAMS.index(stream) for stream in turns["stream"].loc[ids]], frames)
            file["who"] = np.where(file["energetic"][:], streams, SPEAKS.index("nobody")).astype(np.int32)
            file["who"].attrs["names"] = list(SPEAKS)
            silent = index["silent"]
            written = [index["tokens"][turn]["written"][cut] for turn, cut in zip(ids, cuts)]
            file["written"] = np.array([token not in silent for said in written for token in said])
