"""The workflow against its contract: files, parameters, job counts and the targets of each shipped configuration."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml

import architecture
from eqknobs.config import merge, validate
from eqknobs.errors import EqknobsError
from eqknobs.models.sites import expand_targets
from eqknobs.plan import model_config
from eqknobs.provenance import code_inputs
from helpers import ROOT
from helpers.workflow import snakemake
from readme_graph import in_order

DEFAULT = yaml.safe_load((ROOT / "config/config.yaml").read_text())
CONFIGS = sorted(p.name for p in (ROOT / "config").glob("*.yaml"))
CHAIN = [name for name in CONFIGS if not name.startswith("train-")]


def outputs(name: str | Path) -> set[str]:
    """Every file that the jobs of a configuration (a shipped one by its name) make, from Snakemake's summary."""
    lines = snakemake(ROOT, "--nolock", "--summary", "--configfile", str(ROOT / "config" / name)).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("output_file\t"))
    return {line.split("\t")[0] for line in lines[start + 1 :] if "\t" in line}


@pytest.mark.parametrize("name", CHAIN)
def test_a_configs_dag_holds_its_own_targets_and_no_others(name: str) -> None:
    config = merge(DEFAULT, yaml.safe_load((ROOT / "config" / name).read_text()))
    planned = outputs(name)
    assert planned
    found = set()
    for output in planned:
        assert output.startswith((f"results/{config['run']['name']}/", "results/models/")), output
        sites = r"encoder_transformer|encoder_layer\.\d+|encoder|(?:layer|residual|heads)\.\d+"
        found |= set(re.findall(rf"[\w-]+\.(?:{sites})", output))
    reads = not name.startswith("accent")  # whose stage pools what models say itself
    assert found == (set(expand_targets(config["run"]["targets"], config["models"])) if reads else set())


@pytest.mark.parametrize(
    ("over", "gone"),
    [
        (
            {"saes": None, "steering": {"saes": []}, "importance": None, "hallucination": None},
            {"saes", "importance"},
        ),
        ({"probes": None, "steering": None, "importance": None}, {"probes", "steering", "importance", "labels"}),
        ({"codec": None}, {"renders/{target}/codec"}),
        ({"quantisation": None}, {"quantisation", "renders/{target}/quantisation"}),
    ],
)
def test_a_stage_that_is_null_makes_no_file_and_the_others_make_theirs(over: dict, gone: set, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(over))
    target = DEFAULT["run"]["targets"][0]
    planned = {path for path in outputs(tmp_path / "x.yaml") if "whisper" not in path}
    parts = ("saes", "probes", "steering", "importance", "labels", "renders/{target}/codec", "tables", "report")
    for part in (*parts, "quantisation", "renders/{target}/quantisation"):
        made = any(path.startswith(f"results/demo/{part.format(target=target)}") for path in planned)
        assert made == (part not in gone), part


def test_a_stage_works_on_its_own_targets(tmp_path: Path) -> None:
    first, second = "tiny-mimi.encoder_layer.0", "tiny-mimi.encoder_transformer"
    lists = {"codec": {"targets": [second]}, "steering": {"targets": [first]}, "importance": None}
    lists |= {"saes": {"jumprelu": {"targets": [second]}}, "run": {"targets": [second, first]}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(lists))
    planned = {path.removeprefix("results/demo/") for path in outputs(tmp_path / "x.yaml")}
    for path, made in {
        f"renders/{first}/codec/index.csv": False,
        f"renders/{second}/codec/index.csv": True,
        f"renders/{first}/steering/index.csv": True,
        f"scores/{second}.steering.words.csv": False,
        f"saes/{first}/jumprelu/seed0/sae.safetensors": False,
        f"saes/{second}/jumprelu/seed0/sae.safetensors": True,
        f"probes/{first}/rms.npz": True,
    }.items():
        assert (path in planned) == made, path


def test_runs_have_names_of_their_own() -> None:
    names = [merge(DEFAULT, yaml.safe_load((ROOT / "config" / name).read_text()))["run"]["name"] for name in CHAIN]
    assert len(set(names)) == len(names)


def test_the_demo_has_at_most_71_jobs() -> None:
    text = snakemake(ROOT, "-n", "--nolock", "--forceall").stdout
    assert 15 <= int(re.search(r"^total +(\d+)$", text, re.M).group(1)) <= 71


