"""How well the SAEs reconstruct, and how sparse they are: `sae.csv`; what is lost downstream: `splicing.csv`."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from eqknobs.evidence import stats
from eqknobs.evidence.estimates import IntervalsCfg, Measure, counts, estimate, groups, records, sums, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import ends, estimated, headline, number, sample
from eqknobs.plan import layer_of

STAGE = "saes"
COLUMNS = {
    "sae": "target sae variant seed d_in d_sae split l0 fvu dead_share layer input_scale clips speakers fvu_low "
    "fvu_high cosine wer_text_spliced wer_text_spliced_low wer_text_spliced_high nll_spliced nll_spliced_low "
    "nll_spliced_high no_speech_auc no_speech_auc_low no_speech_auc_high",
    "splicing": "target layer arm sae seed reference split clips speakers non_speech wer_text wer_text_low "
    "wer_text_high nll nll_low nll_high no_speech_auc no_speech_auc_low no_speech_auc_high "
    "wer_text_difference wer_text_difference_low wer_text_difference_high nll_difference "
    "nll_difference_low nll_difference_high no_speech_auc_difference no_speech_auc_difference_low "
    "no_speech_auc_difference_high nll_over_untrained nll_over_untrained_low nll_over_untrained_high "
    "wer_text_over_untrained wer_text_over_untrained_low wer_text_over_untrained_high",
}
NOTHING: dict[str, Any] = {"sae": []}
FVU = Measure("fvu", "sq_error", "sq_total", "lower")
COSINE = Measure("cosine", "cosine_sum", "frames", "higher")
L0 = Measure("l0", "l0_sum", "frames")
WER_TEXT = Measure("wer_text", "errors", "words", "lower")
NLL = Measure("nll", "nats", "tokens", "lower")
AUC = "no_speech_auc"
OVER_UNTRAINED = ("nll_over_untrained", "wer_text_over_untrained")
LEAST_CLIPS = 10  # with fewer an interval says too little
DENSE_SHARE = 0.1  # a code with more than this share of its features active is called not sparse


def auc_draws(speech: pd.DataFrame, other: pd.DataFrame, cfg: IntervalsCfg) -> NDArray[np.float64]:
    """AUC of `no_speech_prob` telling other sound from speech, ties one half: its value, then bootstrap draws.

    speech, other: `id`, `speaker`, `no_speech_prob`. Both are resampled; the same clips are drawn alike whatever their
    scores are, so that draws of two arms are paired.
    """
    speech, other = speech.sort_values("id"), other.sort_values("id")
    high, low = other["no_speech_prob"].to_numpy()[:, None], speech["no_speech_prob"].to_numpy()[None]
    above = (high > low) + 0.5 * (high == low)
    weights = []
    for place, clips in enumerate((other, speech)):
        drawn = stats.bootstrap_weights(clips["speaker"].tolist(), cfg["bootstrap"], cfg["seed"] + place)
        weights.append(np.vstack([np.ones(len(clips)), drawn]))
    return np.einsum("ni,ij,nj->n", weights[0], above, weights[1], optimize=True) / (
        weights[0].sum(1) * weights[1].sum(1)
    )


def _ends(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _difference(a: pd.DataFrame, b: pd.DataFrame, measure: Measure, name: str, cfg: IntervalsCfg) -> dict[str, float]:
    """a − b on the same clips, with its interval."""
    a, b = a.sort_values("id"), b.sort_values("id")
    speakers = a["speaker"].tolist()
    found = stats.paired_difference(*sums(a, measure), *sums(b, measure), speakers, cfg["bootstrap"], cfg["seed"])
    return _ends(name, found[:3])


def spliced_rows(scores: pd.DataFrame, target: str, cfg: IntervalsCfg) -> pd.DataFrame:
    """`splicing.csv` of a target: one row a (arm, SAE, seed), the first one unspliced; speech is what has a text."""
    arms = [
        (key, own[own["tokens"].notna()], own[own["tokens"].isna()])
        for key, own in groups(
            scores.assign(sae=scores["sae"].fillna("")), ["arm", "sae", "seed", "reference", "split"]
        )
    ]
    untrained = {(key["sae"], key["seed"]): speech for key, speech, _ in arms if key["arm"] == "untrained"}
    (_, whole, silent), *_ = arms
    before = auc_draws(whole, silent, cfg) if len(silent) else None
    rows = []
    for key, speech, other in arms:
        row = {"target": target, "layer": layer_of(target), **key, **counts(speech), "non_speech": len(other)}
        for measure in (WER_TEXT, NLL):
            row |= estimate(speech, measure, cfg)
            row |= _difference(speech, whole, measure, f"{measure.name}_difference", cfg)
        if before is not None:
            draws = auc_draws(speech, other, cfg)
            row |= _ends(AUC, (draws[0], *stats.interval(draws[1:])))
            row |= _ends(f"{AUC}_difference", (draws[0] - before[0], *stats.interval(draws[1:] - before[1:])))
        if key["arm"] == "sae":
            before_training = untrained[key["sae"], key["seed"]]
            for measure in (WER_TEXT, NLL):
                row |= _difference(speech, before_training, measure, f"{measure.name}_over_untrained", cfg)
        rows.append(row)
    return table(rows, COLUMNS["splicing"])


def _spliced_cells(spliced: pd.DataFrame, key: dict[str, Any]) -> dict[str, float]:
    """What `sae.csv` says of an SAE spliced in; nothing where that was not measured."""
    own = spliced[(spliced["arm"] == "sae") & (spliced[["sae", "seed", "split"]] == pd.Series(key)).all(axis=1)]
    found: dict[str, float] = {}
    for name, column in (("wer_text", "wer_text_spliced"), ("nll", "nll_spliced"), (AUC, AUC)):
        for end in ("", "_low", "_high"):
            found |= {f"{column}{end}": value for value in own[f"{name}{end}"]}
    return found


def tabulate(at: Context) -> Tabulated:
    """One row a (SAE, seed, split). Dead share is counted on val, so it stands in the val rows only."""
    details = at.inputs.json(f"saes/{at.target}/saes.json")["saes"]
    found = []
    scores = f"scores/{at.target}.splicing.csv"
    measured = at.inputs.has(scores)
    spliced = spliced_rows(at.inputs.csv(scores), at.target, at.cfg) if measured else table([], COLUMNS["splicing"])
    keys = ["sae", "variant", "input_scale", "seed", "d_in", "d_sae", "split"]
    for key, clips in groups(at.inputs.csv(f"scores/{at.target}.sae.csv"), keys):
        row = {
            "target": at.target,
            "layer": layer_of(at.target),
            **key,
            **counts(clips),
            **estimate(clips, FVU, at.cfg),
        }
        for measure in (L0, COSINE):
            row |= estimate(clips, measure, at.cfg, interval=False)
        row |= _spliced_cells(spliced, {name: key[name] for name in ("sae", "seed", "split")})
        if key["split"] == "val":
            row["dead_share"] = details[key["sae"]][str(key["seed"])]["dead_share"]
        found.append(row)
    rows = table(found, COLUMNS["sae"])
    first = (rows["seed"] == rows["seed"].min()) & (rows["split"] == "test")
    left_out = ["dead_share", "layer", "input_scale", *(name for name in rows if "spliced" in name or AUC in name)]
    facts = {"sae": records(rows[first].drop(columns=left_out))}
    if measured:
        facts["splicing"] = records(spliced)
    return Tabulated({"sae": rows, "splicing": spliced}, facts)


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether each SAE is sparse, and what it leaves unexplained."""
    lines = []
    for row in facts["sae"]:
        share = row["l0"] / row["d_sae"]
        text = f"SAE {row['sae']} {'is not sparse' if share > DENSE_SHARE else 'is sparse'}: "
        text += f"{row['l0']:.1f} of {row['d_sae']} "
        text += f"features fire in a frame ({share:.1%}). It leaves {number(row['fvu'])} of the variance unexplained."
        detail = f"FVU {ends(row['fvu_low'], row['fvu_high'])}; {sample(row)}; called sparse up to {DENSE_SHARE:.0%}"
        cell = (f"SAE {row['sae']}", "variance unexplained")
        lines.append(headline("sae", "measured", text, detail, cell, estimated(row, "fvu")))
    return lines + [_spliced_finding(row, facts["splicing"]) for row in facts.get("splicing", []) if _first(row, facts)]


