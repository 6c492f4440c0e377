"""Steering: push activations along a direction, calibrate every arm to one shift of the centroid, render it.

A direction v points from the highest to the lowest bin of a property: its arms make sound darker, softer or lower.
Its strength α counts standard deviations of the train frames' projection on v; alpha_raw = α · deviation is the
blog's α.

With f = encode(x), the z-scoring inside the SAE, and a = alpha_raw, an arm replaces the activations x by

- `codec_roundtrip`: x. (`original` is the untouched clip.)
- `sae_roundtrip:<sae>`: decode(f)
- `sae_probe:<sae>`: decode(f'), f' = ReLU(f + a·v), v = unit(w_low − w_high) of the SAE's probe (the blog)
- `sae_probe_error:<sae>`: decode(f') + (x − decode(f)), the SAE's own error added back
- `sae_probe_renorm:<sae>`: decode(f' · rms(f) / rms(f')) (audio-latent SAE paper)
- `sae_clamp:<sae>`: decode(f''), where the m features of largest |w_low − w_high|·std are set to mean + α·std if
  w_low > w_high, else to max(0, mean − α·std); mean and std over the train frames, alpha_raw = α
- `raw_probe`: x + std·a·v, v = unit(w_low − w_high) of the probe on z-scored latents
- `difference_in_means`: the same, v = unit(mean z of the lowest bin's train frames − that of the highest bin's)
- `random`: the same, v a random unit vector
- `dsp_lowpass`: encode(zero-phase Butterworth low-pass of the clip); α is its cutoff in kHz, alpha_raw in Hz
- `dsp_bandpass`: encode(zero-phase Butterworth band-pass 300–3000 Hz); nothing to calibrate
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import scipy.signal
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, read_json, write_csv, write_json
from eqknobs.models import Model
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE
from eqknobs.sound import metrics
from eqknobs.sound.renders import (
    Clip,
    Condition,
    OpenedCfg,
    edited,
    load_clip,
    open_codec,
    pick_clips,
    render_conditions,
    render_pieces,
)
from eqknobs.stages.probes.compute import ProbeFiles, labelled_frames, load_probe, read_probe, to_classes

BLOCK = 4096  # frames worked on at a time
FILTER_ORDER = 4  # of one pass; filtering forwards and backwards doubles it
LOWEST_CUTOFF = 200.0  # Hz
CALIBRATION_STEPS = 12  # of narrowing, once the target is bracketed


class VectorsCfg(TypedDict):
    """What makes the directions: of the section `steering`, and the run's seed."""

    binning: str  # whose probe
    low_bin: int
    high_bin: int
    seed: int  # of the random direction, which all properties share


class SteeringCfg(VectorsCfg, OpenedCfg):
    """What both jobs of the stage read."""

    saes: list[str]
    codebooks: int | None
    clamp_features: list[int]


class CalibrationCfg(SteeringCfg):
    """What `calibrate_steering` reads."""

    val_clips: int
    shift: float
    tolerance: float
    alpha_max: float


class SteeringRendersCfg(SteeringCfg):
    """What `render_steering` reads."""

    clips: int
    alphas: list[float]
    listen: int
    other_alpha: dict[str, float]  # property, of those that are probed -> α


@dataclass(frozen=True)
class Sources:
    """The files that a target is steered with."""

    manifest: str | Path
    cache: str | Path
    labels: str | Path
    saes: Mapping[str, Path]  # SAE name -> folder
    probes: Mapping[str, ProbeFiles]  # property -> npz

    @classmethod
    def declared(cls, inputs: Any) -> "Sources":
        """Those that a rule declares, as Snakemake's object."""
        saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
        probes: dict[str, list[str]] = {}
        for path in inputs.probes:
            probes.setdefault(Path(path).stem, []).append(path)
        return cls(inputs.manifest, inputs.cache, inputs.labels, saes, probes)


@dataclass(frozen=True)
class Direction:
    """A unit vector in a feature space and the spread of the train frames along it."""

    v: np.ndarray  # float32 [width], norm 1
    sd: float  # standard deviation of the train frames' projection on v


