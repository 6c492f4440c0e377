"""What turning a direction does to the sound: the table `steering.csv`."""

from typing import Any

import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import (
    CENTROID_HZ,
    MEL_DISTANCE,
    SPEAKER_SIMILARITY,
    WER,
    WER_TEXT,
    Measure,
    counts,
    estimate,
    groups,
    records,
    table,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, headline, label, listed, numbers, said
from eqknobs.evidence.words import mark_words, words_rule

STAGE = "steering"
COLUMNS = {
    "steering": "target property arm alpha alpha_raw calibrated split clips centroid_hz wer wer_low wer_high wer_text "
    "speaker_similarity f0_error_cents loudness_change_db mel_distance speakers rank centroid_hz_low centroid_hz_high "
    "speaker_similarity_low speaker_similarity_high wer_text_low wer_text_high",
}
NOTHING: dict[str, Any] = {"steering": []}
F0_ERROR = Measure("f0_error_cents", "f0_error_cents")
LOUDNESS_CHANGE = Measure("loudness_change_db", "loudness_change_db")
COMPARED = {measure.name: measure for measure in (WER, SPEAKER_SIMILARITY)}
ARMS = {
    "original": "untouched clip",
    "codec_roundtrip": "codec round trip",
    "sae_roundtrip": "SAE round trip",
    "sae_probe": "SAE probe direction",
    "sae_probe_error": "SAE probe direction + error term",
    "sae_probe_renorm": "SAE probe direction, code re-normalised",
    "sae_clamp": "SAE feature clamp",
    "raw_probe": "raw-latent probe direction",
    "difference_in_means": "difference in means",
    "random": "random direction",
    "dsp_lowpass": "low-pass filter before the codec",
    "dsp_bandpass": "band-pass 300–3000 Hz before the codec",
}


def steering_table(at: Context, scores: pd.DataFrame, measurable: bool) -> pd.DataFrame:
    """One row a (property, arm, α): the sweep (signal measures only) and the calibrated arms (words as well).

    `rank` orders the arms that reached the target shift by word error, then by speaker similarity; by the latter
    alone where words are unmeasurable.
    """
    found = []
    for key, clips in groups(scores, ["property", "arm", "alpha", "alpha_raw", "calibrated", "split"]):
        row = {"target": at.target, **key, **counts(clips)}
        for measure in (WER, WER_TEXT, CENTROID_HZ, SPEAKER_SIMILARITY, F0_ERROR, LOUDNESS_CHANGE):
            row |= estimate(clips, measure, at.cfg)
        found.append(row | estimate(clips, MEL_DISTANCE, at.cfg, interval=False))
    rows = table(found, COLUMNS["steering"])
    for _, arms in rows[rows["calibrated"] == "reached"].groupby("property"):
        order = arms.assign(worse=-arms["speaker_similarity"])
        order = order.sort_values((["wer"] if measurable else []) + ["worse", "arm"])
        rows.loc[order.index, "rank"] = range(1, len(order) + 1)
    return mark_words(rows, measurable)


def _compared(at: Context, rows: pd.DataFrame, measurable: bool) -> list[dict[str, Any]]:
    """Arms that reached the target centroid, against the raw-latent probe direction and the bare codec."""
    rows = rows[(rows["property"] == "centroid") & (rows["split"] == "test")]
    arms = dict(list(rows[rows["calibrated"] == "reached"].groupby("arm")))
    codec = rows[rows["arm"] == "codec_roundtrip"].drop_duplicates("id")
    rivals = {"raw_probe": arms.get("raw_probe"), "codec_roundtrip": codec if len(codec) else None}
    found = []
    for arm, clips in arms.items():
        for other, rival in rivals.items():
            for measure in ([WER] if measurable else []) + [SPEAKER_SIMILARITY]:
                if rival is None or arm == other:
                    continue
                if record := compare(clips, rival, measure, at.cfg):
                    what = {"property": "centroid", "binning": None, "a": arm, "b": other}
                    found.append({"family": f"steering, {measure.name}, minus {other}", **what, **record})
    return found


def tabulate(at: Context) -> Tabulated:
    """Table, calibrated arms and comparisons of one target."""
    words, scores = words_rule(at), at.inputs.scores(at.target, "steering")
    rows = steering_table(at, scores, words["measurable"])
    matched = rows["calibrated"].isin(["reached", "unreached"]) & (rows["property"] == "centroid")
    facts = {"words": words, "steering": records(rows[matched])}
    return Tabulated({"steering": rows}, facts, _compared(at, scores, words["measurable"]))


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Which arms reach the shift, and whether the SAEs' cost less than the raw-latent direction."""
    arms = facts["steering"]
    if not arms:
        return []
    shift = at.inputs.json(f"steering/{at.target}/calibration.json")["target_hz_ratio"]
    reached = [row["arm"] for row in arms if row["calibrated"] == "reached"]
    missed = [row["arm"] for row in arms if row["calibrated"] == "unreached"]
    text = f"{len(reached)} of {counted(len(arms), 'arm')} can lower the spectral centroid to {shift:g} × the codec's "
    text += "round trip."
    if missed:
        text += f" Not reached, so not ranked: {listed(label(arm, ARMS) for arm in missed)}."
    centroids = [row["centroid_hz"] for row in arms if row["calibrated"] == "reached"]
    detail = "strength chosen on val"
    if centroids:
        detail += f"; on test the centroids of these arms span {min(centroids):.0f} to {max(centroids):.0f} Hz"
    if "random" in reached:
        detail += "; the random direction reaches it too"
    lines = [headline("steering", "measured", text, detail)]
    if "raw_probe" not in reached:
        text = "The raw-latent probe direction misses the shift: there is nothing to compare the SAEs with."
        lines.append(headline("steering", "undecided", text))
    return lines + [_finding(record) for record in facts["comparisons"] if _is_claim(record)]


def _is_claim(record: dict[str, Any]) -> bool:
    kind = record["a"].partition(":")[0]
    return (
        record["family"].startswith("steering") and kind in ("sae_probe", "dsp_lowpass") and record["b"] == "raw_probe"
    )


def _finding(record: dict[str, Any]) -> dict[str, Any]:
    verdict, words = said(record)
    if record["a"] == "dsp_lowpass":  # a plain filter that beats the direction is bad news for the knob
        verdict = {"positive": "negative", "negative": "positive"}.get(verdict, verdict)
    measure = COMPARED[record["measure"]]
    text = f"At the matched shift, in {measure.said}, the {label(record['a'], ARMS)} {words} the raw-latent one."
    cell = (f"{label(record['a'], ARMS)}, against the raw-latent one", measure.said)
    return headline("steering", verdict, text, numbers(record, measure), cell, difference(record))
