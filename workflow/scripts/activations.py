"""Cache the activations of one target, or of a shard of the clips those of its model's targets."""

from typing import Any

import eqknobs.script
from eqknobs.corpus.activations import ActivationsCfg, cache_activations, cache_shard
from eqknobs.pieces import STORE
from eqknobs.shards import Shard, whole


class JobCfg(ActivationsCfg, total=False):
    siblings: dict[str, str]  # other sites of the model -> where their caches are to be
    shard: Shard  # only these clips, into the work files


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    siblings = cfg.pop("siblings")
    if shard := cfg.pop("shard", None):
        cache_shard(inputs.manifest, whole(outputs[0]), cfg, shard, siblings, STORE)
    else:
        cache_activations(inputs.manifest, outputs[0], cfg["model"], cfg["site"], cfg, siblings, STORE)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
