"""Page the features that are strongest in a user's recording, beside the run's own strongest moments."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np

from eqknobs.audio import read_audio, read_clip
from eqknobs.corpus.cache import ActivationCache
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_csv, read_json, require_output
from eqknobs.models import ModelCfg, load_model
from eqknobs.plan import SPEECH, corpus_of, model_config, parse_target, sae_home, trained_saes
from eqknobs.report.page import CONFIG, environment, frame_of
from eqknobs.sae import SAE
from eqknobs.stages.features.compute import cut, moment
from eqknobs.stages.features.pages import badges, curve, moment_shown, sounding
from eqknobs.strict_yaml import read_yaml

LONGEST = 300  # seconds


@dataclass
class _Run:
    """What is read of a run: its folder, configuration, target, the SAE and its name, the target's cache."""

    folder: Path
    config: dict[str, Any]
    target: str
    name: str
    sae: SAE
    cache: ActivationCache

    @property
    def rate(self) -> int:
        """Samples/s."""
        return int(self.cache.attrs["sample_rate"])


def explore(
    run: str | Path, target: str, sae: str, audio: str | Path, out: str | Path, count: int = 12, device: str = "auto"
) -> Path:
    """Write `out/index.html`: the `count` features of a run's SAE (its first seed) that are strongest in a recording.

    run: a finished run's folder (`results/<run>`); its report says which model it opened. Models and speech that lie in
    folders are looked for from the working directory. Beside a feature stand the clips of the run in which it is
    strongest, if the run has the stage `features`. Returns the page. Raises EqknobsError: no such run, target or SAE,
    no model or another one, sound that cannot be read or is longer than five minutes.
    """
    require_output(out, folder=True)
    opened = _opened(Path(run), target, sae)
    with opened.cache:
        wav, acts = _heard(opened, audio, device)
        code = opened.sae.encode(acts)
        peaks = code.max(0)
        strongest = [int(j) for j in np.argsort(-peaks, kind="stable")[:count] if peaks[j] > 0]
        known = _Known(opened)
        entries = [_entry(opened, known, feature, code[:, feature], len(wav) / opened.rate) for feature in strongest]
        heard = sounding(wav, opened.rate)
    shown = {"entries": entries, "heard": heard, "paged": known.paged, "target": target, "sae": sae}
    _write(Path(out), opened, shown, audio)
    return Path(out) / "index.html"


def _entry(run: _Run, known: "_Known", feature: int, on: np.ndarray, seconds: float) -> dict[str, Any]:
    """What the page shows of a feature; on: its activations in the recording, [frames]."""
    hop = 1 / float(run.cache.attrs["frame_rate"])
    points = [[(frame + 0.5) * hop, float(value)] for frame, value in enumerate(on)]
    record = known.records.get(feature)
    return {
        "feature": feature,
        "peak": float(on.max()),
        "at": (int(on.argmax()) + 0.5) * hop,
        "rate": float((on > 0).mean()),
        "curve": curve(points, seconds, float(on.max())),
        "badges": badges(record) if record else [],
        "clips": known.moments(feature),
        "record": record,
    }