# What the demo has off, so that every file is planned.
ALL_ON = {
    "hardware": {"shard_clips": 1},
    "corpora": {
        "again": {**DEFAULT["data"], "max_utterances": 20},
        "mix": {"source": "union", "of": ["speech", "again"]},
    },
    "domains": {
        "corpus": "mix",
        "splits": ["test"],
        "sources": "source",
        "selection": "clip",
        "frame_taus": [0.2],
        "clip_taus": [0.5],
        "permutations": 1,
        "resamples": 10,
        "map_features": 0,
    },
    "phones": {"selection": "clip", "purity": 0.5, "min_firings": 20, "shifts": 1, "l2": [0.01], "epochs": 1},
    "data": {"phones": "resources/corpus/phones.csv"},
    "models": {
        **DEFAULT["models"],
        "w": {"kind": "whisper", "path": "results/models/whisper-tiny.en", "revision": None},
    },
    "run": {**DEFAULT["run"], "targets": [*DEFAULT["run"]["targets"], "w.layer.0"]},
    "splicing": {"split": "test", "clips": 1, "non_speech": ["again"], "seeds": 1},
}


def test_every_documented_file_is_planned_and_every_planned_file_documented(tmp_path: Path) -> None:
    documented = re.findall(r"^\| `([a-z_]+/[^`]+)` \| ([a-z_, ]+) \|", (ROOT / "docs/layout.md").read_text(), re.M)
    patterns = {re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)) + "$"): path for path, _ in documented}
    planned = {output.removeprefix("results/demo/") for output in outputs("config.yaml")}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(ALL_ON))
    everything = {output.removeprefix("results/demo/") for output in outputs(tmp_path / "all.yaml")} | planned
    for output in everything:
        # Documented beside their config.json, and the folder of the page.
        if not output.endswith(("sae.safetensors", "log.csv", "report")) and "results/models/" not in output:
            assert any(p.match(output) for p in patterns), f"{output} is not in docs/layout.md"
    for pattern, path in patterns.items():
        assert any(pattern.match(output) for output in everything), f"docs/layout.md names {path}, which nothing makes"


def test_rules_have_log_benchmark_conda_and_one_parameter() -> None:
    for file in (ROOT / "rules").glob("*.smk"):
        for rule in re.split(r"^rule ", file.read_text(), flags=re.M)[1:]:
            name = rule.split(":")[0]
            for part in ("log:", "benchmark:", "conda:", "script:", "message:"):
                assert f"    {part}" in rule, (name, part)
            assert re.search(r"params:\n        cfg=cfg\(", rule), name
            assert not re.search(r"params:\n.*\n        \w+=", rule), name
            script = re.search(r'code\("(\w+\.py)"\)', rule).group(1)
            assert f"workflow/scripts/{script}" in rule, name


def test_no_script_reads_the_configuration() -> None:
    for script in (ROOT / "workflow/scripts").glob("*.py"):
        assert "snakemake.config" not in script.read_text()


def test_code_inputs_follow_imports_and_find_the_pages_template() -> None:
    names = {Path(path).name for path in code_inputs(ROOT / "workflow/scripts/report.py")}
    assert {"page.py", "page.html.j2", "section.html.j2", "page.macros.html.j2", "io.py", "errors.py"} <= names
    assert "sae.py" not in {Path(p).name for p in code_inputs(ROOT / "workflow/scripts/manifest.py")}


def test_computation_imports_no_presentation() -> None:
    """So editing a figure or a sentence never reruns it; the tables do not depend on the figures either."""
    scripts = {path.stem: path for path in (ROOT / "workflow/scripts").glob("*.py")}
    found = {name: {Path(file).as_posix() for file in code_inputs(path)} for name, path in scripts.items()}
    drawn = r"/section\.(py|html\.j2)$|/report/(page|players)|/evidence/(drawing|display)"
    for name, files in found.items():
        hidden = {"report": r"^$", "tables": drawn, "speech_lm_table": drawn}.get(
            name, rf"{drawn}|/stages/\w+/tables\.py$|/report/\w|/evidence/w"
        )
        assert not [file for file in files if re.search(hidden, file)], name
    for name, part in (("tables", "tables.py"), ("report", "section.py"), ("report", "section.html.j2")):
        listed = {path.parent.name for path in (ROOT / "src/eqknobs/stages").glob(f"*/{part}")}
        assert (
            listed == {Path(file).parent.name for file in found[name] if re.search(rf"/stages/\w+/{part}$", file)}
            and listed
        )


def moshi(config: dict, targets: tuple[str, ...] = ("m.heads.0", "m.residual.1"), **keys) -> None:
    """Open a Moshi model without SAEs."""
    config["models"]["m"] = {"kind": "moshi", "path": "owner/name", "revision": None, **keys}
    config["saes"], config["run"]["targets"] = None, list(targets)


