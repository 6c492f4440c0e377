"""Cache the activations of one target."""

from typing import Any

import eqknobs.script
from eqknobs.corpus.activations import ActivationsCfg, cache_activations
from eqknobs.pieces import STORE


class JobCfg(ActivationsCfg, total=False):
    siblings: dict[str, str]  # other sites of the model -> where their caches are to be


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    siblings = cfg.pop("siblings")
    cache_activations(inputs.manifest, outputs[0], cfg["model"], cfg["site"], cfg, siblings, STORE)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
