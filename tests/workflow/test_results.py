"""A finished run, held against its own raw scores and, for three renders, against its own sound.

EQKNOBS_RESULTS names the folder (default results/demo); skipped where it is absent.
"""

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from sklearn.metrics import f1_score

from helpers import ROOT
from helpers.recompute import (
    check_counted,
    check_domains,
    check_equal_quality,
    check_erasing,
    check_features,
    check_hallucinations,
    check_layers,
    check_maps,
    check_overlap,
    check_packing,
    check_pruning,
    check_recipe,
    check_splicing,
    check_stability,
    check_steered,
    check_summary,
    check_table,
    read,
    round_trip_wer,
)

RUN = Path(os.environ.get("EQKNOBS_RESULTS", ROOT / "results" / "demo"))
if not (RUN / "tables" / "summary.json").is_file():
    pytest.skip(f"no finished run in {RUN}", allow_module_level=True)
SUMMARY = json.loads((RUN / "tables" / "summary.json").read_text())
CONFIGS = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "config").glob("*.yaml"))]
DEFAULT = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


def merged(key: str) -> dict:
    """A section of the configuration that made the run: the default, overlaid by the file that names the run."""
    own = next((c for c in CONFIGS if c.get("run", {}).get("name") == RUN.name), {})
    return {**DEFAULT[key], **own.get(key, {})}


CFG = {
    **merged("tables"),
    "seed": SUMMARY["seed"],
    "bootstrap": SUMMARY["bootstrap"],
    "word_codebooks": merged("steering")["codebooks"],
    "properties": merged("probes")["properties"],
}
TARGETS = [name for name, facts in SUMMARY["targets"].items() if not facts.keys() & {"answers", "lm_best"}]
PROBED = [name for name in TARGETS if (RUN / "probes" / name).is_dir()]  # what the chain of codecs works on
OPENED = [name for name, facts in SUMMARY["targets"].items() if "lm_best" in facts]
SPEAKING = [name for name, facts in SUMMARY["targets"].items() if "answers" in facts]  # speech LMs
PRUNED = [name for name, facts in SUMMARY["targets"].items() if "pruning" in facts]
RECOVERED = [name for name, facts in SUMMARY["targets"].items() if "lm_recipe" in facts]
STEERED = [name for name, facts in SUMMARY["targets"].items() if "lm_steering" in facts]
QUANTISED = [name for name, facts in SUMMARY["targets"].items() if "lm_quantisation" in facts]


def model_of(target: str) -> dict:
    model = dict(merged("models")[target.split(".")[0]])
    return {**model, "path": str(ROOT / model["path"])}


@pytest.mark.parametrize("target", PROBED)
def test_every_number_of_the_summary_is_recomputed_from_clips(target):
    assert check_summary(RUN, target, CFG, model_of(target)) > 100


@pytest.mark.parametrize("target", PROBED)
@pytest.mark.parametrize("stage", ["codec", "sae", "probes", "steering", "importance", "quantisation"])
def test_every_cell_of_every_table_is_recomputed_from_clips(target, stage):
    if stage in ("codec", "steering", "importance", "quantisation") and not SUMMARY["targets"][target]["words"]:
        pytest.skip("the model cannot decode")
    measurable = True
    if SUMMARY["targets"][target]["words"]:
        measurable = round_trip_wer(RUN, target, CFG, model_of(target))[0] <= CFG["unmeasurable_wer"]
    assert check_table(RUN, target, stage, CFG, model_of(target), measurable) > 20


@pytest.mark.parametrize("target", [t for t in TARGETS if SUMMARY["targets"][t]["importance"]])
def test_how_maps_agree_with_the_oracle_is_recomputed_from_clips(target):
    assert check_maps(RUN, target, CFG) > 20


@pytest.mark.parametrize("target", [t for t in TARGETS if SUMMARY["targets"][t]["quantisation"]])
def test_bytes_at_equal_quality_are_recomputed_from_clips(target):
    assert check_equal_quality(RUN, target, model_of(target)) > 20


@pytest.mark.parametrize("model", OPENED)
def test_what_layers_and_heads_hold_is_recomputed_from_clips(model):
    assert check_layers(RUN, model, CFG, SUMMARY["targets"][model]) > 1000


