"""The tables and the summary once more, from the raw scores by plain pandas, without `eqknobs.report.tables`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import matthews_corrcoef

from eqknobs.evidence.stats import bootstrap_weights
from eqknobs.io import read_json
from eqknobs.packing.files import data_bytes

RATIOS = {
    "wer": ("errors", "words"),
    "wer_text": ("errors_text", "words_text"),
    "latent_error": ("latent_sq_error", "latent_sq_total"),
    "fvu": ("sq_error", "sq_total"),
    "cosine": ("cosine_sum", "frames"),
    "token_flip_rate": ("tokens_flipped", "tokens"),
    "l0": ("l0_sum", "frames"),
    "nll": ("nats", "tokens"),
    "accuracy": ("correct", "frames"),
    "deletions": ("deleted", "words_text"),
    "within_one_bin": ("within_one", "frames"),
}
MEANS = ("speaker_similarity", "mel_distance", "centroid_hz", "centroid_correlation_frame", "f0_error_cents")
MEANS += ("loudness_change_db", "dnsmos")
KEYS = {
    "codec": ["path", "codebooks", "voices", "split", "sae"],
    "steering": ["property", "arm", "alpha", "alpha_raw", "calibrated", "split"],
    "importance": ["map", "mode", "removed", "removed_dims", "seed", "split"],
    "importance_maps": ["map", "split"],
    "quantisation": ["part", "plan", "seed", "rounding", "budget", "split"],
    "quantisation_equal_quality": ["part", "plan", "split"],
    "sae": ["sae", "seed", "split"],
    "probes": ["property", "space", "binning", "split"],
}
TEXT = {"id": str, "speaker": str}


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=TEXT, keep_default_na=True)


def sums(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Numerator and denominator by clip, sorted by id; clips without the measure left out."""
    if measure in RATIOS:
        top, bottom = (rows[c] for c in RATIOS[measure])
    else:
        top, bottom = rows[measure], rows[measure] * 0 + 1
    part = pd.DataFrame({"id": rows["id"], "speaker": rows["speaker"], "top": top, "bottom": bottom}).dropna()
    return part.groupby(["id", "speaker"], as_index=False).sum().sort_values("id")


def estimate(rows: pd.DataFrame, measure: str, cfg: dict[str, Any]) -> tuple[float, float, float]:
    """Value and 95 % interval; the draws cover all clips, those without the measure weigh nothing."""
    part = sums(rows, measure)
    if part.empty:
        return (math.nan,) * 3
    everyone = rows[["id", "speaker"]].drop_duplicates().sort_values("id")
    part = everyone.merge(part, "left", ["id", "speaker"]).fillna({"top": 0, "bottom": 0})
    weights = bootstrap_weights(part["speaker"].tolist(), cfg["bootstrap"], cfg["seed"])
    with np.errstate(invalid="ignore"):
        draws = (weights @ part["top"].to_numpy(float)) / (weights @ part["bottom"].to_numpy(float))
    return (part["top"].sum() / part["bottom"].sum(), *np.nanpercentile(draws, [2.5, 97.5]))


def compared(a: pd.DataFrame, b: pd.DataFrame, measure: str, cfg: dict[str, Any]) -> dict[str, float]:
    both = sums(a, measure).merge(sums(b, measure), on=["id", "speaker"])
    both = both[(both["bottom_x"] > 0) & (both["bottom_y"] > 0)]
    weights = bootstrap_weights(both["speaker"].tolist(), cfg["bootstrap"], cfg["seed"])
    x, y = ((weights @ both[f"top_{s}"]) / (weights @ both[f"bottom_{s}"]) for s in "xy")
    value_a, value_b = (both[f"top_{s}"].sum() / both[f"bottom_{s}"].sum() for s in "xy")
    low, high = np.percentile(x - y, [2.5, 97.5])
    tail = min(((x - y) <= 0).sum(), ((x - y) >= 0).sum())
    return {
        "value_a": value_a,
        "value_b": value_b,
        "difference": value_a - value_b,
        "low": low,
        "high": high,
        "p": min(1.0, 2 * (tail + 1) / (cfg["bootstrap"] + 1)),
        "clips": len(both),
        "speakers": both["speaker"].nunique(),
    }


def raw_scores(run: Path, target: str, stage: str, model: dict[str, Any]) -> pd.DataFrame:
    """Per-clip rows that the table of a stage is made of."""
    scores = run / "scores"
    if stage == "sae":
        return read(scores / f"{target}.sae.csv")
    if stage == "probes":
        parts = [
            read(path).assign(property=path.stem.rsplit(".", 1)[1])
            for path in sorted(scores.glob(f"{target}.probes.*.csv"))
        ]
        return pd.concat(parts)
    rows = read(scores / f"{target}.{stage}.signal.csv")
    words = read(scores / f"{target}.{stage}.words.csv")
    words = words.drop(columns=["speaker", "split", "transcript"])
    rows = rows.merge(words, how="left", on=["id", "condition"])
    training = Path(model["path"]) / "training.json"
    known = json.loads(training.read_text()) if training.is_file() else {}
    heard, unheard = (set(map(str, known.get(k) or [])) for k in ("voices_heard", "voices_unheard"))
    rows["voices"] = ["heard" if s in heard else "unheard" if s in unheard else "unknown" for s in rows["speaker"]]
    return rows


def pick(rows: pd.DataFrame, row: dict[str, Any], keys: list[str]) -> pd.DataFrame:
    """The raw rows that belong to a table row; numbers have nine digits in both files."""
    for key in keys:
        if key not in rows:
            continue
        value = row[key]
        if pd.isna(value):
            rows = rows[rows[key].isna()]
        elif isinstance(value, str):
            rows = rows[rows[key] == value]
        else:
            rows = rows[np.isclose(rows[key], value, rtol=1e-8, atol=1e-12)]
    return rows


def same(found: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, str) or isinstance(found, str):
        assert found == wanted, f"{where}: {found!r}, recomputed {wanted!r}"
    else:
        found, wanted = (math.nan if v is None else float(v) for v in (found, wanted))
        assert np.isclose(found, wanted, rtol=1e-6, atol=1e-9, equal_nan=True), f"{where}: {found}, recomputed {wanted}"


def round_trip_wer(run: Path, target: str, cfg: dict[str, Any], model: dict[str, Any]) -> tuple[float, pd.DataFrame]:
    rows = raw_scores(run, target, "codec", model)
    rows = rows[(rows["path"] == "quantized") & (rows["codebooks"] == cfg["word_codebooks"])]
    return rows["errors"].sum() / rows["words"].sum(), rows


