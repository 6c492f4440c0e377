"""A results folder in the layout's form, filled with random raw scores and short tones instead of measurements.

It stands in for a run where the tables' arithmetic and the report's page are tested; nothing here is a result.
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile as sf

from eqknobs.evidence.inputs import Inputs
from eqknobs.io import write_csv, write_json
from eqknobs.plan import bundled
from eqknobs.report.page import write_report
from eqknobs.report.tables import write_tables
from helpers import ROOT

TARGET = "tiny-mimi.encoder_transformer"
RATE, WIDTH, FEATURES = 16000, 48, 192
SAES = {"topk": 32.0, "rms_l1": 120.0}
ALPHAS = (0, 2, 8)
KINDS = ("sae_probe", "sae_probe_error", "sae_probe_renorm", "sae_clamp")
COUNTS = {"expendable": 20, "moderate": 22, "critical": 6}
NAN = float("nan")
Rendered = tuple[float, float, bool, dict[str, Any]]  # centroid factor, harm in added WER, judged for words, columns


def _clips(rng: np.random.Generator, split: str, speakers: int, each: int) -> pd.DataFrame:
    rows = [(f"{split}{s}-{u:02d}", f"{split[0]}{s:02d}", split) for s, u in product(range(speakers), range(each))]
    clips = pd.DataFrame(rows, columns=["id", "speaker", "split"])
    clips["words"] = rng.integers(6, 14, len(clips))
    clips["hz"] = rng.normal(1600, 150, len(clips))
    return clips


def _signal(rng: np.random.Generator, clips: pd.DataFrame, factor: float, harm: float, **columns: Any) -> pd.DataFrame:
    n = len(clips)
    condition = "_".join(str(v).replace(":", "-") for v in columns.values() if v == v)
    return clips[["id", "speaker", "split"]].assign(
        condition=condition,
        **columns,
        seconds=1.0,
        centroid_hz=clips["hz"] * factor + rng.normal(0, 20, n),
        centroid_original_hz=clips["hz"],
        centroid_correlation_frame=np.clip(rng.normal(0.93 - harm / 4, 0.02, n), -1, 1),
        loudness_db=rng.normal(-25, 1, n),
        loudness_change_db=rng.normal(-0.5, 0.3, n),
        f0_error_cents=np.where(rng.random(n) < 0.1, np.nan, rng.gamma(2, 8, n)),
        mel_distance=rng.gamma(20, (2 + 8 * abs(harm)) / 20, n),
        latent_sq_error=rng.gamma(9, abs(harm) * 10 + 0.1, n),
        latent_sq_total=rng.gamma(9, 100, n),
    )


def _words(rng: np.random.Generator, signal: pd.DataFrame, clips: pd.DataFrame, wer: float) -> pd.DataFrame:
    words = signal[["id"]].merge(clips[["id", "words"]], on="id")["words"].to_numpy()
    original = "original" in signal[[c for c in ("arm", "path") if c in signal]].to_numpy()
    wer = 0.0 if original else wer
    return signal[["id", "speaker", "split", "condition"]].assign(
        transcript="a b c",
        words=words,
        errors=rng.binomial(words, wer),
        words_text=words,
        errors_text=rng.binomial(words, min(1, wer + 0.05)),
        speaker_similarity=1.0 if original else np.clip(rng.normal(0.9 - wer, 0.03, len(signal)), -1, 1),
    )


def _tone(rng: np.random.Generator, path: Path, cut: float) -> None:
    """1.5 s of a chirping, softly noisy tone; `cut` dims the high part, as a lowered centroid would."""
    t = np.arange(3 * RATE // 2) / RATE
    wav = np.sin(2 * np.pi * (180 + 30 * np.sin(3 * t)) * t) + (1 - cut) * 0.4 * np.sin(2 * np.pi * 2600 * t)
    wav = (wav + 0.05 * rng.standard_normal(len(t))) * (0.6 + 0.4 * np.sin(6 * t)) * 0.3
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, wav, RATE, subtype="PCM_16")


def _render(
    rng: np.random.Generator, folder: Path, signal: pd.DataFrame, keep: list[str], cut: float, judged: bool
) -> list[dict]:
    kept = signal[signal["id"].isin(keep)]
    known = [c for c in kept if c in ("path", "codebooks", "property", "arm", "alpha", "alpha_raw", "calibrated")]
    known += [c for c in kept if c in ("part", "plan", "rounding", "budget", "bits_mean")]
    known += [c for c in kept if c in ("map", "mode", "removed", "removed_dims", "seed")]
    rows = []
    for row in kept.to_dict("records"):
        file = f"{row['condition']}/{row['id']}.flac"
        _tone(rng, folder / file, cut)
        rows.append(
            {"id": row["id"], "condition": row["condition"], "file": file, "judged": judged}
            | {k: row[k] for k in known}
        )
    return rows


def _sae_scores(rng: np.random.Generator, clips: pd.DataFrame, run: Path) -> None:
    rows, details = [], {}
    edges = np.linspace(-5, 0, 26)
    for (sae, l0), seed in product(SAES.items(), (0, 1)):
        frames = rng.integers(60, 120, len(clips))
        total = frames * WIDTH * rng.gamma(20, 1 / 20, len(clips))
        rows.append(
            clips[["id", "speaker", "split"]].assign(
                sae=sae,
                seed=seed,
                variant=sae,
                d_in=WIDTH,
                d_sae=FEATURES,
                frames=frames,
                l0_sum=np.round(frames * l0),
                sq_error=total * rng.normal(0.14, 0.02, len(clips)),
                sq_total=total,
            )
        )
        counts = np.histogram(rng.normal(-1.4, 0.5, FEATURES).clip(-5, 0), edges)[0].tolist()
        density = {"log10_edges": edges.tolist(), "counts": counts}
        details.setdefault(sae, {})[str(seed)] = {"frames": 900, "dead_share": 0.02 * seed, "density": density}
        steps = np.arange(1, 21)
        fvu = 0.14 + 0.8 * np.exp(-steps / 4)
        log = {"epoch": steps, "step": steps * 50, "loss": fvu, "fvu": fvu, "l0": l0, "dead_share": 0.0}
        write_csv(
            run / "saes" / TARGET / sae / f"seed{seed}" / "log.csv",
            pd.DataFrame({**log, "val_fvu": fvu + 0.01, "val_l0": l0}),
        )
    write_csv(run / "scores" / f"{TARGET}.sae.csv", pd.concat(rows))
    match = {"seeds": [0, 1], "features": [180, 182], "frames": 900, "cosine": 0.61, "iou": 0.4}
    match |= {
        "cosine_untrained": 0.25,
        "iou_untrained": 0.3,
        "cosine_null": 0.3,
        "cosine_p": 0.01,
        "iou_null": 0.2,
        "iou_p": 0.01,
    }
    write_json(run / "saes" / TARGET / "saes.json", {"saes": details, "cross_seed": dict.fromkeys(SAES, match)})


def _probe_scores(rng: np.random.Generator, clips: pd.DataFrame, run: Path) -> None:
    spaces = {"raw": 0.43, "pca_l0": 0.36, "pca_d": 0.42, "random_topk": 0.2, "logmel": 0.6}
    spaces |= {f"sae:{sae}": 0.42 - 0.04 * i for i, sae in enumerate(SAES)}
    for name in ("centroid", "pitch", "rms"):
        rows, ridge = [], []
        binnings = ("equal_width", "quantile", *(["semitone"] if name == "pitch" else []))
        for (space, accuracy), binning in product([*spaces.items(), ("majority", 0.06)], binnings):
            kinds = {"majority": 0.06} if space == "majority" else {"true": accuracy, "shuffled": 0.05}
            for labels, share in kinds.items():
                for k in range(5):
                    frames = rng.integers(0, 12, len(clips))
                    correct = rng.binomial(frames, share)
                    rows.append(
                        clips[["id", "speaker", "split"]].assign(
                            space=space,
                            binning=binning,
                            labels=labels,
                            **{"class": k},
                            frames=frames,
                            correct=correct,
                            within_one=correct + rng.binomial(frames - correct, 0.5),
                        )[frames > 0]
                    )
        for space, accuracy in spaces.items():
            frames = rng.integers(30, 60, len(clips))
            mean = rng.normal(3, 0.5, len(clips))
            ridge.append(
                clips[["id", "speaker", "split"]].assign(
                    space=space,
                    frames=frames,
                    sum_y=frames * mean,
                    sum_yy=frames * (mean**2 + 1),
                    sse=frames * (1 - 2 * accuracy) * 0.9,
                    lag=0,
                )
            )
        for kind, scores in (("probes", pd.concat(rows)), ("ridge", pd.concat(ridge))):
            for sae in ("", *SAES):
                here = scores["space"] == f"sae:{sae}" if sae else ~scores["space"].str.startswith("sae:")
                write_csv(run / "scores" / f"{TARGET}.{kind}.{sae + '.' * bool(sae)}{name}.csv", scores[here])


def _steered(unreached: tuple[str, ...]) -> tuple[list[Rendered], dict[str, Any]]:
    """Conditions of the steering stage, and the arms of its calibration."""
    turned = ["raw_probe", "difference_in_means", "random", *(f"{k}:{s}" for k, s in product(KINDS, SAES))]
    conditions: list[Rendered] = []
    calibration: dict[str, Any] = {}

    def arm(
        name: str, alpha: float, status: str, factor: float, harm: float, judged: bool, prop: str = "centroid"
    ) -> None:
        columns = {"property": prop, "arm": name, "alpha": alpha, "alpha_raw": alpha * 1.7, "calibrated": status}
        conditions.append((factor, harm, judged, columns))

    arm("original", NAN, "fixed", 1.0, 0.0, True)
    arm("codec_roundtrip", NAN, "fixed", 0.95, 0.0, True)
    arm("dsp_bandpass", NAN, "fixed", 0.85, 0.05, True)
    for sae in SAES:
        arm(f"sae_roundtrip:{sae}", NAN, "fixed", 0.94, 0.04, True)
    for i, name in enumerate([*turned, "dsp_lowpass"]):
        missed = name in unreached
        calibration[name] = {"alpha": 3.1 + i / 10, "calibrated": "unreached" if missed else "reached"}
        arm(name, 3.1 + i / 10, calibration[name]["calibrated"], 0.9 if missed else 0.71, 0.02 * i, True)
        for alpha in ALPHAS if name != "dsp_lowpass" else ():
            steep = 0.02 if missed else 0.08
            arm(name, alpha, "sweep", 0.95 * np.exp(-steep * alpha), 0.02 * alpha, False)
        for prop in ("pitch", "rms") if name in ("raw_probe", "sae_probe:topk") else ():
            arm(name, 2, "fixed", 0.93, 0.03, False, prop)
    return conditions, calibration


def _ablated() -> list[Rendered]:
    """Conditions of the importance stage."""
    ablations: list[Rendered] = []
    for name, mode, share in product(
        ("composition", "raw_probe", "variance", "inverted", "ablation", "random"), ("mean", "zero"), (0.25, 20 / WIDTH)
    ):
        for seed in range(4) if name == "random" else (NAN,):
            own = share == 20 / WIDTH
            columns = {"map": name, "mode": mode, "removed": share, "removed_dims": round(share * WIDTH), "seed": seed}
            judged = own and not seed >= 3
            ablations.append((0.95, share / 3 + (0.1 if name == "random" else 0), judged, columns))
    ablations.append(
        (
            0.9,
            0.7,
            True,
            {"map": "keep_critical", "mode": "mean", "removed": 42 / WIDTH, "removed_dims": 42, "seed": NAN},
        )
    )
    ablations.append((0.95, 0.0, True, {"map": "none", "mode": "none", "removed": 0.0, "removed_dims": 0, "seed": NAN}))
    return ablations


def _packed() -> list[Rendered]:
    """Conditions of the quantisation stage: what a plan costs falls with its bytes, the measured one's fastest."""
    found: list[Rendered] = []

    def plan(part: str, name: str, budget: float, cost: float, rounding: str = "mse", seed: float = NAN) -> None:
        share = 0.6 if part == "decoder" else 1.0
        size = 20e6 if name == "none" else 1e5 * share + budget * share * 6e5
        columns = {"part": part, "plan": name, "seed": seed, "rounding": rounding, "budget": budget}
        columns |= {"bits_mean": 32.0 if name == "none" else budget, "bytes": round(size)}
        columns |= {"bytes_resident": round(2e7 * share), "tokens": 100, "tokens_flipped": round(90 * min(cost, 1))}
        found.append((0.95, cost / 4, part == "codec" and not seed >= 1, columns))

    for part in ("decoder", "codec"):
        plan(part, "none", NAN, 0.0, rounding="")
        for rounding, bits in product(("mse", "nearest"), (8, 6, 4, 3, 2)):
            plan(part, "uniform", bits, 4.0 / bits**2 - 0.06, rounding)
        for budget in (4, 3):
            for name, factor in (("sensitivity", 0.02), ("guided", 0.9), ("map", 0.5), ("inverted", 0.7)):
                plan(part, name, budget, factor * 4 / budget**2)
            for seed in range(2):
                plan(part, "random", budget, 0.8 * 4 / budget**2, seed=seed)
    return found


