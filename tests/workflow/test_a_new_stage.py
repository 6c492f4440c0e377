"""A stage is one place: a folder, a rule file and a line in each list bring it to the table and to the report.

CONTRIBUTING.md tells the same; the files that this test adds and edits are the ones that it lists.
"""

import json
import re
from pathlib import Path

import pytest
import yaml

from eqknobs.io import read_csv
from helpers import ROOT
from helpers.workflow import copy_workflow, snakemake, write_config

NEW = {
    "src/eqknobs/stages/toy/__init__.py": "",
    "src/eqknobs/stages/toy/settings.yaml": """
toy:
  type: [object, "null"]
  description: "`null`: no clip is measured"
  properties:
    longest: {type: number, exclusiveMinimum: 0, description: "seconds above which a clip counts as long"}
""",
    "src/eqknobs/stages/toy/compute.py": '''
"""How many clips are long."""

from pathlib import Path

from eqknobs.io import read_csv, write_csv


def measure(manifest_csv: str | Path, out_csv: str | Path, longest: float) -> None:
    """Write id, speaker, split, long (0 or 1) of every clip."""
    clips = read_csv(manifest_csv)
    write_csv(out_csv, clips[["id", "speaker", "split"]].assign(long=(clips["seconds"] > longest).astype(int)))
''',
    "src/eqknobs/stages/toy/tables.py": '''
"""How many clips are long: the table `toy.csv`."""

from typing import Any

from eqknobs.evidence.estimates import Measure, counts, estimate, groups, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import headline, number

STAGE = "toy"
COLUMNS = {"toy": "target split long_share clips speakers long_share_low long_share_high"}
NOTHING: dict[str, Any] = {}


def tabulate(at: Context) -> Tabulated:
    """One row a split."""
    found = [
        {"target": at.target, **key, **counts(clips), **estimate(clips, Measure("long_share", "long"), at.cfg)}
        for key, clips in groups(at.inputs.csv("scores/toy.csv"), ["split"])
    ]
    rows = table(found, COLUMNS["toy"])
    return Tabulated({"toy": rows}, {"long": rows["long_share"].tolist()})


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, str]]:
    """How many clips of the first split are long."""
    return [headline("toy", "measured", f"A share of {number(facts['long'][0])} of the clips is long.")]
''',
    "src/eqknobs/stages/toy/section.py": '''
"""The long clips' section of the report."""

from typing import Any

from eqknobs.evidence import display
from eqknobs.evidence.stage import Context

STAGE, TITLE, SOUNDS = "toy", "Long clips", False
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {}


def show(at: Context) -> dict[str, Any]:
    """The table."""
    rows = at.inputs.csv("tables/toy.csv")
    return {"rows": display.laid_out(rows, {"split": "split", "long": ("long_share", 3)})}
''',
    "src/eqknobs/stages/toy/section.html.j2": """
{% from "page.macros.html.j2" import table with context %}
<h2>How many clips are long</h2>
{{ table(rows) }}
""",
    "workflow/scripts/toy.py": '''
"""Count long clips."""

from typing import Any

import eqknobs.script
from eqknobs.stages.toy.compute import measure


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    measure(inputs.manifest, outputs[0], cfg["longest"])


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
''',
    "rules/toy.smk": """
SECTIONS["toy"] = {"targets": TARGETS}
TABLES += ["toy"]
TABLE_INPUTS += [f"{RUN}/scores/toy.csv"]


rule toy:
    input:
        manifest=f"{RUN}/manifest/manifest.csv",
        script=code("toy.py"),
    output:
        f"{RUN}/scores/toy.csv",
    log:
        f"{RUN}/logs/toy.log",
    benchmark:
        f"{RUN}/benchmarks/toy.tsv"
    conda:
        ENV
    threads: config["hardware"]["threads"]
    params:
        cfg=cfg("toy", lambda wildcards: config["toy"]),
    message:
        "Count long clips"
    script:
        "../workflow/scripts/toy.py"
""",
}
LISTS = {
    "Snakefile": ('    "lm_pruning",\n', '    "toy",\n    "lm_pruning",\n'),
    "src/eqknobs/schema.py": ('    "sound",\n', '    "stages/toy",\n    "sound",\n'),
    "src/eqknobs/report/tables.py": (
        "STAGES: tuple[TablesModule, ...] = (",
        "from eqknobs.stages.toy import tables as toy\n\nSTAGES: tuple[TablesModule, ...] = (toy, ",
    ),
    "src/eqknobs/report/page.py": (
        "SECTIONS: tuple[SectionModule, ...] = (",
        "from eqknobs.stages.toy import section as toy\n\nSECTIONS: tuple[SectionModule, ...] = (toy, ",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the toy stage in it, and a configuration in which nothing else is on."""
    folder = copy_workflow(tmp_path_factory.mktemp("toy") / "work")
    for name, text in NEW.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.lstrip("\n"))
    for name, (old, new) in LISTS.items():
        text = (folder / name).read_text()
        assert text.count(old) == 1, name
        (folder / name).write_text(text.replace(old, new))

    def only_toy(config: dict) -> None:
        off = (
            "accent",
            "saes",
            "probes",
            "codec",
            "steering",
            "importance",
            "quantisation",
            "speech_lm",
            "lm_layers",
            "lm_pruning",
            "lm_quantisation",
            "lm_recipe",
            "lm_steering",
        )
        config.update(dict.fromkeys(off))
        config["toy"] = {"longest": 3.0}

    write_config(folder, only_toy)
    return folder


def test_a_new_stage_reaches_table_and_report(folder: Path) -> None:
    snakemake(folder, "--cores", "2")
    results = folder / "results/small"
    manifest = read_csv(results / "manifest/manifest.csv")
    table = read_csv(results / "tables/toy.csv").set_index("split")
    for split, clips in manifest.groupby("split"):
        assert table.loc[split, "long_share"] == pytest.approx((clips["seconds"] > 3).mean())
    facts = json.loads((results / "tables/summary.json").read_text())["targets"]
    (said,) = (line["text"] for target in facts.values() for line in target["headlines"])
    pages = "".join(path.read_text() for path in (results / "report").glob("*.html"))
    assert "How many clips are long" in pages and said in pages and "Long clips" in pages


def test_its_settings_are_checked_and_null_switches_it_off(folder: Path) -> None:
    config = yaml.safe_load((folder / "config/config.yaml").read_text())
    done = snakemake(folder, "-n", "--config", "toy={longest: -1}", check=False)
    assert done.returncode and "config: toy.longest: " in done.stdout + done.stderr  # of a dry run it may be either
    config["toy"] = None
    (folder / "off.yaml").write_text(yaml.safe_dump(config))
    assert "Count long clips" not in snakemake(folder, "-n", "--forceall", "--configfile", "off.yaml").stdout


def test_contributing_lists_the_files() -> None:
    told = (ROOT / "CONTRIBUTING.md").read_text()
    for name in [*NEW, *LISTS]:
        assert re.sub(r"\btoy\b", "<stage>", name) in told, name
