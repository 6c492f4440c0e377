"""A run in shards has the files of one without, and how many shards there are reruns nothing."""

import filecmp
import re
import subprocess
from itertools import chain
from pathlib import Path

import pytest

from eqknobs.shards import most_clips, of_shard, shards
from helpers.workflow import copy_workflow, snakemake, write_config

SPLIT = ("activations", "labels", "codec_renders", "originals", "judgements")
OFF = ("stability", "probes", "erasing", "features", "label_search", "steering", "importance", "quantisation", "accent")
OFF += ("speech_lm", "lm_layers", "lm_pruning", "lm_quantisation", "lm_recipe", "lm_steering", "splicing", "domains")
OFF += ("phones", "hallucination")


def small(folder: Path, each: int | None, *more: str) -> subprocess.CompletedProcess:
    """The codec's part of the small configuration, of two targets of one model, with so many clips a shard."""

    def change(config: dict) -> None:
        config["hardware"]["shard_clips"] = each
        config["run"]["targets"] = ["tiny-mimi.encoder_layer.0", "tiny-mimi.encoder_transformer"]
        config["data"]["max_utterances"], config["codec"]["clips"] = 24, 9
        config["saes"] = {"topk": {**config["saes"]["topk"], "epochs": 1}}
        del config["saes"]["topk"]["grid"]
        config |= dict.fromkeys(OFF)

    write_config(folder, change)
    targets = [f"results/small/labels/{target}.h5" for target in ("tiny-mimi.encoder_layer.0",)]
    return snakemake(folder, "report", *targets, *more)


def counts(done: subprocess.CompletedProcess) -> dict[str, int]:
    table = done.stdout.partition("Job stats:")[2].partition("total")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.M)}


@pytest.mark.parametrize(("clips", "each", "expected"), [(10, None, 1), (10, 10, 1), (11, 10, 2), (0, 5, 1)])
def test_clips_above_the_size_go_in_shards_that_share_them_evenly(clips: int, each: int | None, expected: int) -> None:
    number = shards(clips, each)
    parts = [list(of_shard(range(clips), (which, number))) for which in range(number)]
    assert number == expected and [*chain(*parts)] == list(range(clips)) == list(of_shard(range(clips), None))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and (each is None or max(map(len, parts)) <= each)


def test_a_corpus_that_is_made_has_as_many_clips_as_go_into_it() -> None:
    spoken = {"source": "synthesis", "accents": ["a", "b"], "variants": ["x", "y", "z"], "count": 4}
    corpora = {"spoken": spoken, "both": {"source": "union", "of": ["speech", "spoken"]}}
    corpora["noisy"] = {"source": "mixture", "of": ["both"], "noise": ["spoken"]}
    config = {"data": {"source": "folder", "max_utterances": 10}, "corpora": corpora}
    assert [most_clips(config, name) for name in ("speech", "spoken", "both", "noisy")] == [10, 24, 34, 68]


def test_every_kind_of_job_is_planned_in_shards_of_at_most_so_many_clips(tmp_path: Path) -> None:
    folder = copy_workflow(tmp_path / "work")
    whole, split = (counts(small(folder, each, "-n")) for each in (None, 10))
    assert not [name for name in whole if "shard" in name]
    found = {name.removesuffix("_shard"): number for name, number in split.items() if name.endswith("_shard")}
    # 24 clips are heard in one pass for both targets, and labelled for one; 2 x 9 are judged at most.
    assert found == {"activations": 3, "labels": 3, "originals": 3, "judgements": 2}
    assert {name: number for name, number in split.items() if "shard" not in name} == whole
    few = counts(small(folder, 2, "-n"))
    assert few["codec_renders_shard"] == 2 * 5 and few["judgements_shard"] == 9


@pytest.mark.slow
def test_a_run_in_shards_has_the_same_bytes_and_another_number_reruns_nothing(tmp_path: Path) -> None:
    whole, split = (copy_workflow(tmp_path / name) for name in ("whole", "split"))
    small(whole, None, "--cores", "1")
    ran = counts(small(split, 8, "--cores", "2"))
    assert {f"{name}_shard" for name in SPLIT} <= set(ran)
    for part in ("activations", "labels", "renders", "scores", "saes", "tables"):
        here, there = (folder / "results/small" / part for folder in (whole, split))
        names = [str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()]
        assert sorted(names) == sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file())
        assert filecmp.cmpfiles(here, there, names, shallow=False)[1:] == ([], []), part
    for each in (None, 7):
        assert "Nothing to be done" in small(split, each, "-n").stdout + small(split, each, "-n").stderr
    # What one job of shards left half-done, another number of shards goes on with.
    labels = split / "results/small/labels/tiny-mimi.encoder_layer.0.h5"
    before = labels.read_bytes()
    labels.unlink()
    ran = counts(small(split, 12, "--cores", "2"))
    assert ran["labels_shard"] == 2 and labels.read_bytes() == before
