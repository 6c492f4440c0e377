"""The configuration is read strictly: nothing that a user wrote is lost or means something else."""

import copy
import json
import subprocess
import sys

import jsonschema
import pytest
import yaml

from eqknobs.config import DEFAULT, describe, merge, plain, read_config, settle, validate
from eqknobs.errors import EqknobsError
from eqknobs.plan import bundled_speech, chosen_targets, stage_saes, stage_targets, trained_saes
from eqknobs.schema import PACKAGE, PARTS, described, schema
from eqknobs.strict_yaml import read_yaml
from helpers import ROOT

SHIPPED = [p for p in sorted((ROOT / "config").glob("*.yaml")) if not p.name.startswith("train-")]


def default() -> dict:
    return yaml.safe_load(DEFAULT.read_text())


def refused(change) -> str:
    config = default()
    change(config)
    with pytest.raises(EqknobsError) as caught:
        validate(config)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("config: ")
    return str(caught.value)


def given(text: str) -> dict:
    """What Snakemake 9.27 makes of `--config` entries, every scalar inside a mapping or list as text."""
    return yaml.load(text, Loader=yaml.BaseLoader)


# --- strict YAML ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {path: x}\nrun: {name: a}\ndata:\n  max_minutes: 3\n", "'data' stands on line 1 and again on line 3"),
        ("saes:\n  topk:\n    k: 3\n    lr: 1\n    'k': 4\n", "the key 'k' stands on line 3 and again on line 5"),
        ("- a: 1\n  a: 2\n", "the key 'a' stands on line 1 and again on line 2"),
        ('{"data": {"path": "x",\n\t"path": "y"}}', "the key 'path' stands on line 1 and again on line 2"),
        ("data:\n  max_minutes: 1:30\n", "line 2: YAML takes 1:30 for a number to base 60"),
        ("a: 1:30.5\n", "number to base 60"),
        ("a: [010]\n", "line 1: YAML takes 010 for a number to base 8"),
        ("a: 2026-11-25\n", "YAML takes 2026-11-25 for a date"),
        ("a: {on: 1}\n", "YAML takes the key on for bool; write it in quotes"),
        ("no: 1\n", "YAML takes the key no for bool"),
        ("saes:\n  2: {variant: topk}\n", "line 2: YAML takes the key 2 for int"),
        ("null: 1\n", "YAML takes the key null for null"),
        ("? [a]\n: 1\n", "YAML takes the key a list or mapping for seq"),
        ("a: [1\n", "cannot be read as a configuration"),
        ("a: 1\n---\na: 2\n", "cannot be read as a configuration"),
        ("a: !!python/name:os.system x\n", "cannot be read as a configuration"),
    ],
)  # fmt: skip
def test_what_yaml_would_change_in_silence_is_refused(tmp_path, text, said):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(EqknobsError) as caught:
        read_yaml(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_what_is_meant_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    text = "base: &b {k: 3, lr: 0.1}\nmore: {<<: *b, k: 4}\nlist: [*b, *b]\n"
    path.write_text(text + "'on': yes\n'2': '1:30'\nzero: 0\nhex: 0x10\nnone:\nhalf: 0.5\nday: '2026-11-25'\n")
    assert read_yaml(path) == yaml.safe_load(path.read_text())
    assert read_yaml(path)["more"] == {"k": 4, "lr": 0.1}
    path.write_text('{\t"a": {"b": [1, 2e3]},\n\t"c": "\\t"}')
    assert read_yaml(path)["a"]["b"][0] == 1
    path.write_text("")
    assert read_yaml(path) is None
    for file in (ROOT / "config").glob("*.yaml"):
        assert read_yaml(file) == yaml.safe_load(file.read_text())


def test_read_config_refuses_a_key_given_twice(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("data: {path: mine}\nrun: {name: x}\ndata: {max_minutes: 3}\n")
    with pytest.raises(EqknobsError, match="the key 'data' stands on line 1 and again on line 3"):
        read_config(path)


# --- overlays ---


def test_null_in_an_overlay_drops_what_config_yaml_gives(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "saes: {jumprelu: null, batchtopk: null, topk: {grid: null, aux_k: 64}}\n"
        "steering: {other_alpha: {pitch: null}}\ndata: {labels: null}\n"
    )
    config = read_config(path)
    assert sorted(config["saes"]) == ["audiosae", "rms_l1", "topk"] and "grid" not in config["saes"]["topk"]
    assert config["steering"]["other_alpha"] == {"rms": 2}
    assert config["data"]["labels"] is None  # null is a value of its own here
    path.write_text("models: {tiny-mimi: null, other: {kind: dac, path: x, revision: null}}\n")
    with pytest.raises(EqknobsError, match="which is not under models \\(other, tiny-moshi, whisper-tiny-en\\)"):
        read_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "saes: {topk: null}",
            "probes.reference: names 'topk', which is not under saes (audiosae, batchtopk, jumprelu, rms_l1)",
        ),
        ("saes: {topk: null}\nprobes: {reference: null}\nsteering: {saes: [rms_l1]}",
        "config: importance.sae: names 'topk', which is not under"),
        (
            "saes: {topk: null, rms_l1: null, jumprelu: null, batchtopk: null, audiosae: null}",
            "config: saes: must not be empty",
        ),
        ("run: {seed: null}", "'seed' is a required property"),
        ("saes: {mine: {epochs: 3}}", "config.yaml has no entry of this name to complete, so give all its keys"),
        ("models: {mine: {path: x}}", "config.yaml has no entry of this name to complete"),
    ],
)  # fmt: skip
def test_an_overlay_that_drops_too_much_is_one_line(tmp_path, text, said):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(EqknobsError) as caught:
        read_config(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("sae", sorted(default()["saes"]))
def test_a_default_sae_can_go_without_breaking_the_other_configurations(path, sae):
    base = default()
    del base["saes"][sae]
    base["features"]["saes"] = [name for name in base["features"]["saes"] if name != sae]
    left = sorted(set(base["saes"]) - {"audiosae"})  # of a codec
    base["steering"]["saes"] = [name for name in base["steering"]["saes"] if name != sae] or left[:1]
    base["importance"]["sae"] = left[0]
    config = merge(base, yaml.safe_load(path.read_text()))
    settle(config)
    if path.name == DEFAULT.name:
        return
    settle(whole := merge(default(), yaml.safe_load(path.read_text())))
    assert config["saes"] == whole["saes"]


# --- what --config gives ---


def test_nested_config_of_the_command_line_is_read_as_yaml():
    typed = given(
        "{run: {seed: 3}, saes: {jumprelu: null, topk: {lr: 1e-3, k: 16, grid: {k: [8, 16]}}}, sae_seeds: [0, 5],"
        " data: {labels: null, max_minutes: 2.5}, steering: {codebooks: null, other_alpha: {rms: null}}}"
    )
    config = merge(default(), copy.deepcopy(typed))
    settle(config, typed)
    assert config["run"]["seed"] == 3 and config["sae_seeds"] == [0, 5] and "jumprelu" not in config["saes"]
    assert (config["saes"]["topk"]["lr"], config["saes"]["topk"]["grid"]) == (0.001, {"k": [8, 16]})
    assert (config["data"]["labels"], config["data"]["max_minutes"]) == (None, 2.5)
    assert config["steering"]["codebooks"] is None and config["steering"]["other_alpha"] == {"pitch": 2}


def test_a_jobs_own_snakemake_reads_the_same():
    typed = {"models": {"m": {"kind": "moshi", "path": "a/b", "revision": "None", "nf4": "true"}}, "saes": "None"}
    typed["run"] = {"targets": ["m.residual.1"], "name": "7"}
    config = merge(default(), copy.deepcopy(typed))
    settle(config, typed)
    assert config["saes"] is None and config["models"]["m"]["nf4"] is True and config["models"]["m"]["revision"] is None
    assert config["run"]["name"] == "7"  # text, where text is wanted


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("{run: {seed: three}}", "config: run.seed: 'three' is not of type integer"),
        ("{run: '{seed: 3'}", "config: run: '{seed: 3' is not of type object"),
        ("{data: {max_minutes: '1:30'}}", "--config data.max_minutes, line 1: YAML takes 1:30 for a number to base 60"),
        ("{data: {max_minutes: inf}}", "max_minutes: inf is not a finite number"),
        ("{run: {sed: 3}}", "unknown key 'sed'"),
    ],
)
def test_what_config_cannot_mean_is_named(typed, said):
    over = given(typed)
    config = merge(default(), copy.deepcopy(over))
    with pytest.raises(EqknobsError) as caught:
        settle(config, over)
    assert said in str(caught.value)


