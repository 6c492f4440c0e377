"""The pages as files: self-contained, complete, honest; what they do in a browser is tested in tests/workflow."""

import base64
import html
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from eqknobs.errors import EqknobsError
from eqknobs.evidence.drawing import look
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.wording import ends, number
from eqknobs.io import read_csv
from eqknobs.report import page as report
from eqknobs.report import players as playing
from eqknobs.report.findings import matrix, strongest, weight
from eqknobs.report.page import SECTIONS
from helpers.results_fixture import ALPHAS, TARGET, make_report, make_results, make_tables

STAGES = ["codec", "saes", "probes", "steering", "importance", "quantisation"]  # those of the fixture
OF_FIXTURE = [section for section in SECTIONS if section.STAGE in STAGES]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    config = make_results(root)
    run = root / "results" / "run"
    make_tables(run, config)
    make_report(run, config, run / "report")
    return run, config, (run / "report" / "steering.html").read_text()


def pages_of(folder) -> dict[str, str]:
    """Page -> its HTML, the overview first."""
    return {
        name: (folder / f"{name}.html").read_text()
        for name in ["index", *STAGES]
        if (folder / f"{name}.html").is_file()
    }


def text_of(pages) -> str:
    return " ".join(" ".join("".join(Page(page).text).split()) for page in pages.values())


def block(page: str, name: str):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1])


class Page(HTMLParser):
    """Text, links and ids; complains about tags that do not close."""

    VOID = ("meta", "link", "img", "input", "br", "path", "use")

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.refs, self.ids = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag, attrs):
        self._note(attrs)

    def _note(self, attrs):
        found = dict(attrs)
        self.refs += [found[k] for k in ("href", "src", "xlink:href") if found.get(k)]
        self.ids += [found["id"]] if "id" in found else []

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def test_pages_are_self_contained_and_their_links_lead_somewhere(written):
    run, _, _ = written
    pages = pages_of(run / "report")
    assert list(pages) == ["index", *STAGES] and {p.stem for p in (run / "report").glob("*.html")} == set(pages)
    parsed = {name: Page(page) for name, page in pages.items()}
    files = []
    for name, page in pages.items():
        outside = {ref for ref in parsed[name].refs if not ref.startswith(("#", "data:", "audio/"))}
        for ref in outside:
            other, _, anchor = ref.partition(".html#")
            assert not anchor or anchor in parsed[other].ids
        assert {ref.partition(".html")[0] for ref in outside} == set(pages) and "http-equiv" in page
        assert not re.search(r"url\((?!#)", page.split("<script")[0])
        files += [ref for ref in parsed[name].refs if ref.startswith("audio/")]
        assert {ref[1:] for ref in parsed[name].refs if ref.startswith("#")} <= set(parsed[name].ids)
        said = [own for own in parsed[name].ids if own.startswith("said-")]
        assert len(set(said)) == len(said)
        assert f'<a href="{name}.html" aria-current="page">' in page and len(page.encode()) < 25e6
    assert len(files) > 80 and all((run / "report" / file).is_file() for file in files)
    assert {f"audio/{p.name}" for p in (run / "report" / "audio").iterdir()} == set(files)


def test_every_headline_and_every_table_stands_on_its_page(written):
    run, _, _ = written
    pages = pages_of(run / "report")
    text = text_of(pages)
    summary = json.loads((run / "tables" / "summary.json").read_text())["targets"][TARGET]
    for line in summary["headlines"]:
        here = text_of({line["stage"]: pages[line["stage"]]})
        assert line["text"] in here and line["detail"] in here
    published = [figures for section in OF_FIXTURE for figures in section.PUBLISHED.values()]
    for head, rows in published:
        assert all(" ".join(cell.split()) in text for cell in (*head, *(c for row in rows for c in row)))
    assert text.count("Published by others") == len(published) == 7
    for words in ("What these numbers prove", "The speech is synthetic", "target not reached", "Configuration"):
        assert words in text or words in pages["steering"]
    drawn = {name: page.count("<svg ") for name, page in pages.items()}
    assert drawn == {"index": 0, "codec": 0, "saes": 4, "probes": 3, "steering": 5, "importance": 6, "quantisation": 5}
    assert "bootstrap: 200" in text and "torch" in text
    for name in re.findall(r"#0a0[bc]..", "".join(pages.values())):
        raise AssertionError(f"stand-in colour {name} left in a drawing")


