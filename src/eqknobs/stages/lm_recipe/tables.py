"""What a smaller speech LM says, before and after a short training: the tables `lm_recipe.csv` and `lm_recovery.csv`.

In place of a target stands the model. Intervals and comparisons resample prompts, then draws; differences are paired:
the same prompts and draws. Split `val` is what the recipe was chosen by, `test` what it is judged by.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from eqknobs.evidence.comparisons import compare, compare_changes
from eqknobs.evidence.estimates import Measure, groups, records, table
from eqknobs.evidence.spoken import (
    DELTAS,
    NLL_INTACT,
    SILENT_SHARE,
    SIMILARITY_INTACT,
    SIMILARITY_PROMPT,
    WORDS,
    answered,
    bounds_of,
    by_prompt,
    counted_prompts,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, headline, number, said

STAGE = "lm_recipe"
INTACT = "none:0:0:none:0:0"
MADE = "state order seed share trained heads_removed codebooks bits bits_mean bytes bytes_resident step_ratio"
MEASURES = (
    *WORDS,
    NLL_INTACT,
    SILENT_SHARE,
    SIMILARITY_PROMPT,
    SIMILARITY_INTACT,
)
COLUMNS = {
    "lm_recipe": " ".join(
        [
            f"model split {MADE} chosen answers prompts speakers",
            *(m.name for m in MEASURES),
            *DELTAS,
            *bounds_of(MEASURES),
        ]
    ),
    "lm_recovery": "model split measure order seed share trained steps learning_rate chosen answers prompts speakers "
    "before after change change_low change_high control control_low control_high net net_low net_high p verdict",
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
        found.append(row | answered(mine, None if key["condition"] == INTACT else intact, MEASURES, at.cfg))
    return table(found, COLUMNS["lm_recipe"])


def trainings(whole: pd.DataFrame) -> Iterator[tuple[dict[str, Any], list[pd.DataFrame]]]:
    """Of every training of a pruned model (order, seed, share, trained) the answers after and before, and those of the
    control, the intact model trained alike, after and before. whole: answers of models not shortened, not packed."""
    control = whole[whole["order"] == "none"]
    unchanged = control[control["trained"] == "none"]
    pruned = whole[whole["order"] != "none"]
    for key, mine in groups(pruned, ["order", "seed", "share"]):
        before = mine[mine["trained"] == "none"]
        for data, after in mine[mine["trained"] != "none"].groupby("trained", sort=False):
            yield {**key, "trained": data}, [after, before, control[control["trained"] == data], unchanged]


def recovery_table(at: Context, answers: pd.DataFrame, paces: pd.DataFrame, pace: dict[str, Any]) -> pd.DataFrame:
    """One row a training and measure: on val of every pace that was tried, on test of the one that was taken, net of
    what the same training does to the intact model. pace: that one, steps and learning_rate."""
    rows = []
    for split in ("val", "test"):
        mine = answers[(answers["split"] == split) & (answers["kept"] == 0) & (answers["bits"] == 0)]
        rows += _tried(at, mine, paces, pace) if split == "val" else _netted(at, mine, pace)
    return table(rows, COLUMNS["lm_recovery"])


def _tried(at: Context, val: pd.DataFrame, paces: pd.DataFrame, pace: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, after in groups(paces, ["order", "seed", "share", "trained", *pace]):
        same = (val["order"] == key["order"]) & (val["seed"] == key["seed"]) & (val["share"] == key["share"])
        before = val[same & (val["trained"] == "none") & val["draw"].isin(after["draw"])]
        chosen = int(all(key[name] == value for name, value in pace.items()))
        rows += [{**row, "chosen": chosen} for row in _changed(at, "val", key, [after, before])]
    return rows


def _netted(at: Context, test: pd.DataFrame, pace: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**row, **pace, "chosen": 1} for key, parts in trainings(test) for row in _changed(at, "test", key, parts)]


def _changed(at: Context, split: str, key: dict[str, Any], parts: list[pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Rows of one training: answers after, before and, where there is one, of the control after and before."""
    after, parts = parts[0], [by_prompt(part) for part in parts]
    for measure in WORDS:
        own = compare(parts[0], parts[1], measure, at.cfg)
        if own is None:
            continue
        row = {"model": at.target, "split": split, "measure": measure.name, **key, "answers": len(after)}
        row |= {"prompts": after["id"].nunique(), "speakers": after["speaker"].nunique()}
        row |= {"before": own["value_b"], "after": own["value_a"], **_ends("change", own)}
        if len(parts) == 4:
            control, net = compare(parts[2], parts[3], measure, at.cfg), _net(at, parts, measure)
            if control is not None and net is not None:
                row |= {**_ends("control", control), **_ends("net", net), "p": net["p"], "verdict": net["verdict"]}
        yield row


