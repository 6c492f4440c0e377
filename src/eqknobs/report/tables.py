"""Tables and headlines, computed from the raw per-clip scores and from nothing else.

Every mean and ratio is `sum(numerator) / sum(denominator)` over clips, and every interval resamples speakers, then
utterances inside each drawn speaker (`eqknobs.evidence.stats`). Columns: docs/tables.md.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eqknobs.config import bundled, decodes, parse_target
from eqknobs.errors import EqknobsError
from eqknobs.evidence import stats
from eqknobs.io import read_csv, read_json, write_csv, write_json
from eqknobs.report.headlines import UNMEASURABLE, headlines

# How each measure is made of per-clip columns: (numerator, denominator or None for the mean over clips, better).
MEASURES = {
    "wer": ("errors", "words", "lower"),
    "wer_text": ("errors_text", "words_text", "lower"),
    "speaker_similarity": ("speaker_similarity", None, "higher"),
    "mel_distance": ("mel_distance", None, "lower"),
    "token_flip_rate": ("tokens_flipped", "tokens", "lower"),
    "latent_error": ("latent_sq_error", "latent_sq_total", "lower"),
    "centroid_hz": ("centroid_hz", None, None),
    "centroid_correlation_frame": ("centroid_correlation_frame", None, "higher"),
    "f0_error_cents": ("f0_error_cents", None, None),
    "loudness_change_db": ("loudness_change_db", None, None),
    "accuracy": ("correct", "frames", "higher"),
    "within_one_bin": ("within_one", "frames", "higher"),
    "fvu": ("sq_error", "sq_total", "lower"),
    "cosine": ("cosine_sum", "frames", "higher"),
    "l0": ("l0_sum", "frames", None),
}
WORDS = ("wer", "wer_text")
COLUMNS = {
    "codec": "target voices path codebooks split clips wer wer_text centroid_correlation_clip "
    "centroid_correlation_frame mel_distance speaker_similarity speakers wer_low wer_high wer_text_low wer_text_high "
    "centroid_correlation_frame_low centroid_correlation_frame_high mel_distance_low mel_distance_high "
    "speaker_similarity_low speaker_similarity_high sae token_flip_rate",
    "sae": "target sae variant seed d_in d_sae split l0 fvu dead_share clips speakers fvu_low fvu_high cosine",
    "probes": "target space property binning split frames utterances speakers accuracy accuracy_low accuracy_high "
    "balanced_accuracy within_one_bin ridge_r2 majority shuffled within_one_bin_low within_one_bin_high",
    "steering": "target property arm alpha alpha_raw calibrated split clips centroid_hz wer wer_low wer_high wer_text "
    "speaker_similarity f0_error_cents loudness_change_db mel_distance speakers rank centroid_hz_low centroid_hz_high "
    "speaker_similarity_low speaker_similarity_high wer_text_low wer_text_high",
    "importance_ablation": "target map mode removed seed clips mel_distance latent_error wer speaker_similarity "
    "removed_dims split speakers mel_distance_low mel_distance_high latent_error_low latent_error_high "
    "wer_low wer_high speaker_similarity_low speaker_similarity_high",
}


# --- estimates -------------------------------------------------------------------------------------------------


def _sums(clips: pd.DataFrame, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Per-clip numerator and denominator of a measure; clips on which it is undefined weigh nothing."""
    numerator, denominator, _ = MEASURES[measure]
    top = clips[numerator].to_numpy(float)
    bottom = np.ones(len(top)) if denominator is None else clips[denominator].to_numpy(float)
    known = np.isfinite(top) & np.isfinite(bottom)
    return np.where(known, top, 0.0), np.where(known, bottom, 0.0)


def _divide(top: Any, bottom: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(bottom) > 0, np.asarray(top) / np.asarray(bottom), np.nan)


def _estimate(clips: pd.DataFrame, measure: str, cfg: dict[str, Any], interval: bool = True) -> dict[str, float]:
    """{measure, measure_low, measure_high} over clips; NaN where the raw scores do not hold it."""
    numerator, denominator, _ = MEASURES[measure]
    names = (measure, f"{measure}_low", f"{measure}_high")
    if not {numerator, denominator or numerator} <= set(clips) or clips[numerator].notna().sum() == 0:
        return dict.fromkeys(names if interval else names[:1], math.nan)
    clips = clips.sort_values("id")
    top, bottom = _sums(clips, measure)
    value = float(_divide(top.sum(), bottom.sum()))
    if not interval:
        return {measure: value}
    interval_of = stats.ratio_interval(top, bottom, clips["speaker"].tolist(), cfg["bootstrap"], cfg["seed"])
    return dict(zip(names, (value, *interval_of)))