def test_text_of_a_file_is_not_read_anew():
    config = default()
    config["saes"]["topk"]["k"] = "16"
    with pytest.raises(EqknobsError, match="'16' was read as text, not as a number; leave out the quotes"):
        settle(config, {"run": {"seed": "3"}})


# --- values that cannot be ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["labels"].update(fmin=600), "config: labels.fmin: 600 must be below labels.fmax, which is 550"),
        (lambda c: c["labels"].update(fmin=550), "must be below labels.fmax"),
        (lambda c: c["labels"].update(fmin=2500, fmax=3000), "labels.fmin: 2500 leaves no pitch that CREPE knows"),
        (lambda c: c["labels"].update(fmin=5, fmax=20), "labels.fmax: 20 leaves no pitch that CREPE knows"),
        (lambda c: c["data"].update(min_seconds=40), "data.min_seconds: 40 must be below data.max_seconds"),
        (lambda c: c["data"].update(max_minutes=0.01), "leaves no room for three clips"),
        (lambda c: c["steering"].update(low_bin=19, high_bin=0), "steering.low_bin: 19 must be below steering.high"),
        (lambda c: c["steering"].update(low_bin=3, high_bin=3), "must be below"),
        (lambda c: c["steering"].update(alphas=[]), "config: steering.alphas: must not be empty"),
        (lambda c: c["saes"]["topk"].update(grid={}), "config: saes.topk.grid: must not be empty"),
        (lambda c: c["steering"].update(shift=float("nan")), "steering.shift: nan is not a finite number"),
        (lambda c: c["steering"]["alphas"].append(float("inf")), "steering.alphas.4: inf is not a finite number"),
        (lambda c: c["saes"].update({2: {"variant": "topk"}}), "saes: the key 2 is not text; write it in quotes"),
        (lambda c: c["run"].update(name=False), "run.name: was read as false, as YAML reads on, off"),
        (lambda c: c["saes"]["topk"].update(k=2000), "config: saes.topk.k: 2000 is more than d_sae, 1024"),
        (lambda c: c["saes"]["topk"]["grid"].update(k=[8, 2000]), "saes.topk.k: 2000 is more than d_sae"),
        (lambda c: c["saes"]["topk"]["grid"].update(d_sae=[16, 64]), "saes.topk.k: 64 is more than d_sae, 16"),
        (lambda c: c["saes"]["jumprelu"].update(l0=5000), "saes.jumprelu.l0: 5000 is more than d_sae"),
        (lambda c: c["saes"]["topk"]["grid"].update(l1=[0.1]), "saes.topk.grid.l1: unknown key 'l1'"),
        (lambda c: c["saes"]["topk"]["grid"].update(k=[8.5]), "saes.topk.grid.k: 8.5 is not of type"),
        (lambda c: c["saes"]["topk"]["grid"].update(seed=[0.5]), "saes.topk.grid.seed: 0.5 is not of type"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_in_one_line(change, said):
    assert said in refused(change)


def test_whole_floats_are_ints_wherever_they_name_a_file():
    config = default()
    config["sae_seeds"], config["hardware"]["threads"] = [0.0, 2.0], 1.0
    settle(config)
    assert json.dumps([config["sae_seeds"], config["hardware"]["threads"]]) == "[[0, 2], 1]"


# --- what a run says of itself ---


def test_one_line_tells_data_clips_and_models():
    line = describe(default(), lambda folder: [f"{folder}/{i}.flac" for i in range(3)] + ["x/SPEAKERS.TXT"])
    assert "\n" not in line
    for part in (
        "demo",
        "folder resources/corpus (3 sound files)",
        "up to 240 clips and 20 min",
        "tiny-mimi = resources/",
    ):
        assert part in line
    assert "LibriSpeech train-clean-100" in describe(read_config(ROOT / "config/librispeech-mimi.yaml"))
    assert "trains a codec on work/speech" in describe(read_config(ROOT / "config/train-tiny-mimi.yaml"))


def test_bundled_speech_is_known_by_what_is_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = default()
    assert bundled_speech(config)
    config["data"]["path"] = str((ROOT / "resources/corpus").resolve())
    assert bundled_speech(config)
    config["data"] |= {"source": "librispeech", "subset": "dev-clean"}  # path is still what config.yaml gives
    assert not bundled_speech(config)
    config["data"] |= {"source": "folder", "path": "resources-of-mine"}
    assert not bundled_speech(config)


def test_the_bundled_labels_do_not_go_with_other_speech(tmp_path):
    file = tmp_path / "mine.yaml"
    for text, labels, path in (
        ("data: {path: speech/}", None, "speech"),
        ("data: {path: ./resources//corpus/}", "resources/corpus/labels.csv", "resources/corpus"),
        ("data: {path: speech, labels: mine.csv}", "mine.csv", "speech"),
        ("data: {source: librispeech, subset: dev-clean}", None, None),
    ):
        file.write_text(text)
        data = read_config(file)["data"]
        assert (data["labels"], data["path"]) == (labels, path), text


# --- stages: off, or on some of what there is ---

OFF = {
    "probes": {"probes": None, "steering": None, "importance": None},
    "codec": {"codec": None},
    "steering": {"steering": None},
    "importance": {"importance": None},
    "quantisation": {"quantisation": None},
    "saes, all that can go on": {"saes": None, "steering": {"saes": []}, "importance": None, "hallucination": None},
    "saes and sound": dict.fromkeys(("saes", "codec", "steering", "importance", "hallucination")),
}
MOSHI = {
    "run": {"targets": ["m.residual.1"]},
    "models": {"m": {"kind": "moshi", "path": "owner/name", "revision": None}},
}


@pytest.mark.parametrize("over", OFF.values(), ids=OFF)
def test_null_switches_a_stage_off(over):
    settle(config := merge(default(), over))
    for stage, value in over.items():
        assert (config[stage] is None) == (value is None)


@pytest.mark.parametrize(
    "over",
    [
        {"probes": {"bins": 10}},  # steering.high_bin is 19
        {"probes": {"properties": ["rms"]}},  # no centroid
        {"saes": None},  # steering.saes and importance.sae name some
        {"codec": {"codebooks": [99]}},
        {"probes": None},
    ],
)
def test_what_a_run_has_no_target_for_does_not_bother_it(over):
    settle(merge(merge(default(), MOSHI), over))
    off = dict.fromkeys(("steering", "importance", "codec", "quantisation", "hallucination"))
    settle(merge(merge(default(), over), off))


def some(**sections) -> dict:
    """Two targets and sections over the defaults."""
    targets = {"run": {"targets": ["tiny-mimi.encoder_layer.1", "tiny-mimi.encoder_transformer"]}}
    return merge(merge(default(), targets), sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"probes": None}, "config: steering: needs probes; configure them, or set steering: null"),
        ({"probes": None, "steering": None}, "config: importance: needs probes; "),
        ({"saes": None, "steering": {"saes": []}}, "config: importance.sae: names 'topk', but saes is null"),
        ({"probes": {"targets": ["tiny-mimi.encoder"]}}, "probes.targets: 'tiny-mimi.encoder' is not under run"),
        ({"codec": {"targets": ["x.y"]}}, "config: codec.targets: 'x.y' is not under run.targets; add it there"),
        (
            {"probes": {"targets": ["tiny-mimi.encoder_layer.1"]}},
            "config: steering: needs probes of tiny-mimi.encoder_transformer, which probes.targets leaves out",
        ),
        ({"probes": {"saes": ["topk"]}}, "steering: needs probes of SAE 'rms_l1', which probes.saes leaves out"),
        ({"probes": {"saes": ["tpok"]}}, "config: probes.saes: names 'tpok', which is not under saes"),
        ({"codec": {"saes": ["tpok"]}}, "config: codec.saes: names 'tpok', which is not under saes"),
        (
            {"saes": {"topk": {"targets": ["tiny-mimi.encoder_layer.1"]}}},
            "config: steering: needs SAE 'topk' of tiny-mimi.encoder_transformer, which saes.topk.targets leaves out",
        ),
        ({"saes": {"topk": {"targets": ["a.b"]}}}, "config: saes.topk.targets: 'a.b' is not under run.targets"),
        ({"saes": {"2": default()["saes"]["topk"]}}, "config: saes.2: the name reads as a number"),
        ({"saes": {"1e5": default()["saes"]["topk"]}}, "config: saes.1e5: the name reads as a number"),
        ({"codec": {"codebooks": [8, 99]}}, "config: codec.codebooks: 99 is more than the 16 codebooks of tiny-mimi"),
        ({"steering": {"codebooks": 17}}, "config: steering.codebooks: 17 is more than the 16 codebooks of tiny-mimi"),
        ({"importance": {"maps": ["variance"]}}, "config: importance.maps: must hold 'composition'"),
        ({"importance": {"codebooks": 17}}, "config: importance.codebooks: 17 is more than the 16"),
        ({"quantisation": {"codebooks": 17}}, "config: quantisation.codebooks: 17 is more than the 16"),
        ({"report": {"clips": 4}, "steering": {"listen": 3}}, "config: report.clips: 4 is above steering.listen, 3"),
        ({"run": {"targets": ["tiny-mimi.encoder_layer.2"]}}, "encoder_layer.2': the model has layers 0 to 1"),
        ({"run": {"targets": ["tiny-mimi.layer.0"]}}, "of a mimi are encoder_transformer and encoder_layer.<layer>"),
        ({"run": {"targets": ["tiny-mimi.encoder_transformer.0"]}}, "the sites of a mimi are"),
        ({"saes": {"rms_l1": {"grid": {"k": [8]}}}}, "config: saes.rms_l1.grid.k: unknown key 'k'"),
        ({"saes": {"topk": {"grid": {"d_sae": [0.5]}}}}, "config: saes.topk.grid.d_sae: 0.5 is"),
    ],
)  # fmt: skip
def test_what_a_stage_is_asked_for_must_be_there(sections, said):
    with pytest.raises(EqknobsError) as caught:
        validate(some(**sections))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_sound_stage_refuses_a_target_that_makes_none():
    config = merge(merge(default(), MOSHI), {"steering": {"targets": ["m.residual.1"]}})
    with pytest.raises(EqknobsError, match=r"steering\.targets: 'm\.residual\.1' is no codec: it makes no sound"):
        validate(config)


