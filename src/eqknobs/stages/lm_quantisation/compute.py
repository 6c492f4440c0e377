"""A speech LM in mixed precision, scored on what it says.

Each tensor (and each block) alone is rounded at each width, and plans are made of what that does to calibration speech;
then every plan is screened, teacher-forced on held-out speech, and those that are asked for speak. The network computes
with what a packed file of the plan would give, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eqknobs.errors import EqknobsError, counted
from eqknobs.io import atomic_path, read_csv, write_csv, write_json
from eqknobs.models import ModelCfg
from eqknobs.models.base import inference
from eqknobs.models.moshi.adapter import DTYPES, Moshi
from eqknobs.models.moshi.checkpoint import load_net
from eqknobs.models.moshi.config import Nf4
from eqknobs.models.moshi.interventions import linears
from eqknobs.models.moshi.likelihood import Said, nats
from eqknobs.models.moshi.quantise import is_packed, pack, packed_linear, weight_of
from eqknobs.packing.files import stored
from eqknobs.packing.modules import PackedModule, bytes_resident, packed_module, put_module, replaced
from eqknobs.packing.plan import Plan, mean_bits, packable, plan_bytes
from eqknobs.packing.quantise import Packed
from eqknobs.pieces import Pieces
from eqknobs.speaking.bench import Bench, PromptsCfg, Speech, digest, matching, opened
from eqknobs.speaking.scores import Judge, JudgeCfg
from eqknobs.speaking.takes import write_takes
from eqknobs.stages.lm_quantisation import plans
from eqknobs.stages.lm_quantisation.plans import (
    INTACT_MODEL,
    INVERTED,
    LAYER,
    NF4,
    TEMPORAL,
    UNIFORM,
    Condition,
    Guides,
    Plans,
)

KEPT = 2**28  # values that a network has at most whose packed tensors are kept from plan to plan
PLAYED = (UNIFORM, LAYER, INVERTED)
RAW = {"sensitivity": "lm_quantisation.sensitivity", "nats": "lm_quantised_nats", "answers": "lm_quantised_answers"}


class BestCfg(TypedDict):
    """`lm_quantisation.best`."""

    count: int
    budget: int


class QuantisationCfg(TypedDict):
    """What `quantise_and_score` reads: the section `lm_quantisation`, the model, the judges, the seed, the device."""

    model: ModelCfg
    prompts: PromptsCfg
    property: str
    parts: list[str]
    widths: list[int]
    budgets: list[int]
    outside: int
    group: int | None
    symmetric: bool
    rounding: str
    random_plans: int
    nf4: bool
    answered: list[str]
    best: BestCfg
    draws: int
    batch: int
    temperature: float
    dnsmos: bool
    listen: int
    judges: JudgeCfg
    seed: int
    device: NotRequired[str]
    content: NotRequired[Any]  # digests, which decide when to score again, not how


class Inputs(TypedDict):
    """Files that `quantise_and_score` reads: raw counts of the layers' probes and accuracies of heads; the manifest of
    the run's speech, where people talk to the model; where the codes of sentences go."""

    layers: str | None
    heads: str | None
    manifest: str | None
    codes: Path


class Outputs(TypedDict):
    """Files that it writes; `plans` and `sounds` are folders."""

    sensitivity: str
    nats: str
    answers: str
    plans: str
    sounds: str


