"""Tables and headlines: every cell again from the raw rows, and the rules on words, voices and ranks."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from eqknobs.errors import EqknobsError
from eqknobs.evidence.comparisons import compare, with_holm
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.evidence.stats import holm as library_holm
from eqknobs.evidence.words import words_rule
from eqknobs.plan import voice_records
from eqknobs.report.findings import matrix
from eqknobs.report.tables import COLUMNS, write_tables
from eqknobs.stages.codec import tables as codec
from eqknobs.stages.importance import tables as importance
from eqknobs.stages.probes import tables as probes
from eqknobs.stages.saes import tables as saes
from eqknobs.stages.speech_lm import tables as speech_lm
from eqknobs.stages.steering import tables as steering
from helpers import ROOT
from helpers.recompute import check_equal_quality, check_maps, check_summary, check_table, holm, read
from helpers.results_fixture import ALPHAS, TARGET, inputs_of, make_results, make_tables, tables_cfg

ISSUE_COLUMNS = {
    "codec": "target voices path codebooks split clips wer wer_text centroid_correlation_clip "
    "centroid_correlation_frame mel_distance speaker_similarity",
    "sae": "target sae variant seed d_in d_sae split l0 fvu dead_share",
    "probes": "target space property binning split frames utterances speakers accuracy accuracy_low accuracy_high "
    "balanced_accuracy within_one_bin ridge_r2 majority shuffled",
    "steering": "target property arm alpha alpha_raw calibrated split clips centroid_hz wer wer_low wer_high wer_text "
    "speaker_similarity f0_error_cents loudness_change_db mel_distance",
    "importance_ablation": "target map mode removed seed clips mel_distance latent_error wer speaker_similarity",
    "importance_maps": "target map spearman_oracle spearman_oracle_low spearman_oracle_high val_mel_distance",
    "quantisation": "target part plan seed rounding bits_mean bytes bytes_resident mel_distance latent_error "
    "token_flip_rate wer speaker_similarity dnsmos decode_ratio",
    "quantisation_equal_quality": "target part plan bytes_needed",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    config = make_results(root, sound=False)
    run = root / "results" / "run"
    make_tables(run, config)
    return run, config


def context(run: Path, config: dict, stage: str, **cfg) -> Context:
    """Where a stage's tables are made."""
    cfg = tables_cfg(config) | cfg
    return Context(TARGET, inputs_of(run, config), cfg, cfg["stages"][stage])


@pytest.fixture
def copy(results, tmp_path):
    """A run folder of its own, to break."""
    shutil.copytree(results[0], tmp_path / "run")
    return tmp_path / "run", results[1]


def rewrite(path: Path, change) -> None:
    change(read(path)).to_csv(path, index=False)


@pytest.mark.parametrize("stage", ["codec", "sae", "probes", "steering", "importance", "quantisation"])
def test_every_cell_of_every_table_is_recomputed_from_clips(results, stage):
    run, config = results
    assert check_table(run, TARGET, stage, tables_cfg(config), config["models"]["tiny-mimi"], True) > 40


def test_every_number_of_the_summary_is_recomputed_from_clips(results):
    run, config = results
    assert check_summary(run, TARGET, tables_cfg(config), config["models"]["tiny-mimi"]) > 300


def test_how_maps_agree_with_the_oracle_is_recomputed_from_clips(results):
    run, config = results
    assert check_maps(run, TARGET, tables_cfg(config)) > 60


def test_bytes_at_equal_quality_are_recomputed_from_clips(results):
    run, config = results
    assert check_equal_quality(run, TARGET, config["models"]["tiny-mimi"]) > 50


def test_recomputation_can_fail(copy):
    run, config = copy
    rewrite(run / "tables" / "codec.csv", lambda t: t.assign(wer=t["wer"] + 0.001))
    with pytest.raises(AssertionError, match="wer"):
        check_table(run, TARGET, "codec", tables_cfg(config), config["models"]["tiny-mimi"], True)