def _packed_cells(run: Path, target: str, row: dict[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    """What only the table of packed codecs has in a row; rows: its scores."""
    times = pick(read(run / "scores" / f"{target}.quantisation.time.csv"), row, KEYS["quantisation"])
    ratio = (times["decode_seconds"] / times["decode_seconds_full"]).item() if len(times) else math.nan
    return {
        **{name: rows[name].unique().item() for name in ("bits_mean", "bytes", "bytes_resident")},
        "heard_clips": rows["speaker_similarity"].notna().sum(),
        "decode_ratio": 1.0 if row["plan"] == "none" else ratio,
    }


def curve_of(rows: pd.DataFrame, plan: str, measure: str) -> pd.DataFrame:
    """[clips, bytes] of a measure along a plan's curve, by the rounding that mixed plans share; random plans pooled."""
    rows = rows[rows["rounding"] == rows.loc[rows["plan"] == "sensitivity", "rounding"].iloc[0]]
    uniform = rows[rows["plan"] == "uniform"]
    ends = uniform[uniform["bytes"].isin([uniform["bytes"].min(), uniform["bytes"].max()])]
    rows = uniform if plan == "uniform" else pd.concat([rows[rows["plan"] == plan], ends])
    rows = rows.assign(bytes=rows.groupby("budget")["bytes"].transform("mean"))
    return rows.pivot_table(index="id", columns="bytes", values=measure).dropna()


def check_equal_quality(run: Path, target: str, model: dict[str, Any]) -> int:
    """Recompute the bytes that each plan needs from clips; returns how many cells were compared."""
    table = read(run / "tables" / "quantisation_equal_quality.csv")
    raw, cells = raw_scores(run, target, "quantisation", model), 0
    for row in table[table["target"] == target].to_dict("records"):
        rows = raw[raw["part"] == row["part"]]
        full = rows[rows["plan"] == "none"].set_index("id")
        needed = []
        for name, measure, within, sign in (
            ("mel", "mel_distance", 0.2, 1),
            ("similarity", "speaker_similarity", 0.02, -1),
        ):
            values = curve_of(rows, row["plan"], measure)
            wanted = math.nan
            if len(values.columns):
                loss = (sign * values.sub(full.loc[values.index, measure], axis=0)).mean().sort_index(ascending=False)
                kept = loss[(loss <= within).cummin()]
                wanted = kept.index[-1] if len(kept) else math.nan
                if 0 < len(kept) < len(loss):
                    after = loss.index[len(kept)]
                    wanted = np.exp(np.interp(within, [kept.iloc[-1], loss[after]], np.log([wanted, after])))
                needed.append(wanted)
            same(row[f"bytes_needed_{name}"], wanted, f"{row['part']} {row['plan']} {name}")
        same(row["bytes_needed"], np.max(needed), f"{row['part']} {row['plan']} bytes_needed")
        same(row["bytes_full"], full["bytes"].iloc[0], f"{row['part']} bytes_full")
        known = row["bytes_needed"], row["bytes_needed_low"], row["bytes_needed_high"]
        assert not known[0] < known[1] and not known[0] > known[2]
        cells += 5
    return cells


def _probe_cells(run: Path, target: str, row: dict[str, Any], raw: pd.DataFrame) -> dict[str, Any]:
    """What only the table of probes has in a row; raw: all scores."""
    everything, mine = pick(raw, row, ["property", "binning", "split"]), pick(raw, row, KEYS["probes"])
    rows, shuffled = (mine[mine["labels"] == labels] for labels in ("true", "shuffled"))
    majority = everything[everything["labels"] == "majority"]
    by_class = rows.groupby("class")[["correct", "frames"]].sum()
    sae = row["space"].removeprefix("sae:") + "." if row["space"].startswith("sae:") else ""
    ridge = read(run / "scores" / f"{target}.ridge.{sae}{row['property']}.csv")
    ridge = pick(ridge, row, ["space", "split"])
    spread = ridge["sum_yy"].sum() - ridge["sum_y"].sum() ** 2 / ridge["frames"].sum()
    return {
        "frames": rows["frames"].sum(),
        "utterances": rows["id"].nunique(),
        "balanced_accuracy": (by_class["correct"] / by_class["frames"]).mean(),
        "majority": majority["correct"].sum() / majority["frames"].sum(),
        "shuffled": shuffled["correct"].sum() / shuffled["frames"].sum(),
        "ridge_r2": 1 - ridge["sse"].sum() / spread,
    }


def _spliced(run: Path, target: str, row: dict[str, Any]) -> pd.DataFrame | None:
    """Raw rows of one arm spliced in, or None where that was not measured."""
    file = run / "scores" / f"{target}.splicing.csv"
    if not file.is_file():
        return None
    raw = read(file).rename(columns={"errors": "errors_text", "words": "words_text"}).fillna({"sae": ""})
    return pick(raw, {**row, "sae": "" if row["sae"] != row["sae"] else row["sae"]}, ["arm", "sae", "seed", "split"])


def _auc(rows: pd.DataFrame, cfg: dict[str, Any]) -> tuple[float, float, float]:
    """AUC of `no_speech_prob` by counting pairs, draw by draw."""
    rows = rows.sort_values("id")
    other, speech = rows[rows["tokens"].isna()], rows[rows["tokens"].notna()]
    if other.empty:
        return (math.nan,) * 3
    a, b = other["no_speech_prob"].to_numpy(), speech["no_speech_prob"].to_numpy()
    won = np.sign(a[:, None] - b[None]) / 2 + 0.5
    draws = []
    drawn = (
        bootstrap_weights(own["speaker"].tolist(), cfg["bootstrap"], cfg["seed"] + place)
        for place, own in enumerate((other, speech))
    )
    for x, y in zip(*drawn):
        draws.append((won * np.outer(x, y)).sum() / np.outer(x, y).sum())
    return (won.mean(), *np.percentile(draws, [2.5, 97.5]))


def _spliced_cells(run: Path, target: str, row: dict[str, Any], cfg: dict[str, Any]) -> dict[str, float]:
    """What `sae.csv` says of an SAE spliced in."""
    rows = _spliced(run, target, {**row, "arm": "sae"})
    wanted: dict[str, float] = {}
    for measure, column in (("wer_text", "wer_text_spliced"), ("nll", "nll_spliced"), ("no_speech_auc", None)):
        values: tuple[float, float, float] = (math.nan,) * 3
        if rows is not None and len(rows):
            values = estimate(rows[rows["tokens"].notna()], measure, cfg) if column else _auc(rows, cfg)
        wanted |= {f"{column or measure}{end}": value for end, value in zip(("", "_low", "_high"), values)}
    return wanted


def check_splicing(run: Path, target: str, table: pd.DataFrame, cfg: dict[str, Any]) -> int:
    """Recompute measures and differences of `splicing.csv` from clips; returns how many cells."""
    cells = 0
    for row in table.to_dict("records"):
        rows = _spliced(run, target, row)
        whole = _spliced(run, target, {**row, "arm": "unspliced", "sae": "", "seed": -1})
        assert rows is not None and whole is not None
        speech, before = (own[own["tokens"].notna()] for own in (rows, whole))
        wanted = dict(zip(("no_speech_auc", "no_speech_auc_low", "no_speech_auc_high"), _auc(rows, cfg)))
        for measure in ("wer_text", "nll"):
            wanted |= dict(
                zip((measure, f"{measure}_low", f"{measure}_high"), estimate(speech, measure, cfg), strict=True)
            )
            against = compared(speech, before, measure, cfg)
            names = {"difference": "", "low": "_low", "high": "_high"}
            wanted |= {f"{measure}_difference{end}": against[name] for name, end in names.items()}
        for key, value in wanted.items():
            same(row[key], value, f"splicing {row['arm']} {row['sae']} {row['seed']} {key}")
            cells += 1
    return cells


def check_hallucinations(run: Path, model: str, table: pd.DataFrame, cfg: dict[str, Any]) -> int:
    """Recompute measures of `hallucination.csv` and the comparisons of the summary from clips; returns how many
    cells."""
    raw = read(run / "scores" / f"{model}.hallucination.csv")
    speech = raw["domain"].isin(["clean", "quiet", "noisy"])
    raw = raw.assign(hallucination_rate=raw["written"], detection_rate=raw["detected"], speech=speech)
    raw["detection_rate_speech"] = raw["detected"]
    measures = {False: ("hallucination_rate", "detection_rate", "no_speech_prob")}
    measures[True] = ("wer_text", "deletions", "detection_rate_speech")
    cells = 0
    for row in table.to_dict("records"):
        rows = pick(raw, row, ["arm", "layer", "k", "alpha", "split"])
        rows = rows if row["domain"] == "all" else rows[rows["domain"] == row["domain"]]
        for spoken, names in measures.items():
            for name in names:
                found = estimate(rows[rows["speech"] == spoken], name, cfg)
                for end, value in zip(("", "_low", "_high"), found):
                    same(row[f"{name}{end}"], value, f"hallucination {row['arm']} {row['domain']} {name}{end}")
                    cells += 1
        assert row["clips"] == rows["id"].nunique() and row["speakers"] == rows["speaker"].nunique()
    facts = json.loads((run / "tables" / "summary.json").read_text())["targets"][model]
    test = raw[raw["split"] == "test"]
    for record in facts["comparisons"]:
        if record["family"].startswith("hallucination, "):
            own = test[test["speech"] == (record["measure"] == "wer_text")]
            wanted = compared(*(own[own["arm"] == record[side]] for side in "ab"), record["measure"], cfg)
            for key, value in wanted.items():
                same(record[key], value, f"{record['family']} {record['b']} {key}")
                cells += 1
    return cells


def check_table(run: Path, target: str, stage: str, cfg: dict[str, Any], model: dict[str, Any], words: bool) -> int:
    """Recompute every cell of one table; returns how many were compared."""
    name = {"importance": "importance_ablation"}.get(stage, stage)
    table = read(run / "tables" / f"{name}.csv")
    table = table[table["target"] == target]
    raw = raw_scores(run, target, stage, model)
    details = json.loads((run / "saes" / target / "saes.json").read_text())["saes"]
    cells = 0
    for row in table.to_dict("records"):
        keys = KEYS[stage]
        rows = pick(raw, row, keys)
        where = f"{name} {[row[k] for k in keys]}"
        wanted: dict[str, Any] = {}
        if stage == "probes":
            rows = rows[rows["labels"] == "true"]
            wanted |= _probe_cells(run, target, row, raw)
        else:
            wanted["clips"] = rows["id"].nunique()
            assert len(rows) == wanted["clips"], f"{where}: a clip appears twice"
        wanted["speakers"] = rows["speaker"].nunique()
        if stage == "codec":
            wanted["centroid_correlation_clip"] = rows["centroid_hz"].corr(rows["centroid_original_hz"])
        wanted |= _packed_cells(run, target, row, rows) if stage == "quantisation" else {}
        wanted |= _spliced_cells(run, target, row, cfg) if stage == "sae" else {}
        if stage == "sae" and row["split"] == "val":
            wanted["dead_share"] = details[row["sae"]][str(row["seed"])]["dead_share"]
        for measure in (*RATIOS, *MEANS):
            if measure in table:
                names = [measure, f"{measure}_low", f"{measure}_high"]
                wanted |= dict(
                    zip(names, estimate(rows, measure, cfg) if measure in available(rows) else [math.nan] * 3)
                )
        if not words and stage in ("steering", "importance", "quantisation"):
            judged = rows["errors"].notna().any()
            wanted |= {k: "unmeasurable" for k in wanted if k.startswith("wer") and judged}
        for key, value in wanted.items():
            if key in row:
                same(row[key], value, f"{where} {key}")
                cells += 1
        known = {*wanted, *keys, "target", "layer", "variant", "input_scale", "d_in", "d_sae", "rank", "dead_share"}
        assert set(table) <= known, f"{name}: not recomputed: {set(table) - known}"
    return cells


def check_maps(run: Path, target: str, cfg: dict[str, Any]) -> int:
    """Recompute every cell of `importance_maps.csv`, and the choice of a map; returns how many were compared."""
    table = read(run / "tables" / "importance_maps.csv")
    table = table[table["target"] == target]
    oracle, val = (read(run / "scores" / f"{target}.importance_maps.{part}.csv") for part in ("oracle", "val"))
    about = json.loads((run / "importance" / f"{target}.json").read_text())
    maps = {name: pd.Series(values) for name, values in about["maps"].items()}
    assert set(table["map"]) == set(val["map"]) and set(maps) <= set(table["map"])
    measured = val[val["map"].isin(set(maps) - {"inverted"})].groupby("map")["mel_distance"].mean()
    assert measured[about["chosen"]] == pytest.approx(measured.min(), rel=1e-8)
    effects = oracle.pivot(index="dimension", columns="id", values="mel_change")
    speakers = oracle.drop_duplicates("id").set_index("id")["speaker"]
    cells = 0
    for row in table.to_dict("records"):
        rows = val[val["map"] == row["map"]]
        clips = rows.groupby(["id", "speaker"], as_index=False)["mel_distance"].mean()
        names = ("val_mel_distance", "val_mel_distance_low", "val_mel_distance_high")
        wanted = dict(zip(names, estimate(clips, "mel_distance", cfg)))
        wanted |= {"clips": clips["id"].nunique(), "speakers": clips["speaker"].nunique()}
        wanted |= {"oracle_clips": len(speakers), "oracle_speakers": speakers.nunique()}
        wanted |= {"chosen": int(row["map"] == about["chosen"]), "split": "val"}
        names = ("spearman_oracle", "spearman_oracle_low", "spearman_oracle_high")
        if row["map"] == "none" or not len(oracle):
            wanted |= dict.fromkeys(names, math.nan)
        elif row["map"] == "random":  # of chance, so it is only known where it must lie: 1.96 / √(width − 1)
            band = 1.96 / math.sqrt(len(effects) - 1)
            assert abs(row[names[0]]) < band / 2
            assert -row[names[1]] == pytest.approx(band, rel=0.35) and row[names[2]] == pytest.approx(band, rel=0.35)
        else:
            drawn = bootstrap_weights([speakers[i] for i in effects], cfg["bootstrap"], cfg["seed"]) @ effects.T
            found = [maps[row["map"]].corr(draw, method="spearman") for _, draw in drawn.iterrows()]
            whole = maps[row["map"]].corr(effects.mean(axis=1), method="spearman")
            wanted |= dict(zip(names, (whole, *np.percentile(found, [2.5, 97.5]))))
        for key, value in wanted.items():
            same(row[key], value, f"importance_maps {row['map']} {key}")
            cells += 1
        assert set(table) <= {*wanted, *names, "target", "map"}
    return cells


def available(rows: pd.DataFrame) -> set[str]:
    return {m for m, columns in RATIOS.items() if set(columns) <= set(rows)} | (set(MEANS) & set(rows))


def holm(p: list[float]) -> list[float]:
    order = sorted(range(len(p)), key=lambda i: p[i])
    worst, corrected = 0.0, [0.0] * len(p)
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, p[i] * (len(p) - rank)))
        corrected[i] = worst
    return corrected