class Weights:
    """The weights of a model, and plans of them in its network.

    Where the network holds whole weights, they are replaced by what the packed ones stand for, which is faster and bit
    for bit the same; where it holds NF4, its linears and embeddings by packed ones, made from the checkpoint's weights.
    """

    def __init__(self, model: Moshi, dtype: str | None):
        self.net, self.device = model.net, model.device
        held = [module for module in model.net.modules() if isinstance(module, nn.Linear)]
        if any(isinstance(module, PackedModule) for module in model.net.modules()):
            raise EqknobsError(f"models.{model.name}: is packed already; take the model that it was made from")
        self.plain = not any(map(is_packed, held))
        source = model.net
        if not self.plain:  # mapped, not read: only what is packed comes into memory
            source = load_net(model.files, DTYPES[dtype or "bfloat16"])
        self.source: nn.Module = source
        self.state: dict[str, Tensor] = source.state_dict()
        self.shapes = packable(source)
        self._known: dict[tuple[Any, ...], Packed] = {}
        self._keeps = sum(value.numel() for value in self.state.values()) <= KEPT

    def packed(self, plan: Plan, name: str) -> Packed:
        """A tensor as a plan has it."""
        key = (name, plan.bits[name], plan.group, plan.symmetric, plan.rounding)
        found = self._known.get(key)
        if found is None:
            found = plan.quantise(name, self.state[name].to(self.device))
            if self._keeps:
                self._known[key] = found
        return found

    @contextmanager
    def applied(self, plan: Plan, rest: bool = True) -> Iterator[None]:
        """While the block runs, the network has the plan's weights. rest: what stays is as its file would store it."""
        if self.plain:
            with replaced(self.net, self._values(plan, rest)):
                yield
            return
        kept = {}
        try:
            for name in plan.bits:
                owner = name.removesuffix(".weight")
                kept[owner] = self.net.get_submodule(owner)
                packed = self.packed(plan, name).to(self.device)
                put_module(self.net, owner, packed_module(self.source.get_submodule(owner), packed, self.net.dtype))
                if self.device == "cuda":
                    kept[owner].to("cpu")  # both do not fit
            yield
        finally:
            for owner, module in kept.items():
                put_module(self.net, owner, module.to(self.device))

    def _values(self, plan: Plan, rest: bool) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.state.items():
            if name in plan.bits:
                yield name, self.packed(plan, name).dequantise()
            elif rest:
                yield name, stored(name, value, plan.rest)

    @contextmanager
    def nf4(self) -> Iterator[dict[str, int]]:
        """While the block runs, the temporal linears hold what NF4 (scales in float32) stands for; its sizes."""
        form, values, size = Nf4(double=False), {}, 0
        for name in linears(self.net):
            weight = weight_of(self.net.get_submodule(name))
            linear = packed_linear(*pack(weight, form, weight.dtype), weight.dtype)
            values[f"{name}.weight"] = weight_of(linear)
            size += bytes_resident(linear)
        others = {name: value for name, value in self.state.items() if name not in values}
        held = sum(value.numel() * value.element_size() for value in others.values())
        with replaced(self.net, values.items()):
            yield {"bytes": size + plan_bytes(others, Plan({})), "bytes_resident": size + held}

    def sizes(self, plan: Plan) -> dict[str, float]:
        """bits_mean over all that is packed; bytes of tensor data in its file; bytes that the network then holds."""
        held = 0
        for name, value in self.state.items():
            held += value.numel() * value.element_size() if name not in plan.bits else 0
        packed = {name: value for name, value in self.state.items() if name in plan.bits}
        return {
            "bits_mean": mean_bits(self.state, plan),
            "bytes": plan_bytes(self.state, plan),
            "bytes_resident": held + plan_bytes(packed, plan),
        }