def _net(at: Context, parts: list[pd.DataFrame], measure: Measure) -> dict[str, Any] | None:
    """The change of a training less the control's."""
    after, before, control_after, control_before = parts
    return compare_changes(after, before, control_after, control_before, measure, at.cfg)


def _ends(name: str, record: dict[str, Any]) -> dict[str, float]:
    return {name: record["difference"], f"{name}_low": record["low"], f"{name}_high": record["high"]}


def compared(at: Context, answers: pd.DataFrame) -> list[dict[str, Any]]:
    """On test: what training changes in every pruned model against what it changes in the intact one, the control; that
    too, which claims nothing; the first order against the others, trained."""
    test, found = answers[answers["split"] == "test"], []
    whole = test[(test["kept"] == 0) & (test["bits"] == 0)]
    for key, parts in trainings(whole):
        about = {"a": "trained", "b": "untrained", "order": key["order"], "data": key["trained"]}
        about |= {"share": float(key["share"]), "order_seed": int(key["seed"])}
        for measure in WORDS:
            if record := _net(at, [by_prompt(part) for part in parts], measure):
                found.append(_record(record, about, measure, parts[0]))
    first = next((order for order in whole["order"] if order != "none"), None)
    for (order, seed, share), mine in whole.groupby(["order", "seed", "share"], sort=False):
        before = mine[mine["trained"] == "none"]
        for data, after in mine[mine["trained"] != "none"].groupby("trained", sort=False):
            if order == "none":
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
            found.append(_record(record, about, measure, a))
    return found


def _record(record: dict[str, Any], about: dict[str, Any], measure: Measure, rows: pd.DataFrame) -> dict[str, Any]:
    family = {"family": f"lm_recipe, {measure.name}", "speakers": rows["speaker"].nunique()}
    return {**record, "property": None, "binning": None, **about, **family}


def tabulate(at: Context) -> Tabulated:
    """The stage's tables, and what its findings rest on."""
    answers = at.inputs.csv(f"scores/{at.target}.lm_recipe_answers.csv")
    made = at.inputs.json(f"lm/{at.target}/recipe.json")
    paces = at.inputs.csv(f"scores/{at.target}.lm_recipe_paces.csv")
    rows, recovery = recipe_table(at, answers, made["condition"]), recovery_table(at, answers, paces, made["training"])
    facts = {"margin": made["margin"], "val": made["prompts"]}
    facts |= {"rows": records(rows[(rows["split"] == "test") & ((rows["chosen"] == 1) | (rows["state"] == "intact"))])}
    return Tabulated({"lm_recipe": rows, "lm_recovery": recovery}, {"lm_recipe": facts}, compared(at, answers))


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
        text = f"With {share} ({ORDERS[record['order']]}{drawn}), training on {data} gives back "
        text += {"positive": "more than", "negative": "less than"}.get(verdict, "not demonstrably more than")
        text += " it changes in the intact model, in "
        where = (cell, f"{measure.said}, {share}")
        detail = "change of " + counted_prompts(record, measure)
        return headline(STAGE, verdict, f"{text}{measure.said}.", detail, where, difference(record))
    where = (cell, f"{measure.said}, {share}")
    return headline(
        STAGE, verdict, f"{text}{measure.said}.", counted_prompts(record, measure), where, difference(record)
    )