def on_uniforms_line(rows: pd.DataFrame, size: float, measure: str) -> pd.DataFrame:
    """Each clip's numerator and denominator on the line between uniform plans, in the logarithm of bytes; at a plan's
    own bytes (within 1 %) its values."""
    names = list(RATIOS.get(measure, (measure,)))
    values = {name: curve_of(rows, "uniform", name) for name in names}
    sizes = values[names[0]].columns.to_numpy(float)
    near = sizes[np.abs(np.log(sizes / size)).argmin()]
    size = near if abs(np.log(near / size)) <= 0.01 else size
    found = {
        name: [np.interp(np.log(size), np.log(sizes), clip) for clip in table.to_numpy()]
        for name, table in values.items()
    }
    speakers = rows.drop_duplicates("id").set_index("id")["speaker"]
    index = values[names[0]].index
    return pd.DataFrame({"id": index, "speaker": speakers[index].to_numpy(), **found})


def sides(record: dict[str, Any], run: Path, target: str, model: dict[str, Any]) -> list[pd.DataFrame]:
    """The raw rows of both sides of a comparison."""
    stage = record["family"].split(",")[0]
    if stage == "probe":
        rows = raw_scores(run, target, "probes", model)
        rows = rows[(rows["labels"] == "true") & (rows["split"] == "test") & (rows["property"] == record["property"])]
        rows = rows[rows["binning"] == record["binning"]]
        return [rows[rows["space"] == record[s]] for s in "ab"]
    if stage == "steering":
        rows = raw_scores(run, target, "steering", model)
        rows = rows[(rows["property"] == "centroid") & rows["calibrated"].isin(["reached", "fixed"])]
        return [rows[rows["arm"] == record[s]] for s in "ab"]
    if stage == "quantisation":
        rows = raw_scores(run, target, "quantisation", model)
        rows = rows[rows["part"] == record["part"]]
        mixed = rows[(rows["budget"] == record["budget"]) & (rows["plan"] != "uniform")]
        other = mixed[mixed["plan"] == record["b"]]
        if record["b"] == "uniform":
            other = on_uniforms_line(rows, record["bytes"], record["measure"])
        return [mixed[mixed["plan"] == record["a"]], other]
    rows = raw_scores(run, target, "importance", model)
    rows = rows[(rows["removed_dims"] == record["removed_dims"]) & (rows["mode"] == record["mode"])]
    return [rows[rows["map"] == record[s]] for s in "ab"]


