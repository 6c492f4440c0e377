"""What the numbers allow one to say: sentences made from the summary, phrased by the sign of each interval."""

import re
from collections.abc import Iterable
from typing import Any

from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import counted

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
    "dsp_lowpass": "low-pass filter before the codec",
    "dsp_bandpass": "band-pass 300–3000 Hz before the codec",
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
    "none": "nothing removed",
}
MEASURE_NAMES = {
    "wer": "WER",
    "speaker_similarity": "speaker similarity",
    "mel_distance": "mel distance",
    "latent_error": "latent error",
    "accuracy": "accuracy",
}


def label(name: str, words: dict[str, str] = ARMS | SPACES) -> str:
    """Plain words for an arm, a space or (words=MAPS) a map: "sae_clamp:topk" -> "SAE feature clamp (topk)"."""
    kind, _, sae = name.partition(":")
    return f"{words.get(kind, kind)} ({sae})" if sae else words.get(kind, kind)


def _number(value: float, signed: bool = False) -> str:
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-", "−")


def _range(low: float, high: float, signed: bool = False) -> str:
    return f"[{_number(low, signed)}, {_number(high, signed)}]"


def _of(row: dict[str, Any]) -> str:
    clips, speakers = row.get("clips", row.get("utterances")), row["speakers"]
    return f"{counted(clips, 'clip')}, {counted(speakers, 'speaker')}"


def _listed(names: Iterable[str]) -> str:
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last


def _said(record: dict[str, Any]) -> tuple[str, str]:
    """What a comparison does to the claim that a is the better one: (verdict, words).

    An interval that holds 0, or a p that fails Holm's correction, shows nothing.
    """
    if record["verdict"] == "undecided":
        return "undecided", "is not shown to differ from"
    if record["p_holm"] >= 0.05:
        return "undecided", f"looks {record['verdict']} than, but after Holm's correction is not shown to differ from,"
    return ("positive" if record["verdict"] == "better" else "negative"), f"does {record['verdict']} than"


def _numbers(record: dict[str, Any]) -> str:
    """Both values, the paired difference with its interval, p and counts."""
    p = f"p = {record['p_holm']:.3f}" + (f" (Holm, {record['compared']})" if record["compared"] > 1 else "")
    return (
        f"{MEASURE_NAMES[record['measure']]} {_number(record['value_a'])} against {_number(record['value_b'])}; "
        f"difference {_number(record['difference'], True)} {_range(record['low'], record['high'], True)}; {p}; "
        f"{_of(record)}"
    )


def _headline(topic: str, verdict: str, text: str, detail: str = "") -> dict[str, str]:
    return {"topic": topic, "verdict": verdict, "text": text, "detail": detail}


def _codec(summary: dict[str, Any]) -> list[dict[str, str]]:
    words = summary["words"]
    if words is None:
        return []
    wer = f"{_number(words['wer'])} {_range(words['wer_low'], words['wer_high'])}"
    text = f"The codec alone, at {counted(words['codebooks'], 'codebook')}, costs a word error rate of {wer}"
    if not words["measurable"]:
        text += f": above {words['threshold']}, so what an edit costs in words is {UNMEASURABLE}"
    detail = f"against the recogniser's own transcript of the untouched clip; {_of(words)}"
    return [_headline("codec", "measured", f"{text}.", detail)]


def _saes(summary: dict[str, Any]) -> list[dict[str, str]]:
    lines = []
    for row in summary["sae"]:
        share = row["l0"] / row["d_sae"]
        dense = share > DENSE_SHARE
        text = f"SAE {row['sae']} {'is not sparse' if dense else 'is sparse'}: {row['l0']:.1f} of {row['d_sae']} "
        text += f"features fire in a frame ({share:.1%}). It leaves {_number(row['fvu'])} of the variance unexplained."
        detail = f"FVU {_range(row['fvu_low'], row['fvu_high'])}; {_of(row)}; called sparse up to {DENSE_SHARE:.0%}"
        lines.append(_headline("sae", "measured", text, detail))
    return lines


def _probes(summary: dict[str, Any]) -> list[dict[str, str]]:
    lines = []
    for record in summary["comparisons"]:
        if not re.fullmatch("probe, (quantile|category), minus (raw|random_topk)", record["family"]):
            continue
        null = next(r for r in summary["probes"] if (r["space"], r["property"]) == (record["a"], record["property"]))
        verdict, words = _said(record)
        name = PROPERTIES[record["property"]].title
        text = f"{name}: the probe on {label(record['a'])} {words} the one on {label(record['b'])}."
        nulls = f"majority {_number(null['majority'])}, shuffled labels {_number(null['shuffled'])}"
        lines.append(_headline("probe", verdict, text, f"{_numbers(record)}; {nulls}; {_classes(record['property'])}"))
    return lines


