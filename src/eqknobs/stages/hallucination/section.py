"""The section of the report on what a Whisper writes where nobody speaks."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import soundfile as sf

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, Look, figure, legend, look
from eqknobs.evidence.listening import data_uri, mp3
from eqknobs.evidence.stage import Context
from eqknobs.io import require_renders
from eqknobs.stages.hallucination.tables import ARMS, SPOKEN, setting

STAGE, TITLE, SOUNDS = "hallucination", "Hallucinations", False
ABOUT = (
    "What Whisper writes where nobody speaks: SAE steering beside gates, a VAD and muted heads, and the words it costs."
)
PUBLISHED_SOURCE = (
    "AudioSAE (arXiv 2602.05027): Whisper-small; its detection rate on non-speech, share with no_speech_prob under .5. "
    "Follow-up (arXiv 2606.07473): texts. Calm-Whisper (arXiv 2505.12969): large-v3. Their settings were chosen on the "
    "sets that they report."
)
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "audiosae": (
        ["AudioSAE, detected as speech", "Musan", "FSD50K", "WHAM", "WER, test-clean (%)"],
        [
            ["nothing done", ".33", ".27", ".51", "5.1"],
            ["SAE inserted, α 0", ".31", ".24", ".36", "5.2"],
            ["difference in means, α 3", ".20", ".15", ".32", "5.3"],
            ["100 features, α 1", ".12", ".09", ".14", "5.5"],
            ["100 features, α 3", ".00", ".01", ".03", "98.4"],
        ],
    ),
    "texts": (
        ["texts where nobody speaks (%)", "before", "after"],
        [
            ["follow-up, small: SAE of layer 12, k 25, α 3", "72.63", "14.11"],
            ["follow-up, large-v3: SAE of layer 32", "86.88", "29.03, in its text 55.46"],
            ["follow-up, large-v3: activation steering", "86.88", "82.37"],
            ["Calm-Whisper, large-v3 (UrbanSound8K)", "–", "15.51"],
        ],
    ),
}
LOOKS = {
    "none": Look(INK, "o"),
    "sae_inserted": Look(HUES["sky"], "P"),
    "sae": Look(HUES["blue"], "s"),
    "sae_scaled": Look(HUES["purple"], "D"),
    "sae_error": Look(HUES["sky"], "^"),
    "random_features": Look(FAINT, "s"),
    "mean_difference": Look(HUES["green"], "v"),
    "random_direction": Look(FAINT, "v"),
    "muted_heads": Look(HUES["yellow"], "X"),
    "symbols": Look(HUES["orange"], "*"),
    "no_speech": Look(HUES["orange"], "<"),
    "no_speech_logprob": Look(HUES["orange"], ">"),
    "energy": Look(HUES["grey"], "p"),
    "vad": Look(HUES["orange"], "h"),
}
READ = ("none", "sae", "sae_scaled", "mean_difference", "muted_heads", "symbols", "no_speech", "vad")  # beside a player


def frontier(rows: pd.DataFrame, measure: str, title: str, label: str) -> dict[str, str]:
    """A measure of non-speech against the word error rate of speech: chosen points on test, with what val tried."""

    def draw(axes: plt.Axes) -> None:
        for arm, name in ARMS.items():
            color, marker = look(arm, LOOKS)
            own = rows[(rows["arm"] == arm) & (rows["domain"] == "all")]
            val, test = own[own["split"] == "val"], own[own["split"] == "test"]
            axes.plot(val["wer_text"], val[measure], marker, color=color, ms=3.5, alpha=0.35, mew=0)
            if len(test):
                x, y = test["wer_text"], test[measure]
                ends = [[v - test[f"{c}_low"], test[f"{c}_high"] - v] for v, c in ((x, "wer_text"), (y, measure))]
                bars: dict[str, Any] = {"elinewidth": 0.8, "ecolor": FAINT, "ls": "", "ms": 6}
                axes.errorbar(x, y, yerr=ends[1], xerr=ends[0], color=color, marker=marker, label=name, **bars)
        axes.set(xlabel="WER of speech, against its text", ylabel=label, ylim=(-0.04, 1.04))
        legend(axes, 3)

    best = "Upper" if measure == "no_speech_prob" else "Lower"
    caption = "Large: the point that val chose, on test, with 95 % intervals; small: every point on val. "
    caption += f"{best} left is best."
    return figure(title, draw, caption, height=4.6, width=6.2)


def heard(at: Context, scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Clips to play, each with what is written of it under the chosen points: [{domain, id, text, sound, takes}]."""
    name = f"renders/{at.target}/hallucination/index.csv"
    index, folder = at.inputs.csv(name), at.inputs.path(name).parent
    require_renders(folder / "index.csv", index["file"])
    test = scores[(scores["split"] == "test") & (scores["seed"] == 0)]
    found = []
    for row in index.to_dict("records"):
        wav, rate = sf.read(folder / row["file"], dtype="float32")
        own = test[test["id"] == row["id"]].set_index("arm")["transcript"]
        takes = [{"arm": ARMS[arm], "said": own[arm], "before": arm == "none"} for arm in READ if arm in own]
        text = row["text"] if isinstance(row["text"], str) else ""
        sound = data_uri("audio/mpeg", mp3(wav, rate))
        found.append({"domain": row["domain"], "id": row["id"], "text": text, "sound": sound, "takes": takes})
    return found


