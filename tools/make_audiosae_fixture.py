"""Write tests/fixtures/audiosae: a small random SAE in the format of AudioSAE's checkpoints, and its codes.

    python tools/make_audiosae_fixture.py [--out FOLDER]

`ae.pt` and `config.json` as the hub's model cards list them; `expected.safetensors`: x [N, d], codes
relu(W_enc (x − b_dec) + b_enc) [N, F] and reconstructions W_dec f + b_dec [N, d], computed here from the formula.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from eqknobs.io import output_folder

ROOT = Path(__file__).resolve().parents[1]
D, F, N, K = 8, 24, 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=output_folder, default=str(ROOT / "tests/fixtures/audiosae"), metavar="FOLDER")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(F, D, generator=generator) for _ in range(2))
    bias, b_dec, x = (torch.randn(*shape, generator=generator) for shape in ((F,), (D,), (N, D)))
    codes = torch.relu((x - b_dec) @ encoder.T + bias)
    state = {"encoder.weight": encoder, "encoder.bias": bias, "decoder.weight": decoder.T.contiguous()}
    torch.save({**state, "b_dec": b_dec, "k": torch.tensor(K)}, out / "ae.pt")
    trainer = {"activation_dim": D, "dict_size": F, "k": K, "layer": 1, "lm_name": "random"}
    (out / "config.json").write_text(json.dumps({"trainer": trainer}, indent=1) + "\n")
    save_file({"x": x, "codes": codes, "reconstruction": codes @ decoder + b_dec}, out / "expected.safetensors")


if __name__ == "__main__":
    main()