@dataclass(frozen=True)
class Arm:
    """A way to steer. `edit(acts, alpha_raw)` acts on activations, `wav_filter(wav, rate, alpha_raw)` on sound."""

    edit: Callable[[np.ndarray, float], np.ndarray] | None = None
    wav_filter: Callable[[np.ndarray, int, float], np.ndarray] | None = None
    sd: float = 1.0  # alpha_raw = α · sd
    features: int | None = None  # sae_clamp's m

    def condition(self, name: str, alpha: float, about: dict[str, Any], **kwargs: Any) -> Condition:
        """The condition that renders this arm at one strength."""
        raw = alpha * self.sd
        columns = {**about, "alpha": alpha, "alpha_raw": raw}
        if (edit := self.edit) is not None:
            kwargs["edit"] = lambda acts: edit(acts, raw)
        if (wav_filter := self.wav_filter) is not None:
            kwargs["wav_filter"] = lambda wav, rate: wav_filter(wav, rate, raw)
        return Condition(name, columns, **kwargs)


# --- directions ------------------------------------------------------------------------------------------------


def unit(vector: np.ndarray, what: str) -> np.ndarray:
    """`vector` at norm 1, float32. Raises EqknobsError, naming `what`, if it is zero or not finite."""
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not math.isfinite(norm) or norm == 0:
        raise EqknobsError(f"{what}: the steering direction has norm {norm}; the probe found nothing to steer")
    return (vector / norm).astype(np.float32)