def _first(row: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether this is the spliced SAE of the first seed."""
    seeds = [other["seed"] for other in facts["splicing"] if other["arm"] == "sae"]
    return row["arm"] == "sae" and row["seed"] == min(seeds)


def _learnt(differences: list[tuple[float | None, float | None]]) -> str:
    """Whether training helped by every measure ("positive"), or harmed by any ("negative"); the lower the better."""
    known = [(low, high) for low, high in differences if low is not None and high is not None]
    if any(low > 0 for low, _ in known):
        return "negative"
    return "positive" if known and all(high < 0 for _, high in known) else "undecided"


def _spliced_finding(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the words lose downstream of an SAE, beside the same SAE before training."""
    by_arm = {
        other["arm"]: other for other in rows if other["sae"] in ("", row["sae"]) and other["seed"] in (-1, row["seed"])
    }
    whole, mean, untrained = (by_arm[arm] for arm in ("unspliced", "mean", "untrained"))
    verdict = _learnt([(row[f"{name}_low"], row[f"{name}_high"]) for name in OVER_UNTRAINED])
    if row["clips"] < LEAST_CLIPS:
        verdict = "undecided"
    text = f"With what SAE {row['sae']} reconstructs in its layer's place, the text costs {number(row['nll'])} nats a "
    text += (
        f"token ({number(whole['nll'])} unspliced) and WER is {number(row['wer_text'])} ({number(whole['wer_text'])})."
    )
    detail = f"difference {number(row['nll_difference'], True)} nats "
    detail += f"{ends(row['nll_difference_low'], row['nll_difference_high'], True)}; before training "
    detail += (
        f"{number(untrained['nll'])} nats, WER {number(untrained['wer_text'])}; the train mean {number(mean['nll'])} "
    )
    detail += f"nats, WER {number(mean['wer_text'])}; {sample(row)}"
    if row["reference"] != "text":
        detail += f"; the text is what {row['reference']} hears"
    if row["clips"] < LEAST_CLIPS:
        detail += f"; fewer than {LEAST_CLIPS} clips decide nothing"
    cell = (f"SAE {row['sae']} spliced in", "words and nats, against the same SAE untrained")
    return headline("sae", verdict, text, detail, cell, estimated(row, "nll_over_untrained"))