class _Known:
    """What the stage `features` of a run kept of an SAE: records of the features that it paged (`records`), and the
    clips in which every feature is strongest."""

    def __init__(self, run: _Run):
        self.run, self.records, self.paged = run, {}, False
        self.code: dict[int, np.ndarray] = {}
        file = run.folder / "features" / f"{run.target}.json"
        found = read_json(file)["saes"].get(run.name) if file.is_file() else None
        if found:
            self.paged, self.seconds = True, found["seconds"]
            self.records = {record["feature"]: record for record in found["features"]}
            with np.load(file.with_suffix(".npz")) as kept:
                self.strongest = kept[f"{run.name}.clips"]
            manifest = manifest_of(run.folder, run.target)
            self.manifest = read_csv(manifest).set_index("id", drop=False)

    def moments(self, feature: int) -> list[dict[str, Any]]:
        """The run's strongest moments of a feature, one a speaker; without clips whose sound is gone."""
        found = []
        for row in self.strongest[feature] if self.paged else []:
            if row < 0:
                continue
            clip, cache = self.run.cache.utterances.iloc[row], self.run.cache
            frames = slice(int(clip.start), int(clip.start + clip.frames))
            if row not in self.code:
                self.code[row] = self.run.sae.encode(np.array(cache.acts[frames]))
            try:
                wav = read_clip(self.manifest.loc[clip.id], self.run.rate)
            except EqknobsError:
                continue
            on = self.code[row][:, feature]
            one = moment(clip, on, cache.frame_times[frames], len(wav) / self.run.rate, self.seconds)
            found.append((one, cut(wav, self.run.rate, one)))
        most = max((one["activation"] for one, _ in found), default=1.0)
        return [moment_shown(one, wav, self.run.rate, most) for one, wav in found]


def manifest_of(run: Path, target: str) -> Path:
    """The manifest of the corpus that a target of a run hears."""
    corpus = corpus_of(target)
    return run / "manifest" / ("" if corpus == SPEECH else corpus) / "manifest.csv"


def config_of(run: Path) -> dict[str, Any]:
    """The configuration that a run was made with, as its report keeps it."""
    if not run.is_dir():
        raise EqknobsError(f"--run {run}: no such folder; name a finished run, results/<run>")
    file = run / "report" / CONFIG
    if not file.is_file():
        raise EqknobsError(f"--run {run}: has no report/{CONFIG}; let the run finish, its report is what says so")
    found: dict[str, Any] = read_yaml(file)
    return found


def _opened(run: Path, target: str, sae: str) -> _Run:
    """A target of a run with one of its SAEs."""
    config = config_of(run)
    cache = run / "activations" / f"{target}.h5"
    if not cache.is_file():
        known = sorted(path.stem for path in (run / "activations").glob("*.h5"))
        raise EqknobsError(f"--target {target}: not in {run}; it has {', '.join(known) or 'none'}")
    names = trained_saes(config, target)
    if sae not in names:
        raise EqknobsError(f"--sae {sae}: no such SAE of {target} in {run}; it has {', '.join(names) or 'none'}")
    folder = run / "saes" / sae_home(config, target, sae) / sae / f"seed{min(config['sae_seeds'])}"
    return _Run(run, config, target, sae, SAE.load(folder), ActivationCache(cache))


def _heard(run: _Run, audio: str | Path, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The recording [samples], and its activations [frames, width]."""
    wav = read_audio(audio, run.rate)
    if (seconds := len(wav) / run.rate) > LONGEST:
        raise EqknobsError(f"{audio}: {seconds:.0f} s, at most {LONGEST} are paged; cut a piece out of it")
    with gpu_lock(pick_device(device)):
        model = load_model(cast(ModelCfg, {**model_config(run.config, run.target), "device": device}))
        wanted = str(run.cache.attrs["revision"])
        if model.revision != wanted:
            raise EqknobsError(
                f"models.{model.name}: has weights {model.revision}, {run.folder} opened {wanted}; put those back, or "
                "run again"
            )
        site = parse_target(run.target)[1]
        if not model.frames(len(wav), site):
            raise EqknobsError(f"{audio}: {seconds:.2f} s are too short for {model.name}; give more")
        return wav, model.encode(wav, site)


def _write(out: Path, run: _Run, shown: dict[str, Any], audio: str | Path) -> None:
    page: jinja2.Template = environment().get_template("features/explore.html.j2")
    shown |= {"file": Path(audio).name, "title": f"What {shown['sae']} hears in {Path(audio).name}"}
    text = page.render(**frame_of(run.config["run"]["name"]), playing={"made": {}}, **shown)
    with atomic_path(out / "index.html") as unfinished:
        unfinished.write_text(text, encoding="utf-8")