def train_moments(
    cache: ActivationCache, features: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [columns], of `features(acts [n, width])` over the train frames."""
    rows = cache.rows("train")
    total = squares = np.zeros(())
    for start in range(0, len(rows), BLOCK):
        values = np.asarray(features(np.array(cache.acts[rows[start : start + BLOCK]])), np.float64)
        total, squares = total + values.sum(0), squares + np.square(values).sum(0)
    mean = total / len(rows)
    return mean, np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))


def probe_difference(probes_npz: ProbeFiles, space: str, cfg: VectorsCfg) -> np.ndarray:
    """w_low − w_high [width] of a probe.

    Raises EqknobsError if the probe has fewer classes (quantiles that coincide are merged).
    """
    weights, _ = load_probe(probes_npz, space, cfg["binning"])
    if max(cfg["low_bin"], cfg["high_bin"]) >= len(weights):
        raise EqknobsError(
            f"the {cfg['binning']} probe on {space} has {len(weights)} classes, steering wants bins "
            f"{cfg['low_bin']} and {cfg['high_bin']}; lower steering.high_bin"
        )
    return weights[cfg["low_bin"]] - weights[cfg["high_bin"]]


def mean_difference(
    cache: ActivationCache, labels_h5: str | Path, probes_npz: ProbeFiles, name: str, cfg: VectorsCfg
) -> np.ndarray:
    """Mean z-scored latent of the lowest bin's train frames minus that of the highest bin's, float64 [width].

    Bins and lag are those of the probe on raw latents.
    """
    edges, found = read_probe(probes_npz, f"edges:{cfg['binning']}", "lag:raw")
    lag = int(found)
    frames = labelled_frames(cache, labels_h5, name, [lag])
    train = frames.of("train")
    classes = to_classes(frames.values[train], edges)
    means = []
    for wanted in (cfg["low_bin"], cfg["high_bin"]):
        rows = frames.rows[train][classes == wanted] - lag
        if not len(rows):
            raise EqknobsError(f"{labels_h5}: no train frame in bin {wanted} of {name}; change steering.binning")
        means.append(cache.acts[rows].mean(0, dtype=np.float64))
    return (means[0] - means[1]) / cache.std


def directions(
    cache: ActivationCache,
    labels_h5: str | Path,
    probes_npz: ProbeFiles,
    saes: dict[str, SAE],
    name: str,
    cfg: VectorsCfg,
) -> dict[str, Direction]:
    """Directions of one property: `sae_probe:<sae>` in code space, the others in z-scored latent space."""
    random = np.random.default_rng([cfg["seed"], 11]).standard_normal(len(cache.mean))
    vectors = {
        "raw_probe": probe_difference(probes_npz, "raw", cfg),
        "difference_in_means": mean_difference(cache, labels_h5, probes_npz, name, cfg),
        "random": random,
    }
    vectors = {arm: unit(vector, f"{name}, {arm}") for arm, vector in vectors.items()}
    stacked = np.stack(list(vectors.values()), 1)
    _, spread = train_moments(cache, lambda acts: (acts - cache.mean) / cache.std @ stacked)
    found = {arm: Direction(v, float(sd)) for (arm, v), sd in zip(vectors.items(), spread)}
    for sae_name, sae in saes.items():
        arm = f"sae_probe:{sae_name}"
        v = unit(probe_difference(probes_npz, f"sae:{sae_name}", cfg), f"{name}, {arm}")
        _, spread = train_moments(cache, partial(_projected, sae, v))
        found[arm] = Direction(v, float(spread[0]))
    return found


def _projected(sae: SAE, v: np.ndarray, acts: np.ndarray) -> np.ndarray:
    """The code of activations [n, width] along v [n, 1]."""
    return (sae.encode(acts) @ v)[:, None]


# --- arms ------------------------------------------------------------------------------------------------------


def latent_arm(direction: Direction, std: np.ndarray) -> Arm:
    """x' = x + std·alpha_raw·v, v in z-scored latent space."""
    step = (std * direction.v).astype(np.float32)
    return Arm(lambda acts, raw: acts + np.float32(raw) * step, sd=direction.sd)


def sae_arms(sae: SAE, name: str, direction: Direction) -> dict[str, Arm]:
    """The three arms that add a vector to an SAE's code. At alpha 0 they are the SAE round trip, the codec round
    trip and the SAE round trip, to the last bit."""

    def pushed(acts: np.ndarray, raw: float) -> tuple[np.ndarray, np.ndarray]:
        code = sae.encode(acts)
        return code, np.maximum(code + np.float32(raw) * direction.v, 0)

    def error_added_back(acts: np.ndarray, raw: float) -> np.ndarray:
        code, steered = pushed(acts, raw)
        return acts + (sae.decode(steered) - sae.decode(code))

    def renormalised(acts: np.ndarray, raw: float) -> np.ndarray:
        code, steered = pushed(acts, raw)
        rms, steered_rms = (np.sqrt(np.square(f).mean(1, keepdims=True)) for f in (code, steered))
        return sae.decode(steered * (rms / np.maximum(steered_rms, 1e-12)))

    edits = {
        "sae_probe": lambda acts, raw: sae.decode(pushed(acts, raw)[1]),
        "sae_probe_error": error_added_back,
        "sae_probe_renorm": renormalised,
    }
    return {f"{arm}:{name}": Arm(edit, sd=direction.sd) for arm, edit in edits.items()}


def clamp_arm(sae: SAE, difference: np.ndarray, mean: np.ndarray, std: np.ndarray, features: int) -> Arm:
    """Set the `features` features of largest |w_low − w_high|·std to mean ± α·std (see the module's table).

    difference: w_low − w_high [m]; mean, std: of the code over train frames [m]. The weight is taken per standard
    deviation, since a feature that hardly ever fires has a large weight and next to no say.
    """
    chosen = np.argsort(-np.abs(difference) * std, kind="stable")[:features]
    mean, step = mean[chosen], np.sign(difference[chosen]) * std[chosen]

    def edit(acts: np.ndarray, alpha: float) -> np.ndarray:
        code = sae.encode(acts)
        code[:, chosen] = np.maximum(mean + alpha * step, 0)
        return sae.decode(code)

    return Arm(edit, features=len(chosen))


def lowpass(wav: np.ndarray, rate: int, cutoff: float) -> np.ndarray:
    """Zero-phase Butterworth low-pass [samples]: −6 dB at `cutoff` Hz, 48 dB an octave; none at or above Nyquist."""
    if cutoff >= rate / 2:
        return wav
    sections = scipy.signal.butter(FILTER_ORDER, cutoff, fs=rate, output="sos")
    return scipy.signal.sosfiltfilt(sections, wav).astype(np.float32)


def bandpass(wav: np.ndarray, rate: int, low: float = 300.0, high: float = 3000.0) -> np.ndarray:
    """Zero-phase Butterworth band-pass [samples]: −6 dB at both edges (Hz). The blog's radio, as a filter."""
    sections = scipy.signal.butter(FILTER_ORDER, [low, high], "bandpass", fs=rate, output="sos")
    return scipy.signal.sosfiltfilt(sections, wav).astype(np.float32)


def make_arms(
    cache: ActivationCache,
    labels_h5: str | Path,
    probes_npz: ProbeFiles,
    saes: dict[str, SAE],
    name: str,
    cfg: VectorsCfg,
    clamp_features: dict[str, list[int]] | None = None,
) -> dict[str, Arm]:
    """The steerable arms of one property, by name; without filters.

    clamp_features: SAE name -> numbers m of features to clamp. Several m of an SAE are told apart as
    `sae_clamp:<sae>#<m>`, a single one is `sae_clamp:<sae>`.
    """
    found = directions(cache, labels_h5, probes_npz, saes, name, cfg)
    arms: dict[str, Arm] = {}
    for sae_name, sae in saes.items():
        arms |= sae_arms(sae, sae_name, found[f"sae_probe:{sae_name}"])
        counts = sorted({min(m, sae.config.d_sae) for m in (clamp_features or {}).get(sae_name, [])})
        if counts:
            difference = probe_difference(probes_npz, f"sae:{sae_name}", cfg)
            moments = train_moments(cache, sae.encode)
        for m in counts:
            arm = f"sae_clamp:{sae_name}" + (f"#{m}" if len(counts) > 1 else "")
            arms[arm] = clamp_arm(sae, difference, *moments, m)
    for arm in ("raw_probe", "difference_in_means", "random"):
        arms[arm] = latent_arm(found[arm], cache.std)
    return arms


# --- calibration -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """The strength found for an arm, what it measures there, and whether that is the target."""

    alpha: float
    value: float
    reached: bool


def calibrate(
    measure: Callable[[float], float],
    target: float,
    tolerance: float,
    alpha_max: float,
    start: float = 1.0,
) -> Calibration:
    """Find a strength in [0, alpha_max] at which `measure` is within `tolerance` (relative) of `target`.

    `measure` should fall from above the target. The strength is doubled from `start` until it has passed the
    target, then narrowed by the Illinois variant of regula falsi. What is not finite (silence) counts as passed.
    Not reached: `measure` starts below the target, is still above it at alpha_max, or jumps over it; then the
    strength is the one that came closest.
    """
    trials = _Trials(measure, target, tolerance)
    low, high = 0.0, min(start, alpha_max)
    if trials.miss(low) <= tolerance:
        return trials.closest()
    while trials.miss(high) > tolerance:
        if high >= alpha_max:
            return trials.closest()
        low, high = high, min(2 * high, alpha_max)
    _narrow(trials, low, high)
    return trials.closest()


class _Trials:
    """What `measure` gave at the strengths that were tried, each once."""

    def __init__(self, measure: Callable[[float], float], target: float, tolerance: float):
        self.measure, self.target, self.tolerance = measure, target, tolerance
        self.tried: dict[float, float] = {}

    def miss(self, alpha: float) -> float:
        """Relative distance above the target; −1 (all the way down) for silence."""
        if alpha not in self.tried:
            self.tried[alpha] = self.measure(alpha)
        return self.tried[alpha] / self.target - 1 if math.isfinite(self.tried[alpha]) else -1.0

    def done(self, alpha: float) -> bool:
        """Whether a strength that was tried is on the target."""
        return math.isfinite(self.tried[alpha]) and abs(self.miss(alpha)) <= self.tolerance

    def closest(self) -> Calibration:
        """The best so far, of equals the smallest."""
        alpha = min(self.tried, key=lambda a: (abs(self.miss(a)), a))
        return Calibration(alpha, self.tried[alpha], self.done(alpha))


def _narrow(trials: _Trials, low: float, high: float) -> None:
    """Try strengths between `low`, above the target, and `high`, at or below it, until one is done."""
    f_low, f_high, kept = trials.miss(low), trials.miss(high), 0
    for _ in range(CALIBRATION_STEPS):
        if trials.done(high):
            break
        share = f_low / (f_low - f_high)
        # 0.05 … 0.95: a curve that is flat on one side would otherwise be approached in crumbs.
        middle = low + (high - low) * min(max(share, 0.05), 0.95)
        f = trials.miss(middle)
        if trials.done(middle):
            break
        if f > 0:
            low, f_low = middle, f
            f_high, kept = (f_high / 2 if kept == 1 else f_high), 1
        else:
            high, f_high = middle, f
            f_low, kept = (f_low / 2 if kept == -1 else f_low), -1


class _Bench:
    """Measures arms on the val clips, each sound once."""

    def __init__(self, model: Model, cfg: SteeringCfg, clips: list[Clip], pieces: Pieces):
        self.pieces = pieces
        self.model, self.site, self.codebooks, self.clips = model, cfg["site"], cfg["codebooks"], clips
        self.known: dict[tuple[str, str], tuple[float, float]] = {}
        self.rows: list[dict[str, Any]] = []

    def measure(self, name: str, arm: Arm, alpha: float) -> tuple[float, float]:
        """Mean centroid (Hz) and mean mel distance to the original (dB) over the clips; NaN where silent."""
        condition = arm.condition(name, alpha, {"arm": name}, codebooks=self.codebooks)
        scores = []
        for clip in self.clips:
            acts = edited(self.model, self.site, clip, condition)
            key = (clip.sha256, hashlib.blake2b(acts.tobytes(), digest_size=32).hexdigest())
            if key not in self.known:
                self.known[key] = self.pieces.json(
                    "calibration", [self.codebooks, *key], partial(self._heard, clip, acts)
                )
            centroid, distance = self.known[key]
            scores.append((centroid, distance))
            self.rows.append(
                {
                    "id": clip.id,
                    "speaker": clip.speaker,
                    "split": clip.split,
                    **condition.columns,
                    "features": arm.features,
                    "centroid_hz": centroid,
                    "mel_distance": distance,
                }
            )
        centroid, distance = np.mean(scores, axis=0)  # one silent clip makes the mean NaN: it counts as passed
        return float(centroid), float(distance)

    def _heard(self, clip: Clip, acts: np.ndarray) -> list[float]:
        rate = self.model.sample_rate
        wav = self.model.decode(acts, self.site, len(clip.wav), self.codebooks)
        return [metrics.clip_centroid(wav, rate), metrics.mel_distance(clip.wav, wav, rate)]


def calibrate_steering(
    sources: Sources,
    out_json: str | Path,
    out_csv: str | Path,
    cfg: CalibrationCfg,
    pieces: Pieces | None = None,
) -> None:
    """Calibrate every arm to one mean centroid on val clips: `shift` × that of the codec round trip, ± `tolerance`.

    The m of `sae_clamp` is the one that reaches the target at the least mel distance; if none does, the one that comes
    closest.

    out_json: arm -> {alpha, alpha_raw, calibrated (reached | unreached | fixed), centroid_val_hz}, `features`
    beside it for sae_clamp; and `target_hz_ratio`. out_csv, all that was tried: id, speaker, split, arm, alpha,
    alpha_raw, features, centroid_hz, mel_distance.
    """
    manifest = read_csv(sources.manifest)
    saes = {name: SAE.load(sources.saes[name]) for name in cfg["saes"]}
    with ActivationCache(sources.cache) as cache, open_codec(cfg, cache) as model:
        chosen = pick_clips(manifest, "val", cfg["val_clips"])
        loaded = [load_clip(model, cache, row) for row in chosen.itertuples(index=False)]
        bench = _Bench(model, cfg, loaded, render_pieces(pieces, model, cfg))
        candidates = dict.fromkeys(saes, cfg["clamp_features"])
        arms = make_arms(cache, sources.labels, sources.probes["centroid"], saes, "centroid", cfg, candidates)
        fixed = {"codec_roundtrip": Arm()}
        fixed |= {f"sae_roundtrip:{name}": Arm(partial(_round_trip, sae)) for name, sae in saes.items()}
        fixed["dsp_bandpass"] = Arm(wav_filter=lambda wav, rate, _: bandpass(wav, rate))
        result: dict[str, dict[str, Any]] = {}
        for name, arm in fixed.items():
            value, _ = bench.measure(name, arm, 0.0)
            result[name] = {"alpha": 0.0, "alpha_raw": 0.0, "calibrated": "fixed", "centroid_val_hz": value}
        target = cfg["shift"] * result["codec_roundtrip"]["centroid_val_hz"]
        if not math.isfinite(target):
            raise EqknobsError("a val clip is silent after the codec's round trip: nothing to calibrate on")

        def solve(name: str, arm: Arm, alpha_of: Callable[[float], float], most: float, start: float) -> dict[str, Any]:
            found = calibrate(
                lambda strength: bench.measure(name, arm, alpha_of(strength))[0], target, cfg["tolerance"], most, start
            )
            alpha = alpha_of(found.alpha)
            return {
                "alpha": alpha,
                "alpha_raw": alpha * arm.sd,
                "calibrated": "reached" if found.reached else "unreached",
                "centroid_val_hz": found.value if math.isfinite(found.value) else None,
                **({} if arm.features is None else {"features": arm.features}),
            }

        nyquist = model.sample_rate / 2000  # kHz
        low_pass = Arm(wav_filter=lowpass, sd=1000.0)
        octaves = math.log2(1000 * nyquist / LOWEST_CUTOFF)
        result["dsp_lowpass"] = solve("dsp_lowpass", low_pass, lambda s: nyquist * 2.0**-s, octaves, 1.0)
        progress = tqdm(arms.items(), desc="calibrate", unit="arm")
        for name, arm in progress:
            progress.set_postfix_str(name)
            kind, _, sae_name = name.partition(":")
            # The variants of sae_probe end near its own strength, if it got there.
            own = result.get(f"sae_probe:{sae_name}", {}) if kind.startswith("sae_probe_") else {}
            start = own["alpha"] if own.get("calibrated") == "reached" else 1.0
            result[name] = solve(name, arm, lambda s: s, cfg["alpha_max"], start or 1.0)
        for sae_name in saes:
            _pick_clamp(result, sae_name, target, pd.DataFrame(bench.rows))
    write_csv(out_csv, pd.DataFrame(bench.rows))
    write_json(out_json, {"target_hz_ratio": cfg["shift"], "arms": result})


def _round_trip(sae: SAE, acts: np.ndarray, _: float) -> np.ndarray:
    return sae(acts)


def _pick_clamp(result: dict[str, Any], sae_name: str, target: float, tried: pd.DataFrame) -> None:
    """Replace the candidates `sae_clamp:<sae>#<m>` in `result` by the best one, `sae_clamp:<sae>`."""
    names = [name for name in result if name.startswith(f"sae_clamp:{sae_name}#")]

    def cost(name: str) -> tuple[bool, float]:
        found = result[name]
        if found["calibrated"] == "reached":
            at = tried[(tried["arm"] == name) & (tried["alpha"] == found["alpha"])]
            return False, float(at["mel_distance"].mean())
        value = found["centroid_val_hz"]
        return True, math.inf if value is None else abs(value - target)

    if names:
        best = result[min(names, key=cost)]
        for name in names:
            del result[name]
        result[f"sae_clamp:{sae_name}"] = best


# --- renders ---------------------------------------------------------------------------------------------------


def _key(*parts: Any) -> str:
    return ".".join(str(part) for part in parts).replace(":", "-")


def steering_conditions(
    arms: dict[str, Arm],
    other_arms: dict[str, dict[str, Arm]],
    saes: dict[str, SAE],
    calibration: dict[str, Any],
    cfg: SteeringRendersCfg,
) -> list[Condition]:
    """Every condition of the stage; columns property, arm, alpha, alpha_raw, calibrated.

    `calibrated` is reached or unreached (strength from val), fixed (no strength, or one from the config) or sweep.
    arms: those of the centroid; other_arms: property -> its arms. Judged (`keep`): the fixed references and
    calibrated arms.
    """
    codebooks = cfg["codebooks"]
    judged = {"keep": True, "pitch": True, "codebooks": codebooks}
    played = {"listen": cfg["listen"], "codebooks": codebooks}

    def about(name: str, arm: str, calibrated: str) -> dict[str, Any]:
        return {"property": name, "arm": arm, "calibrated": calibrated}

    def fixed(arm: str, **kwargs: Any) -> Condition:
        columns = {**about("centroid", arm, "fixed"), "alpha": None, "alpha_raw": None}
        return Condition(_key("centroid", arm), columns, **(judged | kwargs))

    conditions = [fixed("original", codec=False), fixed("codec_roundtrip")]
    for name, sae in saes.items():
        conditions.append(fixed(f"sae_roundtrip:{name}", edit=sae))
    conditions.append(fixed("dsp_bandpass", wav_filter=bandpass))
    steerable = {**arms, "dsp_lowpass": Arm(wav_filter=lowpass, sd=1000.0)}
    for name, arm in steerable.items():
        found = calibration[name]
        columns = about("centroid", name, found["calibrated"])
        key = _key("centroid", name, "calibrated")
        conditions.append(arm.condition(key, found["alpha"], columns, **judged))
    for name, arm in arms.items():
        for alpha in cfg["alphas"]:
            key = _key("centroid", name, f"alpha{alpha:g}")
            conditions.append(arm.condition(key, alpha, about("centroid", name, "sweep"), **played))
    for name, alpha in cfg["other_alpha"].items():
        for arm_name, arm in other_arms[name].items():
            columns = about(name, arm_name, "fixed")
            key = _key(name, arm_name, f"alpha{alpha:g}")
            conditions.append(arm.condition(key, alpha, columns, pitch=True, **played))
    return conditions


def render_steering(
    sources: Sources,
    calibration_json: str | Path,
    out_dir: str | Path,
    signal_csv: str | Path,
    cfg: SteeringRendersCfg,
    pieces: Pieces | None = None,
) -> None:
    """Render the calibrated arms, the sweep over `alphas` and the other properties on test clips.

    Files as in `render_conditions`. The sweep leaves f0_error_cents empty.
    """
    calibration = read_json(calibration_json)["arms"]
    clips = pick_clips(read_csv(sources.manifest), "test", cfg["clips"])
    saes = {name: SAE.load(sources.saes[name]) for name in cfg["saes"]}
    with ActivationCache(sources.cache) as cache, open_codec(cfg, cache) as model:
        clamped = {name: [calibration[f"sae_clamp:{name}"]["features"]] for name in saes}
        arms = make_arms(cache, sources.labels, sources.probes["centroid"], saes, "centroid", cfg, clamped)
        kinds = ("sae_probe", "raw_probe", "difference_in_means", "random")
        others = {}
        for name in cfg["other_alpha"]:
            found = make_arms(cache, sources.labels, sources.probes[name], saes, name, cfg)
            others[name] = {arm: edit for arm, edit in found.items() if arm.partition(":")[0] in kinds}
        conditions = steering_conditions(arms, others, saes, calibration, cfg)
        kept = render_pieces(pieces, model, cfg)
        render_conditions(model, cfg, clips, cache, conditions, out_dir, signal_csv, kept)