def show(at: Context) -> dict[str, Any]:
    """The frontier, clips with their transcripts, and the table: test, test by domain, val."""
    rows = at.inputs.csv("tables/hallucination.csv")
    rows = rows[rows["target"] == at.target]
    place = {arm: i for i, arm in enumerate(ARMS)}
    rows = rows.assign(order=rows["arm"].map(place)).sort_values("order", kind="stable")
    named: dict[str, Any] = {"arm": lambda r: ARMS[r["arm"]], "setting": lambda r: setting(r) or "–"}
    sound: dict[str, Any] = {
        "words": ("hallucination_rate", 2),
        "detected": ("detection_rate", 2),
        "no speech": ("no_speech_prob", 2),
    }
    speech: dict[str, Any] = {
        "WER": ("wer_text", 2),
        "deleted": ("deletions", 2),
        "speech detected": ("detection_rate_speech", 2),
    }
    kept: dict[str, Any] = {"margin kept": lambda r: "yes" if r["within_margin"] else "no"}
    test, val = rows[rows["split"] == "test"], rows[rows["split"] == "val"]
    domains = test[test["domain"] != "all"]
    by_domain: dict[str, Any] = {"arm": named["arm"]}
    for domain in dict.fromkeys(domains["domain"]):
        measure = "wer_text" if domain in SPOKEN else "hallucination_rate"
        by_domain[f"{domain}: {'WER' if domain in SPOKEN else 'words'}"] = (f"{domain}.{measure}", 2)
    about = at.inputs.json(f"hallucination/{at.target}.json")
    return {
        "drawn": [
            frontier(rows, "hallucination_rate", "Words where nobody speaks", "share of non-speech clips with words"),
            frontier(rows, "no_speech_prob", "What the model says of it", "mean no_speech_prob of non-speech"),
        ],
        "test": display.laid_out(test[test["domain"] == "all"], {**named, **sound, **speech, **kept}),
        "domains": display.laid_out(_wide(domains), by_domain),
        "val": display.laid_out(val, {**named, **sound, **speech, **kept}),
        "samples": {split: display.sample(own.iloc[0].to_dict()) for split, own in (("test", test), ("val", val))},
        "clips": heard(at, at.inputs.csv(f"scores/{at.target}.hallucination.csv")),
        "about": about,
        "tau": at.own["tau"],
        "wer_margin": at.own["wer_margin"],
        "non_speech": ", ".join(at.own["non_speech"]).capitalize(),
        "held_out": at.own["held_out"],
    }


def _wide(domains: pd.DataFrame) -> pd.DataFrame:
    """One row an arm, with the columns `<domain>.<measure>` and their intervals."""
    found: dict[str, dict[str, Any]] = {}
    for row in domains.to_dict("records"):
        mine = found.setdefault(row["arm"], {"arm": row["arm"]})
        for name in ("wer_text", "hallucination_rate"):
            mine |= {f"{row['domain']}.{name}{end}": row[f"{name}{end}"] for end in ("", "_low", "_high")}
    return pd.DataFrame(list(found.values()))
