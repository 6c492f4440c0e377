"""What a Whisper writes where nobody speaks, and what keeps it from that at which cost in words.

Every arm is tried on val at its points; the point that writes the fewest texts without losing more words than
`wer_margin` is scored on test. Arms that change the model (`edits`; muted heads of the decoder, as in Calm-Whisper,
arXiv 2505.12969) stand beside what needs no look inside: gates on no_speech_prob, on the level, on a voice activity
detector, and Whisper's own symbols, in which it describes what it hears if it may.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import jiwer
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from eqknobs.audio import write_flac
from eqknobs.corpus.cache import ActivationCache
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import array_hash, atomic_path, read_csv, write_csv, write_json
from eqknobs.models import ModelCfg, load_model
from eqknobs.models.whisper import Halfway, Said
from eqknobs.pieces import Pieces
from eqknobs.provenance import content, module_inputs
from eqknobs.sae import SAE
from eqknobs.sound.judges import normalise
from eqknobs.stages.hallucination.clips import CONDITIONS, Heard, heard_clips, non_speech, rms_db, sourced
from eqknobs.stages.hallucination.edits import (
    DIRECTIONS,
    EDITED,
    Fitted,
    Point,
    direction,
    edit_of,
    edited,
    fit,
    save_fitted,
    shift,
)

SEEDED = ("random_features", "random_direction")
GATES = ("no_speech", "no_speech_logprob", "energy", "vad")
VAD_RATE, VAD_WINDOW = 16000, 512  # of Silero's detector


class RivalsCfg(TypedDict):
    """The points of arms without an SAE."""

    alphas: list[float]
    heads: list[int]
    no_speech: list[float]
    logprob: float
    energy_db: list[float]
    vad: list[float]
    seeds: int


class HallucinationCfg(TypedDict):
    """What `hallucinate` reads."""

    model: ModelCfg
    layers: list[int]
    non_speech: list[str]
    held_out: list[str]
    clips: dict[str, int]
    speech: dict[str, int]
    quiet_db: float
    snr_db: float
    label: str
    tau: float
    counts: list[int]
    alphas: list[float]
    rivals: RivalsCfg
    edit: str
    blanks: bool
    wer_margin: float
    max_tokens: int
    batch: int
    listen: int
    reference: NotRequired[ModelCfg]  # whose transcript stands for the text of speech
    seed: int
    content: NotRequired[dict[str, str]]


class Inputs(NamedTuple):
    """Files: manifests of speech and, by corpus, of sound without it; manifest of what the SAEs hear; by layer the
    activations of that and the SAE's folder."""

    speech: str
    non_speech: Mapping[str, str]
    heard: str
    caches: Mapping[int, str]
    saes: Mapping[int, Path]


class Outputs(NamedTuple):
    """Files: raw rows; what was chosen (JSON), what was fitted (.npz); a folder of sounds with index.csv."""

    scores: str
    chosen: str
    fitted: str
    sounds: str


# --- one transcription, judged


def written(text: str) -> bool:
    """Whether letters or digits are left of a text after Whisper's normaliser, which drops what is in brackets."""
    return any(sign.isalnum() for sign in normalise(text))


def word_counts(text: str, said: str) -> dict[str, float]:
    """errors_text, words_text, deleted of a transcript; NaN where the clip has no text."""
    wanted = normalise(text)
    if not wanted:
        return dict.fromkeys(("errors_text", "words_text", "deleted"), float("nan"))
    found = jiwer.process_words(wanted, normalise(said))
    errors = found.substitutions + found.deletions + found.insertions
    return {"errors_text": errors, "words_text": len(wanted.split()), "deleted": found.deletions}


def judged(clip: Heard, said: Said, tau: float, speech: bool | None = None) -> dict[str, Any]:
    """The raw row of a clip; speech: a gate's verdict, which then counts as detection, None: the model's own."""
    text = "" if speech is False else said.text
    row: dict[str, Any] = {
        "id": clip.id,
        "speaker": clip.speaker,
        "split": clip.split,
        "domain": clip.domain,
        "transcript": text,
    }
    row |= {"written": int(written(text)), "detected": int(said.no_speech_prob < tau if speech is None else speech)}
    row |= {"no_speech_prob": said.no_speech_prob, "logprob": said.logprob}
    return row | word_counts(clip.text, text)