@pytest.mark.parametrize("name", ISSUE_COLUMNS)
def test_columns_are_those_agreed_in_that_order_and_documented(results, name):
    columns = list(read(results[0] / "tables" / f"{name}.csv"))
    assert columns == COLUMNS[name].split()
    assert columns[: len(ISSUE_COLUMNS[name].split())] == ISSUE_COLUMNS[name].split()
    document = (ROOT / "docs" / "tables.md").read_text()
    section = document.split(f"## `{name}.csv`")[1].split("\n## ")[0]
    assert [c for c in columns if f"`{c}`" not in section and not c.endswith(("_low", "_high"))] == []


def test_writing_twice_gives_the_same_bytes(copy):
    run, config = copy
    before = {path.name: path.read_bytes() for path in (run / "tables").iterdir()}
    make_tables(run, config)
    assert {path.name: path.read_bytes() for path in (run / "tables").iterdir()} == before


def test_words_are_unmeasurable_where_the_round_trip_loses_them(tmp_path):
    config = make_results(tmp_path, wer=0.7, sound=False)
    run = tmp_path / "results" / "run"
    make_tables(run, config)
    steering, importance = (read(run / "tables" / f"{n}.csv") for n in ("steering", "importance_ablation"))
    for table in (steering, importance):
        words = table[[c for c in table if c.startswith("wer")]]
        assert set(words.stack().dropna()) == {"unmeasurable"}
    assert steering[steering["calibrated"] == "sweep"]["wer"].isna().all()  # never judged, so not even that
    codec = read(run / "tables" / "codec.csv")  # what the rule rests on stays a number
    assert (codec[codec["path"] == "quantized"]["wer"].astype(float) > 0.5).all()
    facts = json.loads((run / "tables" / "summary.json").read_text())["targets"][TARGET]
    assert facts["words"]["measurable"] is False
    assert not [r for r in facts["comparisons"] if r["measure"].startswith("wer")]
    assert "unmeasurable" in next(h["text"] for h in facts["headlines"] if h["topic"] == "codec")
    ranked = steering.dropna(subset=["rank"]).sort_values("rank")
    assert ranked["speaker_similarity"].is_monotonic_decreasing
    check_table(run, TARGET, "steering", tables_cfg(config), config["models"]["tiny-mimi"], False)


def test_a_round_trip_at_the_threshold_is_still_measurable(results):
    run, config = results
    wer = words_rule(context(run, config, "codec"))["wer"]
    for threshold, measurable in ((wer, True), (wer - 1e-6, False)):
        at = context(run, config, "codec", unmeasurable_wer=threshold)
        assert words_rule(at)["measurable"] is measurable


def test_without_the_codec_stage_the_steering_stages_own_reference_decides_on_words(copy):
    run, config = copy
    for path in (run / "scores").glob("*.codec.*.csv"):
        path.unlink()
    rows = read(run / "scores" / f"{TARGET}.steering.words.csv")
    rows = rows[rows["condition"] == rows.loc[rows["condition"].str.contains("codec_roundtrip"), "condition"].iloc[0]]
    cfg = tables_cfg(config)
    del cfg["stages"]["codec"]
    write_tables(inputs_of(run, config), cfg, run / "tables")
    facts = json.loads((run / "tables" / "summary.json").read_text())["targets"][TARGET]
    assert facts["words"]["wer"] == pytest.approx(rows["errors"].sum() / rows["words"].sum())
    assert not [h for h in facts["headlines"] if h["topic"] == "codec"]


def test_without_a_quantiser_the_codec_is_said_to_have_none(results):
    at = context(*results, "codec", word_codebooks=None)
    words, clips = words_rule(at), at.inputs.scores(TARGET, "codec")
    clips = clips[(clips["path"] == "unquantized") & (clips["split"] == "test")]
    assert words["wer"] == clips["errors"].sum() / clips["words"].sum() != words_rule(context(*results, "codec"))["wer"]
    (line,) = codec.findings(at, {"words": words})
    assert line["text"].startswith("The codec alone, without its quantiser, costs a word error rate of ")