def test_a_stage_works_on_what_it_lists():
    first, second = "tiny-mimi.encoder_layer.1", "tiny-mimi.encoder_transformer"
    config = some(
        saes={"jumprelu": {"targets": [first]}},
        codec={"saes": ["topk", "jumprelu"], "targets": [second]},
        steering=None,
    )
    settle(config)
    assert stage_targets(config, "probes") == [first, second]
    assert stage_targets(config, "codec", decoding=True) == [second] and stage_targets(config, "steering") == []
    assert trained_saes(config, first) == ["batchtopk", "jumprelu", "rms_l1", "topk"]
    assert stage_saes(config, "probes", second) == ["batchtopk", "rms_l1", "topk"]
    assert stage_saes(config, "codec", second) == ["topk"]


WHISPER = ["whisper-tiny-en.layer.1", "whisper-tiny-en.layer.3"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], ["tiny-mimi.encoder_transformer", *WHISPER]),
        (["whisper-*"], WHISPER),
        (["!whisper-*"], ["tiny-mimi.encoder_transformer"]),
        (["!whisper-*", "*.3@heard"], ["tiny-mimi.encoder_transformer", f"{WHISPER[1]}@heard"]),
        (
            ["*@heard", WHISPER[0]],
            ["tiny-mimi.encoder_transformer@heard", WHISPER[0], *(f"{t}@heard" for t in WHISPER)],
        ),
        (["nothing.*"], []),
    ],
)  # fmt: skip
def test_targets_are_chosen_by_patterns_all_but_some_and_on_other_corpora(wanted, found):
    assert sorted(chosen_targets(default(), "x.targets", wanted)) == sorted(found)