def check_summary(run: Path, target: str, cfg: dict[str, Any], model: dict[str, Any]) -> int:
    """Recompute every number of the summary of one target; returns how many were compared."""
    facts = json.loads((run / "tables" / "summary.json").read_text())["targets"][target]
    assert set(facts) >= {
        "words",
        "sae",
        "probes",
        "steering",
        "importance",
        "importance_maps",
        "quantisation",
        "comparisons",
        "headlines",
    }
    cells = _check_codec(run, target, facts, cfg, model) if facts["words"] else 0
    for part in ("sae", "probes", "steering", "importance_maps", "quantisation"):
        name = {"quantisation": "quantisation_equal_quality"}.get(part, part)
        if part == "quantisation" and not facts[part]:
            continue
        table = read(run / "tables" / f"{name}.csv")
        for row in facts[part]:
            found = pick(table[table["target"] == target], row, KEYS[name])
            assert len(found) == 1, f"summary {part}: {row} is not one row of the table"
            for key, number in row.items():
                value = found[key].item()
                if not (number is None and pd.isna(value)):
                    same(number if not isinstance(value, str) else str(number), value, f"summary {part} {key}")
                cells += 1
    return cells + _check_comparisons(run, target, facts["comparisons"], cfg, model)


def _check_codec(run: Path, target: str, facts: dict[str, Any], cfg: dict[str, Any], model: dict[str, Any]) -> int:
    """Of a target that decodes: what its round trip costs in words, and the counts of its importance map."""
    wer, rows = round_trip_wer(run, target, cfg, model)
    value, low, high = estimate(rows, "wer", cfg)
    wanted = {
        "wer": value,
        "wer_low": low,
        "wer_high": high,
        "clips": rows["id"].nunique(),
        "speakers": rows["speaker"].nunique(),
        "codebooks": cfg["word_codebooks"],
        "threshold": cfg["unmeasurable_wer"],
        "measurable": wer <= cfg["unmeasurable_wer"],
    }
    assert set(wanted) == set(facts["words"])
    for key, number in wanted.items():
        same(facts["words"][key], number, f"words {key}")
    importance = json.loads((run / "importance" / f"{target}.json").read_text())
    values = np.array(importance["maps"]["composition"])
    counts = {"expendable": (values < 0.3).sum(), "critical": (values >= 0.7).sum(), "width": len(values)}
    counts["moderate"] = len(values) - counts["expendable"] - counts["critical"]
    assert counts == facts["importance"]
    return len(wanted) + len(counts)


def _check_comparisons(
    run: Path, target: str, comparisons: list[dict[str, Any]], cfg: dict[str, Any], model: dict[str, Any]
) -> int:
    cells = 0
    families: dict[str, list[dict[str, Any]]] = {}
    for record in comparisons:
        families.setdefault(record["family"], []).append(record)
        measure = record["measure"]
        wanted = compared(*sides(record, run, target, model), measure, cfg)
        for key, number in wanted.items():
            same(record[key], number, f"{record['family']} {record['a']} {key}")
            cells += 1
        lower = measure in ("wer", "mel_distance", "latent_error")
        sign = 0 if wanted["low"] <= 0 <= wanted["high"] else 1 if wanted["low"] > 0 else -1
        assert record["verdict"] == {0: "undecided", 1: "better", -1: "worse"}[-sign if lower else sign]
    for members in families.values():
        for record, p in zip(members, holm([r["p"] for r in members])):
            same(record["p_holm"], p, f"{record['family']} p_holm")
            assert record["compared"] == len(members)
    return cells


