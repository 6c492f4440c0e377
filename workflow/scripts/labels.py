"""Label the frames of one target, or a shard of its clips."""

from typing import Any

import eqknobs.script
from eqknobs.corpus.labels import LabelsCfg, label_shard, write_labels
from eqknobs.shards import Shard, whole


class JobCfg(LabelsCfg, total=False):
    shard: Shard  # only these clips, into the work file


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    if shard := cfg.pop("shard", None):
        label_shard(inputs.manifest, inputs.cache, whole(outputs[0]), cfg, shard)
    else:
        write_labels(inputs.manifest, inputs.cache, outputs[0], cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
