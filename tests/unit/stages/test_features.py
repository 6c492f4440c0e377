"""What single features hear: choice, strongest moments, mean mel maps, pages."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from eqknobs.audio import read_audio
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, read_json, write_csv, write_json
from eqknobs.sae import SAE
from eqknobs.stages.features import checks, tables
from eqknobs.stages.features.compute import (
    HALF,
    Activity,
    MelMaps,
    centres,
    choose,
    clip_activity,
    firing_by_label,
    read_names,
    reasons,
    top_clips,
    window,
)
from eqknobs.stages.features.pages import curve
from helpers.features_world import CFG, NAMED, TARGET, make_paged


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    return make_paged(tmp_path_factory.mktemp("features"))


def activity(fires: np.ndarray, peak: np.ndarray | None = None) -> Activity:
    return Activity(fires.astype(float) if peak is None else peak, fires, pd.DataFrame({"frames": [100] * len(fires)}))


def test_the_strongest_clips_are_of_several_speakers() -> None:
    peak = np.array([1.0, 5, 4, 3, 0])
    assert top_clips(peak, ["a", "b", "b", "c", "d"], 3) == [1, 3, 0]
    assert top_clips(peak, ["a", "b", "b", "c", "d"], 9) == [1, 3, 0]  # none where it is silent


def test_a_window_lies_in_its_clip() -> None:
    assert window(2.0, 5.0, 1.0) == (1.5, 2.5)
    assert window(0.1, 5.0, 1.0) == (0.0, 1.0)
    assert window(4.9, 5.0, 1.0) == (4.0, 5.0)
    assert window(0.1, 0.4, 1.0) == (0.0, 0.4)


def test_features_are_chosen_in_turns_and_random_ones_from_all_that_fire() -> None:
    fires = np.array([[9, 8, 7, 6, 5, 4, 3, 0]])
    peak = np.array([[1.0, 2, 3, 4, 5, 6, 7, 0]])
    none = {**CFG, "random": 1, "min_firings": 3, "count": 4, "seed": 3}
    found = choose(activity(fires, peak), {"label": [4, 7], "phone": [4, 5]}, none)
    drawn = [j for j, why in found.items() if why == "random"]
    assert len(drawn) == 1 and drawn[0] != 7  # too rare
    assert list(found)[-1] == drawn[0] and len(found) == 5
    kept = [j for j in (4, 5, 0, 1, 6) if j not in drawn]
    assert found[kept[0]] in ("label", "phone", "frequent") and 7 not in found
    if 4 not in drawn:
        assert found[4] == "label"
    seen = set()
    for seed in range(60):
        seen |= {j for j, why in choose(activity(fires, peak), {}, {**none, "seed": seed}).items() if why == "random"}
    assert seen == set(range(7))  # those with a reason too: else the draw would stand for the rest only


def clip_power(onset: int, cells: int = 200) -> np.ndarray:
    """Quiet before a cell, loud from there on."""
    power = np.full((cells, 80), 1e-6)
    power[onset:] = 1.0
    return power


def test_an_onset_has_its_energy_right_of_the_centre_an_offset_left() -> None:
    rng = np.random.default_rng(0)
    times = (np.arange(200) + 0.5) * 0.02
    on = np.zeros(200)
    on[99] = 2.0
    maps = MelMaps()
    about = {"id": "a", "speaker": "s", "split": "test"}
    maps.add(clip_power(100), centres(on, times, clip_power(100), 5, rng), about)
    found = {row["kind"]: row["right"] / row["frames"] for row in maps.rows}
    assert found["feature"] > 0.99 and abs(found["matched"] - 0.5) < 0.4
    mean = maps.means()
    assert mean.shape == (3, 80, 51) and (mean[0, :, HALF + 1 :] > mean[0, :, :HALF]).all()
    other = MelMaps()
    power = clip_power(100)[::-1]
    on = np.roll(on[::-1], 0)
    other.add(power, centres(on, times, power, 5, rng), about)
    assert other.rows[0]["right"] < 0.01


def test_matched_frames_are_as_loud_and_off_and_no_window_leaves_the_clip() -> None:
    rng = np.random.default_rng(1)
    times = (np.arange(200) + 0.5) * 0.02
    power = np.full((200, 80), 1e-6)
    power[::4] = 1.0
    on = np.zeros(200)
    on[[0, 40, 80, 120, 196]] = [9, 1, 2, 3, 9]
    found = centres(on, times, power, 2, rng)
    assert found["feature"].tolist() == [80, 120]  # the strongest whose window the clip holds
    assert len(found["random"]) == len(found["matched"]) == 2
    assert (power[found["matched"], 0] == 1.0).all() and not on[found["matched"]].any()
    for cells in found.values():
        assert (cells >= HALF).all() and (cells + HALF < 200).all()
    assert all(len(cells) == 0 for cells in centres(on[:30], times[:30], power[:30], 2, rng).values())


def test_firing_rates_by_label() -> None:
    clips = pd.DataFrame({"frames": [10, 30, 10]})
    found = firing_by_label(np.array([5, 3, 0]), clips, {"sex": pd.Series(["F", "F", "M"])})
    assert found == {"sex": {"F": {"rate": 0.2, "clips": 2}, "M": {"rate": 0.0, "clips": 1}}}


def test_what_other_stages_say(tmp_path: Path) -> None:
    searches = [
        {"sae": "x", "property": "sex", "label": "F", "column": 3, "p": 0.2, "f1_test": 0.5},
        {"sae": "x", "property": "accent", "label": "US", "column": 3, "p": 0.01, "f1_test": 0.8},
        {"sae": "x", "property": "sex", "label": "M", "column": 2, "p": 0.1, "f1_test": 0.7},
    ]
    write_json(tmp_path / "l.json", {"searches": searches})
    write_json(tmp_path / "p.json", {"saes": {"x": {"features": [1, 2, 7], "phones": ["AA", "AA", "B"]}}})
    rows = [
        (1, "music", 0.5, True),
        (1, "speech", 0.1, False),
        (2, "music", 0.1, False),
        (2, "speech", 0.9, True),
        (4, "music", 0.3, False),
        (4, "speech", 0.3, False),
    ]
    table = pd.DataFrame(rows, columns=["feature", "domain", "frame_share", "frame_0.1"])
    write_csv(tmp_path / "d.csv", table.assign(sae="x", clip_share=0.0))
    pairs = pd.DataFrame({"kind": ["seeds", "seeds", "layers"], "sae": "x", "a": ["t #0", "t #1", "t #0"]})
    write_csv(tmp_path / "s.csv", pairs.assign(b="t #2", feature=1, best=[0.5, 0.6, 0.7], found=[8, 9, 10]))
    names = read_names("x", *(tmp_path / name for name in ("l.json", "p.json", "d.csv", "s.csv")))
    assert [one["label"] for one in names.labels[3]] == ["US", "F"]
    assert names.domains == {2: "speech", 1: "music"} and list(names.domains) == [2, 1]
    assert names.twins == {1: (8, 0.5)}
    assert reasons(names) == {"label": [3, 2], "phone": [1, 7, 2], "domain": [1, 2]}
    assert reasons(read_names("y", tmp_path / "l.json")) == {}


def test_a_shown_moment_is_the_clips_own_sound_around_the_peak(paged) -> None:
    index = read_csv(paged.run / "renders" / TARGET / "features" / "index.csv")
    manifest = read_csv(paged.world.manifest).set_index("id")
    record = read_json(paged.run / "features" / f"{TARGET}.json")["saes"]["topk"]["features"][0]
    own = index[(index["sae"] == "topk") & (index["feature"] == record["feature"])]
    assert own["speaker"].is_unique and own["activation"].is_monotonic_decreasing
    assert own["activation"].iloc[0] == pytest.approx(record["max"])
    with paged.world.open() as cache:
        sae = SAE.load(paged.world.saes["topk"])
        found = clip_activity(cache, sae, CFG["splits"])
        assert found.peak[:, record["feature"]].max() == pytest.approx(record["max"])
        assert record["rate"] == found.fires[:, record["feature"]].sum() / found.clips["frames"].sum()
    for row in own.itertuples():
        cut, rate = sf.read(paged.run / "renders" / TARGET / "features" / row.file, dtype="float32")
        whole = read_audio(manifest.loc[row.id, "path"], rate)
        first = round(row.start * rate)
        assert np.abs(cut - whole[first : first + len(cut)]).max() < 1e-3
        assert row.start <= row.peak <= row.start + row.seconds and len(cut) <= round(CFG["seconds"] * rate) + 1


def test_the_named_feature_has_a_page_and_the_table_says_why(paged) -> None:
    table = read_csv(paged.run / "tables" / "features.csv")
    own = table[(table["sae"] == "topk") & (table["feature"] == NAMED)].iloc[0]
    assert own["why"] in ("label", "random") and own["label"] == "sex: F"
    assert (own["twin"], own["twin_overlap"]) == (9, 0.75)
    assert (table["why"] == "random").groupby(table["sae"]).sum().eq(CFG["random"]).all()
    assert set(table.columns) == set(tables.COLUMNS["features"].split())
    rows = read_csv(paged.run / "scores" / f"{TARGET}.features.csv")
    sums = rows[(rows["sae"] == "topk") & (rows["feature"] == NAMED) & (rows["kind"] == "matched")]
    assert own["onset_matched"] == pytest.approx(sums["right"].sum() / sums["frames"].sum())
    lines = tables.findings(paged.context(), {"features": table.to_dict("records")})
    assert len(lines) == 2 and all("drawn at random" in line["text"] for line in lines)


def test_the_same_seed_gives_the_same_files(paged, tmp_path: Path) -> None:
    again = make_paged(tmp_path).run
    for name in (f"features/{TARGET}.json", f"features/{TARGET}.npz", f"scores/{TARGET}.features.csv"):
        assert (again / name).read_bytes() == (paged.run / name).read_bytes()


def test_a_page_holds_every_feature_and_the_users_captions(paged, tmp_path: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text(f"sae,feature,caption\ntopk,{NAMED},a rising <hum>\nrms_l1,{NAMED},of another\n")
    page = paged.write_pages(captions)["topk"].read_text()
    record = read_json(paged.run / "features" / f"{TARGET}.json")["saes"]["topk"]["features"]
    assert re.findall(r'<details class="feature" id="f(\d+)"', page) == [str(one["feature"]) for one in record]
    assert "“a rising &lt;hum&gt;”" in page and "of another" not in page
    assert f'data-words="{NAMED} ' in page and "sex: f" in page and "overlap χ 0.75" in page
    assert page.count("<audio") == sum(len(one["clips"]) for one in record)
    assert not re.search(r'(?:src|href)="(?!data:|\w+\.html)', page.partition("<body>")[2])


def test_a_lost_window_is_one_line(paged, tmp_path: Path) -> None:
    run = make_paged(tmp_path)
    next((run.run / "renders" / TARGET / "features").glob("*.flac")).unlink()
    with pytest.raises(EqknobsError, match="no such render"):
        run.write_pages()


def test_the_curve_reaches_the_top_at_the_largest_activation() -> None:
    assert (
        curve([[0.0, 0.0], [0.5, 2.0], [1.0, 1.0]], 1.0, 2.0)
        == "0.00,100.0 0.00,100.0 50.00,8.0 100.00,54.0 100.00,100.0"
    )
    assert curve([], 1.0, 2.0) == ""


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"saes": ["y"]}, r"features\.saes: names 'y'"),
        ({"count": 900}, r"features: pages of about \d+ MB"),
        ({"captions": "none.csv"}, r"features\.captions: no file none\.csv"),
    ],
)
def test_settings_that_cannot_be(over: dict, said: str) -> None:
    config = {"run": {"targets": ["w.layer.0"]}, "models": {"w": {"kind": "whisper"}}, "saes": {"x": {}}}
    with pytest.raises(EqknobsError, match=said):
        checks.check({**config, "features": {**CFG, **over}})
    checks.check({**config, "features": CFG})


def test_captions_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("sae,feature\nx,1\n")
    config = {"run": {"targets": ["w.layer.0"]}, "models": {"w": {"kind": "whisper"}}, "saes": {"x": {}}}
    with pytest.raises(EqknobsError, match="no column caption"):
        checks.check({**config, "features": {**CFG, "captions": str(tmp_path / "c.csv")}})