def test_chosen_targets_come_in_the_runs_order_on_every_corpus():
    found = chosen_targets(default(), "x.targets", [WHISPER[1], WHISPER[0]], ["talk", "speech"])
    assert found == [f"{WHISPER[0]}@talk", WHISPER[0], f"{WHISPER[1]}@talk", WHISPER[1]]
    with pytest.raises(EqknobsError, match=r"x\.targets: names the corpus 'noise'"):
        chosen_targets(default(), "x.targets", ["whisper-*@noise"])
    with pytest.raises(EqknobsError, match=r"it goes into saes\.audiosae\.corpus"):
        validate(merge(default(), {"saes": {"audiosae": {"targets": ["whisper-*@heard"]}}}))


def test_what_the_demo_says_of_whisper_goes_with_another_runs_targets():
    config = merge(default(), {"run": {"targets": ["tiny-mimi.encoder_layer.0"]}})
    settle(config)
    (target,) = config["run"]["targets"]
    assert trained_saes(config, target) == ["batchtopk", "jumprelu", "rms_l1", "topk"]
    for stage in ("probes", "stability", "label_search", "features"):
        assert stage_targets(config, stage) == [target]
    assert not stage_targets(config, "domains") and not stage_targets(config, "phones")


# --- one spelling of what means the same ---


