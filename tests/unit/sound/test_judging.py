"""The judging of a run: tables of untouched clips and of renders, with judges that are loaded once."""

import runpy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from eqknobs.audio import read_audio, write_flac
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, write_csv
from eqknobs.pieces import Pieces
from eqknobs.sound import judging
from eqknobs.sound.judges import RATE, JudgesCfg, Transcriber, normalise
from eqknobs.sound.judging import Renders, judge_originals, judge_renders
from eqknobs.sound.quality import Quality
from helpers import ROOT
from helpers.speech import labelled_clips

CFG = JudgesCfg(asr="tiny.en", beam=1, device="cpu")


@pytest.fixture(scope="module")
def clips() -> pd.DataFrame:
    return labelled_clips()


def test_judging(clips, tmp_path):
    clips = clips[:2]
    write_csv(tmp_path / "manifest.csv", clips)
    judge_originals(tmp_path / "manifest.csv", tmp_path / "originals.csv", CFG)
    originals = read_csv(tmp_path / "originals.csv")
    assert list(originals) == "id speaker split transcript text words_text errors_text".split()
    assert originals["words_text"].tolist() == [len(normalise(text).split()) for text in clips["text"]]
    rng, index = np.random.default_rng(0), []
    for clip in clips.itertuples():
        wav = read_audio(clip.path, RATE)
        ruined = 0.05 * rng.standard_normal(len(wav))
        for condition, sound, judged in (("same", wav, True), ("ruined", ruined, True), ("sweep", wav, False)):
            file = f"{condition}/{clip.id}.flac"
            write_flac(tmp_path / "out" / file, sound, RATE)
            index.append({"id": clip.id, "condition": condition, "file": file, "judged": judged, "alpha": 1})
    write_csv(tmp_path / "out/index.csv", pd.DataFrame(index))
    files = tmp_path / "out/index.csv", tmp_path / "originals.csv", tmp_path / "manifest.csv"
    judge_renders([Renders(*files, tmp_path / "words.csv")], CFG)
    words = read_csv(tmp_path / "words.csv")
    expected = "id speaker split condition transcript words errors words_text errors_text speaker_similarity"
    assert list(words) == expected.split() and set(words["condition"]) == {"same", "ruined"} and len(words) == 4
    same, ruined = (words[words["condition"] == name].reset_index() for name in ("same", "ruined"))
    assert (same["errors"] == 0).all() and (same["transcript"] == originals["transcript"]).all()
    assert (same["errors_text"] == originals["errors_text"]).all() and (same["words"] > 3).all()
    np.testing.assert_allclose(same["speaker_similarity"], 1, atol=1e-5)
    assert (ruined["errors"] / ruined["words"] > 0.5).all()
    assert (ruined["speaker_similarity"] < 0.8).all()

    write_csv(tmp_path / "short.csv", originals[:1])
    with pytest.raises(EqknobsError, match="no transcript of"):
        judge_renders([Renders(files[0], tmp_path / "short.csv", files[2], tmp_path / "none.csv")], CFG)
    (tmp_path / "out/ruined" / f"{clips['id'][1]}.flac").unlink()
    with pytest.raises(EqknobsError, match=r"no such render .* run again, and its stage renders them anew"):
        judge_renders([Renders(*files, tmp_path / "none.csv")], CFG)
    assert not (tmp_path / "none.csv").exists()


def test_a_clip_without_a_text_has_no_errors_against_it(clips, tmp_path):
    """Or the words that were heard of it would count as errors of the others."""
    clips = clips[:2].assign(text=["", clips["text"][1]])
    write_csv(tmp_path / "manifest.csv", clips)
    judge_originals(tmp_path / "manifest.csv", tmp_path / "originals.csv", CFG)
    originals = read_csv(tmp_path / "originals.csv")
    assert originals["transcript"].str.len().gt(3).all()
    assert originals[["words_text", "errors_text"]].isna().all(axis=1).tolist() == [True, False]
    path, id = clips["path"][0], clips["id"][0]
    write_flac(tmp_path / "out/x.flac", read_audio(path, RATE), RATE)
    index = pd.DataFrame([{"id": id, "condition": "x", "file": "x.flac", "judged": True}])
    write_csv(tmp_path / "out/index.csv", index)
    files = tmp_path / "out/index.csv", tmp_path / "originals.csv", tmp_path / "manifest.csv"
    judge_renders([Renders(*files, tmp_path / "words.csv")], CFG)
    words = read_csv(tmp_path / "words.csv")
    assert words[["words_text", "errors_text"]].isna().all(axis=None) and (words["words"] > 3).all()