def check_layers(run: Path, model: str, cfg: dict[str, Any], facts: dict[str, Any]) -> int:
    """Recompute the tables of a speech LM's layers, heads and SAEs; returns how many cells were compared."""
    parts = ("lm_layers", "lm_heads.clips", "lm_saes", "lm_features")
    layers, heads, saes, features = (read(run / f"scores/{model}.{part}.csv") for part in parts)
    return (
        _check_layers(run, model, cfg, facts, layers)
        + _check_heads(run, model, heads)
        + _check_dictionaries(run, model, cfg, saes, features)
    )


def _table(run: Path, name: str, model: str) -> pd.DataFrame:
    rows = read(run / f"tables/{name}.csv")
    return rows[rows["model"] == model]


def _check_layers(run: Path, model: str, cfg: dict[str, Any], facts: dict[str, Any], raw: pd.DataFrame) -> int:
    count = 0
    for row in _table(run, "lm_layers", model).to_dict("records"):
        where = f"lm_layers {row['stream']} {row['property']} {row['lag']} {row['split']} {row['layer']}"
        rows = pick(raw[raw["labels"] == "true"], row, ["stream", "property", "lag", "split"])
        null = pick(raw[raw["labels"] == "shuffled"], row, ["stream", "property", "split"])
        own = rows.assign(correct=rows[f"residual.{row['layer']}"])
        columns = {"majority": "majority", "logmel": "logmel", "embeddings": "embeddings"}
        columns |= {"accuracy": "correct", "random_network": f"random.residual.{row['layer']}"}
        for name, column in columns.items():
            same(row[name], own[column].sum() / own["frames"].sum(), f"{where} {name}")
        same(row["shuffled"], null[f"residual.{row['layer']}"].sum() / null["frames"].sum(), f"{where} shuffled")
        same(row["frames"], own["frames"].sum(), f"{where} frames")
        count += 7
        if row["lag"] == 0 and row["split"] == "test":
            _, low, high = estimate(own, "accuracy", cfg)
            same(row["accuracy_low"], low, f"{where} low")
            same(row["accuracy_high"], high, f"{where} high")
    test = raw[(raw["labels"] == "true") & (raw["split"] == "test")]
    rivals = {"embeddings": "embeddings", "logmel": "logmel", "random_network": "random.residual.{layer}"}
    for record in facts["comparisons"]:
        if record["family"].startswith("lm layers minus"):
            rows = pick(test, record, ["stream", "property", "lag"])
            mine, other = f"residual.{record['layer']}", rivals[record["b"]].format(**record)
            found = compared(*(rows.assign(correct=rows[column]) for column in (mine, other)), "accuracy", cfg)
            for name, value in found.items():
                same(record[name], value, f"{record['family']} {name}")
    return count


def _check_heads(run: Path, model: str, raw: pd.DataFrame) -> int:
    table, count = _table(run, "lm_heads", model), 0
    true = raw[raw["labels"] == "true"]
    for row in table.to_dict("records"):
        rows, column = pick(true, row, ["stream", "property", "split"]), f"{row['layer']}.{row['head']}"
        for half, name in (("all", "accuracy"), ("a", "half_a"), ("b", "half_b")):
            part = rows[rows["half"] == half]
            same(row[name], part[column].sum() / part["frames"].sum(), f"lm_heads {column} {name}")
            count += 1
        sides = []
        for name in ("centroid", "token"):
            part = pick(true, row, ["stream", "split"])
            part = part[(part["property"] == name) & (part["half"] == "all")]
            least = part["majority"].sum() / part["frames"].sum()
            sides.append((part[column].sum() / part["frames"].sum() - least) / (1 - least))
        same(row["selectivity"], sides[0] - sides[1], f"lm_heads {column} selectivity")
    for row in _table(run, "lm_stability", model).to_dict("records"):
        mine = pick(table, row, ["stream", "property", "split"])
        same(row["spearman"], mine["half_a"].corr(mine["half_b"], method="spearman"), "lm_stability")
    order = read(run / f"scores/{model}.lm_heads.csv")
    val = table[(table["stream"] == "agent") & (table["split"] == "val")]
    assert np.allclose(order.to_dict("list")["selectivity"], val["selectivity"], rtol=1e-6), "what pruning reads"
    return count


def _check_dictionaries(run: Path, model: str, cfg: dict[str, Any], raw: pd.DataFrame, features: pd.DataFrame) -> int:
    count = 0
    for row in _table(run, "lm_saes", model).to_dict("records"):
        where = f"lm_saes {row['layer']} {row['space']} {row['stream']} {row['split']}"
        for name, value in zip(
            ("accuracy", "accuracy_low", "accuracy_high"),
            estimate(pick(raw, row, ["layer", "space", "stream", "split"]), "accuracy", cfg),
            strict=True,
        ):
            same(row[name], value, f"{where} {name}")
        own = pick(features, row, ["layer", "space"])
        alive = own[own[f"{row['stream']}_class"].notna()]
        for kind, suffix in (("class", "share"), ("shuffled", "shuffled")):
            place = alive[f"{row['stream']}_{kind}"] / alive["classes"]
            same(row[f"low_{suffix}"], (place < 1 / 3).mean(), f"{where} low {kind}")
            same(row[f"high_{suffix}"], (place >= 2 / 3).mean(), f"{where} high {kind}")
        same(row["text_tagged"], (own["text_share"] >= 0.8).mean(), f"{where} text")
        count += 8
    tagged = _table(run, "lm_features", model)
    assert len(tagged) == (features["space"] == "sae").sum()
    return count


def check_pruning(run: Path, model: str) -> None:
    """The tables of the pruning stage, counted anew from answers and nats."""
    table, far = (read(run / "tables" / f"{name}.csv") for name in ("lm_pruning", "lm_prunable"))
    answers, nats = (read(run / "scores" / f"{model}.lm_{name}.csv") for name in ("pruned_answers", "nats"))
    keys = ["granularity", "order", "share", "repair", "seed"]
    rows, spoken = table[table["model"] == model].set_index(keys), dict(list(answers.groupby(keys)))
    assert len(rows) == nats.groupby(keys).ngroups and set(spoken) == set(rows[rows["answers"] > 0].index)
    intact = answers[answers["granularity"] == "intact"]
    for key, clips in nats.groupby(keys):
        row = rows.loc[key]
        assert row["clips"] == len(clips) and np.isclose(row["nll_audio"], clips["nll_audio"].mean(), rtol=1e-6)
        if key not in spoken:
            assert row["answers"] == 0 and np.isnan(row["wer_monologue"])
            continue
        mine = spoken[key]
        base = intact[intact["draw"].isin(mine["draw"])]
        assert row["answers"] == len(mine) and row["prompts"] == mine["id"].nunique()
        for name, top, bottom in PRUNED_RATIOS:
            value = mine[top].sum() / mine[bottom].sum()
            assert np.isclose(row[name], value, rtol=1e-6, equal_nan=True), (key, name)
            if f"delta_{name}" in row and key[0] != "intact":
                apart = value - base[top].sum() / base[bottom].sum()
                assert np.isclose(row[f"delta_{name}"], apart, atol=1e-7, equal_nan=True), (key, name)
        for name, column in (("similarity_intact", "similarity_intact"), ("silent_share", "silent"), ("f0_hz", "f0")):
            assert np.isclose(row[name], mine[column].mean(), rtol=1e-6, equal_nan=True), (key, name)
    for row in far[far["model"] == model].to_dict("records"):
        shares = sorted(k[2] for k in spoken if k[:2] == (row["granularity"], row["order"]) and k[3] == row["repair"])
        assert row["largest_share"] in (0, *shares) and row["tested"] == len(set(shares))
        assert (row["bound"] <= 0.05) == (row["largest_share"] > 0) or np.isnan(row["bound"])
        if row["order"] not in ("random", "random_layers") and row["largest_share"]:
            found = rows.loc[(row["granularity"], row["order"], row["largest_share"], row["repair"], 0)]
            assert np.isclose(found[f"delta_{row['measure']}_high"], row["bound"], atol=1e-7)