def test_what_a_speech_lm_says_stands_beside_what_is_heard_of_it():
    row = {"codec_wer": 0.1, "voice_right": 0.75, "answers": 8, "seeds": 1, "speakers": 2}
    for name, value in (("wer_monologue", 0.2), ("wer_prompt", 0.3)):
        row |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
    rows = [row | {"condition": name} for name in ("intact", "forced", "heads_zeroed_.5")]
    found = matrix(speech_lm.findings(None, {"answers": rows}))
    assert [row["name"] for row in found["rows"]] == ["intact", "heads off, share .5"] and not found["sentences"]
    assert found["columns"] == ["WER, heard against monologue", "WER, monologue against prompt"]
    assert [[cell["value"] for cell in row["cells"]] for row in found["rows"]] == [[0.2, 0.3]] * 2
    assert found["rows"][1]["cells"][1]["text"].startswith(
        "With 50% of its heads off the model writes what it was told"
    )


def test_arms_that_miss_the_shift_keep_their_row_and_no_rank(results):
    table = read(results[0] / "tables" / "steering.csv")
    missed = table[table["calibrated"] == "unreached"]
    assert missed["arm"].tolist() == ["random"]
    assert missed["rank"].isna().all() and missed["wer"].notna().all()
    reached = table[table["calibrated"] == "reached"]
    assert sorted(reached["rank"]) == list(range(1, len(reached) + 1))
    assert reached.sort_values("rank")["wer"].astype(float).is_monotonic_increasing
    assert table[~table["calibrated"].isin(["reached"])]["rank"].isna().all()
    facts = json.loads((results[0] / "tables" / "summary.json").read_text())["targets"][TARGET]
    assert not [r for r in facts["comparisons"] if "random" in (r["a"], r["b"]) and r["family"].startswith("steering")]
    assert "random direction" in next(h["text"] for h in facts["headlines"] if "Not reached" in h["text"])


def test_nothing_reached_still_makes_tables(tmp_path):
    arms = ["raw_probe", "difference_in_means", "random", "dsp_lowpass"]
    arms += [
        f"{kind}:{sae}"
        for kind in ("sae_probe", "sae_probe_error", "sae_probe_renorm", "sae_clamp")
        for sae in ("topk", "rms_l1")
    ]
    config = make_results(tmp_path, unreached=tuple(arms), sound=False)
    run = tmp_path / "results" / "run"
    make_tables(run, config)
    facts = json.loads((run / "tables" / "summary.json").read_text())["targets"][TARGET]
    assert read(run / "tables" / "steering.csv")["rank"].isna().all()
    first = next(h for h in facts["headlines"] if h["topic"] == "steering")
    assert first["verdict"] == "measured" and first["text"].startswith("0 of 12 arms")


def test_sweep_rows_hold_signal_measures_and_no_words(results):
    table = read(results[0] / "tables" / "steering.csv")
    sweep = table[table["calibrated"] == "sweep"]
    assert len(sweep) == 11 * len(ALPHAS) and sweep["centroid_hz"].notna().all()
    assert sweep[["wer", "wer_low", "wer_high", "wer_text"]].isna().all().all()


@pytest.mark.parametrize("training", [None, {}, {"voices_heard": [], "voices_unheard": None}])
def test_voices_that_training_does_not_name_are_unknown(results, tmp_path, training):
    run, config = results
    model = tmp_path / "model"
    model.mkdir()
    if training is not None:
        (model / "training.json").write_text(json.dumps(training))
    config = {**config, "models": {"tiny-mimi": {"kind": "mimi", "path": str(model)}}}
    table = codec.tabulate(context(run, config, "codec", bootstrap=100)).tables["codec"]
    assert set(table["voices"]) == {"unknown"}


def test_voices_are_named_by_the_models_training(results):
    table = read(results[0] / "tables" / "codec.csv")
    assert set(table["voices"]) == {"heard", "unheard", "unknown"}
    clips = table[table["path"] == "original"].set_index("voices")[["clips", "speakers"]]
    assert clips.loc["heard"].tolist() == [6, 2] and clips.loc["unheard"].tolist() == [3, 1]


