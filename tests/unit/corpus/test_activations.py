"""Activation caches: exact contents, resume after kill -9, full disks and NaN."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
from transformers import EncodecConfig, EncodecModel, MimiConfig, MimiModel

from eqknobs.audio import read_audio
from eqknobs.corpus import activations
from eqknobs.corpus.activations import cache_activations
from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256
from eqknobs.models import load_model

RATE = 16000
SITE = "encoder_transformer"
SPLITS = ["train", "train", "val", "train", "test", "train"]
SECONDS = [1.0, 0.503, 0.8, 1.3, 0.77, 0.61]


def model_config(folder, kind="mimi"):
    return {"name": "small", "kind": kind, "path": str(folder), "revision": None, "device": "cpu"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small random Mimi, six clips (one at 24 kHz, one with space and umlaut) and their manifest."""
    root = tmp_path_factory.mktemp("activations")
    torch.manual_seed(0)
    config = MimiConfig(
        sampling_rate=RATE,
        hidden_size=32,
        num_filters=4,
        upsampling_ratios=[8, 5, 4, 4],
        codebook_size=16,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=4,
        upsample_groups=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=10,
        layer_scale_initial_scale=0.5,
        initializer_range=0.3,
    )
    MimiModel(config).save_pretrained(root / "mimi")
    rows = []
    for i, (split, seconds) in enumerate(zip(SPLITS, SECONDS)):
        path = root / ("clip ü 1.flac" if i == 1 else f"clip{i}.flac")
        rate = 24000 if i == 2 else RATE
        wav = 0.1 * np.random.default_rng(i).standard_normal(int(seconds * rate))
        sf.write(path, wav, rate)
        rows.append({"id": f"00{i}", "path": str(path), "speaker": f"0{i // 2}", "split": split, "text": "a b"})
        rows[-1]["sha256"] = file_sha256(path)
    pd.DataFrame(rows).to_csv(root / "manifest.csv", index=False)
    cache_activations(root / "manifest.csv", root / "whole.h5", model_config(root / "mimi"), SITE, {"x": 1})
    return root


def run(world, out, site=SITE, manifest="manifest.csv", model="mimi", cfg=None):
    cache_activations(world / manifest, out, model_config(world / model), site, cfg or {"x": 1})


def work_files(folder):
    return sorted(folder.glob("*.part-*"))