PRUNED_RATIOS = (
    ("wer_monologue", "errors_monologue", "words_monologue"),
    ("wer_prompt", "errors_prompt", "words_prompt"),
    ("pad_share", "pad_frames", "frames"),
    ("words_per_second", "words_heard", "active_seconds"),
)


def check_stability(table: pd.DataFrame, features: pd.DataFrame) -> int:
    """Recompute the shares of `stability.csv` from its features; returns how many were compared."""
    cells = 0
    for row in table.to_dict("records"):
        own = pick(features, row, ["kind", "sae", "a", "b"])
        assert row["features"] == len(own) <= row["d_sae"]
        assert row["coverage"] <= row["coverage_all"] * row["d_sae"] / max(len(own), 1) + 1e-9
        for name, column in {"coverage": "best", "null_rate": "rate", "duplicates": "duplicate"}.items():
            same(row[name], (own[column] > row["theta"]).mean(), f"stability {row['a']} {row['b']} {name}")
            cells += 1
        same(row["cosine"], own["cosine"].mean(), f"stability {row['a']} {row['b']} cosine")
        assert row["null_shift_low"] <= row["null_shift"] <= row["null_shift_high"]
    return cells


def check_overlap(run: Path, target: str, features: pd.DataFrame) -> None:
    """The overlaps of the first pair of seeds of one SAE, again from the codes themselves, by dense products."""
    from eqknobs.corpus.cache import ActivationCache
    from eqknobs.sae import SAE

    name = "topk" if (features["sae"] == "topk").any() else features["sae"].iloc[0]
    own = features[(features["kind"] == "seeds") & (features["sae"] == name)]
    own = own[own["a"] == own["a"].iloc[0]]
    fires = []
    with ActivationCache(run / "activations" / f"{target}.h5") as cache:
        for side in ("a", "b"):
            seed = own[side].iloc[0].rpartition("#")[2]
            sae = SAE.load(run / "saes" / target / name / f"seed{seed}")
            on = []
            for clip in cache.utterances[cache.utterances["split"] == "test"].itertuples():
                z = (np.array(cache.acts[clip.start : clip.start + clip.frames]) - sae.mean.numpy()) / sae.std.numpy()
                h = np.maximum((z - sae.b_dec.numpy()) @ sae.W_enc.numpy().T + sae.b_enc.numpy(), 0)
                least = np.sort(h, axis=None)[-sae.config.k * len(h)]
                on.append(h >= max(least, 1e-30))
            fires.append(np.concatenate(on).astype(np.float32))
    a, b = fires
    both = a.T @ b
    chi = both / np.maximum(a.sum(0)[:, None] + b.sum(0) - both, 1)
    enough = b.sum(0) >= own["fires"].min()
    found = chi[own["feature"]][:, enough].max(1)
    close = np.abs(found - own["best"].to_numpy()) < 0.02  # a hair more or less in a clip's selection
    assert close.mean() > 0.99


def check_domains(table: pd.DataFrame, features: pd.DataFrame) -> int:
    """Recompute labels and shares of `domains.csv` from the shares of each feature; returns how many cells."""
    cells = 0
    for (sae, level, tau), own in table.groupby(["sae", "level", "tau"]):
        f = features[features["sae"] == sae].pivot(index="feature", columns="domain", values=f"{level}_share")
        has = pd.DataFrame({d: f[d] - f.drop(columns=d).min(axis=1) >= tau - 1e-5 for d in f})
        for row in own.to_dict("records"):
            where = f"domains {sae} {level} {tau} {row['domain']}"
            close = (f.sub(f[row["domain"]], axis=0).abs() - tau).abs().lt(2e-6).any(axis=1).mean()  # rounded shares
            assert abs(row["share"] - has[row["domain"]].mean()) <= close + 1e-9, where
            assert row["exclusive"] <= row["share"] <= 1 and row["permuted_low"] <= row["permuted_high"], where
            cells += 1
    return cells


def check_counted(table: pd.DataFrame, rows: pd.DataFrame, keys: list[str], ratio: tuple[str, str, str]) -> int:
    """Recompute one ratio of sums of every row; ratio: its column, numerator and denominator."""
    name, top, bottom = ratio
    for row in table.to_dict("records"):
        own = pick(rows, row, keys)
        assert row["clips"] == own["id"].nunique() and row["speakers"] == own["speaker"].nunique()
        same(row[name], own[top].sum() / own[bottom].sum(), f"{name} {[row[key] for key in keys]}")
    return len(table)


def check_features(run: Path, target: str, table: pd.DataFrame, cfg: dict[str, Any]) -> int:
    """Recompute onsets of every feature with a page from its windows, and of one its firing from the codes and its
    loudest moment from the corpus' sound; returns how many cells were compared."""
    rows = read(run / "scores" / f"{target}.features.csv")
    names = {"feature": "onset_share", "random": "onset_random", "matched": "onset_matched"}
    cells = 0
    for row in table.to_dict("records"):
        own = pick(rows, row, ["sae", "feature"])
        for kind, name in names.items():
            part, where = own[own["kind"] == kind], f"features {row['sae']} {row['feature']} {name}"
            if len(part):
                for key, value in zip(
                    ("", "_low", "_high"), estimate(part.assign(correct=part["right"]), "accuracy", cfg)
                ):
                    same(row[name + key], value, where + key)
                    cells += 1
        assert (row["clips"], row["frames"]) == (
            own.loc[own["kind"] == "feature", "id"].nunique(),
            own.loc[own["kind"] == "feature", "frames"].sum(),
        )
    _check_moment(run, target, table.iloc[0])
    return cells