def test_what_means_the_same_reads_the_same():
    config = default()
    settle(kept := copy.deepcopy(config))
    config["data"] |= {"path": "./resources//corpus/", "labels": "resources/corpus/./labels.csv", "subset": "dev-clean"}
    config["models"]["tiny-mimi"]["path"] = "./resources/models/tiny-mimi/"
    config["judges"]["asr"] = "tiny.en/"
    config["saes"]["topk"]["grid"]["k"].reverse()
    config["sae_seeds"].reverse()
    for section, names in {
        "probes": ("properties", "lags", "l2"),
        "codec": ("codebooks",),
        "steering": ("saes", "alphas", "clamp_features"),
        "importance": ("maps", "removed", "modes"),
        "quantisation": ("parts", "widths", "budgets", "heard_widths"),
    }.items():
        for name in names:
            config[section][name].reverse()
    settle(config)
    assert config == kept
    assert config["steering"]["saes"] == default()["steering"]["saes"]  # the order of its arms in the tables


def test_names_are_sorted_with_their_numbers_by_size():
    targets = ["m.residual.27", "m.residual.3", "m.heads.15"]
    settle(config := merge(merge(default(), MOSHI), {"run": {"targets": targets}}))
    assert config["run"]["targets"] == ["m.heads.15", "m.residual.3", "m.residual.27"]


