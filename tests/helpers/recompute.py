"""The tables and the summary once more, from the raw scores by plain pandas, without `eqknobs.report.tables`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eqknobs.evidence.stats import bootstrap_weights

RATIOS = {
    "wer": ("errors", "words"),
    "wer_text": ("errors_text", "words_text"),
    "latent_error": ("latent_sq_error", "latent_sq_total"),
    "fvu": ("sq_error", "sq_total"),
    "cosine": ("cosine_sum", "frames"),
    "token_flip_rate": ("tokens_flipped", "tokens"),
    "l0": ("l0_sum", "frames"),
    "accuracy": ("correct", "frames"),
    "within_one_bin": ("within_one", "frames"),
}
MEANS = ("speaker_similarity", "mel_distance", "centroid_hz", "centroid_correlation_frame", "f0_error_cents")
MEANS += ("loudness_change_db",)
KEYS = {
    "codec": ["path", "codebooks", "voices", "split", "sae"],
    "steering": ["property", "arm", "alpha", "alpha_raw", "calibrated", "split"],
    "importance": ["map", "mode", "removed", "removed_dims", "seed", "split"],
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
            everything = pick(raw, row, ["property", "binning", "split"])
            rows = rows[rows["labels"] == "true"]
            shuffled = pick(raw, row, keys)
            shuffled = shuffled[shuffled["labels"] == "shuffled"]
            majority = everything[everything["labels"] == "majority"]
            by_class = rows.groupby("class")[["correct", "frames"]].sum()
            sae = row["space"].removeprefix("sae:") + "." if row["space"].startswith("sae:") else ""
            ridge = read(run / "scores" / f"{target}.ridge.{sae}{row['property']}.csv")
            ridge = pick(ridge, row, ["space", "split"])
            spread = ridge["sum_yy"].sum() - ridge["sum_y"].sum() ** 2 / ridge["frames"].sum()
            wanted |= {
                "frames": rows["frames"].sum(),
                "utterances": rows["id"].nunique(),
                "balanced_accuracy": (by_class["correct"] / by_class["frames"]).mean(),
                "majority": majority["correct"].sum() / majority["frames"].sum(),
                "shuffled": shuffled["correct"].sum() / shuffled["frames"].sum(),
                "ridge_r2": 1 - ridge["sse"].sum() / spread,
            }
        else:
            wanted["clips"] = rows["id"].nunique()
            assert len(rows) == wanted["clips"], f"{where}: a clip appears twice"
        wanted["speakers"] = rows["speaker"].nunique()
        if stage == "codec":
            wanted["centroid_correlation_clip"] = rows["centroid_hz"].corr(rows["centroid_original_hz"])
        if stage == "sae" and row["split"] == "val":
            wanted["dead_share"] = details[row["sae"]][str(row["seed"])]["dead_share"]
        for measure in (*RATIOS, *MEANS):
            if measure in table:
                names = [measure, f"{measure}_low", f"{measure}_high"]
                wanted |= dict(
                    zip(names, estimate(rows, measure, cfg) if measure in available(rows) else [math.nan] * 3)
                )
        if not words and stage in ("steering", "importance"):
            judged = rows["errors"].notna().any()
            wanted |= {k: "unmeasurable" for k in wanted if k.startswith("wer") and judged}
        for key, value in wanted.items():
            if key in row:
                same(row[key], value, f"{where} {key}")
                cells += 1
        known = {*wanted, *keys, "target", "variant", "d_in", "d_sae", "rank", "dead_share"}
        assert set(table) <= known, f"{name}: not recomputed: {set(table) - known}"
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
    rows = raw_scores(run, target, "importance", model)
    rows = rows[(rows["removed_dims"] == record["removed_dims"]) & (rows["mode"] == record["mode"])]
    return [rows[rows["map"] == record[s]] for s in "ab"]


def check_summary(run: Path, target: str, cfg: dict[str, Any], model: dict[str, Any]) -> int:
    """Recompute every number of the summary of one target; returns how many were compared."""
    facts = json.loads((run / "tables" / "summary.json").read_text())["targets"][target]
    assert set(facts) == {"words", "sae", "probes", "steering", "importance", "comparisons", "headlines"}
    cells = 0
    if facts["words"]:
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
            cells += 1
        importance = json.loads((run / "importance" / f"{target}.json").read_text())
        values = np.array(importance["maps"]["composition"])
        wanted = {"expendable": (values < 0.3).sum(), "critical": (values >= 0.7).sum(), "width": len(values)}
        wanted["moderate"] = len(values) - wanted["expendable"] - wanted["critical"]
        assert wanted == facts["importance"]
        cells += 4
    for part, name in (("sae", "sae"), ("probes", "probes"), ("steering", "steering")):
        table = read(run / "tables" / f"{name}.csv")
        for row in facts[part]:
            found = pick(table[table["target"] == target], row, KEYS[name])
            assert len(found) == 1, f"summary {part}: {row} is not one row of the table"
            for key, number in row.items():
                value = found[key].item()
                if not (number is None and pd.isna(value)):
                    same(number if not isinstance(value, str) else str(number), value, f"summary {part} {key}")
                cells += 1
    families: dict[str, list[dict[str, Any]]] = {}
    for record in facts["comparisons"]:
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
