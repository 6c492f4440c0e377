"""Freeze what the moshi package 0.2.13 answers on tiny random checkpoints, so that tests outlive it.

    NO_TORCH_COMPILE=1 NO_CUDA_GRAPH=1 python tools/make_moshi_fixtures.py

Writes tests/fixtures/moshi/{kyutai,persona}.safetensors. The checkpoints themselves are not stored: they are drawn
from numpy's legacy generator (tests/helpers/moshi_world.py).
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from eqknobs.io import atomic_path  # noqa: E402
from helpers import moshi_cases as cases  # noqa: E402
from helpers.moshi_oracle import oracle, persona_reply, reply  # noqa: E402
from helpers.moshi_world import write_kyutai, write_persona  # noqa: E402


@torch.no_grad()
def kyutai(folder: Path) -> dict[str, Tensor]:
    lm = oracle(write_kyutai(folder))
    out = lm(cases.CODES)
    text, codes = reply(lm, cases.USER)
    torch.manual_seed(cases.SEED)
    user = cases.USER[:1, :, : cases.SAMPLED_FRAMES]
    sampled_text, sampled_codes = reply(lm, user, use_sampling=True)
    return {
        "text_logits": out.text_logits[0, 0],
        "audio_logits": out.logits[cases.LOGITS_SHOWN],
        "greedy": torch.cat([text[:, None], codes], dim=1).short(),
        "sampled": torch.cat([sampled_text[:, None], sampled_codes], dim=1).short(),
    }


def persona(folder: Path) -> dict[str, Tensor]:
    lm = oracle(write_persona(folder))
    out = {}
    for name, voice in (("text_only", None), ("voice", cases.VOICE_CODES), ("stored_voice", cases.VOICE_CODES)):
        out[name] = persona_reply(lm, voice, stored=name == "stored_voice").short()
    return out


def main() -> None:
    out = ROOT / "tests/fixtures/moshi"
    with tempfile.TemporaryDirectory() as scratch:
        for make in (kyutai, persona):
            with atomic_path(out / f"{make.__name__}.safetensors") as path:
                save_file({k: v.contiguous() for k, v in make(Path(scratch) / make.__name__).items()}, path)


if __name__ == "__main__":
    main()