def _times(run: Path) -> None:
    """Seconds of decodes of the conditions that were heard."""
    signal = pd.read_csv(run / "scores" / f"{TARGET}.quantisation.signal.csv").drop_duplicates("condition")
    signal = signal[(signal["part"] == "codec") & (signal["plan"] != "none")].reset_index()
    times = signal[["condition", "part", "plan", "seed", "rounding", "budget"]]
    times = times.assign(decode_seconds=0.1 + 0.01 * signal.index, decode_seconds_full=0.1)
    write_csv(run / "scores" / f"{TARGET}.quantisation.time.csv", times)


def _mapped(run: Path, val: pd.DataFrame, rng: np.random.Generator) -> None:
    """The maps, their oracle and their curves on val."""
    spread = [rng.uniform(0.05, 0.29, 20), rng.uniform(0.31, 0.69, 22), rng.uniform(0.71, 0.99, 5), [1.0]]
    values = rng.permutation(np.concatenate(spread)).tolist()
    maps = {"composition": values, "raw_probe": values[::-1], "variance": values, "ablation": values[::-1]}
    about = {"chosen": "variance", "absent": {"fisher": "model x gives no gradients"}}
    write_json(
        run / "importance" / f"{TARGET}.json",
        {"counts": COUNTS, "thresholds": {"expendable": 0.3, "critical": 0.7}, "maps": maps, **about},
    )
    parts: dict[str, list[pd.DataFrame]] = {"oracle": [], "val": []}
    for clip in val[["id", "speaker", "split"]].to_dict("records"):
        effects = pd.DataFrame({**clip, "dimension": range(WIDTH), "mel_change": np.array(values[::-1])})
        parts["oracle"].append(effects.assign(mel_change=effects["mel_change"] + rng.gamma(2, 0.1, WIDTH)))
        for i, name in enumerate(["none", "variance", *sorted(set(maps) - {"variance"}), "random", "random"]):
            for removed in (0,) if name == "none" else (0.25, 0.5):
                columns = {"map": name, "seed": i - 5 if name == "random" else NAN, "removed": removed}
                columns |= {"removed_dims": round(removed * WIDTH), "mel_distance": 3 + i * removed + rng.random() / 9}
                parts["val"].append(pd.DataFrame([clip | columns]))
    for part, rows in parts.items():
        write_csv(run / "scores" / f"{TARGET}.importance_maps.{part}.csv", pd.concat(rows))


