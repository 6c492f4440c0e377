"""Draw docs/tiny-moshi.png: learning curves, what zeroed heads cost, and spectrograms of held-out sentences.

python tools/picture_speech_lm.py SPEECH CODES [--model FOLDER] [--table speech_lm.csv] [--out FILE]

SPEECH, CODES: the training's clips and its codes.npz.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from eqknobs.audio import read_audio
from eqknobs.io import output_file, read_csv
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.generate import generate
from eqknobs.speaking.clips import CUT, read_clips
from picture_codec import mel_decibels

RATE = 16000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("speech", type=Path)
    parser.add_argument("codes", type=Path)
    parser.add_argument("--model", type=Path, default=Path("resources/models/tiny-moshi"))
    parser.add_argument("--table", type=Path, default=Path("docs/results/bundled-full/tables/speech_lm.csv"))
    parser.add_argument("--out", type=output_file, default="docs/tiny-moshi.png")
    args = parser.parse_args()
    model = Moshi({"name": "tiny-moshi", "kind": "moshi", "path": str(args.model), "device": "cpu"})
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(3, 3)

    log = read_csv(args.model / "log.csv").astype({"text": float})  # a loss here, not words
    curve = figure.add_subplot(grid[0, :2])
    for codebook in range(1, 9):
        label = f"codebook {codebook}" if codebook in (1, 2, 3, 8) else None
        curve.plot(log["step"], log[f"codebook_{codebook}"], color=plt.cm.viridis(codebook / 9), label=label)
    curve.plot(log["step"], log["text"], color="C3", label="text")
    curve.set(xlabel="step", ylabel="nats, held out")
    curve.legend(frameon=False, ncols=2, fontsize="small")
    curve.grid(alpha=0.3)

    table, heads = read_csv(args.table).set_index("condition"), figure.add_subplot(grid[0, 2])
    zeroed = {float(name.removeprefix("heads_zeroed_")): name for name in table.index if name.startswith("heads_")}
    shares, rows = [0.0, *zeroed], table.loc[["intact", *zeroed.values()]]
    for name, label in (("wer_monologue", "heard against monologue"), ("wer_prompt", "monologue against prompt")):
        heads.plot(shares, rows[name], marker="o", label=label)
        heads.fill_between(shares, rows[f"{name}_low"], rows[f"{name}_high"], alpha=0.2)
    heads.set(xlabel="share of heads zeroed", ylabel="word error rate")
    heads.legend(frameon=False, fontsize="small")

    test = read_clips(args.speech, args.codes)["test"]
    for row, voice in enumerate(sorted({clip.voice for clip in test}), start=1):
        clip = next(clip for clip in test if clip.voice == voice)
        frames = clip.codes.shape[2] - CUT
        user = torch.tensor(model.config.silence)[None, :, None].repeat(1, 1, frames)
        prompt = model.prompt(clip.text, read_audio(args.model / f"voices/{voice}.flac", RATE))
        path = args.speech / voice / f"{clip_name(args.speech, clip.text, voice)}.flac"
        shown = {
            f"{voice}: speech": read_audio(path, RATE)[CUT * model.hop :],
            "through the codec": model.speech(torch.from_numpy(clip.codes[0, :, CUT:]).long(), frames * model.hop),
            "said by tiny-moshi": model.speech(generate(model.net, user, prompt).codes[0], frames * model.hop),
        }
        for column, (title, wav) in enumerate(shown.items()):
            axes = figure.add_subplot(grid[row, column])
            extent = (0, len(wav) / RATE, 0, 80)
            axes.imshow(
                mel_decibels(wav), origin="lower", aspect="auto", vmin=-60, vmax=10, cmap="magma", extent=extent
            )
            axes.set(yticks=[], xlabel="s")
            axes.set_title(f"{title}\n{clip.text}" if not column else title, fontsize="small")
    figure.savefig(args.out, dpi=75)


def clip_name(speech: Path, text: str, voice: str) -> str:
    """The number of a voice's clip of a text."""
    return next(path.stem for path in sorted(speech.glob(f"{voice}/*.json")) if f'"{text}"' in path.read_text())


if __name__ == "__main__":
    main()
