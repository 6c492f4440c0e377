"""Draw docs/tiny-mimi.png: the bundled codec's learning curve, and spectrograms of what it makes of three clips.

python tools/picture_codec.py [--model FOLDER] [--out FILE]
"""

import argparse
from pathlib import Path

import librosa
import matplotlib.pyplot as plt
import numpy as np

from eqknobs.audio import read_audio
from eqknobs.io import output_file, read_csv
from eqknobs.models import load_model

SITE, RATE = "encoder_transformer", 16000
CLIPS = {
    "joe, heard (the agent's voice)": "101/1101/101-1101-0003.flac",
    "slt-tenor, heard": "107/1107/107-1107-0003.flac",
    "joe-soprano, unheard": "104/1104/104-1104-0003.flac",
}
PATHS = {"original": 0, "unquantised": None, "16 codebooks": 16, "8 codebooks": 8}


def mel_decibels(wav: np.ndarray) -> np.ndarray:
    """Mel spectrogram [bands, frames] in dB re full scale, floored at -80."""
    power = librosa.feature.melspectrogram(y=wav, sr=RATE, n_fft=512, hop_length=160, n_mels=80)
    return librosa.power_to_db(power, ref=1.0, amin=1e-8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("resources/models/tiny-mimi"))
    parser.add_argument("--corpus", type=Path, default=Path("resources/corpus"))
    parser.add_argument("--out", type=output_file, default="docs/tiny-mimi.png")
    args = parser.parse_args()
    model = load_model({"name": "codec", "kind": "mimi", "path": str(args.model), "device": "cpu"})
    figure = plt.figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.add_gridspec(len(CLIPS) + 1, len(PATHS))

    log = read_csv(args.model / "log.csv")
    curve = figure.add_subplot(grid[0, :])
    curve.plot(log["step"], log["train"], color="0.7", label="training crops (noise or codebooks included)")
    curve.plot(log["step"], log["unquantised"], color="C0", label="held out, unquantised")
    curve.plot(log["step"], log["quantised"], color="C3", label="held out, 16 codebooks")
    starts = log.loc[log["phase"] == "quantiser", "step"]
    curve.axvline(starts.min(), color="0.5", linestyle=":")
    curve.set(xlabel="step", ylabel="spectral loss", ylim=(0.6, 2.6), xlim=(0, log["step"].max()))
    curve.legend(frameon=False)
    curve.grid(alpha=0.3)
    curve.set_title("learning curve; dotted: the quantiser comes in", fontsize="medium")

    for row, (title, path) in enumerate(CLIPS.items(), start=1):
        wav = read_audio(args.corpus / path, RATE)[: 3 * RATE]
        acts = model.encode(wav, SITE)
        for column, (name, codebooks) in enumerate(PATHS.items()):
            shown = wav if codebooks == 0 else model.decode(acts, SITE, len(wav), codebooks)
            axes = figure.add_subplot(grid[row, column])
            image = axes.imshow(
                mel_decibels(shown),
                origin="lower",
                aspect="auto",
                vmin=-60,
                vmax=10,
                cmap="magma",
                extent=(0, len(wav) / RATE, 0, 80),
            )
            axes.set(xticks=[], yticks=[], ylabel="" if column else "mel band")
            axes.set_title(f"{title}: {name}" if not column else name, fontsize="small")
            if row == len(CLIPS):
                axes.set(xticks=[0, 1, 2, 3], xlabel="s")
    figure.colorbar(image, ax=figure.axes[1:], label="dB", shrink=0.6)
    figure.savefig(args.out, dpi=75)


if __name__ == "__main__":
    main()