def test_contents(world):
    model = load_model(model_config(world / "mimi"))
    with ActivationCache(world / "whole.h5") as cache:
        table = cache.utterances
        assert list(table.columns) == ["id", "speaker", "split", "sha256", "start", "frames", "samples"]
        assert list(table["id"]) == [f"00{i}" for i in range(6)] and list(table["speaker"][:3]) == [
            "00",
            "00",
            "01",
        ]
        assert list(table["split"]) == SPLITS
        manifest = pd.read_csv(world / "manifest.csv")
        for row, path in zip(table.itertuples(), manifest["path"]):
            wav = read_audio(path, RATE)
            assert row.samples == len(wav) and row.frames == 2 * -(-len(wav) // 1280)
            acts = cache.acts[row.start : row.start + row.frames]
            assert np.array_equal(acts, model.encode(wav, SITE))
            times = cache.frame_times[row.start : row.start + row.frames]
            assert np.allclose(times, (np.arange(row.frames) + 0.5) * 640 / RATE)
        assert cache.acts.shape == (table["frames"].sum(), 32) and cache.acts.dtype == np.float32
        assert np.array_equal(cache.utt_of_row, np.repeat(np.arange(6), table["frames"]))
        assert cache.utt_of_row.dtype == np.int32

        parts = {split: cache.rows(split) for split in ("train", "val", "test")}
        assert sorted(np.concatenate(list(parts.values()))) == list(range(len(cache.acts)))
        assert all(SPLITS[cache.utt_of_row[row]] == split for split, rows in parts.items() for row in rows)
        assert parts["train"].dtype == np.int64

        train = np.asarray(cache.acts[parts["train"]], np.float64)
        assert cache.mean.dtype == cache.std.dtype == np.float64
        assert np.allclose(cache.mean, train.mean(0), rtol=1e-12) and np.allclose(cache.std, train.std(0), rtol=1e-9)
        everything = np.asarray(cache.acts, np.float64)
        assert not np.allclose(cache.mean, everything.mean(0), rtol=1e-6)  # train frames only

        attrs = cache.attrs
        assert (attrs["model"], attrs["site"], attrs["module_path"]) == (
            "small",
            SITE,
            "encoder.encoder_transformer",
        )
        assert (attrs["frame_rate"], attrs["hop"], attrs["sample_rate"]) == (25.0, 640, RATE)
        assert attrs["train_frames"] == len(train) and attrs["revision"] == model.revision
        assert attrs["manifest_sha256"] == file_sha256(world / "manifest.csv")
        assert json.loads(attrs["versions"])["torch"] == version("torch")
        with pytest.raises(ValueError, match="read-only"):
            cache.acts[0] = 0
    with h5py.File(world / "whole.h5", locking=False) as file:
        assert file["activations"].chunks is None and file["activations"].compression is None
        assert np.array_equal(file["activations"][:], ActivationCache(world / "whole.h5").acts)
    assert work_files(world) == []


def test_another_site_and_another_kind(world, tmp_path):
    run(world, tmp_path / "layer.h5", "encoder_layer.0")
    with ActivationCache(tmp_path / "layer.h5") as layer, ActivationCache(world / "whole.h5") as whole:
        assert layer.attrs["module_path"] == "encoder.encoder_transformer.layers.0"
        assert layer.acts.shape == whole.acts.shape and not np.allclose(layer.acts, whole.acts, atol=1e-2)
    config = EncodecConfig(
        sampling_rate=RATE,
        hidden_size=24,
        num_filters=4,
        codebook_size=64,
        codebook_dim=24,
        target_bandwidths=[1.2],
    )
    EncodecModel(config).save_pretrained(world / "encodec")
    cache_activations(
        world / "manifest.csv", tmp_path / "encodec.h5", model_config(world / "encodec", "encodec"), "encoder"
    )
    with ActivationCache(tmp_path / "encodec.h5") as cache:
        assert cache.acts.shape[1] == 24 and cache.attrs["hop"] == 320
        assert list(cache.utterances["frames"]) == [-(-n // 320) for n in cache.utterances["samples"]]


def test_two_runs_give_the_same_bytes(world, tmp_path):
    time.sleep(1.1)  # a time stamp in the file would differ now
    run(world, tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == (world / "whole.h5").read_bytes()


def test_constant_dimension_has_a_std_above_zero(world, tmp_path, monkeypatch):
    from eqknobs.models.mimi import Mimi

    encode = Mimi.encode_sites

    def flat(self, wav, sites):
        found = encode(self, wav, sites)
        for acts in found.values():
            acts[:, 3] = 0.5
        return found

    monkeypatch.setattr(Mimi, "encode_sites", flat)
    run(world, tmp_path / "flat.h5")
    with ActivationCache(tmp_path / "flat.h5") as cache:
        assert cache.mean[3] == 0.5 and 0 < cache.std[3] < 1e-3 and (cache.std > 0).all()


# Interruption

SLOW = """
import json, sys, time
from eqknobs.corpus.activations import cache_activations
from eqknobs.models.mimi import Mimi
encode = Mimi.encode_sites
def slow(self, wav, sites):
    acts = encode(self, wav, sites)
    with open(sys.argv[3], "a") as file:
        file.write(".")
    time.sleep(0.4)
    return acts
Mimi.encode_sites = slow
keys = json.loads(sys.argv[4])
cache_activations("manifest.csv", sys.argv[1], json.loads(sys.argv[2]), **keys)
"""


def slow_process(world, out, keys):
    """A process that caches and marks each clip that it encodes in the file `encoded` beside `out`."""
    marks = out.parent / "encoded"
    command = [sys.executable, "-c", SLOW, out, json.dumps(model_config(world / "mimi")), marks, json.dumps(keys)]
    return subprocess.Popen(command, cwd=world, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL), marks


def killed_after_3(world, out, keys):
    """Kill a process that caches when it has encoded three clips."""
    process, marks = slow_process(world, out, keys)
    while process.poll() is None and not (marks.exists() and marks.stat().st_size >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kill_9_and_resume_give_the_same_bytes(world, tmp_path, monkeypatch):
    out = tmp_path / "cache.h5"
    killed_after_3(world, out, {"target_site": SITE, "cfg": {"x": 1}})
    assert not out.exists() and len(work_files(tmp_path)) == 1  # nothing half-written is taken for whole
    with h5py.File(work_files(tmp_path)[0]) as file:
        done = int(file["done"][:].sum())
    assert 2 <= done < 6
    with pytest.raises(EqknobsError, match=r"only \d of 6 utterances"):
        ActivationCache(work_files(tmp_path)[0])

    from eqknobs.models.mimi import Mimi

    encode, again = Mimi.encode_sites, []
    monkeypatch.setattr(Mimi, "encode_sites", lambda *args: again.append(1) or encode(*args))
    run(world, out)
    assert len(again) == 6 - done  # finished utterances were not encoded again
    assert out.read_bytes() == (world / "whole.h5").read_bytes()
    assert work_files(tmp_path) == []


@pytest.mark.parametrize("order", [[0], [2, 0, 1], [1, 0]], ids=str)
def test_shards_fill_one_file_which_the_job_finishes(world, tmp_path, monkeypatch, order):
    """The same bytes, whatever number and order; a shard that never ran is done with the rest."""
    from eqknobs.models.mimi import Mimi

    out, encode, encoded = tmp_path / "cache.h5", Mimi.encode_sites, []
    monkeypatch.setattr(Mimi, "encode_sites", lambda *args: encoded.append(1) or encode(*args))
    model, shards = model_config(world / "mimi"), 3
    cfg = {"x": 1, "model": model, "site": SITE}
    for which in order:
        for _ in range(2):  # again, and nothing is left to do
            activations.cache_shard(world / "manifest.csv", out, cfg, (which, shards))
        assert not out.exists()
    assert len(encoded) == 2 * len(order)
    cache_activations(world / "manifest.csv", out, model, SITE, cfg)
    assert len(encoded) == 6 and not work_files(tmp_path)
    monkeypatch.undo()
    cache_activations(world / "manifest.csv", tmp_path / "unsharded.h5", model, SITE, cfg)
    assert out.read_bytes() == (tmp_path / "unsharded.h5").read_bytes()


def test_shards_serve_all_targets_of_a_model(world, alone, tmp_path, monkeypatch):
    seen, cfg = passes(monkeypatch), job(tmp_path, SITE)
    del cfg["target_site"]
    wanted = {"siblings": cfg["siblings"], "pieces": cfg["pieces"]}
    cfg = cfg["cfg"] | {"model": model_config(world / "mimi"), "site": SITE}
    for which in range(2):
        activations.cache_shard(world / "manifest.csv", tmp_path / f"{SITE}.h5", cfg, (which, 2), **wanted)
    assert seen == [LAYERS] * 6 and len(work_files(tmp_path)) == 3


class Stop(Exception):
    """An interruption inside the process, cheaper than a kill."""


def interrupted(world, out, monkeypatch, after, cfg=None):
    from eqknobs.models.mimi import Mimi

    encode, calls = Mimi.encode_sites, []

    def stop(self, wav, sites):
        if len(calls) == after:
            raise Stop
        calls.append(1)
        return encode(self, wav, sites)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Mimi, "encode_sites", stop)
        run(world, out, cfg=cfg)
    return work_files(out.parent)[0]


def test_torn_last_write_is_done_again(world, tmp_path, monkeypatch):
    """A kill between the frames and the counter leaves frames that are written anew."""
    work = interrupted(world, tmp_path / "cache.h5", monkeypatch, 2)
    with h5py.File(work, "r") as file:
        offset, start = file["activations"].id.get_offset(), int(file["utterances/start"][2])
    with open(work, "r+b") as file:
        file.seek(offset + start * 32 * 4)
        file.write(b"\xff" * 300)
    run(world, tmp_path / "cache.h5")
    assert (tmp_path / "cache.h5").read_bytes() == (world / "whole.h5").read_bytes()


def test_work_file_of_other_settings_or_broken_is_not_used(world, tmp_path, monkeypatch):
    out = tmp_path / "cache.h5"
    work = interrupted(world, out, monkeypatch, 2)
    with monkeypatch.context() as patch:
        seen = encodings(patch)
        run(world, tmp_path / "other.h5", cfg={"x": 2})
        assert len(seen) == 6
    interrupted(world, out, monkeypatch, 2, cfg={"x": 2})
    assert len(work_files(tmp_path)) == 2  # going back to x = 1 loses nothing
    work.write_bytes(work.read_bytes()[:500])
    run(world, out)
    assert out.read_bytes() == (world / "whole.h5").read_bytes() and work_files(tmp_path) == []


# Clips whose sound is unchanged


def encodings(monkeypatch):
    """Lengths of the waveforms that are encoded from now on."""
    from eqknobs.models.mimi import Mimi

    encode, seen = Mimi.encode_sites, []
    monkeypatch.setattr(
        Mimi, "encode_sites", lambda self, wav, sites: seen.append(len(wav)) or encode(self, wav, sites)
    )
    return seen


def edited_manifest(world, folder, change):
    """A manifest whose rows were changed, dropped or put in another order, beside copies of its sounds."""
    table = pd.read_csv(world / "manifest.csv", dtype=str)
    for i, path in enumerate(table["path"]):
        shutil.copy(path, folder)
        table.loc[i, "path"] = str(folder / Path(path).name)
    table = change(table)
    table = table.assign(sha256=table["path"].map(file_sha256))
    table.to_csv(folder / "manifest.csv", index=False)
    return table


def test_only_changed_clips_are_encoded_again(world, tmp_path, monkeypatch):
    def change(table):
        sf.write(table["path"][3], 0.1 * np.random.default_rng(99).standard_normal(16100), RATE)
        return table.drop(index=1).iloc[::-1]

    edited_manifest(world, tmp_path, change)
    whole = tmp_path / "whole/cache.h5"
    run(world, whole, manifest=tmp_path / "manifest.csv")
    seen = encodings(monkeypatch)
    out = tmp_path / "cache.h5"
    run(world, out)
    assert len(seen) == 6
    out.unlink()  # as Snakemake does before a job runs
    run(world, out, manifest=tmp_path / "manifest.csv")
    assert seen[6:] == [16100]
    assert out.read_bytes() == whole.read_bytes()
    out.unlink()
    run(world, out, manifest=tmp_path / "manifest.csv", cfg={"x": 2})  # other settings: all anew
    assert len(seen) == 7 + 5


def test_a_half_done_cache_of_another_manifest_is_used(world, tmp_path, monkeypatch):
    interrupted(world, tmp_path / "cache.h5", monkeypatch, 4)
    edited_manifest(world, tmp_path, lambda table: table.iloc[1:])
    seen = encodings(monkeypatch)
    run(world, tmp_path / "cache.h5", manifest=tmp_path / "manifest.csv")
    assert len(seen) == 2 and work_files(tmp_path) == []


def test_a_sound_that_is_not_the_manifests_is_refused(world, tmp_path):
    table = edited_manifest(world, tmp_path, lambda table: table)
    rng = np.random.default_rng(5)
    sf.write(table["path"][0], 0.1 * rng.standard_normal(16000), RATE)  # as long as before
    with pytest.raises(EqknobsError, match=r"clip0\.flac: changed since the manifest was drawn"):
        run(world, tmp_path / "cache.h5", manifest=tmp_path / "manifest.csv")


HOLD = """
import sys, time, h5py
file = h5py.File(sys.argv[1], "r+")
print("open", flush=True)
time.sleep(60)
"""


def test_a_half_done_cache_that_another_program_has_open_is_continued(world, tmp_path, monkeypatch):
    work = interrupted(world, tmp_path / "cache.h5", monkeypatch, 3)
    other = subprocess.Popen([sys.executable, "-c", HOLD, work], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"open\n"
        seen = encodings(monkeypatch)
        run(world, tmp_path / "cache.h5")
        assert len(seen) == 3
        ActivationCache(tmp_path / "cache.h5")
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / "cache.h5").read_bytes() == (world / "whole.h5").read_bytes()


def test_a_half_done_cache_that_may_not_be_read_is_not_thrown_away(world, tmp_path, monkeypatch):
    work = interrupted(world, tmp_path / "cache.h5", monkeypatch, 3)

    def refuse(*_args, **_keys):
        raise PermissionError(13, "Permission denied")  # root may read all

    with monkeypatch.context() as patch, pytest.raises(EqknobsError, match="may not be read"):
        patch.setattr(h5py, "File", refuse)
        run(world, tmp_path / "cache.h5")
    assert work_files(tmp_path) == [work]


# Several targets of one model

LAYERS = [SITE, "encoder_layer.0", "encoder_layer.1"]


def job(folder, site, sites=LAYERS):
    """What a job of one target says to `cache_activations`, when a run wants several sites of its model."""
    return {
        "target_site": site,
        "cfg": {"site": site, "content": {"model": "digest"}},
        "siblings": {other: str(folder / f"{other}.h5") for other in sites if other != site},
        "pieces": str(folder / "pieces"),
    }


def run_job(world, folder, site, sites=LAYERS, manifest=None, **cfg):
    keys = job(folder, site, sites)
    keys["cfg"] |= cfg
    manifest = manifest or world / "manifest.csv"
    cache_activations(manifest, folder / f"{site}.h5", model_config(world / "mimi"), **keys)


def pieces(folder):
    return sorted((folder / "pieces").rglob("*.h5"))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """Each site's cache, made by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for site in LAYERS:
        run(world, folder / f"{site}.h5", site, cfg=job(folder, site)["cfg"])
    return folder


def passes(monkeypatch):
    """The sites of each pass of a model from now on."""
    from eqknobs.models.mimi import Mimi

    encode, seen = Mimi.encode_sites, []
    monkeypatch.setattr(Mimi, "encode_sites", lambda self, wav, sites: seen.append(sites) or encode(self, wav, sites))
    return seen


def same(folder, alone, sites=LAYERS):
    return all((folder / f"{site}.h5").read_bytes() == (alone / f"{site}.h5").read_bytes() for site in sites)


def test_one_pass_caches_all_targets_of_a_model(world, alone, tmp_path, monkeypatch):
    seen = passes(monkeypatch)
    run_job(world, tmp_path, SITE)
    assert seen == [LAYERS] * 6 and len(pieces(tmp_path)) == 2
    assert sorted(p.name for p in tmp_path.glob("*.h5")) == [f"{SITE}.h5"]  # another's output is its own job's

    def refuse(_cfg):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(activations, "load_model", refuse)
    for site in LAYERS[1:]:
        run_job(world, tmp_path, site)
        assert any((tmp_path / f"{site}.h5").samefile(piece) for piece in pieces(tmp_path))  # and no disk more
    assert same(tmp_path, alone) and len(list(tmp_path.glob(".*.kept"))) == 3 and not work_files(tmp_path)


def test_a_target_that_is_added_touches_no_other_cache(world, alone, tmp_path, monkeypatch):
    seen = passes(monkeypatch)
    for site in LAYERS[:2]:
        run_job(world, tmp_path, site, LAYERS[:2])
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*.h5")}
    pieces(tmp_path)[0].unlink()
    run_job(world, tmp_path, LAYERS[2])
    assert seen == [LAYERS[:2]] * 6 + [LAYERS[2:]] * 6
    assert len(before) == 2 and not pieces(tmp_path)
    assert all((path.stat().st_mtime_ns, path.read_bytes()) == was for path, was in before.items())
    assert same(tmp_path, alone)


def test_a_killed_pass_goes_on_for_all_targets(world, alone, tmp_path, monkeypatch):
    killed_after_3(world, tmp_path / f"{SITE}.h5", job(tmp_path, SITE))
    assert len(work_files(tmp_path)) == 3
    done = set()
    for path in work_files(tmp_path):
        with h5py.File(path) as file:
            done.add(int(file["done"][:].sum()))
    assert min(done) >= 2
    seen = passes(monkeypatch)
    run_job(world, tmp_path, LAYERS[1])
    assert len(seen) == 6 - min(done)
    for site in (SITE, LAYERS[2]):
        run_job(world, tmp_path, site)
    assert len(seen) == 6 - min(done) and same(tmp_path, alone) and not work_files(tmp_path)


def test_jobs_side_by_side_encode_once(world, alone, tmp_path):
    started = [slow_process(world, tmp_path / f"{site}.h5", job(tmp_path, site)) for site in LAYERS[:2]]
    assert [process.wait(120) for process, _ in started] == [0, 0]
    assert started[0][1].read_text() == "." * 6
    assert same(tmp_path, alone, LAYERS[:2])


def test_two_runs_never_share_a_file(world, alone, tmp_path):
    """Snakemake touches its outputs: a link to another run's would make that one's look new."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pieces").symlink_to(tmp_path / "store")
    (tmp_path / "store").mkdir()
    for site in LAYERS:
        run_job(world, tmp_path / "first", site)
    for site in LAYERS[1:]:
        run_job(world, tmp_path / "second", site)
        ours, theirs = (tmp_path / name / f"{site}.h5" for name in ("second", "first"))
        assert not ours.samefile(theirs) and ours.read_bytes() == theirs.read_bytes()
        (tmp_path / "first" / f"{site}.h5").unlink()  # as Snakemake does before it makes it again
        run_job(world, tmp_path / "first", site)
        assert any(theirs.samefile(piece) for piece in (tmp_path / "store").rglob("*.h5"))


def test_a_sibling_that_cannot_be_cached_stops_nobody(world, alone, tmp_path, monkeypatch, capsys):
    from eqknobs.models.mimi import Mimi

    encode = Mimi.encode_sites

    def broken(self, wav, sites):
        found = encode(self, wav, sites)
        if LAYERS[1] in found and len(wav) < 13000:  # not the first clip
            found[LAYERS[1]][0] = np.nan
        return found

    monkeypatch.setattr(Mimi, "encode_sites", broken)
    sites = [*LAYERS, "encoder_layer.7"]
    run_job(world, tmp_path, SITE, sites)
    assert f"{LAYERS[1]}.h5: not cached along with the others: utterance 001" in capsys.readouterr().out
    run_job(world, tmp_path, LAYERS[2], sites)
    assert same(tmp_path, alone, [SITE, LAYERS[2]]) and len(pieces(tmp_path)) == 1
    with pytest.raises(EqknobsError, match=r"001 .*encoder_layer\.0 gave NaN"):
        run_job(world, tmp_path, LAYERS[1], sites)
    with pytest.raises(EqknobsError, match=r"no site .encoder_layer\.7"):
        run_job(world, tmp_path, "encoder_layer.7", sites)


def test_the_disk_must_hold_all_siblings(world, tmp_path, monkeypatch):
    rows = ActivationCache(world / "whole.h5").acts.shape[0]
    one = rows * (32 * 4 + 8) + (1 << 20)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=3 * one - 1))
    with pytest.raises(EqknobsError, match="not enough disk"):
        run_job(world, tmp_path, SITE)
    run_job(world, tmp_path, SITE, LAYERS[:2])


def test_changed_clips_alone_are_encoded_for_all_targets(world, tmp_path, monkeypatch):
    for site in LAYERS[:2]:
        run_job(world, tmp_path, site, LAYERS[:2])

    def change(table):
        sf.write(table["path"][3], 0.1 * np.random.default_rng(99).standard_normal(16100), RATE)
        return table.iloc[::-1]

    edited_manifest(world, tmp_path, change)
    seen = encodings(monkeypatch)
    for site in LAYERS[:2]:
        (tmp_path / f"{site}.h5").unlink()
        run_job(world, tmp_path, site, LAYERS[:2], tmp_path / "manifest.csv")
    assert seen == [16100]
    with ActivationCache(tmp_path / f"{LAYERS[1]}.h5") as cache:
        assert cache.attrs["manifest_sha256"] == file_sha256(tmp_path / "manifest.csv")


def test_settings_and_other_models_have_pieces_of_their_own(world, tmp_path, monkeypatch):
    run_job(world, tmp_path, SITE)
    seen = passes(monkeypatch)
    run_job(world, tmp_path, LAYERS[1], content={"model": "another"})
    assert len(seen) == 6
    keys = job(tmp_path, LAYERS[2])
    del keys["cfg"]["content"]  # nothing tells what the model's files hold
    cache_activations(world / "manifest.csv", tmp_path / "x.h5", model_config(world / "mimi"), **keys)
    assert seen[6:] == [LAYERS[2:]] * 6


# A budget of frames


def test_a_budget_keeps_a_run_of_each_clip(world, alone, tmp_path):
    budget = 110
    for site in LAYERS[:2]:
        run_job(world, tmp_path, site, LAYERS[:2], frames=budget, seed=0)
    run_job(world, (other := tmp_path / "other"), SITE, [SITE], frames=budget, seed=1)
    firsts = []
    for folder, site in ((tmp_path, SITE), (tmp_path, LAYERS[1]), (other, SITE)):
        with ActivationCache(alone / f"{site}.h5") as whole, ActivationCache(folder / f"{site}.h5") as cache:
            table = cache.utterances
            assert (table["clip_frames"] == whole.utterances["frames"]).all()
            assert len(cache.acts) == table["frames"].sum() <= budget < len(whole.acts)
            assert len(cache.acts) > budget - 6 and (table["frames"] >= np.minimum(table["clip_frames"], 16)).all()
            assert table.loc[3, "frames"] > table.loc[1, "frames"]
            for part, full in zip(table.itertuples(), whole.utterances.itertuples()):
                kept = slice(full.start + part.first, full.start + part.first + part.frames)
                rows = slice(part.start, part.start + part.frames)
                assert part.first + part.frames <= full.frames
                assert np.array_equal(cache.acts[rows], whole.acts[kept])
                assert np.allclose(cache.frame_times[rows], whole.frame_times[kept])
            train = np.asarray(cache.acts[cache.rows("train")], np.float64)
            assert np.allclose(cache.mean, train.mean(0)) and cache.attrs["train_frames"] == len(train)
            assert len(cache.utt_of_row) == len(cache.acts)
            firsts.append(table["first"].tolist())
            with pytest.raises(EqknobsError, match=r"needs whole clips; remove activations\.frames"):
                cache.require_whole_clips()
            whole.require_whole_clips()
    assert firsts[0] == firsts[1] != firsts[2] and any(firsts[0])


def test_a_budget_that_holds_everything_keeps_it(world, alone, tmp_path):
    run_job(world, tmp_path, SITE, [SITE], frames=10**6, seed=0)
    with ActivationCache(alone / f"{SITE}.h5") as whole, ActivationCache(tmp_path / f"{SITE}.h5") as cache:
        assert np.array_equal(cache.acts, whole.acts) and not cache.utterances["first"].any()
        cache.require_whole_clips()


def test_a_budget_below_the_shortest_runs_is_refused(world, tmp_path):
    with pytest.raises(EqknobsError, match=r"activations\.frames: 50 frames are too few for 6 clips.*at least 94"):
        run_job(world, tmp_path, SITE, [SITE], frames=50, seed=0)
    assert not list(tmp_path.glob("*.h5"))


def test_budgets_are_kept_to(world):
    rng = np.random.default_rng(0)
    keys = [f"{i:064x}" for i in range(200)]
    frames = rng.integers(1, 400, 200)
    for budget in (2 * frames.sum(), frames.sum() - 1, 20_000, 3_200):
        first, kept = activations.kept_frames(frames, keys, budget, 0)
        assert (kept >= np.minimum(frames, activations.LEAST_FRAMES)).all() and (first + kept <= frames).all()
        assert min(budget, frames.sum()) - 200 <= kept.sum() <= budget
    again = activations.kept_frames(frames[::-1], keys[::-1], 20_000, 0)[0][::-1]
    assert np.array_equal(again, activations.kept_frames(frames, keys, 20_000, 0)[0])  # whatever the order


def test_labels_of_a_budget_are_those_of_the_whole_clip(world, alone, tmp_path):
    from eqknobs.corpus.labels import write_labels

    run_job(world, tmp_path, SITE, [SITE], frames=110, seed=0)
    cfg = {"crepe": "tiny", "periodicity": 0.5, "floor_db": 40, "fmin": 50, "fmax": 550, "n_mels": 8}
    for folder in (alone, tmp_path):
        write_labels(world / "manifest.csv", folder / f"{SITE}.h5", folder / "labels.h5", cfg)
    with (
        h5py.File(alone / "labels.h5") as whole,
        h5py.File(tmp_path / "labels.h5") as part,
        ActivationCache(tmp_path / f"{SITE}.h5") as cache,
    ):
        starts = whole["utterances/start"][:] + cache.utterances["first"]
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, cache.utterances["frames"])])
        for name in ("centroid", "rms", "pitch", "periodicity", "energetic", "voiced", "logmel"):
            assert np.array_equal(part[name][:], whole[name][:][rows], equal_nan=name == "pitch" or name == "centroid")


