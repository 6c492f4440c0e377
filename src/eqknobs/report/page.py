"""One page that shows, plays and qualifies the results of a run; it opens from disk without a network."""

import base64
import hashlib
import html
import io
import json
import math
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import librosa
import matplotlib
import numpy as np
import pandas as pd
import soundfile as sf
import yaml
from PIL import Image

from eqknobs.config import bundled, bundled_speech, decodes, parse_target
from eqknobs.errors import EqknobsError, counted
from eqknobs.io import atomic_path, read_csv, read_json, require_renders, unused_name
from eqknobs.report.headlines import ARMS, MAPS, PROPERTIES, SPACES, label
from eqknobs.report.tables import voices

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
MAX_PAGE = 25e6  # bytes
SOUND_BUDGET = 12e6  # bytes of MP3 in the page; clips are cut to what fits
MP3_BYTES = 9000  # a second, with its share of the spectrogram
PACKAGES = "eqknobs torch transformers snakemake scikit-learn librosa faster-whisper resemblyzer torchcrepe".split()

# Stand-ins that become CSS variables, so that one drawing serves light and dark.
INK, FAINT, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
HUES = {name: f"#0a0c{i:02x}" for i, name in enumerate("blue sky orange green purple yellow grey".split())}
VARIABLES = {INK: "ink", FAINT: "faint", GRID: "grid", PAPER: "card"} | {v: k for k, v in HUES.items()}
HUE_OF = {
    "sae_probe": "blue",
    "sae_probe_error": "sky",
    "sae_probe_renorm": "purple",
    "sae_clamp": "yellow",
    "raw_probe": "orange",
    "difference_in_means": "green",
    "random": "grey",
    "raw": "orange",
    "pca_l0": "green",
    "pca_d": "green",
    "random_topk": "grey",
    "logmel": "yellow",
    "composition": "blue",
    "variance": "green",
    "inverted": "purple",
    "keep_critical": "yellow",
}
MARKERS = dict(zip(HUE_OF, "osD^voXosD^vosD^"))
SAE_HUES = ("blue", "purple", "sky", "green")

# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED_SOURCE = (
    "kyutai's Mimi on LibriSpeech. Version 1: the blog post “Finding EQ Knobs Inside a Neural Audio Codec with Sparse "
    "Autoencoders”; rerun: its author's controlled rerun of August 2026."
)
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "codec": (
        ["", "version 1", "rerun"],
        [
            ["round trip: centroid (Hz)", "–", "1442 (original 1594)"],
            ["round trip: WER (original .019)", "–", ".018"],
            ["round trip: speaker similarity", "–", ".923"],
        ],
    ),
    "sae": (
        ["", "version 1", "rerun"],
        [
            ["ReLU + L1 + RMS, 512 → 4096", "“sparsity 0.328, 100 % alive”", "L0 2,903 of 4,096, FVU .005: not sparse"],
            ["TopK, 512 → 8192, k = 32", "–", "L0 32, FVU .142, 0 dead"],
        ],
    ),
    "probes": (
        ["", "version 1", "rerun: raw / ReLU SAE / TopK SAE"],
        [
            ["centroid, 20 bins", ".481 (“against 5 % chance”)", ".428 / .424 / .417"],
            ["centroid, ±1 bin", "–", ".805 / .800 / .814"],
            ["centroid, ridge R²", "–", ".869 / .886 / .843"],
            ["pitch", "–", ".479 / .508 / .566"],
            ["RMS", ".461", "–"],
        ],
    ),
    "sweep": (
        ["α (raw)", "centroid (Hz), version 1, one file"],
        [["0", "2611 (original 2832)"], ["1", "2463"], ["2", "2303"], ["5", "1872"], ["10", "1241"]],
    ),
    "steering": (
        ["rerun, 50 clips, matched shift", "centroid (Hz)", "WER", "speaker similarity"],
        [
            ["original", "1594", ".019", "1.000"],
            ["codec round trip", "1442", ".018", ".923"],
            ["raw-latent probe direction", "736", ".021", ".752"],
            ["SAE probe direction (ReLU)", "774", ".027", ".752"],
            ["SAE probe direction (TopK)", "794", ".027", ".622"],
            ["difference in means", "707", ".020", ".707"],
            ["band-pass 300–3000 Hz (not matched)", "1184", ".024", ".643"],
        ],
    ),
    "importance": (
        ["", "version 1", "rerun (WER / speaker similarity)"],
        [
            ["expendable / moderate / critical of 512", "285 / 220 / 7", "298 expendable"],
            ["expendable set to the mean", "never ablated", ".024 / .723"],
            ["raw-probe map, same size", "–", ".036 / .492"],
            ["298 at random, 3 seeds", "–", ".085–.152 / .261–.422"],
            ["keep only critical", "–", ".986 / −.020"],
        ],
    ),
}