def make_results(root: Path, wer: float = 0.2, unreached: tuple[str, ...] = ("random",), sound: bool = True) -> dict:
    """Fill `root/results/run` and `root/model`; returns the configuration that the report would get.

    wer: of the codec's own round trip. unreached: arms that miss the target shift.
    """
    rng = np.random.default_rng(0)
    run = root / "results" / "run"
    test, val = _clips(rng, "test", 4, 3), _clips(rng, "val", 3, 2)
    keep = test["id"].iloc[[0, 5]].tolist() if sound else []
    manifest = pd.concat([test, val]).assign(path="x.flac", sex="f", accent="us", seconds=2.0, text="a b c")
    write_csv(run / "manifest" / "manifest.csv", manifest.drop(columns=["hz", "words"]))
    write_csv(run / "manifest" / "rejected.csv", pd.DataFrame({"path": ["bad.wav"], "reason": ["silent"]}))
    originals = test[["id", "speaker", "split"]].assign(transcript="a b c", text="a b c", words_text=test["words"])
    write_csv(run / "scores" / "originals.csv", originals.assign(errors_text=0))
    _sae_scores(rng, pd.concat([val, test]), run)
    _probe_scores(rng, pd.concat([val, test]), run)

    def stage(name: str, conditions: list[Rendered]) -> None:
        signals, words, index = [], [], []
        for factor, harm, judged, columns in conditions:
            signal = _signal(rng, test, factor, harm, **columns)
            signals.append(signal)
            if judged:
                words.append(_words(rng, signal, test, min(0.95, wer + harm)))
                if name == "quantisation":
                    words[-1] = words[-1].assign(dnsmos=2 - harm)
            index += _render(rng, run / "renders" / TARGET / name, signal, keep, 1 - factor, judged)
        write_csv(run / "scores" / f"{TARGET}.{name}.signal.csv", pd.concat(signals))
        write_csv(run / "scores" / f"{TARGET}.{name}.words.csv", pd.concat(words))
        if index:
            write_csv(run / "renders" / TARGET / name / "index.csv", pd.DataFrame(index))

    stage(
        "codec",
        [
            (1.0, 0.0, True, {"path": "original", "codebooks": NAN}),
            (0.97, -0.05, True, {"path": "unquantized", "codebooks": NAN}),
        ]
        + [(0.95, (16 - n) / 200, True, {"path": "quantized", "codebooks": n}) for n in (16, 8)],
    )
    conditions, calibration = _steered(unreached)
    stage("steering", conditions)
    write_json(run / "steering" / TARGET / "calibration.json", {"target_hz_ratio": 0.75, "arms": calibration})

    stage("importance", _ablated())
    _mapped(run, val, rng)
    stage("quantisation", _packed())
    _times(run)
    speakers = sorted(test["speaker"].unique())
    write_json(root / "model" / "training.json", {"voices_heard": speakers[:2], "voices_unheard": speakers[2:3]})
    return {
        "run": {"name": "run", "seed": 0, "targets": [TARGET]},
        "data": {"source": "folder", "path": "resources/corpus"},
        "models": {"tiny-mimi": {"kind": "mimi", "path": str(root / "model"), "revision": None}},
        "saes": {sae: {"variant": sae, "d_sae": FEATURES} for sae in SAES},
        "probes": {"properties": ["centroid", "pitch", "rms"], "bins": 12},
        "steering": {"codebooks": 16, "shift": 0.75, "alphas": list(ALPHAS)},
        "judges": {"asr": "tiny.en", "beam": 1},
        "tables": {"bootstrap": 200, "unmeasurable_wer": 0.5},
        "report": {"clips": 2},
    }