def _check_moment(run: Path, target: str, row: pd.Series) -> None:
    import soundfile as sf

    from eqknobs.audio import read_audio
    from eqknobs.corpus.cache import ActivationCache
    from eqknobs.sae import SAE

    sae = SAE.load(run / "saes" / target / row["sae"] / "seed0")
    on: dict[str, np.ndarray] = {}
    with ActivationCache(run / "activations" / f"{target}.h5") as cache:
        for clip in cache.utterances[cache.utterances["split"].isin(row["split"].split("+"))].itertuples():
            code = sae.encode(np.array(cache.acts[clip.start : clip.start + clip.frames]))
            on[clip.id] = code[:, int(row["feature"])]
    same(row["rate"], np.mean(np.concatenate(list(on.values())) > 0), "features rate")
    same(row["max"], max(one.max() for one in on.values()), "features max")
    index = read(run / "renders" / target / "features" / "index.csv")
    shown = pick(index, row.to_dict(), ["sae", "feature"])
    assert row["top_clips"].split() == shown["id"].tolist() and shown["speaker"].is_unique
    moment = shown.iloc[0]
    assert on[moment["id"]].max() == max(one.max() for one in on.values())
    cut, rate = sf.read(run / "renders" / target / "features" / moment["file"], dtype="float32")
    manifest = run / "manifest" / target.partition("@")[2] / "manifest.csv"
    path = read(manifest).set_index("id").loc[moment["id"], "path"]
    whole = read_audio(run.resolve().parents[1] / path, rate)[round(moment["start"] * rate) :][: len(cut)]
    assert np.abs(cut - whole).max() < 1e-3


def check_recipe(run: Path, model: str) -> None:
    """The table of the stage lm_recipe, counted anew from answers, and the recipe's choice and file."""
    table = read(run / "tables/lm_recipe.csv").query(f"model == '{model}'")
    answers = read(run / "scores" / f"{model}.lm_recipe_answers.csv")
    recipe = read_json(run / "lm" / model / "recipe.json")
    keys = ["split", "order", "seed", "share", "trained", "codebooks", "bits"]
    rows, spoken = table.set_index(keys), dict(list(answers.groupby(keys)))
    assert set(rows.index) == set(spoken)
    for key, mine in spoken.items():
        row, whole = rows.loc[key], answers[(answers["state"] == "intact") & (answers["split"] == key[0])]
        base = whole[whole["draw"].isin(mine["draw"])]
        assert row["answers"] == len(mine) and row["prompts"] == mine["id"].nunique()
        for name, top, bottom in PRUNED_RATIOS[:2]:
            value = mine[top].sum() / mine[bottom].sum()
            assert np.isclose(row[name], value, rtol=1e-6, equal_nan=True), (key, name)
            if row["state"] != "intact":
                apart = value - base[top].sum() / base[bottom].sum()
                assert np.isclose(row[f"delta_{name}"], apart, atol=1e-7, equal_nan=True), (key, name)
    val = table[table["split"] == "val"]
    highs = val[["delta_wer_monologue_high", "delta_wer_prompt_high"]]
    within = (highs <= recipe["margin"]).all(axis=1) | (val["state"] == "intact")
    best = val[within].sort_values("bytes").iloc[0]
    assert best["chosen"] == 1 and best["bytes"] == recipe["bytes"] and val["chosen"].sum() == 1
    check_recovery(read(run / "tables/lm_recovery.csv").query(f"model == '{model}'"), answers, recipe["training"])
    files = [run / "lm" / model / "recipe" / name for name in ("packed.safetensors", "model.safetensors")]
    assert [data_bytes(file) for file in files if file.is_file()] == [best["bytes"]]


def _common_rates(plain: pd.DataFrame, models: list[tuple], top: str, bottom: str) -> list[float]:
    """Word error rates on the prompts to which all those models say something."""
    parts = []
    for order, seed, share, trained in models:
        same = (plain["order"] == order) & (plain["seed"] == seed) & (plain["share"] == share)
        parts.append(plain[same & (plain["trained"] == trained)].groupby("id")[[top, bottom]].sum())
    heard = sorted(set.intersection(*(set(part.index[part[bottom] > 0]) for part in parts)))
    return [part.loc[heard, top].sum() / part.loc[heard, bottom].sum() for part in parts]


def check_recovery(table: pd.DataFrame, answers: pd.DataFrame, pace: dict) -> None:
    """What training gives back, counted anew from answers: a change, the control's, and their difference."""
    plain = answers[(answers["split"] == "test") & (answers["kept"] == 0) & (answers["bits"] == 0)]
    test = table[table["split"] == "test"]
    assert len(test) and (test["steps"] == pace["steps"]).all() and (table["chosen"] == 1).any()
    tops = {name: (top, bottom) for name, top, bottom in PRUNED_RATIOS[:2]}
    for row in test.to_dict("records"):
        top, bottom = tops[row["measure"]]
        place = row["order"], row["seed"], row["share"]
        models = [(*place, row["trained"]), (*place, "none"), ("none", 0, 0, row["trained"]), ("none", 0, 0, "none")]
        after, before = _common_rates(plain, models[:2], top, bottom)
        assert np.allclose([row["after"], row["before"], row["change"]], [after, before, after - before], atol=1e-7)
        own, was, control, whole = _common_rates(plain, models, top, bottom)
        assert np.isclose(row["net"], own - was - control + whole, atol=1e-7), row


def check_packing(run: Path, model: str) -> None:
    """The tables of the stage lm_quantisation, counted anew from answers and nats, and its plans from their files."""
    table, small = (read(run / "tables" / f"{name}.csv") for name in ("lm_quantisation", "lm_quantisable"))
    answers, nats = (read(run / "scores" / f"{model}.lm_quantised_{name}.csv") for name in ("answers", "nats"))
    keys = ["part", "plan", "budget", "seed"]
    rows, spoken = table[table["model"] == model].set_index(keys), dict(list(answers.groupby(keys)))
    assert len(rows) == nats.groupby(keys).ngroups and set(spoken) == set(rows[rows["answers"] > 0].index)
    intact = answers[answers["plan"] == "intact"]
    for key, clips in nats.groupby(keys):
        row = rows.loc[key]
        for name in ("nll_text", "nll_audio", "cosine", "bytes", "bytes_resident"):
            assert np.isclose(row[name], clips[name].mean(), rtol=1e-6), (key, name)
        if key not in spoken:
            assert row["answers"] == 0 and np.isnan(row["wer_monologue"])
            continue
        mine = spoken[key]
        base = intact[intact["draw"].isin(mine["draw"])]
        assert row["answers"] == len(mine) and row["prompts"] == mine["id"].nunique()
        assert np.isclose(row["nll_intact"], mine["nll_intact"].mean(), rtol=1e-6), key
        for name, top, bottom in PRUNED_RATIOS[:2]:
            value = mine[top].sum() / mine[bottom].sum()
            assert np.isclose(row[name], value, rtol=1e-6, equal_nan=True), (key, name)
            if key[1] != "intact":
                apart = value - base[top].sum() / base[bottom].sum()
                assert np.isclose(row[f"delta_{name}"], apart, atol=1e-7, equal_nan=True), (key, name)
    for part, mine in rows.reset_index().query("plan not in ('intact', 'nf4')").groupby("part"):
        for budget, same_bytes in mine.groupby("budget"):
            limit = same_bytes.loc[same_bytes["plan"] == "uniform", "bytes"].iloc[0]
            assert same_bytes["bytes"].between(0.95 * limit, limit).all(), (part, budget)
    for row in small[small["model"] == model].to_dict("records"):
        sizes = rows.reset_index().query(f"part == '{row['part']}' and plan == '{row['plan']}' and answers > 0")
        assert row["tested"] == sizes["budget"].nunique()
        assert (row["bound"] <= 0.05) == np.isfinite(row["bytes"])
        assert np.isnan(row["bytes"]) or row["bytes"] >= 0.99 * sizes["bytes"].min()