def joined(pieces: Sequence[Said]) -> Said:
    """The windows of a clip as one: all words, the mean log-probability, the least no_speech_prob."""
    text = " ".join(filter(None, (piece.text for piece in pieces)))
    return Said(text, float(np.mean([p.logprob for p in pieces])), min(p.no_speech_prob for p in pieces))


def voice_activity(wav: np.ndarray, rate: int) -> float:
    """The largest probability of speech that Silero's detector (faster-whisper's copy) gives any 32 ms of a sound.

    Raises EqknobsError for another rate than its 16 kHz, or where it cannot be loaded.
    """
    if rate != VAD_RATE:
        raise EqknobsError(f"the voice activity detector hears {VAD_RATE} Hz, not {rate}")
    try:
        from faster_whisper.vad import get_vad_model

        model = get_vad_model()
    except Exception as error:  # onnxruntime raises many kinds
        raise EqknobsError(
            f"Silero's voice activity detector cannot be loaded ({error}); install faster-whisper"
        ) from error
    padded = np.pad(wav.astype(np.float32), (0, -len(wav) % VAD_WINDOW))
    return float(np.max(model(padded)))


def gate(point: Point, said: Said, wav: np.ndarray, rate: int, logprob: float) -> bool:
    """Whether a gate lets a clip [samples] through as speech; said: what the untouched model says of it.

    logprob: under which the gate of both wants the mean log-probability to be, to keep silent.
    """
    bound = point.alpha or 0.0
    if point.arm == "no_speech":
        return said.no_speech_prob <= bound
    if point.arm == "no_speech_logprob":
        return not (said.no_speech_prob > bound and said.logprob < logprob)
    return rms_db(wav) >= bound if point.arm == "energy" else voice_activity(wav, rate) >= bound


# --- every arm on every clip


