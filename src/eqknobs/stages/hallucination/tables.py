"""What keeps a Whisper from writing where nobody speaks: the table `hallucination.csv`.

In place of a target stands the model. Rates are over clips of non-speech, words over clips of speech; intervals
resample pieces and voices, then clips.
"""

from typing import Any

import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import WER_TEXT, Measure, counts, estimate, groups, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, ends, estimated, headline, listed, number, numbers, said

STAGE = "hallucination"
SPOKEN = ("clean", "quiet", "noisy")  # domains of speech
WRITTEN = Measure("hallucination_rate", "written", None, "lower", "share of non-speech clips with words")
DETECTED = Measure("detection_rate", "detected", None, "lower", "share of non-speech clips detected as speech")
NO_SPEECH = Measure("no_speech_prob", "no_speech_prob", None, "higher", "no_speech_prob of non-speech")
DELETED = Measure("deletions", "deleted", "words_text", "lower", "share of words left out")
HEARD = Measure("detection_rate_speech", "detected", None, "higher", "share of speech clips detected as speech")
OF_SOUND, OF_SPEECH = (WRITTEN, DETECTED, NO_SPEECH), (WER_TEXT, DELETED, HEARD)
MEASURES = (*OF_SOUND, *OF_SPEECH)
POINT = ["arm", "layer", "k", "alpha"]
COLUMNS = {
    "hallucination": " ".join(
        [
            "target",
            *POINT,
            "chosen within_margin split domain",
            *(m.name for m in MEASURES),
            "clips speakers non_speech seeds",
            *(f"{m.name}{end}" for m in MEASURES for end in ("_low", "_high")),
        ]
    )
}
NOTHING: dict[str, Any] = {}
ARMS = {
    "none": "nothing done",
    "sae_inserted": "SAE inserted, α 0",
    "sae": "SAE features",
    "sae_scaled": "SAE features, scaled",
    "sae_error": "SAE features, error term kept",
    "random_features": "random SAE features",
    "mean_difference": "difference in means",
    "random_direction": "random direction",
    "muted_heads": "decoder heads muted",
    "symbols": "Whisper's own symbols",
    "no_speech": "gate on no_speech_prob",
    "no_speech_logprob": "gate on both (OpenAI's)",
    "energy": "gate on the level",
    "vad": "gate on Silero's VAD",
}
CHEAP = ("symbols", "no_speech", "no_speech_logprob", "energy", "vad")
MODEL = ("none", "sae_inserted", "sae_error", "random_features", "mean_difference", "random_direction", "muted_heads")
FORMS = ("sae", "sae_scaled")
BOUNDS = {"no_speech": "> {}", "no_speech_logprob": "> {}", "energy": "< {} dB", "vad": "< {}"}  # that keep silent


def setting(row: dict[str, Any]) -> str:
    """The point of a row in words: "layer 3, k 10, α 1"."""
    if row["arm"] in BOUNDS:
        return BOUNDS[row["arm"]].format(f"{row['alpha']:g}".replace("-", "−"))
    names = {"layer": "layer", "k": "heads" if row["arm"] == "muted_heads" else "k", "alpha": "α"}
    found = [f"{name} {row[key]:g}" for key, name in names.items() if row[key] is not None and not pd.isna(row[key])]
    return ", ".join(found)


def _measured(rows: pd.DataFrame, at: Context) -> dict[str, float]:
    """Every measure of the rows of a point, where it has clips for it; a clip's value is its mean over seeds."""
    names = ["written", "detected", "no_speech_prob", "errors_text", "words_text", "deleted"]
    rows = rows.groupby(["id", "speaker", "domain"], as_index=False)[names].mean()
    speech = rows["domain"].isin(SPOKEN)
    found: dict[str, float] = {}
    for part, measures in ((rows[~speech], OF_SOUND), (rows[speech], OF_SPEECH)):
        for measure in measures if len(part) else ():
            found |= estimate(part, measure, at.cfg)
    return found


def hallucination_rows(raw: pd.DataFrame, chosen: dict[str, Any], limit: float, at: Context) -> pd.DataFrame:
    """One row a point and split; of chosen points on test also one a domain. Seeds of random arms count together.

    chosen: arm -> its point; limit: word error rate of speech of val that a point may have.
    """
    found = []
    for key, rows in groups(raw, [*POINT, "split"]):
        point = chosen[key["arm"]]
        picked = all(_equal(key[name], point[name]) for name in POINT)
        val = raw[(raw["split"] == "val") & _same(raw, key) & raw["domain"].isin(SPOKEN)]
        within = bool(val["errors_text"].sum() / val["words_text"].sum() <= limit + 1e-12)
        domains = ["all", *(dict.fromkeys(rows["domain"]) if key["split"] == "test" else ())]
        for domain in domains:
            own = rows if domain == "all" else rows[rows["domain"] == domain]
            sounds = own.loc[~own["domain"].isin(SPOKEN), "id"].nunique()
            about = {"chosen": picked, "within_margin": within, "domain": domain, "non_speech": sounds}
            about |= {"target": at.target, "seeds": own["seed"].nunique()}
            found.append({**key, **about, **counts(own), **_measured(own, at)})
    return table(found, COLUMNS["hallucination"])


def _equal(a: Any, b: Any) -> bool:
    return (pd.isna(a) and (b is None or pd.isna(b))) or a == b