def test_a_bundled_models_voices_are_those_of_the_bundled_corpus(results):
    """LibriSpeech has a reader 103 too: tiny-mimi did not hear that one."""
    run, config = results
    model = {"kind": "mimi", "path": "resources/models/tiny-mimi"}
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    records = {}
    for data in ({"source": "folder", "path": "resources/corpus"}, {"source": "librispeech"}):
        records[data["source"]] = voice_records({**default, "data": {**default["data"], **data}}, [TARGET])
    assert records == {"folder": {TARGET: f"{model['path']}/training.json"}, "librispeech": {}}
    heard = json.loads((ROOT / model["path"] / "training.json").read_text())["voices_heard"]
    scores = read(run / "scores" / f"{TARGET}.codec.signal.csv")
    assert "103" in heard and not set(heard) & set(scores["speaker"])
    shutil.copytree(run / "scores", run.parent / "other" / "scores")
    for path in (run.parent / "other" / "scores").glob("*.codec.*.csv"):
        path.write_text(path.read_text().replace(",t00,", ",103,"))
    cfg = tables_cfg(config) | {"bootstrap": 100}
    for source, expected in (("folder", {"heard", "unknown"}), ("librispeech", {"unknown"})):
        inputs = Inputs.below(run.parent / "other", *records[source].values())
        at = Context(TARGET, inputs, cfg, {"targets": [TARGET], "training": records[source]})
        assert set(codec.tabulate(at).tables["codec"]["voices"]) == expected


def test_a_model_that_cannot_decode_gets_no_sound_rows(copy):
    run, config = copy
    models = {"tiny-mimi": {**config["models"]["tiny-mimi"], "kind": "hubert"}}
    for path in (run / "scores").glob("*.words.csv"):
        path.unlink()
    make_tables(run, {**config, "models": models})
    assert read(run / "tables" / "steering.csv").empty and len(read(run / "tables" / "probes.csv"))


def test_missing_raw_scores_are_named(copy):
    run, config = copy
    inputs, gone = inputs_of(run, config), run / "scores" / f"{TARGET}.codec.words.csv"
    gone.unlink()
    with pytest.raises(EqknobsError, match=r"codec\.words\.csv: no such file; run the stage"):
        write_tables(inputs, tables_cfg(config), run / "tables")


def test_what_the_rule_does_not_declare_is_not_read(copy):
    run, config = copy
    files = inputs_of(run, config).declared - {run / "scores" / f"{TARGET}.sae.csv"}
    with pytest.raises(EqknobsError, match=r"\.sae\.csv is read, but no input of the rule; add it"):
        write_tables(Inputs(run, files), tables_cfg(config), run / "tables")


@pytest.mark.parametrize("stage", ["codec", "saes", "probes", "steering", "importance", "quantisation"])
def test_a_stage_that_is_off_leaves_the_others_as_they_are(copy, stage):
    run, config = copy
    before = {path.name: path.read_bytes() for path in (run / "tables").glob("*.csv")}
    own = {path for path in before if path.startswith({"saes": ("sae", "splicing")}.get(stage, stage))}
    for name in before:
        (run / "tables" / name).unlink()
    cfg = tables_cfg(config)
    del cfg["stages"][stage]
    write_tables(inputs_of(run, config), cfg, run / "tables")
    assert {path.name: path.read_bytes() for path in (run / "tables").glob("*.csv")} == {
        name: content for name, content in before.items() if name not in own
    }