def tables_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """The slice of the configuration that `write_tables` takes."""
    record = str(Path(config["models"]["tiny-mimi"]["path"]) / "training.json")
    sounding = [TARGET] if config["models"]["tiny-mimi"]["kind"] == "mimi" else []
    return {
        **config["tables"],
        "seed": config["run"]["seed"],
        "targets": [TARGET],
        "word_codebooks": config["steering"]["codebooks"],
        "stages": {
            "codec": {"targets": sounding, "training": {TARGET: record}},
            "saes": {"targets": [TARGET]},
            "probes": {"targets": [TARGET], "saes": {TARGET: sorted(config["saes"] or {})}, **config["probes"]},
            "steering": {"targets": sounding, "shift": config["steering"]["shift"]},
            "importance": {"targets": sounding},
            "quantisation": {"targets": sounding, "rounding": "mse"},
        },
    }


def inputs_of(run: Path, config: dict[str, Any]) -> Inputs:
    """What the rules would declare: here, all that there is."""
    return Inputs.below(run, *Path(config["models"]["tiny-mimi"]["path"]).glob("training.json"))


def make_tables(run: Path, config: dict[str, Any]) -> None:
    """Write the tables of a run made by `make_results`."""
    write_tables(inputs_of(run, config), tables_cfg(config), run / "tables")


def make_report(run: Path, config: dict[str, Any], out: Path, ours: bool = True) -> None:
    """Write its report; ours: whether the speech is that of this project."""
    path = Path(config["models"]["tiny-mimi"]["path"])
    training = {"tiny-mimi": str(path / "training.json")} if bundled(path) else {}
    facts = ROOT / "resources/corpus/corpus.json"
    corpora = {"speech": {"manifest": "manifest/manifest.csv", "facts": str(facts) if ours else None}}
    cfg = {"config": config, "training": training, "bundled_speech": ours, "corpora": corpora}
    inputs = inputs_of(run, config)
    inputs.declared.add(facts)
    write_report(inputs, tables_cfg(config) | cfg, out)
