"""How well the SAEs reconstruct, and how sparse they are: the table `sae.csv`."""

from typing import Any

from eqknobs.evidence.estimates import Measure, counts, estimate, groups, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import ends, estimated, headline, number, sample
from eqknobs.plan import layer_of

STAGE = "saes"
COLUMNS = {
    "sae": "target sae variant seed d_in d_sae split l0 fvu dead_share layer input_scale clips speakers fvu_low "
    "fvu_high cosine",
}
NOTHING: dict[str, Any] = {"sae": []}
FVU = Measure("fvu", "sq_error", "sq_total", "lower")
COSINE = Measure("cosine", "cosine_sum", "frames", "higher")
L0 = Measure("l0", "l0_sum", "frames")
DENSE_SHARE = 0.1  # a code with more than this share of its features active is called not sparse


def tabulate(at: Context) -> Tabulated:
    """One row a (SAE, seed, split). Dead share is counted on val, so it stands in the val rows only."""
    details = at.inputs.json(f"saes/{at.target}/saes.json")["saes"]
    found = []
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
        if key["split"] == "val":
            row["dead_share"] = details[key["sae"]][str(key["seed"])]["dead_share"]
        found.append(row)
    rows = table(found, COLUMNS["sae"])
    first = (rows["seed"] == rows["seed"].min()) & (rows["split"] == "test")
    return Tabulated({"sae": rows}, {"sae": records(rows[first].drop(columns=["dead_share", "layer", "input_scale"]))})


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
    return lines