# Bad input


def test_full_disk_is_seen_before_the_work(world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=10_000))
    with pytest.raises(EqknobsError, match="not enough disk"):
        run(world, tmp_path / "cache.h5")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_on_resume(world, tmp_path, monkeypatch):
    interrupted(world, tmp_path / "cache.h5", monkeypatch, 2)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(EqknobsError, match="not enough disk"):
        patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
        run(world, tmp_path / "cache.h5")
    assert not (tmp_path / "cache.h5").exists() and len(work_files(tmp_path)) == 1


def test_disk_that_fills_up_meanwhile(world, tmp_path, monkeypatch):
    out, pwrite, calls = tmp_path / "cache.h5", os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(1)
        if len(calls) == 5:  # the frames of the third utterance: half of them fit
            return pwrite(descriptor, data[: len(data) // 2], offset)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch, pytest.raises(EqknobsError, match="disk full while writing"):
        patch.setattr(os, "pwrite", full)
        run(world, out)
    assert not out.exists()
    with h5py.File(work_files(tmp_path)[0]) as file:
        assert int(file["done"][:].sum()) == 2
    run(world, out)
    assert out.read_bytes() == (world / "whole.h5").read_bytes()


def test_disk_full_while_laying_out(world, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(activations, "contiguous", full)
    with pytest.raises(EqknobsError, match="disk full while writing"):
        run(world, tmp_path / "cache.h5")
    assert list(tmp_path.iterdir()) == []


def test_nan_activations_name_the_utterance(world, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(world / "mimi", tmp_path / "mimi"))
    tensors = load_file(broken / "model.safetensors")
    key = next(k for k in sorted(tensors) if "encoder_transformer" in k)
    tensors[key][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EqknobsError, match=r"utterance 000 \(.*clip0\.flac\).*NaN or infinite"):
        cache_activations(world / "manifest.csv", tmp_path / "cache.h5", model_config(broken), SITE, {})
    assert not (tmp_path / "cache.h5").exists()


def test_bad_manifests_sites_and_audio(world, tmp_path):
    out = tmp_path / "cache.h5"
    for site in ("encoder_layer.2", "decoder_transformer"):
        with pytest.raises(EqknobsError, match="has no site"):
            run(world, out, site)
    manifest = pd.read_csv(world / "manifest.csv", dtype=str)
    manifest.assign(split="test").to_csv(tmp_path / "no_train.csv", index=False)
    with pytest.raises(EqknobsError, match="no utterance in split train"):
        run(world, out, manifest=tmp_path / "no_train.csv")
    cut = tmp_path / "cut.flac"
    cut.write_bytes((world / "clip0.flac").read_bytes()[:5000])
    manifest.loc[2, ["path", "sha256"]] = str(cut), file_sha256(cut)
    manifest.to_csv(tmp_path / "cut.csv", index=False)
    with pytest.raises(EqknobsError, match=r"cut\.flac"):
        run(world, out, manifest=tmp_path / "cut.csv")
    assert not out.exists() and work_files(tmp_path) == []


def test_reading_what_is_no_cache(tmp_path):
    (tmp_path / "text.h5").write_text("not HDF5")
    h5py.File(tmp_path / "empty.h5", "w").close()
    for name in ("text.h5", "empty.h5", "missing.h5"):
        with pytest.raises(EqknobsError, match="is not an activation cache"):
            ActivationCache(tmp_path / name)
