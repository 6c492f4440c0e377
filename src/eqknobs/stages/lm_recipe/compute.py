"""Recovery of a pruned speech LM by a short training, and the smallest model that still says what it is told.

Models are made of one another (`plan`): heads out, trained, codebooks out, packed. All answer the same prompts with the
same seeds as the intact model. The recipe is chosen by the answers to val prompts alone, and written as a model.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pandas as pd

from eqknobs.errors import EqknobsError
from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import IntervalsCfg, Measure
from eqknobs.io import read_csv, write_csv, write_json
from eqknobs.models import ModelCfg
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import save_net
from eqknobs.models.moshi.config import codec_of
from eqknobs.packing.modules import pack_modules
from eqknobs.pieces import Pieces
from eqknobs.provenance import content, module_inputs
from eqknobs.speaking.bench import Bench, PromptsCfg, Speech, SpokenCfg
from eqknobs.speaking.clips import encode_speech, read_clips
from eqknobs.speaking.prompts import Asked, Sentences
from eqknobs.speaking.scores import Judge, JudgeCfg
from eqknobs.speaking.takes import write_takes
from eqknobs.stages.lm_recipe import plan
from eqknobs.stages.lm_recipe.nets import Nets, Pace, PackingCfg, TrainingCfg, told
from eqknobs.stages.lm_recipe.plan import INTACT, Condition

BOUNDED = (
    Measure("wer_monologue", "errors_monologue", "words_monologue", "lower"),
    Measure("wer_prompt", "errors_prompt", "words_prompt", "lower"),
)


class RecipePromptsCfg(TypedDict):
    """`lm_recipe.prompts`."""

    sentences: str
    val: int
    count: int


class RecipeCfg(TypedDict):
    """What `recover_and_score` reads: the section `lm_recipe`, the model, the judges, how intervals are drawn, the seed
    and the device."""

    model: ModelCfg
    prompts: RecipePromptsCfg
    orders: list[str]
    seeds: int
    shares: list[float]
    codebooks: list[int]
    bits: list[int]
    group: int | None
    symmetric: bool
    rounding: str
    training: TrainingCfg
    margin: float
    draws: int
    batch: int
    temperature: float
    listen: int
    judges: JudgeCfg
    bootstrap: int
    seed: int
    device: NotRequired[str]
    content: NotRequired[Any]  # digests, which decide when to score again, not how


class Inputs(TypedDict):
    """Files that it reads: orders of heads; where the codes of sentences go."""

    orders: str
    codes: Path


class Outputs(TypedDict):
    """What it writes: answers, those to val prompts after training at every pace, the choice, the folders of the
    chosen model before and after packing, sounds."""

    answers: str
    paces: str
    recipe: str
    whole: str
    model: str
    sounds: str


class RecipeBench(Bench[Condition]):
    """A model in whose place smaller ones speak."""

    def __init__(self, nets: Nets, judge: Judge, speech: Speech, cfg: SpokenCfg, pieces: Pieces) -> None:
        super().__init__(nets.model, judge, speech, cfg, pieces, INTACT)
        self.nets = nets

    def applied(self, condition: Condition) -> AbstractContextManager[None]:
        return self.nets.put(condition)

    def decided_by(self, condition: Condition) -> Any:
        widths = self.nets.plan(condition)
        return [self.nets.decided_by(condition), None if widths is None else widths.to_json()]


def speech_of(asked: list[Asked]) -> Speech:
    """Prompts alone."""
    return Speech(asked=asked, held_out=[], held_by=[], calibration=[], real=[])


def opened(cfg: RecipeCfg, codes: Path, pieces: Pieces) -> tuple[Nets, dict[str, RecipeBench]]:
    """The networks, and a bench each for the splits `val` and `test`.

    Raises EqknobsError where the folder of sentences has no clips of part train or test.
    """
    model = Moshi(cfg["model"])
    judge = Judge(model, cfg["judges"], pieces)
    made_of = [model.revision, {k: v for k, v in cfg["model"].items() if k != "device"}]
    own = pieces.within([*made_of, [content(file) for file in module_inputs(__name__)]])
    asks = cfg["prompts"]
    encode_speech(asks["sentences"], codes, model.codec, model.config.codebooks, levels=1, seed=0)
    parts = read_clips(asks["sentences"], codes)
    if len(parts["train"]) < cfg["training"]["batch"] or not parts["test"]:
        raise EqknobsError(
            f"{asks['sentences']}: {len(parts['train'])} clips of part train and {len(parts['test'])} of test; "
            f"lm_recipe needs a batch ({cfg['training']['batch']}) and one"
        )
    tests = Sentences(model, parts["test"][: asks["count"]], parts["train"])
    longest = max(clip.codes.shape[2] for clips in parts.values() for clip in clips)
    voices = sorted({clip.voice for clip in parts["train"]})
    vals = Sentences(model, told(asks["val"], "val", voices, longest, cfg["seed"]), parts["train"])
    known = judge.voices(tests.sequences)
    spoken = SpokenCfg(
        model=cfg["model"],
        prompts=PromptsCfg(
            source="sentences", sentences=asks["sentences"], count=asks["count"], held_out=0, calibration=0
        ),
        batch=cfg["batch"],
        temperature=cfg["temperature"],
        dnsmos=False,
        judges=cfg["judges"],
    )
    packing = PackingCfg(group=cfg["group"], symmetric=cfg["symmetric"], rounding=cfg["rounding"])
    nets = Nets(model, spoken, cfg["training"], packing, parts["train"], longest, cfg["seed"], own)
    asked = {"val": vals.asked(known), "test": tests.asked(known)}
    return nets, {part: RecipeBench(nets, judge, speech_of(rows), spoken, own) for part, rows in asked.items()}


def bounds(rows: pd.DataFrame, cfg: IntervalsCfg) -> dict[str, dict[str, float]]:
    """Condition -> measure -> upper 95 % bound of its paired difference to the intact model, prompts resampled.

    rows: answers to the prompts of one split, with their condition's name.
    """
    rows = rows.assign(speaker=rows["id"])
    found: dict[str, dict[str, float]] = {INTACT.name: {measure.name: 0.0 for measure in BOUNDED}}
    whole = rows[rows["condition"] == INTACT.name]
    for name, mine in rows.groupby("condition", sort=False):
        if name != INTACT.name:
            same = whole[whole["draw"].isin(mine["draw"])]
            records = {measure.name: compare(mine, same, measure, cfg) for measure in BOUNDED}
            found[str(name)] = {key: float("nan") if one is None else one["high"] for key, one in records.items()}
    return found


def chosen(found: Mapping[str, Mapping[str, float]], sizes: Mapping[str, float], margin: float) -> str:
    """The condition of the smallest file of which no bound is beyond the margin; the intact model always qualifies."""
    within = [name for name, one in found.items() if all(value <= margin for value in one.values())]
    return min(within, key=lambda name: (sizes[name], name))


def tried(bench: RecipeBench, every: Sequence[Condition], data: str) -> list[dict[str, Any]]:
    """Records of answers after training at every pace, of the first order's model with the most heads out; sets the
    pace after which fewest words are wrong. bench: of val, whose intact answers are known."""
    pruned = [c for c in every if c.heads and c.trained == data and not c.codebooks and not c.bits]
    first = [c for c in pruned if c.order == pruned[0].order]
    condition = max(first, key=lambda c: len(c.heads)) if first else Condition(trained=data)
    rows: list[dict[str, Any]] = []
    nets = bench.nets
    for pace in nets.paces:
        nets.pace = pace
        rows += [{**pace._asdict(), **row} for row in bench.score(condition, 0)]
    nets.pace = best_pace(pd.DataFrame(rows))
    return rows


def best_pace(rows: pd.DataFrame) -> Pace:
    """The pace of fewest word errors, of both word error rates together; of equals the shortest and slowest."""
    sums = rows.groupby(["steps", "learning_rate"])[
        ["errors_monologue", "errors_prompt", "words_monologue", "words_prompt"]
    ].sum()
    rates = (sums["errors_monologue"] + sums["errors_prompt"]) / (sums["words_monologue"] + sums["words_prompt"])
    steps, learning_rate = rates.idxmin()
    return Pace(int(steps), float(learning_rate))


def write_recipe(nets: Nets, condition: Condition, facts: dict[str, Any], cfg: ModelCfg, out: Outputs) -> None:
    """The chosen model in half precision and, beside it, packed; and how it was made."""
    model, net, widths = nets.model, copy.deepcopy(nets.of(condition)), nets.plan(condition)
    codec = codec_of(cfg, model.files.config, f"models.{model.name}")

    def near(folder: str) -> str | None:
        return os.path.relpath(codec, folder) if Path(codec).is_dir() else None

    net = net.cpu().float()
    save_net(copy.deepcopy(net).half(), out["whole"], model.files.tokenizer, near(out["whole"]))
    if widths is None:
        net.half()
    else:
        pack_modules(net, widths)
    save_net(net, out["model"], model.files.tokenizer, near(out["model"]), widths)
    about = {"heads": [list(head) for head in condition.heads], "plan": None if widths is None else widths.to_json()}
    write_json(out["recipe"], {"condition": condition.name, **condition.row(), **facts, **about})


def played(conditions: Sequence[Condition], name: str) -> list[Condition]:
    """What the page plays: the intact model, heads out by each order at the largest share before and after training,
    the recipe."""
    largest = max((c.share for c in conditions), default=0)
    found = [INTACT]
    for c in conditions:
        if c.heads and c.share == largest and c.state in ("pruned", "recovered") and c.seed == 0:
            found.append(c)
    recipe = [c for c in conditions if c.name == name and c not in found]
    return [*found, *recipe]


def write_sounds(bench: RecipeBench, conditions: Sequence[Condition], name: str, listen: int, folder: Path) -> None:
    """The first answers of what is `played`."""
    shown = [(c, {**c.row(), "chosen": int(c.name == name)}) for c in played(conditions, name)]
    write_takes(bench.judge, (take for c, columns in shown for take in bench.takes(c, columns, listen)), folder)


def recover_and_score(cfg: RecipeCfg, inputs: Inputs, out: Outputs, pieces: Pieces | None = None) -> None:
    """Make every model, let it speak, choose the recipe and write it. Each file appears when it is whole."""
    nets, benches = opened(cfg, inputs["codes"], pieces or Pieces(None))
    codebooks = nets.model.config.codebooks
    if cfg["codebooks"] and max(cfg["codebooks"]) >= codebooks:
        raise EqknobsError(f"config: lm_recipe.codebooks: the model has {codebooks}; name fewer, or none")
    every = plan.conditions(_chain(cfg), read_csv(inputs["orders"]))
    rows: list[dict[str, Any]] = []
    intact = {part: bench.hear_intact(cfg["draws"]) for part, bench in benches.items()}
    trained = pd.DataFrame(tried(benches["val"], every, cfg["training"]["data"][0]))
    trained.insert(0, "model", nets.model.name)
    write_csv(out["paces"], trained)
    sizes = {c.name: nets.sizes(c) for c in every}
    ratios = {c.name: nets.step_ratio(c, benches["test"].speech["asked"][0]) for c in every}
    for part, bench in benches.items():
        about = {"model": nets.model.name, "split": part}
        found = [(INTACT, intact[part])]
        for condition in every[1:]:
            found.append((condition, [row for draw in range(cfg["draws"]) for row in bench.score(condition, draw)]))
        for condition, records in found:
            made = {"condition": condition.name, **sizes[condition.name], "step_ratio": ratios[condition.name]}
            rows += [{**about, **made, **record} for record in records]
    answers = pd.DataFrame(rows)
    write_csv(out["answers"], answers)
    val = answers[answers["split"] == "val"]
    known = bounds(val, {"bootstrap": cfg["bootstrap"], "seed": cfg["seed"]})
    name = chosen(known, {key: one["bytes"] for key, one in sizes.items()}, cfg["margin"])
    recipe = next(c for c in every if c.name == name)
    facts = {
        "margin": cfg["margin"],
        "training": nets.pace._asdict(),
        "prompts": int(val["id"].nunique()),
        "bounds": known,
        **sizes[name],
    }
    facts = {key: None if value != value else value for key, value in facts.items()}  # NaN is no JSON
    write_recipe(nets, recipe, facts, cfg["model"], out)
    write_sounds(benches["test"], every, name, cfg["listen"], Path(out["sounds"]))


def _chain(cfg: RecipeCfg) -> plan.ChainCfg:
    return plan.ChainCfg(
        orders=cfg["orders"],
        seeds=cfg["seeds"],
        shares=cfg["shares"],
        codebooks=cfg["codebooks"],
        bits=cfg["bits"],
        data=cfg["training"]["data"],
    )
