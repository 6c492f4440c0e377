"""What the numbers allow one to say: sentences made from the summary, phrased by the sign of each interval."""

from collections.abc import Iterable
from typing import Any

UNMEASURABLE = "unmeasurable"
DENSE_SHARE = 0.1  # a code with more than this share of its features active is called not sparse

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
    "dsp_lowpass": "low-pass filter, then the codec",
    "dsp_bandpass": "band-pass 300–3000 Hz, then the codec",
}
SPACES = {
    "raw": "raw latents",
    "pca_l0": "PCA at L0",
    "pca_d": "PCA at d",
    "random_topk": "random projection + TopK",
    "logmel": "log-mel",
    "sae": "SAE",
}
MAPS = {
    "composition": "SAE × probe map",
    "raw_probe": "raw-probe map",
    "variance": "variance map",
    "inverted": "inverted map",
    "random": "random sets",
    "keep_critical": "keep only critical",
}
MEASURE_NAMES = {
    "wer": "WER",
    "speaker_similarity": "speaker similarity",
    "mel_distance": "mel distance (dB)",
    "latent_error": "latent error",
    "accuracy": "accuracy",
}


def label(name: str) -> str:
    """Plain words for an arm, a feature space or an importance map: "sae_clamp:topk" -> "SAE feature clamp (topk)"."""
    kind, _, sae = name.partition(":")
    words = ARMS.get(kind) or MAPS.get(kind) or SPACES.get(kind) or kind
    return f"{words} ({sae})" if sae else words


def _number(value: float, signed: bool = False) -> str:
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-", "−")


def _range(low: float, high: float, signed: bool = False) -> str:
    return f"[{_number(low, signed)}, {_number(high, signed)}]"


def _of(row: dict[str, Any]) -> str:
    clips, speakers = row.get("clips", row.get("utterances")), row["speakers"]
    return f"{clips} clips, {speakers} {'speaker' if speakers == 1 else 'speakers'}"


def _listed(names: Iterable[str]) -> str:
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last


def _difference(record: dict[str, Any]) -> str:
    """The paired difference with its interval and what it allows one to say."""
    corrected = (
        f"; p = {record['p_holm']:.3f} after Holm over {record['compared']}" if record["compared"] > 1 else ""
    )
    found = f"difference {_number(record['difference'], True)} {_range(record['low'], record['high'], True)}"
    a, b = label(record["a"]), label(record["b"])
    said = {
        "undecided": "the interval holds 0, so no difference is shown",
        "better": f"the {a} does better than the {b}",
        "worse": f"the {a} does worse than the {b}",
    }[record["verdict"]]
    if record["verdict"] != "undecided" and record["p_holm"] >= 0.05:
        said += ", but not after correction"
    return f"{found}{corrected}: {said}"


def _headline(topic: str, verdict: str, text: str) -> dict[str, str]:
    return {"topic": topic, "verdict": verdict, "text": text}


def _codec_headlines(summary: dict[str, Any]) -> list[dict[str, str]]:
    words = summary["words"]
    if words is None:
        return []
    text = (
        f"Through the codec alone ({words['codebooks']} codebooks) the recogniser's word error rate is "
        f"{_number(words['wer'])} {_range(words['wer_low'], words['wer_high'])} against its own transcript of the "
        f"untouched clip ({_of(words)})."
    )
    if words["measurable"]:
        return [_headline("codec", "measured", text + " Word errors of edits are to be read on top of that.")]
    return [
        _headline(
            "codec",
            "negative",
            f"{text} That is above {words['threshold']}: what an edit costs in words cannot be measured on this codec, "
            f"and the word columns say “{UNMEASURABLE}”.",
        )
    ]


def _sae_headlines(summary: dict[str, Any]) -> list[dict[str, str]]:
    lines = []
    for row in summary["sae"]:
        share = row["l0"] / row["d_sae"]
        text = (
            f"SAE {row['sae']}: {row['l0']:.1f} of {row['d_sae']} features fire in a frame ({share:.1%}), and "
            f"{_number(row['fvu'])} {_range(row['fvu_low'], row['fvu_high'])} of the variance stays unexplained "
            f"({_of(row)})."
        )
        dense = share > DENSE_SHARE
        lines.append(
            _headline(
                "sae",
                "negative" if dense else "measured",
                text + (" This code is not sparse." if dense else ""),
            )
        )
    return lines