def test_a_moshi_model_may_say_all_or_nothing() -> None:
    for keys in (
        {},
        {"nf4": True},
        {"nf4": {"linears": ["*"], "block": 128, "double": False}, "codec": "kyutai/mimi", "codec_revision": None}
        | {"dtype": "float32", "stream": "agent"},
    ):
        config = json.loads(json.dumps(DEFAULT))
        moshi(config, **keys)
        validate(config)
        assert model_config(config, "m.heads.0") == {"kind": "moshi", "name": "m", "path": "owner/name"} | keys | {
            "revision": None
        }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["steering"].update(alfas=[1]), "unknown key 'alfas'"),
        (lambda c: c.update(stering={}), "unknown key 'stering'"),
        (lambda c: c["saes"]["topk"].update(lr="1e-3"), "write 0.001 without quotes"),
        (lambda c: c["saes"]["topk"].update(k="many"), "'many' is not of type integer"),
        (lambda c: c["saes"]["topk"].update(l1=0.1), "unknown key 'l1'"),
        (lambda c: c["saes"]["topk"].update(variant="gated"), "is not one of"),
        (lambda c: c["run"].update(targets=["mimi.encoder_transformer"]), "not under models"),
        (lambda c: c["run"].update(targets=["tiny-mimi"]), "does not match"),
        (lambda c: c["run"].update(name="../elsewhere"), "does not match"),
        (lambda c: c["importance"].update(sae="none"), "not under saes"),
        (lambda c: c["data"]["splits"].update(train=0.9), "must add up to 1"),
        (lambda c: c["data"].update(source="librispeech"), "data.subset"),
        (lambda c: c["steering"].update(high_bin=20), "above the last bin"),
        (lambda c: c["probes"].update(properties=["rms"]), "must hold 'centroid'"),
        (lambda c: c.pop("judges"), "'judges' is a required property"),
        (lambda c: c.update(saes=None), "steering.saes: names 'rms_l1', but saes is null"),
        (lambda c: c["hardware"].update(vram_gb=0), "hardware.vram_gb"),
        (lambda c: c["models"]["tiny-mimi"].update(kind="moshy"), "'moshy' is not one of"),
        (lambda c: c["models"]["tiny-mimi"].update(nf4=True), "unknown key 'nf4'; known keys: kind, path, revision"),
        (lambda c: moshi(c, nf5=True), "unknown key 'nf5'"),
        (lambda c: moshi(c, nf4={"linear": ["*"]}), "unknown key 'linear'; known keys: block, double, linears"),
        (lambda c: moshi(c, nf4={"block": 63}), "63 is not one of"),
        (lambda c: moshi(c, nf4=4), "nf4: 4 is not of type 'boolean', 'object'"),
        (lambda c: moshi(c, dtype="float8"), "'float8' is not one of ['float32', 'bfloat16', 'float16']"),
        (lambda c: moshi(c, stream="both"), "'both' is not one of ['user', 'agent']"),
        (lambda c: moshi(c, codec=None), "None is not of type 'string'"),
        (
            lambda c: moshi(c, targets=["m.residual"]),
            "a moshi are embeddings and residual.<layer> and heads.<layer>",
        ),
        (lambda c: moshi(c, targets=["m.encoder_layer.1"]), "sites of a moshi are"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(change, said: str) -> None:
    config = json.loads(json.dumps(DEFAULT))
    change(config)
    with pytest.raises(EqknobsError) as caught:
        validate(config)
    assert said in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).startswith("config: ")


def test_the_workflow_refuses_a_bad_configuration_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("saes: {topk: {lr: 1e-3}}\nrun: {name: never}\n")
    done = snakemake(ROOT, "--cores", "1", "--configfile", str(tmp_path / "bad.yaml"), check=False)
    assert done.returncode != 0
    assert "write 0.001 without quotes" in done.stderr and "Traceback" not in done.stderr
    assert not (ROOT / "results/never").exists()


def edges(graph: str) -> set[tuple[str, str]]:
    """(rule, rule that needs it) of a mermaid graph; Snakemake numbers the nodes anew each time."""
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", graph))
    return {(names[a], names[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", graph)}


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_graph_keeps_one_order(seed: int) -> None:
    """However Snakemake's sets fall out."""
    lines = (ROOT / "README.md").read_text().split("```mermaid\n")[1].split("\n```")[0].splitlines()
    shuffled = lines[:4] + random.Random(seed).sample(lines[4:], len(lines) - 4)
    ids = sorted(set(re.findall(r"id\d+", "\n".join(lines))))
    other = dict(zip(ids, random.Random(seed).sample(ids, len(ids))))
    assert in_order(re.sub(r"id\d+", lambda m: other[m[0]], "\n".join(shuffled))) == "\n".join(lines)


def test_readme_shows_the_current_rule_graph() -> None:
    drawn = snakemake(ROOT, "--rulegraph", "mermaid-js").stdout.strip()
    assert len(edges(drawn)) > 20
    assert in_order(drawn) in (ROOT / "README.md").read_text(), "run: python tools/readme_graph.py"


def test_conda_environments_follow_the_lock() -> None:
    from make_env import files

    for path, text in files().items():
        assert path.read_text() == text, "run: python tools/make_env.py"


def test_the_picture_of_the_rooms_is_in_step() -> None:
    assert architecture.PAGE.read_text() == architecture.page(), "run: python tools/architecture.py"