def test_a_path_that_stands_twice_is_refused():
    training = yaml.safe_load((ROOT / "config/train-tiny-mimi.yaml").read_text())
    training["codec_training"]["data"] |= {"./work/speech/": 0.1}
    with pytest.raises(EqknobsError, match=r"config: \./work/speech/ stands there twice"):
        settle(merge(default(), training))


def test_a_slice_is_sorted_plain_json():
    value = plain({"b": (1.0, 2), "a": {"d": 0.5, "c": None}})
    assert json.dumps(value) == json.dumps({"a": {"c": None, "d": 0.5}, "b": [1, 2]})


# --- the schema ---


def test_the_schema_is_one_and_every_key_says_what_it_means():
    jsonschema.Draft202012Validator.check_schema(schema())
    rows = list(described())
    for key in ("run.name", "saes.<name>.k", "models.<name>.nf4.block", "probes.saes", "codec_training.steps"):
        assert key in dict(rows)
    assert (
        "models.<name>.stream",
        "moshi: optional: `user` (default): the clip is heard; `agent`: the agent speaks it",
    ) in rows

    def silent(value: object) -> set[str]:
        """Keys without a description that hold no others."""
        if isinstance(value, list):
            return set().union(*map(silent, value))
        if not isinstance(value, dict):
            return set()
        keys = value["properties"] if isinstance(value.get("properties"), dict) else {}
        here = {k for k, v in keys.items() if isinstance(v, dict) and not v.keys() & {"description", "properties"}}
        return here.union(*map(silent, value.values()))

    splits, sizes = {"train", "val", "test"}, {"dim", "layers", "heads", "hidden", "context", "codebooks"}
    sizes |= {f"dep_{size}" for size in ("dim", "layers", "heads", "hidden")}
    choosers = {"kind", "variant", "source", "data", "synthesis"}  # their description stands with the mapping
    assert silent(schema()) == {*splits, *sizes, *choosers, "pitch", "rms", "models", "items"}  # `probes.properties`


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("probes: {properties: [centroid, timbre]}", "probes.properties: 'timbre' is not one of centroid, rms, pitch"),
        ("probes: {properties: [voice]}", "the splits of data share no speaker; set data.split_unit: sentence, or"),
        ("probes: {reference: none}", "probes.reference: names 'none', which is not under saes"),
        ("data: {split_unit: sentence, split_by: source}", "data.split_by: keeps speakers apart"),
    ],
)
def test_properties_and_splits_must_go_together(tmp_path, text, said):
    path = tmp_path / "over.yaml"
    path.write_text(text)
    with pytest.raises(EqknobsError, match=said):
        read_config(path)
    path.write_text("data: {split_unit: sentence}\nprobes: {properties: [centroid, voice], reference: null}")
    read_config(path)