def check_steered(run: Path, model: str) -> None:
    """The table of the stage lm_steering, counted anew from answers and from what was tried on val."""
    table = read(run / "tables/lm_steering.csv")
    table = table[table["model"] == model]
    tried, answers = (
        read(run / f"scores/{model}.{name}.csv") for name in ("lm_steering_calibration", "lm_steered_answers")
    )
    keys = ["layer", "property", "direction", "seed", "matched", "beside", "alpha"]
    intact = answers[answers["direction"] == "intact"]
    spoken = dict(list(answers[answers["direction"] != "intact"].groupby(keys, dropna=False)))
    test = table[(table["split"] == "test") & (table["direction"] != "intact")]
    assert len(test) == len(spoken)
    for key, mine in spoken.items():
        (row,) = [
            r for r in test.to_dict("records") if all(r[k] == v or (r[k] != r[k] and v != v) for k, v in zip(keys, key))
        ]
        both = mine.merge(intact, on=["id", "draw"], suffixes=("", "_intact"))
        assert len(both) == len(mine) == row["answers"]
        voice = [both[f"similarity_to{end}"] - both[f"similarity_from{end}"] for end in ("", "_intact")]
        shifts = {"pitch_shift": 12 * np.log2(both["f0"] / both["f0_intact"]), "voice_shift": voice[0] - voice[1]}
        shifts["level_shift"] = both["level_db"] - both["level_db_intact"]
        for name, values in shifts.items():
            assert np.isclose(row[name], values.mean(), atol=1e-7, equal_nan=True), (key, name)
        own = {"pitch": "pitch_shift", "rms": "level_shift", "voice": "voice_shift"}[row["property"]]
        assert np.isclose(row["shift"], row[own], equal_nan=True), key
        for name, top, bottom in PRUNED_RATIOS[:2]:
            value, base = (both[f"{top}{end}"].sum() / both[f"{bottom}{end}"].sum() for end in ("", "_intact"))
            assert np.isclose(row[name], value, rtol=1e-6, equal_nan=True), (key, name)
            assert np.isclose(row[f"delta_{name}"], value - base, atol=1e-7, equal_nan=True), (key, name)
    val = table[table["split"] == "val"].set_index(["layer", "property", "direction", "alpha"])
    for key, mine in tried.groupby(["layer", "property", "direction", "alpha"]):
        assert np.isclose(val.loc[key, "shift"], mine["shift"].mean(), equal_nan=True), key
        if val.loc[key, "matched"] != "tried":
            sides = test.query("layer == @key[0] and property == @key[1] and direction == @key[2] and beside == 'none'")
            assert key[3] in set(sides["alpha"]) or sides.empty, key  # what val found speaks, in the chosen layer


def check_erasing(run: Path, target: str, cfg: dict[str, Any]) -> int:
    """Recompute scores, side effects, the end of every curve and what swaps change, from what each probe told; returns
    how many cells."""
    raw = pd.read_csv(run / "scores" / f"{target}.erasing.csv", dtype={"said": str}, keep_default_na=False)
    clips = read(run / "scores" / f"{target}.erasing_clips.csv")
    top, gone, swapped = (_erasing_table(run, name, target) for name in ("topk_probing", "unlearning", "ravel"))
    cells = 0

    def scores(rows: pd.DataFrame, task: str) -> float:
        true = clips.loc[(clips["sae"] == rows["sae"].iloc[0]) & (clips["task"] == task), "true"].to_numpy()
        told = [np.array(text.split(), int) for text in rows.loc[rows["property"] == task, "said"]]
        vowel = task.startswith("vowel ")
        return float(np.mean([matthews_corrcoef(true, one) if vowel else (true == one).mean() for one in told]))

    for row in top.to_dict("records"):
        own = raw[(raw["edit"] == ("kept" if row["order"] else "all")) & (raw["labels"] == "true")]
        own = pick(own[own["penalty"] == "l2"], row | {"count": row["k"]}, ["sae", "task", "space", "order", "count"])
        same(row["score"], scores(own, row["task"]), f"topk_probing {row['task']} {row['space']} {row['k']}")
        cells += 1
    for keys, curve in gone.groupby(["sae", "task", "space", "order", "penalty"]):
        task, where = keys[1], f"unlearning {keys}"
        whole = raw[(raw["edit"] == "all") & (raw["space"] == keys[2]) & (raw["penalty"] == keys[4])]
        whole = whole[whole["sae"] == keys[0]]
        most = scores(raw[(raw["sae"] == keys[0]) & (raw["task"] == task) & (raw["space"] == "majority")], task)
        told = [scores(whole[whole["task"] == task], task)]
        for row in curve.sort_values("removed").to_dict("records"):
            own = raw[raw["edit"] == "removed"]
            own = pick(own, row | {"count": row["removed"]}, ["sae", "task", "space", "order", "penalty", "count"])
            told.append(scores(own, task))
            same(row["score"], told[-1], where)
            others = sorted(set(own["property"]) - {task})
            after = np.mean([scores(own, one) for one in others]) if others else math.nan
            before = np.mean([scores(whole[whole["task"] == one], one) for one in others]) if others else math.nan
            same(row["off_target"], after, f"{where} off_target")
            same(row["off_change"], after - before, f"{where} off_change")
            cells += 3
        shares = [0.0, *curve.sort_values("removed")["share"], 1.0]
        left = [score - most > cfg["tolerance"] for score in told]
        end = shares[max((i + 1 for i, still in enumerate(left) if still), default=0)]
        same(curve["gone"].iloc[0], end if left[0] else math.nan, f"{where} gone")
    swaps = pd.read_csv(run / "scores" / f"{target}.erasing_swaps.csv", dtype=TEXT, keep_default_na=False)
    for row in swapped.to_dict("records"):
        own = pick(swaps, row, ["sae", "task", "space", "order"])
        assert (row["clips"], row["pairs"]) == (own["id"].nunique(), own["pairs"].sum())
        same(row["cause"], own["caused"].sum() / own["pairs"].sum(), f"ravel {row['task']} cause")
        asked = own["asked"].sum()
        same(row["isolation"], own["kept"].sum() / asked if asked else math.nan, f"ravel {row['task']} isolation")
        cells += 2
    return cells


def _erasing_table(run: Path, name: str, target: str) -> pd.DataFrame:
    table = read(run / "tables" / f"{name}.csv")
    return table[table["target"] == target].assign(order=table["order"].fillna(""))