class Bench:
    """A Whisper that transcribes the clips of val and test at any point, each once."""

    def __init__(
        self,
        model: Any,
        cfg: HallucinationCfg,
        clips: Mapping[str, list[Heard]],
        fitted: Mapping[int, Fitted],
        saes: Mapping[int, SAE],
        pieces: Pieces | None = None,
    ):
        self.model, self.cfg, self.clips, self.fitted, self.saes = model, cfg, clips, fitted, saes
        self.pieces = pieces or Pieces(None)
        self.last = list(model.sites)[-1]
        self.heads: list[int] = []  # of the decoder, the one whose loss helps most first
        self._half: dict[str, Halfway] = {}
        self._said: dict[tuple[Any, ...], list[Said]] = {}
        self._sounds = {split: array_hash(*(clip.wav for clip in of)) for split, of in clips.items()}

    def halfway(self, split: str) -> Halfway:
        """What leaves the layers, of all clips of a split."""
        if split not in self._half:
            sites = [f"layer.{layer}" for layer in self.cfg["layers"]]
            wavs = [clip.wav for clip in tqdm(self.clips[split], desc=f"hear {split}", unit="clip")]
            self._half[split] = self.model.halfway(wavs, list(dict.fromkeys([*sites, self.last])))
        return self._half[split]

    def said(self, split: str, point: Point) -> list[Said]:
        """What is made of every clip of a split."""
        heads = self.heads[: point.k] if point.arm == "muted_heads" else []
        return self._kept(split, point, heads, range(len(self.clips[split])))

    def _kept(self, split: str, point: Point, heads: list[int], clips: Sequence[int]) -> list[Said]:
        """What is made of some clips (places in a split) without these heads."""
        key = (split, point, tuple(heads), tuple(clips))
        if key not in self._said:
            about = {"sounds": self._sounds[split], "clips": list(clips), "edit": self._digest(point)}
            made_of = {**about, "point": point.columns(), "heads": heads}
            kept = self.pieces.json("hallucination", made_of, lambda: self._transcribed(split, point, heads, clips))
            self._said[key] = [Said(*one) for one in kept]
        return self._said[key]

    def _digest(self, point: Point) -> str:
        """Of what the point's edit is made of."""
        if point.layer is None:
            return ""
        fitted, sae = self.fitted[point.layer], self.saes[point.layer]
        moved = direction(point, fitted) if point.arm in DIRECTIONS else shift(point, fitted)
        return array_hash(moved, *(value.numpy() for value in sae.state_dict().values()))

    def _transcribed(self, split: str, point: Point, heads: list[int], clips: Sequence[int]) -> list[list[Any]]:
        half, cfg = self.halfway(split), self.cfg
        site = self.last if point.layer is None else f"layer.{point.layer}"
        edit = None
        if point.arm in EDITED and point.layer is not None:
            edit = edit_of(point, self.fitted[point.layer], self.saes[point.layer])
        options = {"blanks": cfg["blanks"], "symbols": point.arm == "symbols"}
        pieces: dict[int, list[Said]] = {clip: [] for clip in clips}
        with torch.inference_mode(), self.model.without_heads(heads):
            for batch in self._batches(split, clips):
                acts = half.acts[site][batch]
                if edit is not None:
                    acts = edited(acts, half.frames[batch], edit, cfg["edit"] == "window")
                for window, one in zip(
                    batch, self.model.say(self.model.go_on(acts, site), cfg["max_tokens"], len(batch), **options)
                ):
                    pieces[int(half.clips[window])].append(one)
        return [list(joined(found)) for found in pieces.values()]

    def _batches(self, split: str, clips: Sequence[int]) -> list[np.ndarray]:
        """Windows of some clips, of speech apart: a batch takes as long as its longest text."""
        windows, own = np.arange(len(self._half[split].clips)), self._half[split].clips
        talk = np.array([bool(clip.text) for clip in self.clips[split]])[own]
        parts = [windows[np.isin(own, list(clips)) & (talk == speech)] for speech in (False, True)]
        size = self.cfg["batch"]
        return [part[first : first + size] for part in parts for first in range(0, len(part), size)]

    def rows(self, split: str, point: Point) -> list[dict[str, Any]]:
        """Raw rows of a point, one a clip."""
        clips, cfg = self.clips[split], self.cfg
        gated = point.arm in GATES
        said = self.said(split, Point("none") if gated else point)
        rate, logprob = self.model.sample_rate, cfg["rivals"]["logprob"]
        verdicts = [gate(point, one, clip.wav, rate, logprob) if gated else None for clip, one in zip(clips, said)]
        return [
            {**point.columns(), **judged(clip, one, cfg["tau"], verdict)}
            for clip, one, verdict in zip(clips, said, verdicts, strict=True)
        ]

    def rank_heads(self) -> list[int]:
        """Heads of the decoder: that one first without which the fewest texts are written on val, or, of equals,
        without which no speech is the likeliest."""
        other = [place for place, clip in enumerate(self.clips["val"]) if not clip.text]
        found = []
        for head in range(self.model.config.decoder_attention_heads):
            quiet = self._kept("val", Point("muted_heads"), [head], other)
            rate, unlikely = (
                np.mean([written(one.text) for one in quiet]),
                np.mean([one.no_speech_prob for one in quiet]),
            )
            found.append((rate, -unlikely, head))
        return [head for _, _, head in sorted(found)]


# --- which point of an arm


class Tried(NamedTuple):
    """What a point does on val: share of non-speech of which texts are written, share detected as speech, mean
    no_speech_prob there, and the word error rate of speech."""

    written: float
    detected: float
    no_speech: float
    wer: float


def tried(rows: pd.DataFrame) -> Tried:
    """The measures of a point's rows (all its seeds)."""
    speech = rows["domain"].isin(CONDITIONS)
    other = rows[~speech]
    wer = rows.loc[speech, "errors_text"].sum() / rows.loc[speech, "words_text"].sum()
    return Tried(other["written"].mean(), other["detected"].mean(), other["no_speech_prob"].mean(), float(wer))


def choose(points: Mapping[Point, Tried], limit: float) -> Point:
    """The point that writes the fewest texts of non-speech and keeps the word error rate at `limit` or below.

    Of equals the one that detects less speech there, then with the higher no_speech_prob, then fewer word errors; where
    none keeps the limit, the one with the fewest word errors.
    """
    fitting = [point for point, found in points.items() if found.wer <= limit + 1e-12]
    if not fitting:
        return min(points, key=lambda point: points[point].wer)
    return min(fitting, key=lambda p: (points[p].written, points[p].detected, -points[p].no_speech, points[p].wer))