def _probe_headlines(summary: dict[str, Any], comparisons: list[dict[str, Any]]) -> list[dict[str, str]]:
    lines = []
    for record in comparisons:
        if record["family"] != "probe, quantile, minus raw":
            continue
        null = next(
            r for r in summary["probes"] if r["space"] == record["a"] and r["property"] == record["property"]
        )
        text = (
            f"{record['property'].capitalize()} (quantile bins): accuracy {_number(record['value_a'])} on the "
            f"{label(record['a'])} features, {_number(record['value_b'])} on the raw latents (majority "
            f"{_number(null['majority'])}, shuffled labels {_number(null['shuffled'])}; {_of(record)}); "
            f"{_difference(record)}."
        )
        verdict = {"better": "positive", "worse": "negative"}.get(record["verdict"], "undecided")
        lines.append(_headline("probe", verdict, text))
    return lines


def _steering_headlines(
    summary: dict[str, Any], comparisons: list[dict[str, Any]], shift: float | None
) -> list[dict[str, str]]:
    arms = summary["steering"]
    reached = [row["arm"] for row in arms if row["calibrated"] == "reached"]
    missed = [row["arm"] for row in arms if row["calibrated"] == "unreached"]
    if not reached + missed:
        return []
    goal = f" to {shift:g} × that of the codec round trip" if shift else " to the target"
    text = f"Asked to lower the spectral centroid{goal}, {len(reached)} of {len(reached + missed)} arms reach it."
    if missed:
        text += f" Not reached, so not ranked: {_listed(label(arm) for arm in missed)}."
    lines = [_headline("steering", "measured" if reached else "negative", text)]
    if "raw_probe" not in reached:
        lines.append(
            _headline(
                "steering",
                "negative",
                "The raw-latent probe direction did not reach the shift: nothing to compare SAEs with.",
            )
        )
    for record in comparisons:
        kind = record["a"].partition(":")[0]
        if (
            record["b"] == "raw_probe"
            and kind in ("sae_probe", "dsp_lowpass")
            and record["family"].startswith("steering")
        ):
            text = (
                f"At the matched shift, {MEASURE_NAMES[record['measure']]} is {_number(record['value_a'])} for the "
                f"{label(record['a'])} and {_number(record['value_b'])} for the raw-latent probe direction "
                f"({_of(record)}); {_difference(record)}."
            )
            verdict = {"better": "positive", "worse": "negative"}.get(record["verdict"], "undecided")
            if kind == "dsp_lowpass":  # a filter that beats the direction is bad news for the knob
                verdict = {"positive": "negative", "negative": "positive"}.get(verdict, verdict)
            lines.append(_headline("steering", verdict, text))
    return lines


def _importance_headlines(summary: dict[str, Any], comparisons: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = summary["importance"]
    if found is None:
        return []
    text = (
        f"The SAE × probe map calls {found['expendable']} of {found['width']} latent dimensions expendable, "
        f"{found['moderate']} moderate and {found['critical']} critical."
    )
    lines = [_headline("importance", "measured", text)]
    for record in comparisons:
        if record.get("mode") == "mean" and record["b"] == "random" and record["measure"] != "latent_error":
            text = (
                f"Setting those {found['expendable']} to their mean: {MEASURE_NAMES[record['measure']]} "
                f"{_number(record['value_a'])}, against {_number(record['value_b'])} for random sets of the same size "
                f"({_of(record)}); {_difference(record)}."
            )
            verdict = {"better": "positive", "worse": "negative"}.get(record["verdict"], "undecided")
            lines.append(_headline("importance", verdict, text))
    return lines


def headlines(summary: dict[str, Any], shift: float | None) -> list[dict[str, str]]:
    """Sentences about one target's summary: [{topic, verdict, text}].

    verdict: "positive" or "negative" (for the method's claims) where an interval excludes 0, "undecided" where it
    holds 0, "measured" for figures that test no claim. shift: the centroid ratio that steering was asked for.
    """
    comparisons = summary["comparisons"]
    return [
        *_codec_headlines(summary),
        *_sae_headlines(summary),
        *_probe_headlines(summary, comparisons),
        *_steering_headlines(summary, comparisons, shift),
        *_importance_headlines(summary, comparisons),
    ]