def test_nothing_to_judge(clips, tmp_path):
    write_csv(tmp_path / "manifest.csv", clips[:1])
    columns = ["id", "condition", "file", "judged"]
    write_csv(tmp_path / "index.csv", pd.DataFrame([("x", "sweep", "x.flac", False)], columns=columns))
    originals = pd.DataFrame(columns="id speaker split transcript text words_text errors_text".split())
    write_csv(tmp_path / "originals.csv", originals)
    judge_renders([Renders(*(tmp_path / f"{n}.csv" for n in ("index", "originals", "manifest", "words")))], CFG)
    assert len(read_csv(tmp_path / "words.csv")) == 0


def two_stages(clips: pd.DataFrame, folder: Path, quality: bool = False) -> list[Renders]:
    """Two clips as two stages render them; the second has sounds of the first, and may be rated."""
    clips = clips[:2]
    write_csv(folder / "manifest.csv", clips)
    judge_originals(folder / "manifest.csv", folder / "originals.csv", CFG)
    renders = []
    for stage, gains in (("loud", (1.0, 0.5)), ("soft", (0.5, 0.1))):
        rows = []
        for gain in gains:
            for clip in clips.itertuples():
                wav = gain * read_audio(clip.path, RATE)
                write_flac(folder / stage / f"{gain}/{clip.id}.flac", wav, RATE)
                rows.append((clip.id, f"gain-{gain}", f"{gain}/{clip.id}.flac", True))
        write_csv(folder / stage / "index.csv", pd.DataFrame(rows, columns=["id", "condition", "file", "judged"]))
        files = (folder / stage / "index.csv", folder / "originals.csv", folder / "manifest.csv")
        renders.append(Renders(*files, folder / f"{stage}.words.csv", quality=quality and stage == "soft"))
    return renders