def _counts(clips: pd.DataFrame) -> dict[str, int]:
    return {"clips": int(clips["id"].nunique()), "speakers": int(clips["speaker"].nunique())}


def _pool(clips: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One row a clip: numerators and denominators summed over repeats (the random sets' seeds)."""
    top, bottom = _sums(clips, measure)
    rows = pd.DataFrame({"id": clips["id"], "speaker": clips["speaker"], "top": top, "bottom": bottom})
    return rows.groupby(["id", "speaker"], as_index=False).sum().query("bottom > 0")


def compare(a: pd.DataFrame, b: pd.DataFrame, measure: str, cfg: dict[str, Any]) -> dict[str, float] | None:
    """Paired bootstrap difference a − b of one measure on the clips that both hold.

    Returns value_a, value_b, difference, low, high (95 %), p (two-sided), clips and speakers; or None where the
    measure was not taken on both.
    """
    needed = {MEASURES[measure][0], MEASURES[measure][1] or MEASURES[measure][0]}
    if not needed <= set(a) or not needed <= set(b):
        return None
    both = _pool(a, measure).merge(_pool(b, measure), on=["id", "speaker"], suffixes=("_a", "_b")).sort_values("id")
    if both.empty:
        return None
    columns = [both[name].to_numpy(float) for name in ("top_a", "bottom_a", "top_b", "bottom_b")]
    found = stats.paired_difference(*columns, both["speaker"].tolist(), cfg["bootstrap"], cfg["seed"])
    values = {"value_a": columns[0].sum() / columns[1].sum(), "value_b": columns[2].sum() / columns[3].sum()}
    return {**{name: float(value) for name, value in {**values, **found._asdict()}.items()}, **_counts(both)}


# --- raw scores ------------------------------------------------------------------------------------------------


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise EqknobsError(f"missing raw scores {path}: run the stage that writes them")
    return read_csv(path)


def read_scores(run_dir: Path, target: str, stage: str) -> pd.DataFrame:
    """Signal and word scores of one stage, one row a (condition, clip); word columns are NaN where not judged."""
    signal = _read(run_dir / "scores" / f"{target}.{stage}.signal.csv")
    words = _read(run_dir / "scores" / f"{target}.{stage}.words.csv")
    return signal.merge(
        words.drop(columns=["speaker", "split", "transcript"], errors="ignore"), "left", ["id", "condition"]
    )


def _groups(rows: pd.DataFrame, keys: list[str]) -> Iterable[tuple[dict[str, Any], pd.DataFrame]]:
    for key in keys:
        if key not in rows:
            rows = rows.assign(**{key: math.nan})
    for values, group in rows.groupby(keys, dropna=False, sort=False):
        yield dict(zip(keys, values)), group


def voices(model: dict[str, Any]) -> dict[str, str]:
    """speaker -> "heard" or "unheard" in the codec's training, from the model folder's training.json; else empty."""
    path = Path(str(model.get("path"))) / "training.json"
    training = read_json(path) if path.is_file() else {}
    return {str(speaker): kind for kind in ("heard", "unheard") for speaker in training.get(f"voices_{kind}") or []}


# --- tables ----------------------------------------------------------------------------------------------------


def _table(name: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS[name].split())


def codec_table(run_dir: Path, target: str, cfg: dict[str, Any], model: dict[str, Any]) -> pd.DataFrame:
    """What the codec alone does to speech: one row a (voices, path, codebooks, split)."""
    rows, known = read_scores(run_dir, target, "codec"), voices(model)
    if bundled(model["path"]) and not cfg["bundled_speech"]:
        known = {}  # it names speakers of the bundled corpus; LibriSpeech has a reader 103 too
    rows["voices"] = [known.get(speaker, "unknown") for speaker in rows["speaker"]]
    table = []
    for key, clips in _groups(rows, ["voices", "path", "codebooks", "split", "sae"]):
        row = {"target": target, **key, **_counts(clips)}
        for measure in (*WORDS, "centroid_correlation_frame", "mel_distance", "speaker_similarity"):
            row |= _estimate(clips, measure, cfg)
        pair = clips[["centroid_hz", "centroid_original_hz"]].dropna()
        row |= _estimate(clips, "token_flip_rate", cfg, interval=False)
        varies = len(pair) > 2 and (pair.std() > 0).all()
        row["centroid_correlation_clip"] = float(pair.corr().iloc[0, 1]) if varies else math.nan
        table.append(row)
    return _table("codec", table)


def sae_table(run_dir: Path, target: str, cfg: dict[str, Any]) -> pd.DataFrame:
    """One row a (SAE, seed, split). Dead share is counted on val, so it stands in the val rows only."""
    details = read_json(run_dir / "saes" / target / "saes.json")["saes"]
    table = []
    for key, clips in _groups(
        _read(run_dir / "scores" / f"{target}.sae.csv"), ["sae", "variant", "seed", "d_in", "d_sae", "split"]
    ):
        row = {"target": target, **key, **_counts(clips)}
        row |= _estimate(clips, "fvu", cfg)
        for measure in ("l0", "cosine"):
            row |= _estimate(clips, measure, cfg, interval=False)
        if key["split"] == "val":
            row["dead_share"] = details[key["sae"]][str(key["seed"])]["dead_share"]
        table.append(row)
    return _table("sae", table)


def _per_clip(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby(["id", "speaker"], as_index=False)[["frames", "correct", "within_one"]].sum(min_count=1)


def _share(rows: pd.DataFrame) -> float:
    return float(_divide(rows["correct"].sum(), rows["frames"].sum()))


def read_probe_scores(run_dir: Path, target: str, kind: str, name: str, saes: list[str]) -> pd.DataFrame:
    """Raw scores (kind `probes` or `ridge`) of one property on all spaces, the SAEs' before `logmel`."""
    scores = run_dir / "scores"
    base = _read(scores / f"{target}.{kind}.{name}.csv")
    last = base["space"] == "logmel"
    codes = [_read(scores / f"{target}.{kind}.{sae}.{name}.csv") for sae in sorted(saes)]
    return pd.concat([base[~last], *codes, base[last]], ignore_index=True)


def probes_table(run_dir: Path, target: str, cfg: dict[str, Any]) -> pd.DataFrame:
    """One row a (space, property, binning, split)."""
    table = []
    for name in sorted(cfg["properties"]):
        scores, ridge = (read_probe_scores(run_dir, target, kind, name, cfg["saes"]) for kind in ("probes", "ridge"))
        majority = scores[scores["labels"] == "majority"]
        for key, rows in _groups(scores[scores["labels"] != "majority"], ["space", "binning", "split"]):
            true, shuffled = (rows[rows["labels"] == kind] for kind in ("true", "shuffled"))
            clips = _per_clip(true)
            counts = _counts(clips)
            same = (majority["binning"] == key["binning"]) & (majority["split"] == key["split"])
            if (majority["space"] == key["space"]).any():
                same &= majority["space"] == key["space"]
            by_class = true.groupby("class")[["correct", "frames"]].sum()
            line = ridge[(ridge["space"] == key["space"]) & (ridge["split"] == key["split"])]
            spread = line["sum_yy"].sum() - line["sum_y"].sum() ** 2 / max(line["frames"].sum(), 1)
            table.append(
                {
                    "target": target,
                    **key,
                    "property": name,
                    "frames": int(clips["frames"].sum()),
                    "utterances": counts["clips"],
                    "speakers": counts["speakers"],
                    **_estimate(clips, "accuracy", cfg),
                    **_estimate(clips, "within_one_bin", cfg),
                    "balanced_accuracy": float((by_class["correct"] / by_class["frames"]).mean()),
                    "ridge_r2": float(1 - line["sse"].sum() / spread) if spread > 0 else math.nan,
                    "majority": _share(majority[same]),
                    "shuffled": _share(shuffled),
                }
            )
    return _table("probes", table)


def _mark_words(table: pd.DataFrame, measurable: bool) -> pd.DataFrame:
    """Where the codec itself loses the words, a word error says nothing about an edit: say so in every such cell."""
    if measurable:
        return table
    columns = [c for c in table if c.startswith(("wer", "wer_text"))]
    table[columns] = table[columns].astype(object).where(table[columns].isna(), UNMEASURABLE)
    return table


def steering_table(run_dir: Path, target: str, cfg: dict[str, Any], measurable: bool) -> pd.DataFrame:
    """One row a (property, arm, α): the sweep (signal measures only) and the calibrated arms (words as well).

    `rank` orders the arms that reached the target shift by word error, then by speaker similarity; by the latter
    alone where words are unmeasurable.
    """
    table = []
    for key, clips in _groups(
        read_scores(run_dir, target, "steering"),
        ["property", "arm", "alpha", "alpha_raw", "calibrated", "split"],
    ):
        row = {"target": target, **key, **_counts(clips)}
        for measure in (*WORDS, "centroid_hz", "speaker_similarity", "f0_error_cents", "loudness_change_db"):
            row |= _estimate(clips, measure, cfg)
        table.append(row | _estimate(clips, "mel_distance", cfg, interval=False))
    result = _table("steering", table)
    for _, arms in result[result["calibrated"] == "reached"].groupby("property"):
        order = arms.assign(worse=-arms["speaker_similarity"])
        order = order.sort_values((["wer"] if measurable else []) + ["worse", "arm"])
        result.loc[order.index, "rank"] = range(1, len(order) + 1)
    return _mark_words(result, measurable)


def importance_table(run_dir: Path, target: str, cfg: dict[str, Any], measurable: bool) -> pd.DataFrame:
    """One row a (map, mode, share removed, seed)."""
    table = []
    keys = ["map", "mode", "removed", "removed_dims", "seed", "split"]
    for key, clips in _groups(read_scores(run_dir, target, "importance"), keys):
        row = {"target": target, **key, **_counts(clips)}
        for measure in ("mel_distance", "latent_error", "wer", "speaker_similarity"):
            row |= _estimate(clips, measure, cfg)
        table.append(row)
    return _mark_words(_table("importance_ablation", table), measurable)


# --- comparisons and headlines ---------------------------------------------------------------------------------


def _compare_probes(run_dir: Path, target: str, cfg: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy of each SAE's probe on test against the raw latents' and against random projection + TopK."""
    records = []
    for name in sorted(cfg["properties"]):
        scores = read_probe_scores(run_dir, target, "probes", name, cfg["saes"])
        scores = scores[(scores["labels"] == "true") & (scores["split"] == "test")]
        for (binning, space), rows in scores.groupby(["binning", "space"]):
            if not space.startswith("sae:"):
                continue
            for other in ("raw", "random_topk"):
                rival = scores[(scores["binning"] == binning) & (scores["space"] == other)]
                found = compare(_per_clip(rows), _per_clip(rival), "accuracy", cfg)
                if found:
                    what = {
                        "property": name,
                        "binning": binning,
                        "a": space,
                        "b": other,
                        "measure": "accuracy",
                    }
                    records.append({"family": f"probe, {binning}, minus {other}", **what, **found})
    return records


def _compare_steering(run_dir: Path, target: str, cfg: dict[str, Any], measurable: bool) -> list[dict[str, Any]]:
    """Arms that reached the target centroid, against the raw-latent probe direction and the bare codec."""
    rows = read_scores(run_dir, target, "steering")
    rows = rows[(rows["property"] == "centroid") & (rows["split"] == "test")]
    arms = dict(list(rows[rows["calibrated"] == "reached"].groupby("arm")))
    codec = rows[rows["arm"] == "codec_roundtrip"].drop_duplicates("id")
    rivals = {"raw_probe": arms.get("raw_probe"), "codec_roundtrip": codec if len(codec) else None}
    records = []
    for arm, clips in arms.items():
        for other, rival in rivals.items():
            for measure in (["wer"] if measurable else []) + ["speaker_similarity"]:
                if rival is None or arm == other:
                    continue
                found = compare(clips, rival, measure, cfg)
                if found:
                    what = {"property": "centroid", "binning": None, "a": arm, "b": other, "measure": measure}
                    records.append({"family": f"steering, {measure}, minus {other}", **what, **found})
    return records


def _compare_importance(run_dir: Path, target: str, cfg: dict[str, Any], measurable: bool) -> list[dict[str, Any]]:
    """What the composition map removes first against every rival set of the same size, at the sizes listened to: the
    map's own count of expendable dimensions (where it has any) and the shares `word_removed`."""
    rows = read_scores(run_dir, target, "importance")
    chosen = rows["map"] == "composition"
    heard = rows.loc[chosen & rows["speaker_similarity"].notna(), "removed_dims"].unique()
    rivals = rows[rows["removed_dims"].isin(heard) & ~rows["map"].isin(["composition", "keep_critical", "none"])]
    records = []
    for (count, mode, rival), clips in rivals.groupby(["removed_dims", "mode", "map"]):
        claimed = rows[chosen & (rows["mode"] == mode) & (rows["removed_dims"] == count)]
        for measure in (
            "mel_distance",
            "latent_error",
            *(["wer"] if measurable else []),
            "speaker_similarity",
        ):
            if len(claimed) == 0:
                continue
            found = compare(claimed, clips, measure, cfg)
            if found:
                what = {
                    "property": "centroid",
                    "binning": None,
                    "a": "composition",
                    "b": rival,
                    "measure": measure,
                }
                family = f"importance, {measure}, {mode}, {count} removed"
                records.append({"family": family, "mode": mode, "removed_dims": int(count), **what, **found})
    return records


def with_holm(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Holm-corrected p inside each family, and a verdict on a from the sign of the interval."""
    for family in sorted({r["family"] for r in records}):
        members = [r for r in records if r["family"] == family]
        for record, p in zip(members, stats.holm([r["p"] for r in members])):
            record |= {"p_holm": float(p), "compared": len(members), "verdict": _verdict(record)}
    return records


def _verdict(record: dict[str, Any]) -> str:
    """ "better", "worse" or "undecided" (the interval holds 0) for a against b."""
    if not (record["low"] > 0 or record["high"] < 0):  # NaN shows nothing either
        return "undecided"
    higher = MEASURES[record["measure"]][2] == "higher"
    return "better" if (record["low"] > 0) == higher else "worse"


# --- the stage -------------------------------------------------------------------------------------------------


def words_rule(run_dir: Path, target: str, cfg: dict[str, Any]) -> dict[str, Any]:
    """Whether words can be judged: WER of the codec's quantised round trip at the steering codebooks, on test."""
    codebooks = cfg["steering_codebooks"]
    codec = read_scores(run_dir, target, "codec")
    clips = codec[(codec["path"] == "quantized") & (codec["codebooks"] == codebooks) & (codec["split"] == "test")]
    if (
        clips.empty
    ):  # the codec stage was asked for other codebooks: the steering stage's own reference is the same sound
        steering = read_scores(run_dir, target, "steering")
        clips = steering[(steering["arm"] == "codec_roundtrip") & (steering["split"] == "test")].drop_duplicates("id")
    found = _estimate(clips, "wer", cfg)
    return {
        "codebooks": codebooks,
        "threshold": cfg["unmeasurable_wer"],
        "measurable": not found["wer"] > cfg["unmeasurable_wer"],
        **found,
        **_counts(clips),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain JSON values; missing cells become None."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()} for row in rows]


def write_tables(run_dir: Path, targets: list[str], cfg: dict[str, Any], models: dict[str, dict[str, Any]]) -> None:
    """Write `tables/*.csv` and `tables/summary.json` of a results folder.

    cfg: `bootstrap` (resamples), `seed`, `unmeasurable_wer`, `steering_codebooks`, `saes` (their names),
    `bundled_speech` (whether it is this project's own corpus, whose speakers the bundled models' training.json names).
    models: name -> its configuration
    (`kind`; `path`, whose training.json names heard and unheard voices). A model that does not decode has no codec,
    steering or importance rows. Raises EqknobsError naming a raw score file that is missing.
    """
    run_dir = Path(run_dir)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in COLUMNS}
    summary: dict[str, Any] = {"bootstrap": cfg["bootstrap"], "seed": cfg["seed"], "targets": {}}
    for target in targets:
        model = models[parse_target(target)[0]]
        sound = decodes({"models": models}, target)
        sae = sae_table(run_dir, target, cfg) if cfg["saes"] else _table("sae", [])
        probes = probes_table(run_dir, target, cfg)
        tables["sae"].append(sae)
        tables["probes"].append(probes)
        comparisons = _compare_probes(run_dir, target, cfg)
        first = sae["seed"] == sae["seed"].min()
        facts: dict[str, Any] = {
            "words": None,
            "importance": None,
            "steering": [],
            "sae": _records(sae[first & (sae["split"] == "test")].drop(columns=["dead_share"])),
            "probes": _records(probes[(probes["split"] == "test") & probes["binning"].isin(["quantile", "category"])]),
        }
        shift = math.nan
        if sound:
            facts["words"] = words_rule(run_dir, target, cfg)
            measurable = facts["words"]["measurable"]
            steering = steering_table(run_dir, target, cfg, measurable)
            tables["codec"].append(codec_table(run_dir, target, cfg, model))
            tables["steering"].append(steering)
            tables["importance_ablation"].append(importance_table(run_dir, target, cfg, measurable))
            matched = steering["calibrated"].isin(["reached", "unreached"]) & (steering["property"] == "centroid")
            facts["steering"] = _records(steering[matched])
            importance = read_json(run_dir / "importance" / f"{target}.json")
            facts["importance"] = {**importance["counts"], "width": sum(importance["counts"].values())}
            shift = read_json(run_dir / "steering" / target / "calibration.json")["target_hz_ratio"]
            comparisons += _compare_steering(run_dir, target, cfg, measurable)
            comparisons += _compare_importance(run_dir, target, cfg, measurable)
        facts["comparisons"] = with_holm(comparisons)
        facts["headlines"] = headlines(facts, shift)
        summary["targets"][target] = facts
    for name, parts in tables.items():
        table = pd.concat(parts, ignore_index=True) if parts else _table(name, [])
        write_csv(run_dir / "tables" / f"{name}.csv", table)
    write_json(run_dir / "tables" / "summary.json", summary)
