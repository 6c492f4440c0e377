"""Checks of `features` beyond their schema, and which targets it works on."""

from pathlib import Path
from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.io import read_text_csv
from eqknobs.plan import check_saes, stage_saes, stage_targets

PAGE = 22e6  # bytes of sound and pictures
SECOND, PICTURE, REST = 12000, 12000, 40000  # bytes a page takes for a second of MP3, a spectrogram, a feature's rest


def paged_targets(config: dict[str, Any]) -> list[str]:
    """The stage's targets that have SAEs."""
    if not config.get("features"):
        return []
    found = stage_targets(config, "features")
    return [target for target in found if stage_saes(config, "features", target)]


def caption_files(config: dict[str, Any]) -> list[str]:
    """The user's captions, where there are any."""
    path = (config.get("features") or {}).get("captions")
    return [path] if path else []


def check(config: dict[str, Any]) -> None:
    """Raises EqknobsError, one line, for SAEs or captions that are not there, or pages that would be too large."""
    if not config.get("features") or not config["saes"]:
        return
    own = config["features"]
    check_saes(config, "features.saes", own.get("saes", []))
    paged_targets(config)
    features = own["count"] + own["random"]
    size = features * (own["clips"] * (own["seconds"] * SECOND + PICTURE) + REST)
    if size > PAGE:
        raise EqknobsError(
            f"config: features: pages of about {size / 1e6:.0f} MB, {PAGE / 1e6:.0f} are the most; "
            "lower features.count, features.random, features.clips or features.seconds"
        )
    for path in caption_files(config):
        if not Path(path).is_file():
            raise EqknobsError(f"config: features.captions: no file {path}; mend the path, or leave captions out")
        if missing := {"sae", "feature", "caption"} - set(read_text_csv(path)):
            raise EqknobsError(f"{path}: no column {sorted(missing)[0]}; captions need sae, feature and caption")