def _same(raw: pd.DataFrame, key: dict[str, Any]) -> pd.Series:
    """Which rows are of a point."""
    found = pd.Series(True, index=raw.index)
    for name in POINT:
        found &= raw[name].isna() if pd.isna(key[name]) else raw[name] == key[name]
    return found


def compared(raw: pd.DataFrame, form: str, at: Context) -> list[dict[str, Any]]:
    """The form of SAE features that val prefers against every other arm, each at its chosen point, on test: words
    written and word errors; against arms inside the model also what it says of no speech."""
    test = raw[raw["split"] == "test"]
    mine, found = test[test["arm"] == form], []
    for arm in ARMS:
        other = test[test["arm"] == arm]
        if arm == form or other.empty:
            continue
        inside = arm in (*MODEL, *FORMS)
        for measure in (WRITTEN, DETECTED, NO_SPEECH, WER_TEXT) if inside else (WRITTEN, WER_TEXT):
            spoken = measure is WER_TEXT
            a, b = (rows[rows["domain"].isin(SPOKEN) == spoken] for rows in (mine, other))
            if record := compare(a, b, measure, at.cfg):
                about = {"property": None, "binning": None, "a": form, "b": arm}
                found.append({**record, **about, "family": f"hallucination, {measure.name}"})
    return found


def tabulate(at: Context) -> Tabulated:
    """The table, its rows on test and of the chosen points on val, and comparisons."""
    raw = at.inputs.csv(f"scores/{at.target}.hallucination.csv")
    about = at.inputs.json(f"hallucination/{at.target}.json")
    rows = hallucination_rows(raw, about["arms"], about["limit"], at)
    shown = rows[rows["chosen"] & (rows["domain"] == "all")]
    facts = {"hallucination": records(shown), "hallucination_form": about["form"]}
    return Tabulated({"hallucination": rows}, facts, compared(raw, about["form"], at))


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the untouched model does; whether SAE features beat what is cheap; each comparison."""
    rows = {(row["arm"], row["split"]): row for row in facts["hallucination"]}
    own = [record for record in facts["comparisons"] if record["family"].startswith("hallucination, ")]
    lines = [_untouched(at, rows["none", "test"])]
    if cheap := [record for record in own if record["b"] in CHEAP and record["measure"] == WRITTEN.name]:
        lines.append(_verdict(at, facts["hallucination_form"], rows, cheap))
    for record in own:
        measure, (verdict, words) = next(m for m in MEASURES if m.name == record["measure"]), said(record)
        rival = ARMS[record["b"]]
        text = (
            f"{at.target}, {ARMS[record['a']]} against {rival}: in the {measure.said}, the former {words} the latter."
        )
        cell = (f"{ARMS[record['a']]}, against {rival}", measure.said)
        lines.append(headline(STAGE, verdict, text, numbers(record, measure), cell, difference(record)))
    return lines


def _untouched(at: Context, row: dict[str, Any]) -> dict[str, Any]:
    text = f"Untouched, {at.target} writes words for {number(row['hallucination_rate'])} "
    text += (
        f"{ends(row['hallucination_rate_low'], row['hallucination_rate_high'])} of the clips in which nobody speaks, "
    )
    text += f"while its no_speech_prob is below {at.own['tau']:g}, as for speech, in {number(row['detection_rate'])} "
    text += f"{ends(row['detection_rate_low'], row['detection_rate_high'])} of them."
    detail = f"WER {number(row['wer_text'])} on speech, clean, quiet and noisy; {counted(row['clips'], 'clip')}, "
    detail += f"{row['non_speech']} of them without speech"
    return headline(STAGE, "measured", text, detail, estimate=estimated(row, "hallucination_rate"))


def _verdict(
    at: Context, form: str, rows: dict[tuple[str, str], dict[str, Any]], cheap: list[dict[str, Any]]
) -> dict[str, Any]:
    """Whether the SAE beats the cheap rivals, on test: against all of them, beside the one that val would pick."""
    told = {record["b"]: said(record)[0] for record in cheap}
    won, lost = ([arm for arm, verdict in told.items() if verdict == v] for v in ("positive", "negative"))
    best = min(told, key=lambda arm: (rows[arm, "val"]["hallucination_rate"], rows[arm, "val"]["wer_text"]))
    mine, rival = rows[form, "test"], rows[best, "test"]
    text = f"SAE steering of {at.target} ({ARMS[form]}; {setting(mine)}) "
    if won and not lost:
        text += f"writes fewer words where nobody speaks than {len(won)} of {len(told)} cheap rivals"
    else:
        text += (
            f"does not beat the cheap rivals: it is better than {len(won)} and worse than {len(lost)} of {len(told)}"
        )
    text += f". It writes words for {number(mine['hallucination_rate'])} of the clips without speech at a WER of "
    text += f"{number(mine['wer_text'])} on speech; the {ARMS[best]} ({setting(rival) or 'no setting'}) for "
    text += f"{number(rival['hallucination_rate'])} at {number(rival['wer_text'])}."
    if not mine["within_margin"]:
        text += f" No point of it kept WER within {at.own['wer_margin']:g} of the untouched model's on val."
    detail = f"worse than: {listed(ARMS[arm] for arm in lost)}; " if lost else ""
    detail += f"better than: {listed(ARMS[arm] for arm in won)}; " if won else ""
    record = next(record for record in cheap if record["b"] == best)
    verdict = "positive" if len(won) == len(told) else "negative" if lost else "undecided"
    return headline(STAGE, verdict, text, detail + numbers(record, WRITTEN), estimate=difference(record))