@pytest.mark.parametrize(
    ("shift", "spread", "verdict", "words"),
    [
        (4, 1, "positive", "does better than"),
        (-4, 1, "negative", "does worse than"),
        (0, 1, "undecided", "is not shown to differ from"),
        (1, 8, "undecided", "is not shown to differ from"),
    ],
)
def test_sentences_follow_the_sign_of_the_interval(shift, spread, verdict, words):
    rng = np.random.default_rng(0)
    raw = pd.DataFrame({"id": [f"u{i}" for i in range(40)], "speaker": [f"s{i % 8}" for i in range(40)]})
    raw = raw.assign(frames=100, correct=40)
    noise = np.round(rng.normal(0, spread, 40))
    sae = raw.assign(correct=raw["correct"] + (noise - np.round(noise.mean())) + shift)
    found = compare(sae, raw, probes.ACCURACY, {"bootstrap": 500, "seed": 0})
    what = {
        "family": "probe, quantile, minus raw",
        "property": "rms",
        "a": "sae:topk",
        "b": "raw",
    }
    what["binning"] = "quantile"
    rows = [{"space": "sae:topk", "property": "rms", "binning": "quantile", "majority": 0.1, "shuffled": 0.05}]
    facts = {"sae": [{"sae": "topk"}], "probes": rows}
    facts["comparisons"] = with_holm([{**what, **found}])
    (line,) = probes.findings(None, facts)
    assert line["verdict"] == verdict
    assert line["text"] == f"RMS level: the probe on SAE (topk) {words} the one on raw latents."
    assert f"{found['difference']:+.3f}".replace("-", "−") in line["detail"] and "majority 0.100" in line["detail"]


def test_what_fails_holms_correction_is_not_claimed(results):
    record = {
        "family": "importance, wer, mean",
        "mode": "mean",
        "removed_dims": 3,
        "a": "composition",
        "b": "random",
        "measure": "wer",
    }
    record |= {
        "value_a": 0.1,
        "value_b": 0.2,
        "difference": -0.1,
        "low": -0.2,
        "high": -0.01,
        "clips": 9,
        "speakers": 3,
        "verdict": "better",
    }
    records = with_holm([{**record, "p": 0.03}, {**record, "b": "variance", "p": 0.04}])
    facts = {"comparisons": records}
    facts |= {"importance": {"expendable": 3, "moderate": 4, "critical": 1, "width": 8}, "importance_maps": []}
    assert records[0]["p_holm"] == pytest.approx(0.06)
    found = importance.findings(context(*results, "importance"), facts)
    (line,) = (line for line in found if "at random" in line["text"])
    assert line["verdict"] == "undecided" and "after Holm's correction is not shown" in line["text"]


def test_findings_say_what_val_chooses_and_which_cheap_map_is_good_enough(copy):
    run, config = copy
    facts = json.loads((run / "tables" / "summary.json").read_text())["targets"][TARGET]
    text = " ".join(line["text"] for line in facts["headlines"] if line["stage"] == "importance")
    assert "Val chooses the variance map" in text and "Rank correlation with the sound" in text
    assert "The variance map is the cheapest that is good enough" in text
    assert "There is no Fisher map here: model x gives no gradients." in text
    val = run / "scores" / f"{TARGET}.importance_maps.val.csv"
    rewrite(val, lambda t: t.assign(mel_distance=t["mel_distance"] + 9 * (t["map"] == "variance")))
    make_tables(run, config)
    facts = json.loads((run / "tables" / "summary.json").read_text())["targets"][TARGET]
    assert not [line for line in facts["headlines"] if "good enough" in line["text"]]
    assert not [record for record in facts["comparisons"] if record["b"] == "ablation"]


def test_the_reference_holm_agrees():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx(library_holm(p))
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_one_is_not_said_in_the_plural(results):
    at = context(*results, "steering")
    row = {
        "sae": "topk",
        "l0": 3.0,
        "d_sae": 64,
        "fvu": 0.1,
        "fvu_low": 0.1,
        "fvu_high": 0.2,
        "clips": 1,
        "speakers": 2,
    }
    words = {"wer": 0.1, "wer_low": 0.0, "wer_high": 0.2, "codebooks": 1, "measurable": True, "threshold": 0.5}
    arm = {"arm": "raw_probe", "calibrated": "reached", "centroid_hz": 900.0}
    facts = {"words": words | {"clips": 1, "speakers": 1}, "sae": [row], "comparisons": [], "steering": [arm]}
    lines = [line for stage in (codec, saes, steering) for line in stage.findings(at, facts)]
    text = " ".join(f"{line['text']} {line['detail']}" for line in lines)
    for said in ("at 1 codebook,", "1 clip, 1 speaker", "1 clip, 2 speakers", "1 of 1 arm can"):
        assert said in text
    assert not re.search(r"\b1 (clips|speakers|codebooks|arms|dimensions)\b", text)