def test_one_job_judges_all_stages_alike_on_any_number_of_cores(
    clips: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renders, loaded, judged = two_stages(clips, tmp_path), [], []
    load, judge = Transcriber.model.func, Transcriber._transcribe
    monkeypatch.setattr(Transcriber.model, "func", lambda self: loaded.append(1) or load(self))
    monkeypatch.setattr(Transcriber, "_transcribe", lambda self, wav: judged.append(1) or judge(self, wav))
    tables = []
    for workers, pieces in ((1, None), (3, None), (2, Pieces(tmp_path / "pieces"))):
        judge_renders(renders, CFG, pieces, workers)
        tables.append([(tmp_path / f"{stage}.words.csv").read_bytes() for stage in ("loud", "soft")])
    assert tables[0] == tables[1] == tables[2] and len(loaded) == 3
    soft = read_csv(tmp_path / "soft.words.csv")
    assert soft["condition"].tolist() == ["gain-0.5"] * 2 + ["gain-0.1"] * 2
    assert soft["id"].tolist() == 2 * clips["id"][:2].tolist()

    # With what is kept, only the sound that changed is judged; the tables of all stages are written.
    loaded.clear(), judged.clear()
    wav = read_audio(tmp_path / "soft/0.1" / f"{clips['id'][0]}.flac", RATE)
    write_flac(tmp_path / "soft/0.1" / f"{clips['id'][0]}.flac", wav[::-1], RATE)
    for stage in ("loud", "soft"):
        (tmp_path / f"{stage}.words.csv").unlink()
    judge_renders(renders, CFG, Pieces(tmp_path / "pieces"), 2)
    assert len(loaded) == len(judged) == 1
    assert (tmp_path / "loud.words.csv").read_bytes() == tables[0][0]
    assert (tmp_path / "soft.words.csv").read_bytes() != tables[0][1]


def test_shards_leave_what_the_whole_job_then_finds(
    clips: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renders, heard = two_stages(clips, tmp_path), []
    judge_renders(renders, CFG)
    tables = [Path(one.out).read_bytes() for one in (*renders, Renders("", "", "", tmp_path / "originals.csv"))]
    for one in (*renders, Renders("", "", "", tmp_path / "originals.csv")):
        Path(one.out).rename(tmp_path / f"{Path(one.out).name}.first")
    pieces, manifest = Pieces(tmp_path / "pieces"), tmp_path / "manifest.csv"
    for which in (1, 0):
        judge_originals(manifest, tmp_path / "mark", CFG, pieces, shard=(which, 2))
    assert not (tmp_path / "mark").exists()
    judge = Transcriber._transcribe
    monkeypatch.setattr(Transcriber, "_transcribe", lambda self, wav: heard.append(1) or judge(self, wav))
    judge_originals(manifest, tmp_path / "originals.csv", CFG, pieces)
    assert not heard
    for which in (0, 1):
        judge_renders(renders, CFG, pieces, shard=(which, 2))
    assert heard and not any(Path(one.out).exists() for one in renders)
    heard.clear()
    judge_renders(renders, CFG, pieces)
    assert not heard and [Path(one.out).read_bytes() for one in renders] == tables[:2]
    assert (tmp_path / "originals.csv").read_bytes() == tables[2]


def test_a_stage_that_asks_has_a_column_of_quality(clips: pd.DataFrame, tmp_path: Path) -> None:
    renders = two_stages(clips[:1], tmp_path, quality=True)
    judge_renders(renders, CFG)
    loud, soft = (read_csv(one.out) for one in renders)
    assert list(soft) == [*loud, "dnsmos"] == [*judging.WORDS, "dnsmos"]
    first = soft.iloc[0]
    wav = read_audio(tmp_path / "soft/0.5" / f"{first['id']}.flac", RATE)
    assert first["dnsmos"] == pytest.approx(Quality().rate(wav))


def test_an_error_ends_the_job_at_once(clips: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renders, judged = two_stages(clips, tmp_path), []

    def fail(self: Transcriber, wav: np.ndarray) -> str:
        judged.append(1)
        time.sleep(0.3)  # meanwhile the job hears of the one before
        raise EqknobsError("no more")

    monkeypatch.setattr(Transcriber, "transcribe", fail)
    with pytest.raises(EqknobsError, match="no more"):
        judge_renders(renders, CFG, workers=1)
    assert len(judged) <= 3 < sum(len(pd.read_csv(one.index)) for one in renders)
    assert not any(Path(one.out).exists() for one in renders)


def test_the_script_pairs_files_and_rates_the_stages_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(ROOT / "workflow/scripts/judgements.py"))["main"]
    found: dict[str, Any] = {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setitem(
        main.__globals__,
        "judge_renders",
        lambda renders, cfg, pieces, workers, shard: found.update(renders=renders, cfg=cfg, workers=workers),
    )
    indexes = ["renders/a.b/codec/index.csv", "renders/a.b@c/steering/index.csv"]
    inputs = SimpleNamespace(indexes=indexes, originals=["o", "o.c"], manifests=["m", "c/m"])
    judges = {"asr": "tiny.en", "beam": 2}
    main(inputs, ["x.csv", "y.csv"], {"judges": judges, "device": "cpu", "dnsmos": ["steering"]})
    assert found["renders"] == [
        Renders(indexes[0], "o", "m", "x.csv"),
        Renders(indexes[1], "o.c", "c/m", "y.csv", quality=True),
    ]
    assert found["cfg"] == judges | {"device": "cpu"} and found["workers"] == 3
