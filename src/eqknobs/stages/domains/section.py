"""Features of domains: the section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, figure, legend
from eqknobs.evidence.stage import Context
from eqknobs.evidence.wording import number
from eqknobs.plan import parse_target

STAGE, TITLE, SOUNDS = "domains", "Domains", False
ABOUT = "Which features belong to speech, music or other sounds, beside permuted domains."
PUBLISHED_SOURCE = "AudioSAE (arXiv 2602.05027)."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "domains": (
        ["AudioSAE, Whisper-small, 6,144 features a layer", "share of features"],
        [
            ["music, by clips", "20–28 % (most at layer 5)"],
            ["speech, by clips", "at most 13 %; a few % from layer 7 on"],
            ["speech, by frames", "2 % at layer 6, 3.5 % at layer 7"],
            ["other sounds", "almost all inside music"],
        ],
    ),
}
COLOURS = ("blue", "orange", "green", "purple", "sky", "yellow")


def _hue(domain: str, domains: list[str]) -> str:
    return HUES[COLOURS[domains.index(domain) % len(COLOURS)]]


def _bars(rows: pd.DataFrame, domains: list[str], level: str) -> dict[str, str]:
    """Share of features of each domain, at every τ, beside permuted domains."""
    taus = sorted(rows["tau"].unique(), reverse=True)

    def draw(axes: plt.Axes) -> None:
        width = 0.8 / len(taus)
        for place, tau in enumerate(taus):
            own = rows[rows["tau"] == tau].set_index("domain").reindex(domains)
            x = np.arange(len(domains)) + width * (place - (len(taus) - 1) / 2)
            error = [own["share"] - own["share_low"], own["share_high"] - own["share"]]
            hues = [_hue(domain, domains) for domain in domains]
            axes.bar(x, own["share"], 0.9 * width, color=hues, alpha=1 - 0.3 * place)
            axes.errorbar(x, own["share"], np.clip(error, 0, None), fmt="none", ecolor=INK, lw=1)
            mid, ends = own["permuted"], [own["permuted"] - own["permuted_low"], own["permuted_high"] - own["permuted"]]
            label = "domains permuted over sources" if place == 0 else None
            axes.errorbar(x, mid, np.clip(ends, 0, None), fmt="_", color=FAINT, ms=8, lw=2.5, alpha=0.8, label=label)
        axes.set_xticks(np.arange(len(domains)), domains)
        axes.set(ylabel="share of features", ylim=(0, None))
        legend(axes)

    caption = f"From dark to pale: τ {', '.join(f'{tau:g}' for tau in taus)}. Thin lines: 95 %."
    return figure(f"Labelled features, by {level}s", draw, caption)


def _sets(own: pd.DataFrame, domains: list[str], column: str, tau: float) -> dict[str, str]:
    """How many features have just these labels (an UpSet plot)."""
    has = own.pivot(index="feature", columns="domain", values=column).astype(bool)[domains]
    sizes = has[has.any(axis=1)].value_counts()

    def draw(axes: plt.Axes) -> None:
        axes.bar(range(len(sizes)), sizes.to_numpy(), color=HUES["grey"])
        for x, (labels, size) in enumerate(sizes.items()):
            axes.text(x, size, str(size), ha="center", va="bottom", fontsize=8)
            for y, (domain, on) in enumerate(zip(domains, labels, strict=True)):
                below = -0.12 - 0.09 * y
                axes.plot(
                    x,
                    below,
                    "o",
                    color=_hue(domain, domains) if on else FAINT,
                    alpha=1 if on else 0.25,
                    transform=axes.get_xaxis_transform(),
                    clip_on=False,
                )
        for y, domain in enumerate(domains):
            axes.text(
                -0.7,
                -0.12 - 0.09 * y,
                domain,
                ha="right",
                va="center",
                fontsize=8.5,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
            )
        axes.set(ylabel="features", xlim=(-0.6, max(len(sizes), 1) - 0.4))
        axes.set_xticks([])

    caption = f"Features with just these labels, by frames, τ {tau:g}."
    return figure("Which labels go together", draw, caption)


def _mapped(drawn: dict[str, Any], domains: list[str]) -> dict[str, str]:
    def draw(axes: plt.Axes) -> None:
        x, labels = np.array(drawn["x"]), drawn["labels"]
        for domain in domains:
            own = [i for i, found in enumerate(labels) if found == [domains.index(domain)]]
            axes.plot(*x[own].T, "o", ms=2.5, color=_hue(domain, domains), label=domain)
        several = [i for i, found in enumerate(labels) if len(found) > 1]
        axes.plot(*x[several].T, "o", ms=2, color=FAINT, alpha=0.6, label="several")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        legend(axes, 4)

    caption = "t-SNE of the encoder's rows of labelled features, by cosine."
    if drawn["silhouette"] is not None:
        shuffled = drawn["silhouette_shuffled"]
        caption += f" Silhouette of the labels {number(drawn['silhouette'], True)}; shuffled, "
        caption += f"{number(min(shuffled), True)} to {number(max(shuffled), True)}."
    return figure("Map of labelled features", draw, caption, height=3.4)


def _layers(rows: pd.DataFrame, domains: list[str], level: str) -> dict[str, str]:
    """Features of one domain alone, over the layers of the model, at the largest τ."""
    top = rows[rows["tau"] == rows["tau"].max()]

    def draw(axes: plt.Axes) -> None:
        for domain in domains:
            own = top[top["domain"] == domain].sort_values("layer")
            axes.plot(own["layer"], own["exclusive"], "o-", color=_hue(domain, domains), label=domain)
        axes.set(xlabel="layer", ylabel="share of features", ylim=(0, None), xticks=sorted(top["layer"].unique()))
        legend(axes)

    return figure(f"Over layers, by {level}s", draw, f"Features with this label alone, τ {top['tau'].max():g}.")


def show(at: Context) -> dict[str, Any]:
    """Labelled features by domain, which labels go together, the map, and the curve over layers."""
    rows, about = at.inputs.csv("tables/domains.csv"), at.inputs.json(f"domains/{at.target}.json")
    model, corpus = parse_target(at.target)[0], at.target.partition("@")[2]
    alike = rows[[parse_target(t)[0] == model and t.partition("@")[2] == corpus for t in rows["target"]]]
    features, domains = at.inputs.csv(f"scores/{at.target}.domains.csv"), about["domains"]
    drawn = []
    own = rows[rows["target"] == at.target]
    for sae, part in own.groupby("sae"):
        frame = part[part["level"] == "frame"]
        least = frame["tau"].min()
        drawn += [_bars(part[part["level"] == level], domains, level) for level in ("frame", "clip")]
        drawn.append(_sets(features[features["sae"] == sae], domains, f"frame_{least:g}", least))
        if about["saes"][sae]["map"]:
            drawn.append(_mapped(about["saes"][sae]["map"], domains))
        curve = alike[(alike["sae"] == sae) & alike["layer"].notna()]
        if curve["layer"].nunique() > 1:
            drawn += [_layers(curve[curve["level"] == level], domains, level) for level in ("frame", "clip")]
    columns = {
        "SAE": "sae",
        "domain": "domain",
        "by": "level",
        "τ": ("tau", 2),
        "features": ("share", 3),
        "this label alone": ("exclusive", 3),
        "permuted over sources": ("permuted", 3),
        "over clips": ("permuted_clips", 3),
        "kept, any source left out": ("left_out", 2),
        "clips / sources": lambda r: f"{r['clips']} / {r['sources']}",
    }
    return {
        "drawn": drawn,
        "found": display.laid_out(own, columns),
        "dead": {s: f["dead"] for s, f in about["saes"].items()},
    }