def test_the_table_of_keys_is_in_step():
    done = subprocess.run(
        [sys.executable, "tools/config_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_settings_file_is_read():
    found = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("settings.yaml")}
    assert found == set(PARTS)


def corpora(config):
    config["run"]["targets"] = ["tiny-mimi.encoder_transformer"]
    config["corpora"] = {
        "music": config["data"] | {"path": "music"},
        "mix": {"source": "union", "of": ["music", "speech"]},
    }


def said(config, **changes):
    """A corpus that espeak-ng says."""
    return {"source": "synthesis"} | config["accent"]["synthesis"] | changes


def voice_of(corpus):
    """Who speaks is asked of a corpus beside speech that is split by sentence."""

    def change(config):
        config["data"]["split_unit"] = "sentence"
        config["probes"].update(properties=["centroid", "voice"], corpora=["speech", corpus])

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["corpora"]["mix"].update(of=["speech", "noise"]), "corpora.mix.of: names the corpus 'noise'"),
        (lambda c: c["corpora"].update(more={"source": "union", "of": ["mix", "speech"]}), "mix is a union itself"),
        (
            lambda c: c["corpora"].update(
                n={"source": "mixture", "of": ["speech"], "noise": ["mix"], "snr_db": [0, 9]}
            ),
            "corpora.n.noise: mix is a union itself",
        ),
        (
            lambda c: c["corpora"].update(
                n={"source": "mixture", "of": ["speech"], "noise": ["music"], "snr_db": [9, 0]}
            ),
            "corpora.n.snr_db: from 9 to less",
        ),
        (lambda c: c["corpora"].update(n=said(c, count=3)), "corpora.n.count: 3 is less than"),
        (lambda c: c["corpora"].update(n=said(c, path="x")), "corpora.n: unknown key 'path'"),
        (
            lambda c: c["corpora"].update(n=said(c, splits={"train": 0.5, "val": 0.5, "test": 0.5})),
            "corpora.n.splits: the three shares",
        ),
        (lambda c: c["corpora"]["music"].update(min_seconds=99), "corpora.music.min_seconds: 99 must be below"),
        (lambda c: c["corpora"]["music"].update(path=None), "corpora.music.path: is null"),
        (lambda c: c["corpora"]["mix"].update(path="x"), "corpora.mix: unknown key 'path'"),
        (lambda c: c["corpora"].update(speech=c["data"]), "corpora"),
        (lambda c: c["probes"].update(corpora=["noise"]), "probes.corpora: names the corpus 'noise'"),
        (
            voice_of("music"),
            "'voice' asks who speaks, but the splits of corpora.music share no speaker; set corpora.music",
        ),
        (voice_of("mix"), "'voice' asks who speaks, but the splits of corpora.music share no speaker"),
        (lambda c: c["saes"]["topk"].update(corpus="noise"), "saes.topk.corpus: names the corpus 'noise'"),
    ],
)
def test_corpora_that_cannot_be_are_refused(change, said):
    config = read_yaml(DEFAULT)
    corpora(config)
    change(config)
    with pytest.raises(EqknobsError) as caught:
        validate(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)