class Trial:
    """Points tried on val, arm by arm, and the one chosen of each."""

    def __init__(self, bench: Bench):
        self.bench, self.cfg, self.rows = bench, bench.cfg, list[dict[str, Any]]()
        self.chosen: dict[str, Point] = {}
        self.limit = float("inf")
        self.limit = self.of([Point("none")])[Point("none")].wer + self.cfg["wer_margin"]

    def of(self, points: Sequence[Point]) -> dict[Point, Tried]:
        """Try the points of one arm and choose one; random arms have one result for all their seeds."""
        found = {}
        for point in points:
            seeds = range(self.cfg["rivals"]["seeds"] if point.arm in SEEDED else 1)
            rows = [row for seed in seeds for row in self.bench.rows("val", point._replace(seed=seed))]
            self.rows += rows
            found[point] = tried(pd.DataFrame(rows))
            print(f"{point}: {found[point]}", flush=True)
        self.chosen[points[0].arm] = choose(found, self.limit)
        return found

    def run(self) -> str:
        """Try every arm; returns the form of features that val prefers."""
        cfg, rivals = self.cfg, self.cfg["rivals"]
        self.of([Point("symbols")])
        for arm in GATES:
            name = {"no_speech_logprob": "no_speech", "energy": "energy_db"}.get(arm, arm)
            self.of([Point(arm, alpha=bound) for bound in rivals[name]])  # type: ignore[literal-required]
        grid = [(layer, k, alpha) for layer in cfg["layers"] for k in cfg["counts"] for alpha in cfg["alphas"]]
        forms: dict[Point, Tried] = {}
        for arm in ("sae", "sae_scaled"):
            found = self.of([Point(arm, *cell) for cell in grid])
            forms[self.chosen[arm]] = found[self.chosen[arm]]
        best, paper = choose(forms, self.limit), self.chosen["sae"]
        self.of([Point("sae_inserted", paper.layer, alpha=0)])
        for arm in ("sae_error", "random_features"):
            self.of([Point(arm, paper.layer, paper.k, alpha) for alpha in cfg["alphas"]])
        for arm in DIRECTIONS:
            self.of([Point(arm, best.layer, alpha=alpha) for alpha in rivals["alphas"]])
        self.bench.heads = self.bench.rank_heads()
        self.of([Point("muted_heads", k=k) for k in rivals["heads"]])
        return best.arm


# --- what train says


def labels_of(model: Any, rows: pd.DataFrame, manifests: Mapping[str, str], cfg: HallucinationCfg) -> dict[str, int]:
    """Id of a train clip -> 1 where it counts as speech, by `cfg["label"]`.

    rows: what the SAEs hear, of train (id, domain); manifests: of the corpora of non-speech, of which the untouched
    model hears `clips.train` each where the label is its no_speech_prob.
    """
    if cfg["label"] == "speech":
        return {str(row.id): int(row.domain not in manifests) for row in rows.itertuples()}
    clips = non_speech(manifests, "train", model.sample_rate, cfg)
    last = list(model.sites)[-1]
    half = model.halfway([clip.wav for clip in clips], [last])
    said = model.say(model.go_on(half.acts[last], last), 1, cfg["batch"])
    found = np.ones(len(clips))
    np.minimum.at(found, half.clips, [one.no_speech_prob for one in said])
    bound = np.median(found) if cfg["label"] == "median" else cfg["tau"]
    return {clip.id: int(value < bound) for clip, value in zip(clips, found, strict=True)}


def fit_layers(model: Any, inputs: Inputs, saes: Mapping[int, SAE], cfg: HallucinationCfg) -> dict[int, Fitted]:
    """Fit every layer on the train clips that its SAE heard, without test's sources. Raises EqknobsError as `fit`, and
    for activations of another model."""
    heard = read_csv(inputs.heard)
    other = heard["domain"].isin(list(inputs.non_speech))
    train = pd.concat([sourced(heard[other], cfg["held_out"]), heard[~other]])
    train = train[train["split"] == "train"].sort_values("id")
    labels = labels_of(model, train, inputs.non_speech, cfg)
    found = {}
    for layer, path in sorted(inputs.caches.items()):
        with ActivationCache(path) as cache:
            if cache.attrs["revision"] != model.revision:
                raise EqknobsError(
                    f"{path} is of weights {cache.attrs['revision']}, not {model.revision}; make it again"
                )
            rows = cache.utterances[cache.utterances["id"].isin(list(labels))].sort_values("id")
            clips = [np.array(cache.acts[row.start : row.start + row.frames]) for row in rows.itertuples()]
        found[layer] = fit(clips, np.array([labels[name] for name in rows["id"]], dtype=int), saes[layer])
        print(f"layer {layer}: fitted on {len(rows)} clips", flush=True)
    return found


