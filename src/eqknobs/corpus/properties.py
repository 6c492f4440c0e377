"""The properties that probes predict: the one list of them, read by configuration, rules, stages and report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Property:
    """A property of a frame or of a whole clip.

    source: dataset of the labels file (level `frame`) or column of the manifest (level `clip`). A category of level
    `frame` is a dataset of integer codes [frames], −1 where there is none, whose attribute `names` names them.
    mask: the frames that count: `energetic`, `voiced` or `all`. binnings: how classes are made of it.
    of_speakers: whether it is to be told of speakers never heard before, so that each of its values needs two in train.
    """

    name: str
    title: str
    source: str
    kind: Literal["continuous", "category"] = "continuous"
    level: Literal["frame", "clip"] = "frame"
    unit: str = ""
    mask: Literal["energetic", "voiced", "all"] = "energetic"
    binnings: tuple[str, ...] = ("equal_width", "quantile")
    of_speakers: bool = True


def _category(name: str, title: str, source: str, of_speakers: bool = True) -> Property:
    return Property(name, title, source, "category", "clip", binnings=("category",), of_speakers=of_speakers)


_LIST = (
    Property("centroid", "Spectral centroid", "centroid", unit="Hz"),
    Property("rms", "RMS level", "rms", unit="dB"),
    Property("pitch", "Pitch", "pitch", unit="Hz", mask="voiced", binnings=("equal_width", "quantile", "semitone")),
    Property("phone", "Phone", "phone", "category", binnings=("category",)),
    Property("token", "Text token", "token", "category", binnings=("category",)),
    Property("who", "Who speaks", "who", "category", mask="all", binnings=("category",)),
    _category("sex", "Sex", "sex"),
    _category("accent", "Accent", "accent"),
    _category("voice", "Voice", "speaker", of_speakers=False),
    _category("source", "Source", "source"),
    _category("domain", "Domain", "domain"),
    _category("noise", "Noise", "noise"),
)
PROPERTIES = {found.name: found for found in _LIST}
# Columns of the labels CSV that the manifest keeps for them, beside its own.
COLUMNS = tuple(found.source for found in _LIST if found.level == "clip")
