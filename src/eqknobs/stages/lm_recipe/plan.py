"""What is done to a speech LM to make it smaller: heads out, training, fewer codebooks, fewer bits, in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pandas as pd

from eqknobs.errors import EqknobsError

Head = tuple[int, int]  # layer and number
NONE = "none"


class ChainCfg(TypedDict):
    """Of `lm_recipe`, what decides its conditions."""

    orders: list[str]
    seeds: int
    shares: list[float]
    codebooks: list[int]
    bits: list[int]
    data: list[str]


@dataclass(frozen=True)
class Condition:
    """One model. order, seed, share: which heads are out; trained: on what, after that; codebooks: how many are left
    (0: all), bits: of all that can be packed (0: not packed)."""

    order: str = NONE
    seed: int = 0
    share: float = 0.0
    trained: str = NONE
    codebooks: int = 0
    bits: int = 0
    heads: tuple[Head, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return f"{self.order}:{self.share:g}:{self.seed}:{self.trained}:{self.codebooks}:{self.bits}"

    @property
    def state(self) -> str:
        """What was done last."""
        if self.bits:
            return "packed"
        if self.codebooks:
            return "shortened"
        if self.trained != NONE:
            return "recovered" if self.heads else "trained"
        return "pruned" if self.heads else "intact"

    def row(self) -> dict[str, Any]:
        """Its columns in tables, but for sizes."""
        columns = {name: getattr(self, name) for name in ("state", "order", "seed", "share", "trained")}
        return {**columns, "heads_removed": len(self.heads), "kept": self.codebooks, "bits": self.bits}


INTACT = Condition()


def order_of(orders: pd.DataFrame, order: str, seed: int) -> list[Head]:
    """All heads, the first to go first, from `scores/<model>.lm_orders.csv`.

    Raises EqknobsError where the table has no such order.
    """
    rows = orders[(orders["order"] == order) & (orders["seed"] == seed)].sort_values("rank")
    if rows.empty:
        raise EqknobsError(f"lm_recipe.orders: lm_pruning made no order {order} {seed}; add it to lm_pruning.heads")
    return list(zip(rows["layer"].tolist(), rows["head"].tolist(), strict=True))


def drawn(order: str) -> bool:
    """Whether an order has seeds."""
    return order.startswith("random")


def conditions(cfg: ChainCfg, orders: pd.DataFrame) -> list[Condition]:
    """Every condition, the intact model first.

    Heads out by each order and share, before and after training; the intact model trained alike, the control. What is
    then shortened and packed: the model with all heads, and the first order's; packed too as it was, without training.
    """
    first, data = cfg["orders"][0], cfg["data"]
    found = [INTACT, *(Condition(trained=one) for one in data)]
    bases = [Condition(trained=data[0])]
    for order in cfg["orders"]:
        for seed in range(cfg["seeds"] if drawn(order) else 1):
            every = order_of(orders, order, seed)
            for share in sorted(cfg["shares"]):
                gone = tuple(every[: round(share * len(every))])
                if not gone:
                    continue
                made = [Condition(order, seed, share, trained=one, heads=gone) for one in (NONE, *data)]
                found += made if order == first else made[:2]
                bases += made[1:2] if order == first else []
    found += [Condition(bits=bits) for bits in sorted(cfg["bits"], reverse=True)]
    for base in bases:
        found += stacked(base, cfg["codebooks"], cfg["bits"])
    return found


def stacked(base: Condition, codebooks: Sequence[int], bits: Sequence[int]) -> Iterator[Condition]:
    """A trained model with fewer codebooks, fewer bits, both."""
    for count in (0, *sorted(codebooks, reverse=True)):
        for width in (0, *sorted(bits, reverse=True)):
            if count or width:
                yield Condition(base.order, base.seed, base.share, base.trained, count, width, base.heads)