# --- all of it


def write_sounds(clips: Sequence[Heard], count: int, rate: int, folder: Path) -> None:
    """The first clips of each domain of test: FLACs and `index.csv` (id, domain, speaker, text, file)."""
    taken: dict[str, int] = {}
    rows = []
    with atomic_path(folder) as audio:
        audio.mkdir()
        for clip in clips:
            taken[clip.domain] = taken.get(clip.domain, 0) + 1
            if taken[clip.domain] <= count:
                file = f"{clip.domain}_{taken[clip.domain]}.flac"
                write_flac(audio / file, clip.wav, rate)
                row = {"id": clip.id, "domain": clip.domain, "speaker": clip.speaker}
                rows.append({**row, "text": clip.text, "file": file})
        write_csv(audio / "index.csv", pd.DataFrame(rows))


def own_pieces(model: Any, cfg: HallucinationCfg, pieces: Pieces | None) -> Pieces:
    """The store for transcripts of this model at these settings, by this code."""
    code = [content(file) for file in module_inputs(__name__)]
    settings = [cfg[key] for key in ("edit", "blanks", "max_tokens", "batch")]
    packages = [version(name) for name in ("torch", "transformers")]
    made_of = [code, settings, model.revision, model.device, torch.get_num_threads(), packages]
    return (pieces or Pieces(None)).within(made_of)


def hallucinate(inputs: Inputs, out: Outputs, cfg: HallucinationCfg, pieces: Pieces | None = None) -> None:
    """Choose a point of each arm on val and score it on test. Each file appears when it is whole.

    out.scores: one row a (point, seed, clip), see `judged`; of val all points, of test the chosen ones. out.chosen: by
    arm its point, and what decides how it is applied. Raises EqknobsError for a model that does not transcribe.
    """
    saes = {layer: SAE.load(folder) for layer, folder in inputs.saes.items()}
    with gpu_lock(pick_device(cfg["model"].get("device") or "auto")):
        model = load_model(cfg["model"])
        if not hasattr(model, "say"):
            raise EqknobsError(f"model {model.name} does not transcribe; hallucination needs kind whisper")
        fitted = fit_layers(model, inputs, saes, cfg)
        reference = None
        if "reference" in cfg:
            reference = load_model({**cfg["reference"], "device": cfg["model"].get("device", "auto")})
        clips = {
            split: heard_clips(inputs.speech, inputs.non_speech, split, model.sample_rate, cfg, reference)
            for split in ("val", "test")
        }
        bench = Bench(model, cfg, clips, fitted, saes, own_pieces(model, cfg, pieces))
        trial = Trial(bench)
        form = trial.run()
        rows = list(trial.rows)
        for point in trial.chosen.values():
            seeds = range(cfg["rivals"]["seeds"] if point.arm in SEEDED else 1)
            rows += [row for seed in seeds for row in bench.rows("test", point._replace(seed=seed))]
        write_csv(out.scores, pd.DataFrame(rows))
        save_fitted(out.fitted, fitted)
        decoding = {"edit": cfg["edit"], "blanks": cfg["blanks"], "max_tokens": cfg["max_tokens"]}
        points = {arm: point.columns() for arm, point in trial.chosen.items()}
        about = {"arms": points, "form": form, "heads": bench.heads, "limit": trial.limit, "label": cfg["label"]}
        about["reference"] = reference.name if reference else "text"
        logprob = cfg["rivals"]["logprob"]
        write_json(out.chosen, {**about, **decoding, "tau": cfg["tau"], "logprob": logprob, "revision": model.revision})
        write_sounds(clips["test"], cfg["listen"], model.sample_rate, Path(out.sounds))
