"""`eqknobs explore`: the page of a user's recording, and what it refuses."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from eqknobs.cli import main
from eqknobs.io import read_csv
from eqknobs.sae import SAE
from helpers.features_world import CFG, TARGET, make_paged
from helpers.tiny_world import RATE


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    return make_paged(tmp_path_factory.mktemp("explore"))


def explore(run: Path, out: Path, audio: Path, *others: str, target: str = TARGET, sae: str = "topk") -> None:
    given = ["--run", run, "--target", target, "--sae", sae, "--audio", audio, "--out", out, "--device", "cpu", *others]
    main(["explore", *map(str, given)])


def test_a_clip_of_the_run_shows_its_own_strongest_features(paged, tmp_path: Path, capsys) -> None:
    clip = read_csv(paged.world.manifest).iloc[-1]
    explore(paged.run, tmp_path / "new", Path(clip["path"]), "--count", "5")
    page = (tmp_path / "new" / "index.html").read_text()
    with paged.world.open() as cache:
        row = cache.utterances.set_index("id").loc[clip["id"]]
        code = SAE.load(paged.world.saes["topk"]).encode(np.array(cache.acts[row.start : row.start + row.frames]))
    wanted = np.argsort(-code.max(0), kind="stable")[:5]
    assert re.findall(r"<h3>Feature (\d+)", page) == [str(j) for j in wanted]
    assert f"up to {code[:, wanted[0]].max():.3g} at" in page
    speakers = read_csv(paged.world.manifest)["speaker"].nunique()
    assert 5 < page.count('class="moment"') <= 5 * min(CFG["clips"], speakers)  # the run's own, of every feature
    assert "http" not in page.partition("<body>")[2]
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'new' / 'index.html'}\n")


def test_another_rate_and_two_channels_are_taken_and_a_run_without_pages_too(paged, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(paged.run, run, symlinks=True, ignore=shutil.ignore_patterns("features"))
    rng = np.random.default_rng(0)
    sf.write(tmp_path / "a.wav", 0.1 * rng.standard_normal((22050, 2)), 22050)
    explore(run, tmp_path / "out", tmp_path / "a.wav", sae="rms_l1")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "did not look at this SAE" in page and 'class="moment"' not in page and "Feature" in page


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    sf.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    return tmp_path / "a.wav"


def refused(*args, **kwargs) -> str:
    with pytest.raises(SystemExit) as ended:
        explore(*args, **kwargs)
    line = str(ended.value.code)
    assert line.startswith("error: ") and "\n" not in line
    return line


def test_what_is_not_there_is_one_line(paged, tmp_path: Path, sound: Path) -> None:
    out = tmp_path / "out"
    assert "no such folder" in refused(tmp_path / "none", out, sound)
    assert f"--target x.y: not in {paged.run}; it has {TARGET}" in refused(paged.run, out, sound, target="x.y")
    assert "--sae z: no such SAE" in refused(paged.run, out, sound, sae="z")
    (tmp_path / "note.txt").write_text("no sound")
    assert "not readable as audio" in refused(paged.run, out, tmp_path / "note.txt")
    sf.write(tmp_path / "long.wav", np.zeros(301 * 8000), 8000)
    assert "at most 300 are paged" in refused(paged.run, out, tmp_path / "long.wav")
    assert "--count: must be" in refused(paged.run, out, sound, "--count", "0")
    assert not out.exists()


def test_a_model_that_is_gone_or_another_and_a_run_that_is_not_finished(
    paged, tmp_path: Path, sound: Path, capsys
) -> None:
    run = tmp_path / "run"
    shutil.copytree(paged.run, run, symlinks=True)
    config = run / "report" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("model\n", "gone\n"))
    assert "models.tiny.path: no folder" in refused(run, tmp_path / "out", sound)
    from helpers.tiny_world import save_codec

    save_codec(tmp_path / "other", num_hidden_layers=1)
    config.write_text(re.sub(r"path: .*model\n", f"path: {tmp_path / 'other'}\n", text))
    assert "put those back, or run again" in refused(run, tmp_path / "out", sound)
    config.unlink()
    assert "let the run finish" in refused(run, tmp_path / "out", sound)