def test_captions_say_what_the_configuration_says(written, tmp_path):
    run, config, _ = written
    page = "".join(pages_of(run / "report").values())
    assert "12 quantile bins; 95 % intervals" in page and "20 quantile bins" not in page
    assert "dotted: training; pale: seed 1." in page
    run = shutil.copytree(run, tmp_path / "run")
    path = run / "importance" / f"{TARGET}.json"
    path.write_text(path.read_text().replace("0.3", "0.25"))
    rows = read_csv(run / "tables" / "sae.csv")
    rows[rows["seed"] == 0].to_csv(run / "tables" / "sae.csv", index=False)
    make_report(run, config, run / "report")
    page = "".join(pages_of(run / "report").values())
    assert "Thresholds .25 and .7 of the maximum.<" in page
    assert "dotted: training.<" in page and "Pale: seed" not in page


def test_an_arm_keeps_its_look_whichever_others_there_are():
    from eqknobs.stages.importance.section import LOOKS as MAPS
    from eqknobs.stages.steering.section import LOOKS as ARMS

    assert all(len(set(looks.values())) == len(looks) for looks in (ARMS, MAPS))
    fewer = {name: shown for name, shown in ARMS.items() if name != "sae_probe"}
    assert look("sae_clamp:topk", fewer) == look("sae_clamp:topk", ARMS) == ARMS["sae_clamp"]


def test_players_hold_every_arm_and_every_stop_of_the_sweep(written):
    _, config, page = written
    players, media = block(page, "players")[TARGET], block(page, "media")
    assert len(players) == config["report"]["clips"]
    for player in players:
        assert set(player["references"]) == {"original", "codec"}
        centroid, *others = player["groups"]
        assert centroid["property"] == "centroid" and {g["property"] for g in others} == {"pitch", "rms"}
        arms = {arm["arm"]: [stop["alpha"] for stop in arm["stops"]] for arm in centroid["arms"]}
        for arm in ("sae_probe:topk", "sae_clamp:rms_l1", "raw_probe", "difference_in_means", "random"):
            assert set(ALPHAS) < set(arms[arm]) and arms[arm] == sorted(arms[arm])
            assert len(arms[arm]) == len(ALPHAS) + 1  # the calibrated strength besides
        used = [s for g in player["groups"] for a in g["arms"] for s in a["stops"]] + list(
            player["references"].values()
        )
        assert all(stop["sound"] in media and stop["picture"] in media for stop in used)
    head, body = media[players[0]["references"]["original"]["sound"]].split(",")
    assert head == "data:audio/mpeg;base64"
    wav, rate = sf.read(io.BytesIO(base64.b64decode(body)))
    assert (rate, abs(len(wav) / rate - 1.5) < 0.1, np.abs(wav).max() > 0.05) == (16000, True, True)


def test_player_readouts_are_the_clips_own_scores(written):
    run, _, page = written
    player = block(page, "players")[TARGET][0]
    signal = read_csv(run / "scores" / f"{TARGET}.steering.signal.csv")
    stop = next(a for a in player["groups"][0]["arms"] if a["arm"] == "raw_probe")["stops"][-1]
    row = signal[(signal["id"] == player["clip"]) & (signal["arm"] == "raw_probe") & (signal["alpha"] == 8)]
    row = row[row["property"] == "centroid"].iloc[0]
    assert stop["centroid_hz"] == pytest.approx(row["centroid_hz"])
    assert stop["speaker_similarity"] is None  # the sweep is not judged


def test_long_clips_are_cut_to_the_budget_and_said_so(written, tmp_path, monkeypatch):
    run, config, _ = written
    monkeypatch.setattr(playing, "SOUND_BUDGET", 5e5)
    make_report(run, config, tmp_path / "out")
    page = (tmp_path / "out" / "steering.html").read_text()
    player = block(page, "players")[TARGET][0]
    assert player["cut"] and player["seconds"] < 1 and f"first {player['seconds']:.1f} s" in page
    monkeypatch.setattr(report, "MAX_PAGE", 1e5)
    with pytest.raises(EqknobsError, match=r"report\.clips"):
        make_report(run, config, tmp_path / "none")
    assert not (tmp_path / "none" / "index.html").exists()


def test_the_overview_plays_the_first_clip_and_holds_no_other_sound(written):
    run, _, page = written
    overview = pages_of(run / "report")["index"]
    (player,) = block(overview, "players")[TARGET]
    assert player == block(page, "players")[TARGET][0] and overview.count('class="player"') == 1
    held = block(overview, "media")
    stops = [stop for group in player["groups"] for arm in group["arms"] for stop in arm["stops"]]
    stops += player["references"].values()
    assert set(held) == {stop[kind] for stop in stops for kind in ("sound", "picture")}
    assert len(held) < len(block(page, "media"))
    assert not [name for name, other in pages_of(run / "report").items() if name in STAGES[:3] and "<script" in other]