@pytest.mark.parametrize("model", SPEAKING)
def test_what_a_speech_lm_says_is_recomputed_from_its_answers(model):
    table = read(RUN / "tables" / "speech_lm.csv")
    table = table[table["model"] == model].set_index("condition")
    answers = read(RUN / "scores" / f"{model}.answers.csv")
    assert set(table.index) == set(answers["condition"])
    for condition, rows in answers.groupby("condition"):
        found, count = table.loc[condition], len(rows)
        assert found["answers"] == count == rows["id"].nunique() and found["speakers"] == rows["speaker"].nunique()
        for name, top, bottom in (
            ("wer_monologue", "errors_monologue", "words_monologue"),
            ("wer_prompt", "errors_prompt", "words_prompt"),
            ("codec_wer", "errors_codec", "words_prompt"),
            ("pad_share", "pads", "frames"),
        ):
            assert found[name] == pytest.approx(rows[top].sum() / rows[bottom].sum(), rel=1e-6), (condition, name)
            assert found[f"{name}_low"] <= found[name] + 1e-9 and found[name] <= found[f"{name}_high"] + 1e-9
        for name, column in (("silent_share", "silent"), ("endless_share", "endless"), ("voice_right", "voice_right")):
            assert found[name] == pytest.approx(rows[column].sum() / count, rel=1e-6), (condition, name)
    said = {row["condition"]: row["wer_monologue"] for row in SUMMARY["targets"][model]["answers"]}
    assert said == pytest.approx(table["wer_monologue"].to_dict(), rel=1e-6)


@pytest.mark.parametrize("model", PRUNED)
def test_what_a_pruned_speech_lm_says_is_recomputed_from_its_answers(model):
    check_pruning(RUN, model)


@pytest.mark.parametrize("model", QUANTISED)
def test_what_a_packed_speech_lm_says_is_recomputed_from_its_answers(model):
    check_packing(RUN, model)


@pytest.mark.parametrize("model", RECOVERED)
def test_what_a_recovered_speech_lm_says_is_recomputed_from_its_answers(model):
    check_recipe(RUN, model)


@pytest.mark.parametrize("model", STEERED)
def test_what_a_steered_speech_lm_says_is_recomputed_from_its_answers(model):
    check_steered(RUN, model)


@pytest.mark.parametrize("target", [t for t in TARGETS if SUMMARY["targets"][t]["words"]])
def test_three_renders_heard_again_give_the_same_words(target):
    from eqknobs.audio import read_audio
    from eqknobs.sound.judges import Transcriber, word_errors

    judge = Transcriber({**merged("judges"), "device": "cpu"})
    originals = read(RUN / "scores" / "originals.csv").set_index("id")
    for stage in ("codec", "steering", "importance", "quantisation"):
        folder = RUN / "renders" / target / stage
        index = read(folder / "index.csv")
        row = index[index["judged"].astype(bool)].iloc[-1]  # the last: an edit, not the untouched clip
        words = read(RUN / "scores" / f"{target}.{stage}.words.csv").fillna({"transcript": ""})
        score = words[(words["id"] == row["id"]) & (words["condition"] == row["condition"])].iloc[0]
        heard = judge.transcribe(read_audio(folder / row["file"], 16000))
        assert heard == score["transcript"], f"{stage} {row['condition']} {row['id']}"
        reference = originals.loc[row["id"], "transcript"]
        errors = word_errors(reference if isinstance(reference, str) else "", heard)
        assert errors == (score["errors"], score["words"])


@pytest.mark.parametrize("target", [t for t in TARGETS if (RUN / "stability" / f"{t}.json").is_file()])
def test_how_many_features_are_found_again_is_recomputed_from_features_and_one_pair_from_codes(target):
    table = read(RUN / "tables" / "stability.csv")
    features = read(RUN / "scores" / f"{target}.stability.csv")
    assert check_stability(table[table["target"] == target], features) > 10
    check_overlap(RUN, target, features)


@pytest.mark.parametrize("target", [t for t in TARGETS if (RUN / "scores" / f"{t}.splicing.csv").is_file()])
def test_what_is_lost_downstream_is_recomputed_from_clips(target):
    table = read(RUN / "tables" / "splicing.csv")
    assert check_splicing(RUN, target, table[table["target"] == target], CFG) >= 4 * 15