class QuantBench(Bench[Condition]):
    """A model whose weights are rounded while it speaks."""

    cfg: QuantisationCfg

    def __init__(self, model: Moshi, judge: Judge, speech: Speech, cfg: QuantisationCfg, pieces: Pieces) -> None:
        super().__init__(model, judge, speech, cfg, pieces, INTACT_MODEL)
        self.weights = Weights(model, cfg["model"].get("dtype"))
        self._hidden: dict[str, list[Tensor]] = {}

    def applied(self, condition: Condition) -> AbstractContextManager[Any]:
        if condition.plan == NF4:
            return self.weights.nf4()
        return nullcontext() if condition.widths is None else self.weights.applied(condition.widths)

    def decided_by(self, condition: Condition) -> Any:
        return condition.plan if condition.widths is None else condition.widths.to_json()

    def sizes(self, condition: Condition) -> dict[str, float]:
        """`bits_mean`, `bytes` and `bytes_resident` of a condition; without packing no bits."""
        if condition.plan == NF4:
            with self.weights.nf4() as sizes:
                return {"bits_mean": np.nan, **sizes}
        if condition.widths is not None:
            return self.weights.sizes(condition.widths)
        whole = {name: value for name, value in self.weights.state.items()}
        return {
            "bits_mean": np.nan,
            "bytes": plan_bytes(whole, Plan({})),
            "bytes_resident": bytes_resident(self.model.net),
        }

    def hidden(self, said: Sequence[Said]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(nats of the text [B], of the codes [B], what the last layer gives in each row's dialogue [T, dim])."""
        seen: list[Tensor] = []
        handle = self.model.net.layers[-1].register_forward_hook(lambda _m, _i, acts: seen.append(acts))
        try:
            with inference():
                found = nats(self.model.net, said)
        finally:
            handle.remove()
        acts = torch.cat(seen, 1)
        rows = [acts[i, found.columns[i]].float().cpu() for i in range(len(said))]
        return found.text.nanmean(1), found.audio.nanmean(2).nanmean(1), rows

    def intact_hidden(self, which: str) -> list[Tensor]:
        """Of the intact model, a row each of `calibration` or `held_out`."""
        if which not in self._hidden:
            batches = self.batches(self.speech[which])  # type: ignore[literal-required]
            self._hidden[which] = [row for batch in batches for row in self.hidden(batch)[2]]
        return self._hidden[which]

    def measured(self, which: str) -> list[list[float]]:
        """[nats of text, of codes, cosine of the last layer with the intact one], a row each, as the model is now."""
        before = self.intact_hidden(which)
        rows: list[list[float]] = []
        for batch in self.batches(self.speech[which]):  # type: ignore[literal-required]
            text, audio, acts = self.hidden(batch)
            for one, other, now in zip(text.tolist(), audio.tolist(), acts, strict=True):
                cosine = torch.nn.functional.cosine_similarity(now, before[len(rows)], dim=1).mean()
                rows.append([one, other, float(cosine)])
        return rows

    def screen(self, condition: Condition) -> list[dict[str, Any]]:
        """One record a held-out clip: nats a frame of its text and codes, cosine of the last layer's output."""

        def make() -> list[list[float]]:
            self.intact_hidden("held_out")
            with self.applied(condition):
                return self.measured("held_out")

        made_of = [self.decided_by(condition), digest(self.speech["held_out"])]
        found, names = self.pieces.json("lm-quantised", made_of, make), ("nll_text", "nll_audio", "cosine")
        rows, sizes = zip(self.speech["held_by"], found, strict=False), self.sizes(condition)
        return [
            {**condition.row(), **sizes, "id": f"{i:03d}", "speaker": speaker, **dict(zip(names, values, strict=True))}
            for i, (speaker, values) in enumerate(rows)
        ]

    def sensitivity(self, base: Plan, parts: Sequence[str]) -> list[dict[str, Any]]:
        """What rounding a tensor or a block alone at each width does to the calibration clips: columns kind, tensor,
        bits, nats (more a frame than intact), drift (1 − cosine). base: how tensors are packed."""
        alone = [("tensor", name, [name]) for name in self.weights.shapes if parts_of(name) in parts]
        if TEMPORAL in parts:
            alone += [("block", name, names) for name, names in plans.blocks_of(self.weights.shapes).items()]
        form, intact, rows = base.with_bits({}).to_json(), self.loss(), []
        for kind, name, tensors in alone:
            with self.pieces.pack("lm-sensitivity", [form, tensors, digest(self.speech["calibration"])]) as known:
                for width in self.cfg["widths"]:
                    if str(width) not in known:
                        self.intact_hidden("calibration")
                        with self.weights.applied(base.with_bits(dict.fromkeys(tensors, width)), rest=False):
                            found = np.array(self.measured("calibration"))
                        known[str(width)] = [float(found[:, :2].sum(1).mean()), float(1 - found[:, 2].mean())]
                    loss, drift = known[str(width)]
                    about = {"kind": kind, "tensor": name, "bits": width}
                    rows.append(
                        {**about, "nats": loss - intact, "drift": drift, "clips": len(self.speech["calibration"])}
                    )
        return rows


def parts_of(tensor: str) -> str:
    """The smallest part that a tensor belongs to."""
    return TEMPORAL if plans.place_of(tensor) else plans.WHOLE


def by_width(rows: Sequence[Mapping[str, Any]], kind: str, measure: str) -> dict[str, dict[int, float]]:
    """name -> width -> a measure of the rows of `QuantBench.sensitivity`."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row["tensor"], {})[row["bits"]] = row[measure]
    return found


def made_plans(bench: QuantBench, inputs: Inputs) -> tuple[list[dict[str, Any]], list[Condition]]:
    """Rows of the sensitivity, and all conditions but the intact one."""
    cfg, weights, config = bench.cfg, bench.weights, bench.model.config
    options: dict[str, Any] = {"group": cfg["group"], "symmetric": cfg["symmetric"], "rounding": cfg["rounding"]}
    makes = Plans(weights.state, weights.shapes, sorted(cfg["widths"]), options, cfg["outside"])
    parts = [TEMPORAL, *cfg["parts"]] if plans.WHOLE in cfg["parts"] else cfg["parts"]
    rows = bench.sensitivity(Plan({}, **options), parts)
    layers = heads = None
    if inputs["layers"] is not None and inputs["heads"] is not None:
        layers = plans.layer_accuracies(read_csv(inputs["layers"]), cfg["property"], config.layers)
        table = read_csv(inputs["heads"])
        values = plans.head_accuracies(table, cfg["property"], config.layers, config.heads)
        heads = plans.head_scores(values, weights.state, config)
    guides = Guides(layers, heads, by_width(rows, "tensor", "nats"), by_width(rows, "block", "drift"))
    found = makes.every(cfg["parts"], cfg["budgets"], guides, cfg["random_plans"], cfg["seed"])
    if cfg["nf4"] and weights.plain:
        found.append(Condition(TEMPORAL, NF4, 4))
    return rows, found


def write_plans(folder: Path, conditions: Sequence[Condition]) -> None:
    """A plan's file each, as `eqknobs compress --plan` takes it, and `index.csv`: part, plan, budget, seed, file."""
    rows = []
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for condition in conditions:
            if condition.widths is not None:
                file = f"{condition.name.replace(':', '.')}.json"
                write_json(temporary / file, condition.widths.to_json())
                rows.append({**condition.row(), "file": file})
        write_csv(temporary / "index.csv", pd.DataFrame(rows))


def played(conditions: Sequence[Condition], spoken: Sequence[Mapping[str, Any]], budget: float) -> list[Condition]:
    """The intact model and, at a budget, the temporal transformer's uniform plan, that by layers' probes and its
    inverse, as far as they have spoken. spoken: records of answers."""
    names = [Condition(TEMPORAL, plan, budget) for plan in PLAYED]
    heard = {tuple(row[key] for key in INTACT_MODEL.row()) for row in spoken}
    return [INTACT_MODEL, *(c for one in names for c in conditions if c == one and tuple(c.row().values()) in heard)]


def scored(bench: QuantBench, conditions: Sequence[Condition], nats: Mapping[str, float]) -> list[dict[str, Any]]:
    """One record an answer of the intact model and of the conditions that speak; `sure`: 1 where with every draw."""
    cfg = bench.cfg
    chosen = plans.best(conditions, nats, cfg["best"]["budget"], cfg["best"]["count"])
    sure = {c.name for c in chosen} | {Condition(TEMPORAL, UNIFORM, cfg["best"]["budget"]).name}
    speaking = [
        c
        for c in conditions
        if c in matching(conditions, cfg["answered"], "lm_quantisation.answered") or c.name in sure
    ]
    records = [{**row, "sure": 1} for row in bench.hear_intact(cfg["draws"])]
    for condition in tqdm(speaking, desc="answers", unit="condition"):
        every = condition.name in sure
        for draw in range(cfg["draws"]) if every else (0,):
            records += [{**row, "sure": int(every)} for row in bench.score(condition, draw, rated=every)]
    return records


def quantise_and_score(cfg: QuantisationCfg, inputs: Inputs, out: Outputs, pieces: Pieces | None = None) -> None:
    """Score a model under every plan. Each file appears when it is whole."""
    found = opened(cfg, inputs["manifest"], inputs["codes"], pieces or Pieces(None), __name__)
    bench = QuantBench(*found[:3], cfg, found[3])
    about = {"model": bench.model.name, "split": "test"}

    def write(path: str, rows: list[dict[str, Any]]) -> None:
        write_csv(path, pd.DataFrame([about | row for row in rows]))

    rows, conditions = made_plans(bench, inputs)
    write(out["sensitivity"], [{**row, "split": "val"} for row in rows])
    write_plans(Path(out["plans"]), conditions)
    screened = [
        row
        for condition in tqdm((INTACT_MODEL, *conditions), desc="nats", unit="condition")
        for row in bench.screen(condition)
    ]
    print(f"{counted(len(conditions), 'condition')} screened", flush=True)
    write(out["nats"], screened)
    table = pd.DataFrame(screened).assign(nats=lambda t: t["nll_text"] + t["nll_audio"])
    keys = ["part", "plan", "budget", "seed"]
    means = {f"{a}:{b}:{c:g}:{d}": float(value) for (a, b, c, d), value in table.groupby(keys)["nats"].mean().items()}
    spoken = scored(bench, conditions, means)
    write(out["answers"], spoken)
    shown = ((c, bench.sizes(c)["bits_mean"]) for c in played(conditions, spoken, cfg["best"]["budget"]))
    takes = (t for c, bits in shown for t in bench.takes(c, {**c.row(), "bits_mean": bits}, cfg["listen"]))
    write_takes(bench.judge, takes, Path(out["sounds"]))
