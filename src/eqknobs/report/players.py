"""What one can listen to: the players' sounds and pictures, and the lossless files that the page links to."""

import hashlib
import math
from pathlib import Path
from typing import Any

import pandas as pd
import soundfile as sf

from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.listening import data_uri, loudest_band, mp3, spectrogram
from eqknobs.evidence.wording import PROPERTIES, label
from eqknobs.io import atomic_path, require_renders, unused_name

SOUND_BUDGET = 12e6  # bytes of MP3 in the page; clips are cut to what fits
MP3_BYTES = 9000  # a second, with its share of the spectrogram
READOUTS = ("centroid_hz", "loudness_change_db", "mel_distance", "f0_error_cents", "speaker_similarity")


class Media:
    """Sounds and pictures of the page, each once, however many conditions share it."""

    def __init__(self) -> None:
        self.items: dict[str, str] = {}

    def add(self, kind: str, content: bytes) -> str:
        key = hashlib.blake2b(content, digest_size=8).hexdigest()
        self.items[key] = data_uri(kind, content)
        return key


def _plain(value: Any) -> Any:
    """A number as JSON takes it; None for a missing one."""
    return None if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def most_rendered(index: pd.DataFrame, count: int) -> list[str]:
    """The clips rendered under most conditions: those that the α sweep was kept of."""
    return index["id"].value_counts(sort=False).sort_values(ascending=False, kind="stable").index[:count].tolist()


class Played:
    """The players of one target.

    index: the table of a stage's renders, beside which the sounds lie. what: as a section's `played` returns it.
    """

    def __init__(self, inputs: Inputs, target: str, stage: str, what: dict[str, Any]):
        name = f"renders/{target}/{stage}/index.csv"
        self.index, self.path = inputs.csv(name), inputs.path(name)
        self.scores = what["scores"].set_index(["id", "condition"])
        self.arms, self.references, self.unit = what["arms"], what["references"], what["unit"]
        self.texts = inputs.csv("scores/originals.csv").set_index("id")["transcript"].to_dict()

    def stops(self, clips: list[str]) -> int:
        """How many sounds the players of these clips hold."""
        return int(self.index["id"].isin(clips).sum())

    def player(self, clip: str, seconds: float, media: Media) -> dict[str, Any]:
        """What the page's script plays of a clip: property -> arm -> stops of the slider; sounds and pictures are added
        to media. seconds: what each sound is cut to."""
        rows = self.index[self.index["id"] == clip]
        require_renders(self.path, rows["file"])
        folder = self.path.parent
        sound = {row["condition"]: sf.read(folder / row["file"], dtype="float32") for row in rows.to_dict("records")}
        reference = rows.loc[rows["arm"] == "original", "condition"]
        peak = loudest_band(*sound[reference.iloc[0] if len(reference) else rows["condition"].iloc[0]])

        def stop(row: dict[str, Any]) -> dict[str, Any]:
            wav, rate = sound[row["condition"]]
            wav = wav[: int(seconds * rate)]
            score = self.scores.loc[(clip, row["condition"])].to_dict()
            return {
                "alpha": _plain(row.get("alpha")),
                "calibrated": _plain(row.get("calibrated")),
                "sound": media.add("audio/mpeg", mp3(wav, rate)),
                "picture": media.add("image/jpeg", spectrogram(wav, rate, peak)),
                "transcript": _plain(score.get("transcript")),
                **{name: _plain(score.get(name)) for name in READOUTS},
            }

        references = {
            button: stop(rows[rows["arm"] == arm].iloc[0].to_dict())
            for button, arm in self.references.items()
            if (rows["arm"] == arm).any()
        }
        groups = [
            {"property": name, "label": PROPERTIES.get(name, name), "arms": self._knobs(part, stop)}
            for name, part in rows[~rows["arm"].isin(self.references.values())].groupby("property", sort=False)
        ]
        groups.sort(key=lambda group: group["property"] != "centroid")
        length = max(len(wav) / rate for wav, rate in sound.values())
        return {
            "clip": clip,
            "speaker": str(self.scores.loc[[clip], "speaker"].iloc[0]),
            "cut": length > seconds,
            "seconds": round(min(length, seconds), 2),
            "text": _plain(self.texts.get(clip)),
            "references": references,
            "groups": groups,
        }

    def _knobs(self, rows: pd.DataFrame, stop: Any) -> list[dict[str, Any]]:
        """The arms of one property, those that turn first, each with its stops."""
        arms = []
        for arm, stops in rows.groupby("arm", sort=False):
            stops = stops.sort_values("alpha", na_position="first").to_dict("records")
            found = [stop(row) for row in stops]
            arms.append({"arm": arm, "label": label(arm, self.arms), "unit": self.unit(arm), "stops": found})
        order = list(self.arms)
        arms.sort(key=lambda arm: (len(arm["stops"]) < 2, order.index(arm["arm"].partition(":")[0])))
        return arms


def copy_sounds(
    inputs: Inputs, sounding: list[tuple[str, str]], clips: dict[str, list[str]], out_dir: Path
) -> list[dict[str, Any]]:
    """Copy the FLACs of some clips to out_dir/audio; returns [{target, stage, rows: [{condition, files}]}].

    sounding: (target, stage) whose renders are declared. clips: target -> ids.
    """
    listed: list[dict[str, Any]] = []
    names: set[str] = set()
    with atomic_path(out_dir / "audio") as folder:
        folder.mkdir()
        for target, stage in sounding:
            name = f"renders/{target}/{stage}/index.csv"
            index, source = inputs.csv(name), inputs.path(name).parent
            index = index[index["id"].isin(clips[target])]
            require_renders(source / "index.csv", index["file"])
            rows = []
            for condition, files in index.groupby("condition", sort=False):
                links = []
                for row in files.to_dict("records"):
                    file = unused_name(f"{target}/{stage}/{row['file']}".replace("/", "__"), names)
                    (folder / file).write_bytes((source / row["file"]).read_bytes())
                    links.append({"clip": row["id"], "href": f"audio/{file}"})
                rows.append({"condition": condition, "files": links})
            listed.append({"target": target, "stage": stage, "rows": rows})
    return listed
