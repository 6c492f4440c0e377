"""Page the features that are strongest in a user's recording, beside the moments at which a run found them strongest."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from eqknobs.audio import read_audio
from eqknobs.corpus.cache import ActivationCache
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_json
from eqknobs.models import load_model
from eqknobs.plan import model_config, parse_target, sae_home
from eqknobs.report.page import CONFIG, environment, frame_of
from eqknobs.sae import SAE
from eqknobs.stages.features.pages import badges, clips_of, curve, sounding
from eqknobs.strict_yaml import read_yaml

LONGEST = 300  # seconds


def explore(
    run: str | Path,
    target: str,
    sae: str,
    audio: str | Path,
    out: str | Path,
    count: int = 12,
    device: str = "auto",
) -> Path:
    """Write `out/index.html`: the `count` features of a run's SAE (its first seed) that are strongest in a recording.

    run: a finished run's folder (`results/<run>`); its report says which model it opened. Models that lie in folders
    are looked for from the working directory. Beside a feature stand its own clips of the run where the stage
    `features` paged it. Returns the page. Raises EqknobsError: no such run, target or SAE, no model or another one,
    sound that cannot be read or is longer than five minutes.
    """
    run, out = Path(run), Path(out)
    config = _config(run)
    dictionary, about = _opened(run, config, target, sae)
    wav, acts = _heard(config, target, audio, about, device)
    code = dictionary.encode(acts)
    peaks = code.max(0)
    strongest = [int(j) for j in np.argsort(-peaks, kind="stable")[:count] if peaks[j] > 0]
    seconds = len(wav) / about["sample_rate"]
    hop = 1 / about["frame_rate"]
    known = _known(run, target, sae)
    heard = sounding(wav, about["sample_rate"])
    entries = []
    for feature in strongest:
        points = [[(frame + 0.5) * hop, float(value)] for frame, value in enumerate(code[:, feature])]
        record = known.get(feature)
        entries.append(
            {
                "feature": feature,
                "peak": float(peaks[feature]),
                "at": (int(code[:, feature].argmax()) + 0.5) * hop,
                "rate": float((code[:, feature] > 0).mean()),
                "curve": curve(points, seconds, float(peaks[feature])),
                "badges": badges(record) if record else [],
                "clips": clips_of(record, run / "renders" / target / "features") if record else [],
                "record": record,
            }
        )
    _write(
        out,
        run,
        config,
        {"target": target, "sae": sae, "entries": entries, "heard": heard, "paged": bool(known)},
        audio,
    )
    return out / "index.html"


def _config(run: Path) -> dict[str, Any]:
    """The configuration that a run was made with, as its report keeps it."""
    if not run.is_dir():
        raise EqknobsError(f"--run {run}: no such folder; name a finished run, results/<run>")
    file = run / "report" / CONFIG
    if not file.is_file():
        raise EqknobsError(f"--run {run}: has no report/{CONFIG}; let the run finish, its report is what says so")
    found: dict[str, Any] = read_yaml(file)
    return found


def _opened(run: Path, config: dict[str, Any], target: str, sae: str) -> tuple[SAE, dict[str, Any]]:
    """The SAE, and the attributes of the target's cache."""
    cache = run / "activations" / f"{target}.h5"
    if not cache.is_file():
        known = sorted(path.stem for path in (run / "activations").glob("*.h5"))
        raise EqknobsError(f"--target {target}: not in {run}; it has {', '.join(known) or 'none'}")
    names = sorted(config["saes"] or {})
    home = sae_home(config, target, sae) if sae in names else target
    folder = run / "saes" / home / sae / f"seed{min(config['sae_seeds'])}"
    if sae not in names or not (folder / "sae.safetensors").is_file():
        trained = sorted({path.parts[-3] for path in (run / "saes" / target).glob("*/seed*/sae.safetensors")})
        raise EqknobsError(f"--sae {sae}: no such SAE of {target} in {run}; it has {', '.join(trained) or 'none'}")
    with ActivationCache(cache) as kept:
        about = {"revision": str(kept.attrs["revision"]), "sample_rate": int(kept.attrs["sample_rate"])}
        about["frame_rate"] = float(kept.attrs["frame_rate"])
    return SAE.load(folder), about


def _heard(
    config: dict[str, Any], target: str, audio: str | Path, about: dict[str, Any], device: str
) -> tuple[np.ndarray, np.ndarray]:
    """The recording [samples], and its activations [frames, width]."""
    wav = read_audio(audio, about["sample_rate"])
    if (seconds := len(wav) / about["sample_rate"]) > LONGEST:
        raise EqknobsError(f"{audio}: {seconds:.0f} s, at most {LONGEST} are paged; cut a piece out of it")
    with gpu_lock(pick_device(device)):
        model = load_model({**model_config(config, target), "device": device})  # type: ignore[typeddict-item]
        if model.revision != about["revision"]:
            raise EqknobsError(
                f"models.{model.name}: has weights {model.revision}, the run opened {about['revision']}; "
                "put those back, or run again"
            )
        site = parse_target(target)[1]
        if not model.frames(len(wav), site):
            raise EqknobsError(f"{audio}: {seconds:.2f} s are too short for {model.name}; give more")
        return wav, model.encode(wav, site)


def _known(run: Path, target: str, sae: str) -> dict[int, dict[str, Any]]:
    """feature -> what the stage `features` kept of it."""
    file = run / "features" / f"{target}.json"
    if not file.is_file():
        return {}
    return {record["feature"]: record for record in read_json(file)["saes"].get(sae, {}).get("features", [])}


def _write(out: Path, run: Path, config: dict[str, Any], shown: dict[str, Any], audio: str | Path) -> None:
    page: jinja2.Template = environment().get_template("features/explore.html.j2")
    shown |= {"file": Path(audio).name, "title": f"What {shown['sae']} hears in {Path(audio).name}"}
    text = page.render(**frame_of(config["run"]["name"]), playing={"made": {}}, **shown)
    try:
        with atomic_path(out / "index.html") as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EqknobsError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from error