# --- drawings --------------------------------------------------------------------------------------------


def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "font.size": 9.5,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "axes.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
        "figure.constrained_layout.use": True,
    }


def _svg(figure: plt.Figure, title: str) -> str:
    """An inline SVG with text as text and colours as CSS variables; ids are salted by the title."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    drawing = buffer.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.S)
    drawing = re.sub(r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"\1", drawing, count=1)
    drawing = re.sub("#0a0[bc][0-9a-f]{2}", lambda m: f"var(--{VARIABLES[m[0]]})", drawing)
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title, quote=True)}" ', 1)


def _hue(name: str, saes: list[str]) -> str:
    kind, _, sae = name.partition(":")
    if kind == "sae":
        return HUES[SAE_HUES[saes.index(sae) % len(SAE_HUES)]]
    return HUES[HUE_OF[kind]] if kind in HUE_OF else FAINT


def _figure(title: str, draw: Any, caption: str, height: float = 2.7, width: float = 4.0) -> dict[str, str]:
    with matplotlib.rc_context(_style()):
        figure, axes = plt.subplots(figsize=(width, height))
        draw(axes)
        return {"title": title, "svg": _svg(figure, title), "caption": caption}


def _legend(axes: plt.Axes, columns: int = 2) -> None:
    axes.figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK)


def _sae_figures(run_dir: Path, target: str, saes: list[str], table: pd.DataFrame) -> list[dict[str, str]]:
    logs = {
        (sae, seed): read_csv(run_dir / "saes" / target / sae / f"seed{seed}" / "log.csv")
        for sae, seed in table[["sae", "seed"]].drop_duplicates().itertuples(index=False)
    }
    details = read_json(run_dir / "saes" / target / "saes.json")["saes"]
    first = table["seed"].min()

    def curves(axes: plt.Axes, column: str) -> None:
        for (sae, seed), log in logs.items():
            log = log.dropna(subset=[f"val_{column}"])
            style = {"color": _hue(f"sae:{sae}", saes), "alpha": 1 if seed == first else 0.45}
            axes.plot(log["epoch"], log[f"val_{column}"], label=sae if seed == first else None, **style)
            train = logs[sae, seed].groupby("epoch")[column].mean()
            axes.plot(train.index, train, linestyle=":", linewidth=1.2, **style)
        axes.set_xlabel("epoch")
        _legend(axes)

    def fvu(axes: plt.Axes) -> None:
        curves(axes, "fvu")
        axes.set(ylabel="FVU", ylim=(0, None))

    def l0(axes: plt.Axes) -> None:
        curves(axes, "l0")
        axes.set(ylabel="features on in a frame (L0)", ylim=(0, None))

    def density(axes: plt.Axes) -> None:
        for sae, seeds in details.items():
            for seed, found in seeds.items():
                style = {"color": _hue(f"sae:{sae}", saes), "alpha": 1 if int(seed) == first else 0.45}
                name = sae if int(seed) == first else None
                axes.stairs(found["density"]["counts"], found["density"]["log10_edges"], label=name, lw=1.6, **style)
        axes.set(xlabel="log₁₀ of the share of frames on which a feature fires", ylabel="features")
        _legend(axes)

    fronts = {sae: run_dir / "saes" / target / sae / "grid" / "front.csv" for sae in saes}
    fronts = {sae: read_csv(path).sort_values("val_l0") for sae, path in fronts.items() if path.exists()}

    def front(axes: plt.Axes) -> None:
        for sae in saes:
            color = _hue(f"sae:{sae}", saes)
            if sae in fronts:
                axes.plot(fronts[sae]["val_l0"], fronts[sae]["val_fvu"], "o-", ms=3.5, lw=1.2, color=color)
            chosen = logs[sae, first].iloc[-1]
            axes.plot(chosen["val_l0"], chosen["val_fvu"], "*", ms=11, color=color, label=sae)
        axes.set(xlabel="features on in a frame (L0), val", ylabel="FVU, val", xscale="log", ylim=(0, None))
        _legend(axes)

    lines = "Solid: val; dotted: training; pale: second seed."
    return [
        _figure("L0 against FVU", front, "Stars: the SAEs of this run; lines: the grids they were chosen from."),
        _figure("Learning curves: FVU", fvu, lines),
        _figure("Learning curves: L0", l0, lines),
        _figure("Firing density on val", density, "Dead features are left out. Pale: second seed."),
    ]


def _probe_figures(table: pd.DataFrame, saes: list[str]) -> list[dict[str, str]]:
    figures = []
    for name in table["property"].unique():
        rows = table[(table["property"] == name) & table["binning"].isin(["quantile", "category"])]
        rows = rows[rows["split"] == "test"]
        order = ["raw", "pca_d", "pca_l0", "random_topk", *(f"sae:{s}" for s in saes), "logmel"]
        rows = rows.set_index("space").reindex([s for s in order if s in set(rows["space"])][::-1]).reset_index()

        def bars(axes: plt.Axes, rows: pd.DataFrame = rows) -> None:
            ends = np.abs(rows[["accuracy_low", "accuracy_high"]].to_numpy().T - rows["accuracy"].to_numpy())
            y = np.arange(len(rows))
            axes.barh(y, rows["accuracy"], color=[_hue(s, saes) for s in rows["space"]], height=0.62, alpha=0.85)
            axes.errorbar(rows["accuracy"], y, xerr=ends, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5)
            axes.plot(rows["majority"], y, "|", color=INK, ms=12, mew=1.6, label="majority class")
            axes.plot(rows["shuffled"], y, "x", color=INK, ms=5, mew=1.4, label="shuffled labels")
            axes.set_yticks(y, [label(s) for s in rows["space"]])
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("accuracy on test")
            _legend(axes)

        caption = (
            f"20 quantile bins; 95 % intervals over {counted(rows['speakers'].max(), 'test speaker')} and "
            f"{counted(rows['utterances'].max(), 'clip')}. Log-mel is the ceiling."
        )
        figures.append(_figure(PROPERTIES.get(name, name), bars, caption, height=2.9))
    return figures


def _steering_figures(table: pd.DataFrame, saes: list[str], shift: float) -> list[dict[str, str]]:
    rows = table[(table["property"] == "centroid") & (table["split"] == "test")]
    sweep = rows[~rows["calibrated"].isin(["reached", "unreached"]) & rows["alpha"].notna()]
    swept = [a for a, n in sweep.groupby("arm")["alpha"].nunique().items() if n > 1]
    base = rows[rows["arm"] == "codec_roundtrip"]["centroid_hz"]
    figures = []

    def lines(axes: plt.Axes, arms: list[str]) -> None:
        for arm in arms:
            line = sweep[sweep["arm"] == arm].sort_values("alpha")
            color, marker = _hue(arm, saes), MARKERS.get(arm.partition(":")[0], "o")
            axes.plot(
                line["alpha"], line["centroid_hz"], color=color, marker=marker, label=_short(arm.partition(":")[0])
            )
            if line["alpha"].nunique() > 1:
                axes.fill_between(
                    line["alpha"], line["centroid_hz_low"], line["centroid_hz_high"], color=color, alpha=0.1, lw=0
                )
        if len(base):
            axes.axhline(base.iloc[0], color=INK, lw=1, ls="--")
            axes.axhline(base.iloc[0] * shift, color=INK, lw=1, ls=":")
        axes.set(xlabel="α (standard deviations)", ylabel="centroid of the render (Hz)")
        _legend(axes)

    plain = [a for a in swept if ":" not in a]
    for sae in saes:
        arms = [a for a in swept if a.endswith(f":{sae}")]
        if arms:
            title = f"α against centroid: SAE {sae}"
            caption = "Dashed: codec round trip; dotted: target. Bands: 95 %."
            figures.append(_figure(title, lambda axes, arms=arms: lines(axes, arms), caption, height=3.0))
    if plain:
        title = "α against centroid: no SAE"
        caption = "Dashed: codec round trip; dotted: target. Bands: 95 %."
        figures.append(_figure(title, lambda axes: lines(axes, plain), caption, height=3.0))

    matched = rows[rows["calibrated"] == "reached"].sort_values("speaker_similarity")
    for measure, title in (("speaker_similarity", "Speaker similarity"), ("wer", "WER")):
        part = matched.assign(**{c: pd.to_numeric(matched[c], errors="coerce") for c in matched if c.startswith("wer")})
        part = part.dropna(subset=[measure])
        if part.empty:
            continue

        def forest(axes: plt.Axes, part: pd.DataFrame = part, measure: str = measure) -> None:
            y = np.arange(len(part))
            for i, row in zip(y, part.to_dict("records")):
                color = _hue(row["arm"], saes)
                axes.plot([row[f"{measure}_low"], row[f"{measure}_high"]], [i, i], color=color, lw=2.2)
                axes.plot(row[measure], i, MARKERS.get(row["arm"].partition(":")[0], "s"), color=color, ms=6)
            axes.set_yticks(y, [_short(arm) for arm in part["arm"]])
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel("word error rate" if measure == "wer" else "speaker similarity")

        note = f"Arms calibrated on val to one centroid; 95 % intervals, {counted(matched['clips'].max(), 'clip')}."
        height = 0.8 + 0.22 * len(part)
        figures.append(_figure(f"{title}, matched shift", forest, note, height=height))
    return figures


def _short(arm: str) -> str:
    kind, _, sae = arm.partition(":")
    short = {
        "sae_probe": "SAE direction",
        "sae_probe_error": "SAE direction + error",
        "sae_probe_renorm": "SAE dir., re-normed",
        "sae_clamp": "SAE clamp",
        "raw_probe": "raw-latent direction",
        "dsp_lowpass": "low-pass filter",
    }.get(kind, label(kind))
    return f"{short} ({sae})" if sae else short


def _importance_figures(importance: dict[str, Any], table: pd.DataFrame) -> list[dict[str, str]]:
    values = np.sort(np.asarray(importance["maps"]["composition"]))[::-1]

    def ranked(axes: plt.Axes) -> None:
        bands = [(0.7, 9, "orange", "critical"), (0.3, 0.7, "yellow", "moderate"), (-1, 0.3, "sky", "expendable")]
        x = np.arange(len(values))
        for low, high, hue, name in bands:
            part = (values >= low) & (values < high)
            axes.fill_between(x, np.where(part, values, 0), step="mid", color=HUES[hue], label=f"{name}: {part.sum()}")
        axes.axhline(0.3, color=INK, lw=0.8, ls=":")
        axes.axhline(0.7, color=INK, lw=0.8, ls=":")
        axes.set(xlabel="latent dimension, by rank", ylabel="importance / maximum")
        _legend(axes)

    figures = [
        _figure("Importance map (SAE × probe)", ranked, "Thresholds .3 and .7, as in version 1."),
    ]
    untouched = table[table["map"] == "none"]
    for mode in [mode for mode in table["mode"].unique() if mode != "none"]:
        for measure, unit in (("mel_distance", "mel distance (dB)"), ("latent_error", "latent error (share)")):
            rows = table[(table["mode"] == mode) & (table["map"] != "keep_critical")]

            def curves(axes: plt.Axes, rows: pd.DataFrame = rows, measure: str = measure, unit: str = unit) -> None:
                sets = rows[rows["map"] == "random"].groupby("removed")[measure]
                if len(sets):
                    spread = sets.agg(["min", "max", "mean"])
                    axes.fill_between(spread.index, spread["min"], spread["max"], color=HUES["grey"], alpha=0.25, lw=0)
                    axes.plot(
                        spread.index, spread["mean"], color=HUES["grey"], label=f"random sets ({sets.size().max()})"
                    )
                for name in [m for m in rows["map"].unique() if m != "random"]:
                    line = rows[rows["map"] == name].groupby("removed")[measure].mean()
                    marker = MARKERS.get(name, "o")
                    axes.plot(line.index, line, color=_hue(name, []), marker=marker, label=label(name, MAPS))
                for value in untouched[measure]:
                    axes.axhline(value, color=INK, lw=1, ls="--")
                axes.set(xlabel="share of dimensions removed", ylabel=unit, ylim=(0, None))
                _legend(axes)

            title = f"Ablation to {'the mean' if mode == 'mean' else mode}: {unit}"
            figures.append(
                _figure(
                    title,
                    curves,
                    "Grey band: smallest to largest of the random sets; dashed: nothing removed.",
                    height=2.9,
                )
            )
    return figures


# --- sound -----------------------------------------------------------------------------------------------


def _picture(wav: np.ndarray, rate: int, peak: float) -> bytes:
    """Mel spectrogram, 80 dB below the original's peak, as a JPEG."""
    power = librosa.feature.melspectrogram(y=wav, sr=rate, n_fft=1024, hop_length=rate // 100, n_mels=96)
    level = np.clip((10 * np.log10(power + 1e-12) - peak) / 80 + 1, 0, 1)
    pixels = (matplotlib.colormaps["magma"](level[::-1])[..., :3] * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((min(640, level.shape[1] * 2), 144)).save(buffer, "JPEG", quality=72)
    return buffer.getvalue()


def _peak(wav: np.ndarray, rate: int) -> float:
    power = librosa.feature.melspectrogram(y=wav, sr=rate, n_fft=1024, hop_length=rate // 100, n_mels=96)
    return float(10 * np.log10(power.max() + 1e-12))


def _mp3(wav: np.ndarray, rate: int) -> bytes:
    """Mono MP3 of about 65 kbit/s, which every browser and phone plays."""
    level = 0.65 if rate <= 24000 else 0.9  # of the bitrates that MPEG offers at this rate
    buffer = io.BytesIO()
    sf.write(buffer, wav, rate, "MPEG_LAYER_III", format="MP3", bitrate_mode="CONSTANT", compression_level=level)
    return buffer.getvalue()


class _Media:
    """Sounds and pictures of the page, each once, however many conditions share it."""

    def __init__(self) -> None:
        self.items: dict[str, str] = {}

    def add(self, kind: str, content: bytes) -> str:
        key = hashlib.blake2b(content, digest_size=8).hexdigest()
        self.items[key] = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        return key


def _plain(value: Any) -> Any:
    """A number as JSON takes it; None for a missing one."""
    return None if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _report_clips(index: pd.DataFrame, count: int) -> list[str]:
    """The clips rendered under most conditions: those that the α sweep was kept of."""
    return index["id"].value_counts(sort=False).sort_values(ascending=False, kind="stable").index[:count].tolist()


def _players(
    run_dir: Path,
    target: str,
    signal: pd.DataFrame,
    words: pd.DataFrame,
    clips: list[str],
    seconds: float,
    media: _Media,
) -> list[dict[str, Any]]:
    """What the page's script plays: clip -> property -> arm -> stops of the slider."""
    folder = run_dir / "renders" / target / "steering"
    index = read_csv(folder / "index.csv")
    scores = signal.merge(words.drop(columns=["speaker", "split"]), "left", ["id", "condition"])
    scores = scores.set_index(["id", "condition"])
    texts = read_csv(run_dir / "scores" / "originals.csv").set_index("id")["transcript"].to_dict()
    players = []
    for clip in clips:
        rows = index[index["id"] == clip]
        require_renders(folder / "index.csv", rows["file"])
        sound = {row["condition"]: sf.read(folder / row["file"], dtype="float32") for row in rows.to_dict("records")}
        reference = rows.loc[rows["arm"] == "original", "condition"]
        peak = _peak(*sound[reference.iloc[0] if len(reference) else rows["condition"].iloc[0]])

        def stop(row: dict[str, Any], sound: dict = sound, peak: float = peak, clip: str = clip) -> dict[str, Any]:
            wav, rate = sound[row["condition"]]
            wav = wav[: int(seconds * rate)]
            score = scores.loc[(clip, row["condition"])].to_dict()
            kept = ("centroid_hz", "loudness_change_db", "mel_distance", "f0_error_cents", "speaker_similarity")
            return {
                "alpha": _plain(row.get("alpha")),
                "calibrated": _plain(row.get("calibrated")),
                "sound": media.add("audio/mpeg", _mp3(wav, rate)),
                "picture": media.add("image/jpeg", _picture(wav, rate, peak)),
                "transcript": _plain(score.get("transcript")),
                **{name: _plain(score.get(name)) for name in kept},
            }

        groups = []
        for name, part in rows[~rows["arm"].isin(["original", "codec_roundtrip"])].groupby("property", sort=False):
            arms = []
            for arm, stops in part.groupby("arm", sort=False):
                stops = stops.sort_values("alpha", na_position="first").to_dict("records")
                unit = " kHz" if arm == "dsp_lowpass" else ""  # its α is the cutoff
                arms.append({"arm": arm, "label": label(arm), "unit": unit, "stops": [stop(row) for row in stops]})
            arms.sort(key=lambda arm: (len(arm["stops"]) < 2, list(ARMS).index(arm["arm"].partition(":")[0])))
            groups.append({"property": name, "label": PROPERTIES.get(name, name), "arms": arms})
        references = {
            kind: stop(rows[rows["arm"] == arm].iloc[0].to_dict())
            for kind, arm in (("original", "original"), ("codec", "codec_roundtrip"))
            if (rows["arm"] == arm).any()
        }
        groups.sort(key=lambda group: group["property"] != "centroid")
        length = max(len(wav) / rate for wav, rate in sound.values())
        players.append(
            {
                "clip": clip,
                "speaker": str(signal.loc[signal["id"] == clip, "speaker"].iloc[0]),
                "cut": length > seconds,
                "seconds": round(min(length, seconds), 2),
                "text": _plain(texts.get(clip)),
                "references": references,
                "groups": groups,
            }
        )
    return players


def _copy_sounds(run_dir: Path, targets: list[str], clips: dict[str, list[str]], out_dir: Path) -> list[dict[str, Any]]:
    """Copy the report clips' FLACs to out_dir/audio; returns [{target, stage, rows: [{condition, files}]}]."""
    listed, names = [], set()
    with atomic_path(out_dir / "audio") as folder:
        folder.mkdir()
        for target in targets:
            for stage in ("codec", "steering", "importance"):
                source = run_dir / "renders" / target / stage
                if not (source / "index.csv").exists():
                    continue
                index = read_csv(source / "index.csv")
                index = index[index["id"].isin(clips[target])]
                require_renders(source / "index.csv", index["file"])
                rows = []
                for condition, files in index.groupby("condition", sort=False):
                    links = []
                    for row in files.to_dict("records"):
                        name = unused_name(f"{target}/{stage}/{row['file']}".replace("/", "__"), names)
                        (folder / name).write_bytes((source / row["file"]).read_bytes())
                        links.append({"clip": row["id"], "href": f"audio/{name}"})
                    rows.append({"condition": condition, "files": links})
                listed.append({"target": target, "stage": stage, "rows": rows})
    return listed


# --- the page --------------------------------------------------------------------------------------------


def _cell(row: dict[str, Any], name: str, digits: int = 3) -> tuple[str, str]:
    """(value, interval) as text; what the table says instead of a number goes through as it is."""
    value = row.get(name)
    if value is None or pd.isna(value):
        return "–", ""

    def shown(number: Any) -> str:
        return f"{float(number):.{digits}f}".replace("-", "−")

    try:
        text = shown(value)
    except ValueError:  # "unmeasurable"
        return str(value), ""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return text, "" if low is None or pd.isna(low) or pd.isna(high) else f"[{shown(low)}, {shown(high)}]"


def _rows(table: pd.DataFrame, columns: dict[str, Any]) -> dict[str, Any]:
    """{head, rows} for the template. columns: heading -> column, (column, digits) or a function of the row."""
    body = []
    for row in table.to_dict("records"):
        cells = []
        for column in columns.values():
            if callable(column):
                cells.append((column(row), ""))
            elif isinstance(column, tuple):
                cells.append(_cell(row, *column))
            else:
                value = row[column]
                text = "–" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
                cells.append((text, ""))
        body.append(cells)
    return {"head": list(columns), "rows": body}


def _clips(row: dict[str, Any]) -> str:
    return f"{row.get('clips', row.get('utterances'))} / {row['speakers']}"


def _strength(row: dict[str, Any]) -> str:
    return _cell(row, "alpha", 2)[0] + (" kHz" if row["arm"] == "dsp_lowpass" else "")


def _tables(tables: dict[str, pd.DataFrame], target: str) -> dict[str, Any]:
    part = {name: table[table["target"] == target] for name, table in tables.items()}
    steering = part["steering"]
    centroid = steering[steering["property"] == "centroid"] if len(steering) else steering
    matched = centroid[centroid["calibrated"] != "sweep"].sort_values("rank", na_position="last", kind="stable")
    importance = part["importance_ablation"]
    judged = importance[importance["speaker_similarity"].notna()]
    steered = {
        "arm": lambda r: label(r["arm"]),
        "α": _strength,
        "α raw": ("alpha_raw", 2),
        "shift": "calibrated",
        "centroid (Hz)": ("centroid_hz", 0),
        "f0 error (cents)": ("f0_error_cents", 1),
        "loudness (dB)": ("loudness_change_db", 1),
        "mel (dB)": ("mel_distance", 2),
        "clips / speakers": _clips,
    }
    worded = {"WER": ("wer", 3), "WER, text": ("wer_text", 3), "speaker similarity": ("speaker_similarity", 3)}
    first = {"rank": "rank", "arm": steered["arm"], "shift": "calibrated", "α": _strength}
    return {
        "codec": _rows(
            part["codec"],
            {
                "path": lambda r: (
                    (r["path"] if pd.isna(r["sae"]) else f"SAE {r['sae']}")
                    + ("" if pd.isna(r["codebooks"]) else f", {counted(int(r['codebooks']), 'codebook')}")
                ),
                "voices": "voices",
                **worded,
                "centroid r, clips": ("centroid_correlation_clip", 3),
                "centroid r, frames": ("centroid_correlation_frame", 3),
                "mel (dB)": ("mel_distance", 2),
                "tokens changed": ("token_flip_rate", 3),
                "clips / speakers": _clips,
            },
        ),
        "sae": _rows(
            part["sae"],
            {
                "SAE": "sae",
                "seed": "seed",
                "d": lambda r: f"{r['d_in']} → {r['d_sae']}",
                "split": "split",
                "L0": ("l0", 1),
                "FVU": ("fvu", 3),
                "cosine": ("cosine", 3),
                "dead share": ("dead_share", 3),
                "clips / speakers": _clips,
            },
        ),
        "probes": _rows(
            part["probes"][part["probes"]["split"] == "test"],
            {
                "property": lambda r: PROPERTIES.get(r["property"], r["property"]),
                "binning": lambda r: r["binning"].replace("_", " "),
                "space": lambda r: label(r["space"]),
                "accuracy": ("accuracy", 3),
                "balanced": ("balanced_accuracy", 3),
                "±1 bin": ("within_one_bin", 3),
                "ridge R²": ("ridge_r2", 3),
                "majority": ("majority", 3),
                "shuffled": ("shuffled", 3),
                "clips / speakers": _clips,
            },
        ),
        "matched": _rows(
            matched, first | {"centroid (Hz)": ("centroid_hz", 0)} | worded | dict(list(steered.items())[5:])
        ),
        "sweep": _rows(centroid[centroid["calibrated"] == "sweep"], steered),
        "others": _rows(
            steering[steering["property"] != "centroid"],
            {"property": lambda r: PROPERTIES.get(r["property"], r["property"]), **steered},
        ),
        "importance": _rows(
            judged,
            {
                "map": lambda r: label(r["map"], MAPS) + ("" if pd.isna(r["seed"]) else f" #{r['seed']:g}"),
                "set to": "mode",
                "removed": lambda r: f"{r['removed_dims']:g}",
                **{k: v for k, v in worded.items() if k != "WER, text"},
                "mel (dB)": ("mel_distance", 2),
                "latent error": ("latent_error", 3),
                "clips / speakers": _clips,
            },
        ),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _bundled_models(models: dict[str, dict[str, Any]], known_speech: bool, speakers: set[str]) -> list[dict[str, Any]]:
    """[{name, heard, speech}] of the models that come with this project: which of the speakers each heard in its
    training, and that speech in words. Its training.json names speakers of the bundled corpus: of another corpus
    (known_speech False) it says nothing."""
    found = []
    for name, model in models.items():
        if bundled(model["path"]):
            record = Path(model["path"]) / "training.json"
            training = read_json(record) if record.is_file() else {}
            heard = [who for who, kind in voices(model).items() if kind == "heard" and who in speakers]
            speech = training.get("config", {}).get("description", "")
            found.append({"name": name, "heard": sorted(heard) if known_speech else [], "speech": speech})
    return found


def write_report(run_dir: Path, targets: list[str], cfg: dict[str, Any], out_dir: Path) -> None:
    """Write `out_dir/index.html` (self-contained) and `out_dir/audio/` (lossless sound files it links to).

    run_dir: a results folder with its tables. cfg: the whole configuration. Raises EqknobsError if the page would be
    larger than 25 MB.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    names = ("codec", "sae", "probes", "steering", "importance_ablation")
    tables = {name: read_csv(run_dir / "tables" / f"{name}.csv") for name in names}
    summary = read_json(run_dir / "tables" / "summary.json")
    sounding = [target for target in targets if decodes(cfg, target)]
    indices = {t: read_csv(run_dir / "renders" / t / "steering" / "index.csv") for t in sounding}
    clips = {t: _report_clips(index, cfg["report"]["clips"]) for t, index in indices.items()}
    stops = sum(int(index["id"].isin(clips[t]).sum()) for t, index in indices.items())
    seconds = SOUND_BUDGET / MP3_BYTES / max(stops, 1)
    media, sections = _Media(), []
    for target in targets:
        part = {name: table[table["target"] == target] for name, table in tables.items()}
        saes = part["sae"]["sae"].unique().tolist()
        figures = {
            "sae": _sae_figures(run_dir, target, saes, part["sae"]) if saes else [],
            "probes": _probe_figures(part["probes"], saes),
        }
        players: list[dict[str, Any]] = []
        if target in sounding:
            shift = cfg["steering"]["shift"]
            figures["steering"] = _steering_figures(part["steering"], saes, shift)
            importance = read_json(run_dir / "importance" / f"{target}.json")
            figures["importance"] = _importance_figures(importance, part["importance_ablation"])
            signal = read_csv(run_dir / "scores" / f"{target}.steering.signal.csv")
            words = read_csv(run_dir / "scores" / f"{target}.steering.words.csv")
            players = _players(run_dir, target, signal, words, clips[target], seconds, media)
        sections.append(
            {
                "name": target,
                "sounds": target in sounding,
                "summary": summary["targets"][target],
                "saes": bool(saes),
                "cross_seed": read_json(run_dir / "saes" / target / "saes.json")["cross_seed"] if saes else {},
                "tables": _tables(tables, target),
                "figures": figures,
                "players": players,
            }
        )
    used = {parse_target(target)[0] for target in targets}
    models = {name: model for name, model in cfg["models"].items() if name in used}
    manifest = read_csv(run_dir / "manifest" / "manifest.csv")
    corpus = manifest.groupby("split").agg(clips=("id", "size"), speakers=("speaker", "nunique"), s=("seconds", "sum"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.j2").render(
        run=cfg["run"]["name"],
        cfg=cfg,
        models=models,
        config_text=yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True, width=100),
        sections=sections,
        corpus=corpus.reset_index().to_dict("records"),
        rejected=len(read_csv(run_dir / "manifest" / "rejected.csv")),
        bundled_speech=bundled_speech(cfg),
        bundled_models=_bundled_models(models, bundled_speech(cfg), set(manifest["speaker"])),
        counted=counted,
        published=PUBLISHED,
        published_source=PUBLISHED_SOURCE,
        spaces=SPACES,
        versions=_versions(),
        files=_copy_sounds(run_dir, sounding, clips, out_dir),
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
        players=_script_json({s["name"]: s["players"] for s in sections}),
        media=_script_json(media.items),
    )
    if len(page.encode()) > MAX_PAGE:
        raise EqknobsError(f"report: the page has {len(page.encode()) / 1e6:.0f} MB, more than 25; lower report.clips")
    with atomic_path(out_dir / "index.html") as path:
        path.write_text(page, encoding="utf-8")


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