def test_a_cell_of_the_matrix_tells_verdict_value_interval_and_sentence(written):
    run, _, _ = written
    pages = pages_of(run / "report")
    lines = json.loads((run / "tables" / "summary.json").read_text())["targets"][TARGET]["headlines"]
    placed = [line for line in lines if "row" in line]
    assert {line["stage"] for line in placed} == {"saes", "probes", "steering", "importance", "quantisation"}
    words = {"positive": "supports", "negative": "against", "undecided": "not shown", "measured": "measured"}
    for line in placed:
        assert line["low"] <= line["value"] <= line["high"]
        page = pages[line["stage"]]
        assert f'<th scope="row">{html.escape(line["row"])}</th>' in page
        assert f'<th scope="col">{html.escape(line["column"])}</th>' in page
        sentence = html.escape(line["text"], quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
        button = re.search(
            rf'<button[^>]* title="{re.escape(sentence)}">.*?</button>\s*<div popover.*?</div>', page, re.S
        )[0]
        signed = line["verdict"] != "measured"
        assert f'class="cell v-{line["verdict"]}"' in button and f"{words[line['verdict']]}:</span>" in button
        assert number(line["value"], signed) in button and ends(line["low"], line["high"], signed) in button
        target = re.search(r'popovertarget="([^"]+)"', button)[1]
        assert f'<div popover id="{target}"' in button and button.count(sentence) == 2


def test_the_overview_says_what_was_opened_and_the_strongest_findings(written):
    run, _, _ = written
    page = pages_of(run / "report")["index"]
    text = text_of({"index": page})
    assert "encoder_transformer" in text and "val 6 clips · 3 speakers" in text and "test 12 clips" in text
    lines = json.loads((run / "tables" / "summary.json").read_text())["targets"][TARGET]["headlines"]
    shown = strongest([line | {"target": TARGET} for line in lines])
    assert 5 <= len(shown) <= 8 and all(line["text"] in text for line in shown)
    assert [section for section in SECTIONS if f'href="{section.STAGE}.html"' in page] == OF_FIXTURE


def line(verdict, value=None, half=1.0, row="r", stage="s", text="t"):
    found = {"target": "a.b", "stage": stage, "verdict": verdict, "text": text, "row": row}
    return found | ({} if value is None else {"value": value, "low": value - half, "high": value + half})


def test_findings_are_ranked_by_their_evidence_for_and_against_in_turn():
    ahead = [line("positive", value, row=f"p{value}") for value in (2, 9, 5, 7, 3)]
    behind = [line("negative", -value, row=f"n{value}") for value in (4, 8, 20)]
    behind.append(line("negative", -6, row="n20"))  # the same claim in another condition
    rest = [line("measured", text=f"m{i}", stage="s" if i < 3 else "u") for i in range(4)] + [line("undecided", 99)]
    found = strongest([*rest, *ahead, *behind])
    assert [x.get("value") for x in found[:6]] == [-20, 9, -8, 7, -4, 5]
    assert [x["text"] for x in found[6:]] == ["m0", "m3"] and found[0]["alike"] == 1 and found[1]["alike"] == 0
    assert [x["verdict"] for x in strongest([line("undecided", 1), line("undecided", 3, row="q")])] == ["undecided"] * 2
    assert weight(line("positive", 3, half=0.5)) == 6 and weight(line("positive", 3, half=0)) == float("inf")
    assert strongest([]) == []


def test_a_matrix_keeps_what_has_no_place_as_sentences():
    placed = [line("measured", 1, row=row) | {"column": column} for row, column in ("ax", "ay", "bx", "bx")]
    loose = [line("measured")]
    found = matrix(placed + loose)
    assert found["columns"] == ["x", "y"] and [row["name"] for row in found["rows"]] == ["a", "b"]
    assert found["rows"][1]["cells"] == [placed[2], None] and found["sentences"] == [placed[3], *loose]
    assert matrix(placed[:1] + loose) == {"columns": [], "rows": [], "sentences": placed[:1] + loose}


def test_text_from_files_is_escaped(written, tmp_path):
    run = shutil.copytree(written[0], tmp_path / "run")
    path = run / "scores" / "originals.csv"
    path.write_text(path.read_text().replace("a b c", "</script><img src=x onerror=alert(1)>"))
    make_report(run, written[1], run / "report")
    for page in pages_of(run / "report").values():
        assert "<img src=x" not in page
    assert "&lt;img src=x" in (run / "report" / "steering.html").read_text()


def test_a_model_that_cannot_decode_gets_a_page_without_sound(written, tmp_path):
    run, config, _ = written
    models = {"tiny-mimi": {**config["models"]["tiny-mimi"], "kind": "hubert"}}
    make_report(run, {**config, "models": models}, tmp_path)
    pages = pages_of(tmp_path)
    assert list(pages) == ["index", "saes", "probes"] and "No target of this run" in pages["index"]
    assert not [page for page in pages.values() if "<script" in page or "audio/" in Page(page).refs]


def test_clips_whose_ids_differ_in_special_characters_keep_their_own_sound(tmp_path):
    ids = ["C# minor", "C minor", "C+minor", "c+minor", "C_minor"]
    folder = tmp_path / "renders" / TARGET / "codec"
    folder.mkdir(parents=True)
    rows = [{"id": name, "condition": "x", "file": f"x/{i}.flac"} for i, name in enumerate(ids)]
    rows += [{"id": name, "condition": "x", "file": f"x/{name}.flac"} for name in ids]
    (folder / "x").mkdir()
    for row in rows:
        (folder / row["file"]).write_text(row["file"])
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    inputs = Inputs.below(tmp_path)
    (group,) = playing.copy_sounds(inputs, [(TARGET, "codec")], {TARGET: ids}, tmp_path / "report")
    links = [link["href"] for row in group["rows"] for link in row["files"]]
    assert [(tmp_path / "report" / link).read_text() for link in links] == [row["file"] for row in rows]
    assert len({link.casefold() for link in links}) == len(rows)


def test_a_render_that_is_gone_is_called_so(written, tmp_path):
    run = shutil.copytree(written[0], tmp_path / "run")
    next((run / "renders" / TARGET / "steering").rglob("*.flac")).unlink()
    with pytest.raises(EqknobsError, match=r"no such render .* run again, and its stage renders them anew"):
        make_report(run, written[1], tmp_path / "out")


def about_training(run, config, folder, ours=True) -> str:
    make_report(run, config, folder, ours)
    text = " ".join("".join(Page((folder / "index.html").read_text()).text).split())
    return text[text.index("What these numbers prove") :]


def test_the_page_says_which_of_its_speakers_a_bundled_model_heard(written, tmp_path):
    run = shutil.copytree(written[0], tmp_path / "run")
    path = run / "manifest" / "manifest.csv"
    path.write_text(path.read_text().replace(",t00,", ",103,").replace(",t01,", ",104,"))
    model = {"tiny-mimi": {"kind": "mimi", "path": "resources/models/tiny-mimi", "revision": None}}
    config = {**written[1], "models": model}
    ours = about_training(run, config, tmp_path / "ours")
    assert "in part on the corpus's own voices (103; the codec table keeps them apart)" in ours
    assert "The speech is synthetic" in ours
    theirs = about_training(run, config, tmp_path / "theirs", ours=False)
    assert "corpus's own voices" not in theirs and "The speech is synthetic" not in theirs
    assert "which of this corpus's speakers it heard, if any, is not recorded (Synthetic speech made by" in theirs
    assert "LibriSpeech train-clean-100" in theirs
    path.write_text(path.read_text().replace(",103,", ",t00,"))
    assert "tiny-mimi is a small codec trained by this project" in ours
    assert "is not recorded" in about_training(run, config, tmp_path / "none")
    moshi = {"tiny-mimi": {**model["tiny-mimi"], "kind": "moshi"}}
    said = about_training(run, {**config, "models": moshi}, tmp_path / "moshi")
    assert "tiny-mimi is a small speech LM trained by this project" in said and "inside this speech LM" in said
    assert "Moshi" in said and "codec table" not in said and "Mimi on" not in said


def test_one_is_not_said_in_the_plural(written, tmp_path):
    run = shutil.copytree(written[0], tmp_path / "run")
    for path in [run / "manifest" / "manifest.csv", *(run / "scores").glob("*.csv")]:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not re.search(r"test[1-9]-|val[1-9]-", line)))
    config = {**written[1], "run": {**written[1]["run"], "seed": 0}}
    make_tables(run, config)
    for stage in ("codec", "steering", "importance", "quantisation"):
        index = run / "renders" / TARGET / stage / "index.csv"
        index.write_text("".join(x for x in index.read_text().splitlines(keepends=True) if "test1-" not in x))
    make_report(run, config, tmp_path / "out")
    text = text_of(pages_of(tmp_path / "out"))
    assert "With 1 test speaker they say" in text and "1 speaker ·" in text and "1 test speaker and 3 clips" in text
    assert not re.search(r"\b1 (test )?(speakers|clips|files|arms|codebooks|dimensions)\b", text)
