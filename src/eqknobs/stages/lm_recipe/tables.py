"""What a smaller speech LM says, before and after a short training: the table `lm_recipe.csv`.

In place of a target stands the model. Intervals and comparisons resample prompts, then draws; differences are paired:
the same prompts and draws. Split `val` is what the recipe was chosen by, `test` what it is judged by.
"""

from typing import Any

import pandas as pd

from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import Measure, estimate, groups, records, table
from eqknobs.evidence.spoken import (
    SIMILARITY_INTACT,
    SIMILARITY_PROMPT,
    WORDS,
    by_prompt,
    counted_prompts,
    paired,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, headline, number, said

STAGE = "lm_recipe"
INTACT = "none:0:0:none:0:0"
MADE = "state order seed share trained heads_removed codebooks bits bits_mean bytes bytes_resident step_ratio"
MEASURES = (
    *WORDS,
    Measure("nll_intact", "nll_intact", None, "lower"),
    Measure("silent_share", "silent", None, "lower"),
    SIMILARITY_PROMPT,
    SIMILARITY_INTACT,
)
DELTAS = [f"delta_{m.name}{end}" for m in WORDS for end in ("", "_low", "_high")]
BOUNDS = [f"{m.name}{end}" for m in MEASURES for end in ("_low", "_high")]
COLUMNS = {
    "lm_recipe": " ".join(
        [f"model split {MADE} chosen answers prompts speakers", *(m.name for m in MEASURES), *DELTAS, *BOUNDS]
    )
}
NOTHING: dict[str, Any] = {}
ORDERS = {
    "acoustic_first": "most acoustic first",
    "acoustic_last": "least acoustic first",
    "random": "at random",
    "random_layers": "at random, as many of each layer",
    "norm": "smallest weight norm first",
    "gradient": "smallest gradient first",
    "damage": "least damage one at a time first",
}
DATA = {"distilled": "its own answers", "sentences": "recorded sentences"}


def described(row: dict[str, Any], codebooks: int) -> str:
    """A row in words. codebooks: of the intact model."""
    heads = row["heads_removed"]
    parts = [f"{row['share']:.0%} of heads out, {ORDERS[row['order']]}"] if heads else []
    parts += [f"trained on {DATA[row['trained']]}"] if row["trained"] != "none" else []
    parts += [f"{row['codebooks']} codebooks"] if row["codebooks"] < codebooks else []
    parts += [f"{row['bits']:g} bits"] if row["bits"] else []
    return "; ".join(parts) or "intact"


def recipe_table(at: Context, answers: pd.DataFrame, recipe: str) -> pd.DataFrame:
    """One row a model and split, the intact one first."""
    found = []
    for key, mine in groups(answers, ["split", "condition", "model", *MADE.split()]):
        intact = answers[(answers["condition"] == INTACT) & (answers["split"] == key["split"])]
        row = {**key, "chosen": int(key["condition"] == recipe)}
        row |= {"answers": len(mine), "prompts": mine["id"].nunique(), "speakers": mine["speaker"].nunique()}
        for measure in MEASURES:
            row |= estimate(by_prompt(mine), measure, at.cfg)
        for measure in WORDS if key["condition"] != INTACT else ():
            if record := paired(intact, mine, measure, at.cfg):
                name = f"delta_{measure.name}"
                row |= {name: record["difference"], f"{name}_low": record["low"], f"{name}_high": record["high"]}
        found.append(row)
    return table(found, COLUMNS["lm_recipe"])


def compared(at: Context, answers: pd.DataFrame) -> list[dict[str, Any]]:
    """On test: every pruned model trained against untrained (the intact model cancels, so that this is the difference
    of their differences to it), the intact one too, which is the control; the first order against the others."""
    test, found = answers[answers["split"] == "test"], []
    whole = test[(test["kept"] == 0) & (test["bits"] == 0)]
    first = next((order for order in whole["order"] if order != "none"), None)
    for (order, seed, share), mine in whole.groupby(["order", "seed", "share"], sort=False):
        before = mine[mine["trained"] == "none"]
        for data, after in mine[mine["trained"] != "none"].groupby("trained", sort=False):
            about = {"a": "trained", "b": "untrained", "order": order, "data": data, "share": float(share)}
            found += _records(at, after, before, about | {"order_seed": int(seed)})
            if order == first:
                same = (whole["share"] == share) & (whole["trained"] == data) & ~whole["order"].isin(["none", first])
                for rival, rows in whole[same].groupby("order", sort=False):
                    about = {"a": first, "b": rival, "order": order, "data": data, "share": float(share)}
                    found += _records(at, after, rows, about | {"order_seed": int(seed)})
    return found


def _records(at: Context, a: pd.DataFrame, b: pd.DataFrame, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Comparisons of two models in both word error rates."""
    found = []
    for measure in WORDS:
        if record := compare(by_prompt(a), by_prompt(b), measure, at.cfg):
            family = {"family": f"lm_recipe, {measure.name}", "speakers": a["speaker"].nunique()}
            found.append({**record, "property": None, "binning": None, **about, **family})
    return found


def tabulate(at: Context) -> Tabulated:
    """The stage's table, and what its findings rest on."""
    answers = at.inputs.csv(f"scores/{at.target}.lm_recipe_answers.csv")
    made = at.inputs.json(f"lm/{at.target}/recipe.json")
    rows = recipe_table(at, answers, made["condition"])
    facts = {"margin": made["margin"], "val": made["prompts"]}
    facts |= {"rows": records(rows[(rows["split"] == "test") & ((rows["chosen"] == 1) | (rows["state"] == "intact"))])}
    return Tabulated({"lm_recipe": rows}, {"lm_recipe": facts}, compared(at, answers))


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Which the recipe is and what it costs; whether training helps a pruned model, and the intact one."""
    own, lines = facts["lm_recipe"], []
    intact, recipe = own["rows"][0], own["rows"][-1]
    text = f"Chosen on {own['val']} val prompts (smallest file of which both upper 95 % bounds of ΔWER are at most "
    text += f"{own['margin']:.2f}): {described(recipe, intact['codebooks'])}, {megabytes(recipe['bytes'])} of "
    text += f"{megabytes(intact['bytes'])}, {recipe['step_ratio']:.2f} times the time a frame"
    detail = f"{recipe['prompts']} test prompts: "
    if recipe["state"] == "intact":
        text = f"No smaller model keeps both upper 95 % bounds of ΔWER within {own['margin']:.2f} on "
        text += f"{own['val']} val prompts: the recipe is the intact model"
        detail = "few prompts make bounds wide"
    else:
        highs = {measure.said: recipe[f"delta_{measure.name}_high"] for measure in WORDS}
        kept = all(high is not None and high <= own["margin"] for high in highs.values())
        text += ", which holds" if kept else ", which does not hold"
        text += " on test prompts"
        detail += "; ".join(
            f"{name}: Δ at most {'–' if high is None else number(high, True)}" for name, high in highs.items()
        )
    lines.append(headline(STAGE, "measured", text + ".", detail))
    names = {m.name: m for m in WORDS}
    for record in facts["comparisons"]:
        if record["family"].startswith("lm_recipe,"):
            lines.append(_compared(record, names[record["measure"]]))
    return lines


def _compared(record: dict[str, Any], measure: Measure) -> dict[str, Any]:
    """The sentence of one comparison."""
    verdict, words = said(record)
    share, data = f"{record['share']:.0%} of heads out", DATA[record["data"]]
    if record["b"] != "untrained":
        text = f"With {share} and trained on {data}, {ORDERS[record['a']]} {words} {ORDERS[record['b']]}, in "
        cell = f"{ORDERS[record['a']]} against {ORDERS[record['b']]}, trained on {data}"
    elif record["order"] == "none":
        text, cell = f"The intact model trained on {data} {words} itself untrained, in ", f"intact: trained on {data}"
        verdict, share = "measured", "no head out"  # the control claims nothing
    else:
        drawn = f" #{record['order_seed']}" if record["order"].startswith("random") else ""
        cell = f"{ORDERS[record['order']]}{drawn}: trained on {data}"
        text = f"With {share} ({ORDERS[record['order']]}{drawn}), training on {data} {words} none, in "
    where = (cell, f"{measure.said}, {share}")
    return headline(
        STAGE, verdict, f"{text}{measure.said}.", counted_prompts(record, measure), where, difference(record)
    )