def _classes(name: str) -> str:
    return "categories" if PROPERTIES[name].kind == "category" else "quantile bins"


def _readable(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Where there is no SAE to compare: what the latents' own probes read, beside log-mel and the nulls."""
    if summary["sae"]:
        return []
    lines = []
    spaces = {(row["space"], row["property"]): row for row in summary["probes"]}
    for (space, name), row in spaces.items():
        if space != "raw":
            continue
        text = f"{PROPERTIES[name].title}: the probe on {label(space)} names the right class in "
        text += f"{_number(row['accuracy'])} {_range(row['accuracy_low'], row['accuracy_high'])} of the frames"
        if rival := spaces.get(("logmel", name)):
            text += f"; the one on {label('logmel')} in {_number(rival['accuracy'])}"
        nulls = f"majority {_number(row['majority'])}, shuffled labels {_number(row['shuffled'])}"
        lines.append(_headline("probe", "measured", f"{text}.", f"{nulls}; {_of(row)}; {_classes(name)}"))
    return lines


def _steering(summary: dict[str, Any], shift: float) -> list[dict[str, str]]:
    arms = summary["steering"]
    reached = [row["arm"] for row in arms if row["calibrated"] == "reached"]
    missed = [row["arm"] for row in arms if row["calibrated"] == "unreached"]
    text = f"{len(reached)} of {counted(len(arms), 'arm')} can lower the spectral centroid to {shift:g} × the codec's "
    text += "round trip."
    if missed:
        text += f" Not reached, so not ranked: {_listed(label(arm) for arm in missed)}."
    centroids = [row["centroid_hz"] for row in arms if row["calibrated"] == "reached"]
    detail = "strength chosen on val"
    if centroids:
        detail += f"; on test the centroids of these arms span {min(centroids):.0f} to {max(centroids):.0f} Hz"
    if "random" in reached:
        detail += "; the random direction reaches it too"
    lines = [_headline("steering", "measured", text, detail)]
    if "raw_probe" not in reached:
        text = "The raw-latent probe direction misses the shift: there is nothing to compare the SAEs with."
        lines.append(_headline("steering", "undecided", text))
    for record in summary["comparisons"]:
        kind = record["a"].partition(":")[0]
        if not record["family"].startswith("steering") or kind not in ("sae_probe", "dsp_lowpass"):
            continue
        if record["b"] == "raw_probe":
            verdict, words = _said(record)
            if kind == "dsp_lowpass":  # a plain filter that beats the direction is bad news for the knob
                verdict = {"positive": "negative", "negative": "positive"}.get(verdict, verdict)
            text = f"At the matched shift, in {MEASURE_NAMES[record['measure']]}, the {label(record['a'])} {words} "
            lines.append(_headline("steering", verdict, f"{text}the raw-latent one.", _numbers(record)))
    return lines


def _importance(summary: dict[str, Any]) -> list[dict[str, str]]:
    found = summary["importance"]
    if found is None:
        return []
    text = f"The map calls {found['expendable']} of {found['width']} latent dimensions expendable, "
    text += f"{found['moderate']} moderate and {found['critical']} critical."
    lines = [_headline("importance", "measured", text, "thresholds .3 and .7 of the maximum, as in version 1")]
    for record in summary["comparisons"]:
        if (
            record.get("mode") == "mean"
            and record["b"] in ("random", "raw_probe")
            and record["measure"] != "latent_error"
        ):
            verdict, words = _said(record)
            rival = "at random" if record["b"] == "random" else "by the raw-probe map"
            text = (
                f"Removing the {counted(record['removed_dims'], 'dimension')} the map ranks lowest {words} removing as "
            )
            text += f"many {rival}, in {MEASURE_NAMES[record['measure']]}."
            lines.append(_headline("importance", verdict, text, _numbers(record)))
    return lines


def headlines(summary: dict[str, Any], shift: float) -> list[dict[str, str]]:
    """Sentences about one target's summary: [{topic, verdict, text, detail}].

    verdict: "positive" or "negative" (for the method's claims) where the interval excludes 0 and Holm's correction
    holds, "undecided" where not, "measured" for figures that test no claim. shift: the centroid ratio asked for.
    """
    return [
        *_codec(summary),
        *_saes(summary),
        *_probes(summary),
        *_readable(summary),
        *(_steering(summary, shift) if summary["steering"] else []),
        *_importance(summary),
    ]