@pytest.mark.parametrize("model", [path.stem for path in sorted((RUN / "hallucination").glob("*.json"))])
def test_what_is_written_where_nobody_speaks_is_recomputed_from_clips(model):
    table = read(RUN / "tables" / "hallucination.csv")
    table = table[table["target"] == model]
    assert check_hallucinations(RUN, model, table, CFG) > 400
    chosen = table[table["chosen"] & (table["domain"] == "all")]
    assert (chosen.groupby("split")["arm"].nunique() == 14).all()
    index = read(RUN / "renders" / model / "hallucination" / "index.csv")
    page = (RUN / "report" / "hallucination.html").read_text()
    assert page.count("<audio") >= len(index) and "before: nothing done" in page


@pytest.mark.parametrize("target", [t for t in TARGETS if (RUN / "domains" / f"{t}.json").is_file()])
def test_labels_of_domains_are_recomputed_from_shares(target):
    table = read(RUN / "tables" / "domains.csv")
    features = read(RUN / "scores" / f"{target}.domains.csv")
    assert check_domains(table[table["target"] == target], features) >= 6


@pytest.mark.parametrize("target", [t for t in TARGETS if (RUN / "phones" / f"{t}.json").is_file()])
def test_what_names_of_features_tell_is_recomputed_from_clips(target):
    table = read(RUN / "tables" / "phones.csv")
    table = table[table["target"] == target]
    rows = read(RUN / "scores" / f"{target}.phones.csv")
    for labels, name in ((["true"], "accuracy"), (["shifted", "shuffled"], "null")):
        own = rows[rows["labels"].isin(labels)]
        judged = table[table[name].notna()]  # the majority has no null
        assert check_counted(judged, own, ["method", "space"], (name, "correct", "frames")) >= 2


@pytest.mark.parametrize("target", [t for t in TARGETS if (RUN / "features" / f"{t}.json").is_file()])
def test_what_features_hear_is_recomputed_from_windows_and_one_moment_from_its_sound(target):
    table = read(RUN / "tables" / "features.csv")
    table = table[table["target"] == target]
    assert check_features(RUN, target, table, CFG) > 20
    for sae, own in table.groupby("sae"):
        page = (RUN / "report" / f"features.{target}.{sae}.html").read_text()
        shown = re.findall(r'<details class="feature" id="f(\d+)"', page)
        assert sorted(map(int, shown)) == sorted(own["feature"]) and len(page) < 25e6


@pytest.mark.parametrize("target", [t for t in TARGETS if (RUN / "label_search" / f"{t}.json").is_file()])
def test_what_a_feature_tells_of_a_label_is_recomputed_from_clips(target):
    table = read(RUN / "tables" / "label_search.csv")
    rows = read(RUN / "scores" / f"{target}.label_search.csv")
    rows = rows.assign(twice=2 * rows["both"], asked=rows["true"] + rows["told"])
    keys = ["sae", "property", "label"]
    assert check_counted(table[table["target"] == target], rows, keys, ("f1_test", "twice", "asked")) >= 1


@pytest.mark.parametrize("path", sorted((RUN / "scores").glob("*.accent.csv")), ids=lambda path: path.name)
def test_macro_f1_of_accents_is_recomputed_from_what_was_told(path):
    runs, model = pd.read_csv(path, dtype={"said": str}), path.name.removesuffix(".accent.csv")
    clips = read(RUN / "scores" / f"{model}.accent_clips.csv")
    table = read(RUN / "tables" / "accent.csv").query("codec == @model").reset_index(drop=True)
    assert len(table) == len(runs)
    told = {}
    for row in runs.to_dict("records"):
        true = clips.loc[clips["task"] == row["task"], "true"].tolist()
        value = f1_score(true, list(map(int, row["said"])), average="macro", zero_division=0)
        key = tuple(str(row[name]) for name in ("weights", "site", "codebooks", "task", "features"))
        told.setdefault(key, []).append(value)
    for key, own in table.groupby(["weights", "site", "codebooks", "task", "features"]):
        assert sorted(own["macro_f1"]) == pytest.approx(sorted(told[tuple(map(str, key))]))


@pytest.mark.parametrize("target", [t for t in TARGETS if (RUN / "erasing" / f"{t}.json").is_file()])
def test_what_is_told_and_erased_is_recomputed_from_what_every_probe_told(target):
    assert check_erasing(RUN, target, merged("erasing")) > 100
