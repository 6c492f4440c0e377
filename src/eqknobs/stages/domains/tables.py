"""How many features belong to a domain: the table `domains.csv`."""

from typing import Any

import numpy as np

from eqknobs.errors import counted
from eqknobs.evidence.estimates import records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.stats import interval
from eqknobs.evidence.wording import ends, headline, number
from eqknobs.plan import layer_of

STAGE = "domains"
COLUMNS = {
    "domains": "target sae layer level domain tau split clips speakers share permuted left_out share_low share_high "
    "exclusive permuted_low permuted_high permuted_clips sources d_sae",
}
NOTHING: dict[str, Any] = {"domains": []}


def tabulate(at: Context) -> Tabulated:
    """One row a (SAE, level, domain, τ)."""
    features, about = at.inputs.csv(f"scores/{at.target}.domains.csv"), at.inputs.json(f"domains/{at.target}.json")
    rows = []
    for sae, found in about["saes"].items():
        own = features[features["sae"] == sae]
        for record in found["labels"]:
            level, tau, domain = record["level"], record["tau"], record["domain"]
            has = own.pivot(index="feature", columns="domain", values=f"{level}_{tau:g}").astype(bool)
            only = has[domain] & (has.sum(axis=1) == 1)
            low, high = interval(record["draws"])
            null_low, null_high = interval(record["permuted"])
            row = {"target": at.target, "sae": sae, "layer": layer_of(at.target), "level": level, "domain": domain}
            row |= {"tau": tau, "split": "+".join(sorted(about["splits"])), "clips": about["clips"][domain]}
            row |= {"speakers": about["speakers"], "sources": about["sources"][domain], "d_sae": found["d_sae"]}
            row |= {"share": has[domain].mean(), "exclusive": only.mean(), "left_out": record["left_out"]}
            row |= {"share_low": low, "share_high": high, "permuted": float(np.mean(record["permuted"]))}
            row |= {"permuted_low": null_low, "permuted_high": null_high}
            rows.append(row | {"permuted_clips": float(np.mean(record["permuted_clips"]))})
    made = table(rows, COLUMNS["domains"])
    return Tabulated({"domains": made}, {"domains": records(made)})


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each domain, at the largest τ of each level, whether more features have its label than chance gives one."""
    lines = []
    rows = facts["domains"]
    for sae in dict.fromkeys(row["sae"] for row in rows):
        for level in ("frame", "clip"):
            own = [row for row in rows if (row["sae"], row["level"]) == (sae, level)]
            top = max((row["tau"] for row in own), default=None)
            for row in (row for row in own if row["tau"] == top):
                above, below = row["share_low"] > row["permuted_high"], row["share_high"] < row["permuted_low"]
                verdict = "positive" if above else "negative" if below else "undecided"
                text = f"{number(row['share'])} of the features of {sae} fire on more {level}s of {row['domain']} "
                text += f"(by {row['tau']:g} or more) than of another domain."
                detail = f"95 % {ends(row['share_low'], row['share_high'])}; with domains permuted over sources "
                detail += f"{number(row['permuted'])} {ends(row['permuted_low'], row['permuted_high'])}, over clips "
                detail += f"{number(row['permuted_clips'])}; "
                kept = row["left_out"]
                detail += "" if kept is None else f"{number(kept)} of them whichever source is left out; "
                detail += f"{counted(row['clips'], 'clip')} of {counted(row['sources'], 'source')}"
                cell = (f"features of {row['domain']}, SAE {sae}", f"by {level}s, τ {row['tau']:g}")
                estimate = tuple(row[name] - row["permuted"] for name in ("share", "share_low", "share_high"))
                lines.append(headline("domains", verdict, text, detail, cell, estimate))
    return lines
