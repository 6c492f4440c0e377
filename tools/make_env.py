"""Write the conda environment from the lock files: `python tools/make_env.py`; `--check` only compares.

`requirements.txt` is the lock. `requirements-nodeps.txt` lists the few packages whose own requirements are wrong for
us (torchcrepe wants torchaudio for reading files; resemblyzer wants a voice-activity package that needs a compiler;
moshi, with which the tests compare, wants an older torch, and for that only einops is missing here; speechmos is
taken for weights, without its imports); they are installed without them, by Snakemake's post-deploy hook in the conda
case.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pins(name: str) -> list[str]:
    """The pinned packages of one lock file."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


def files() -> dict[Path, str]:
    """What the two generated files must hold."""
    packages = "".join(f"      - {pin}\n" for pin in pins("requirements.txt"))
    env = (
        "# Made by tools/make_env.py from requirements.txt; do not edit.\n"
        "channels:\n  - conda-forge\n  - nodefaults\ndependencies:\n  - python =3.11\n  - pip\n  - pip:\n" + packages
    )
    hook = (
        "#!/usr/bin/env bash\n# Made by tools/make_env.py from requirements-nodeps.txt; do not edit.\n"
        "set -euo pipefail\n"
        f'"$CONDA_PREFIX/bin/pip" install --no-deps {" ".join(pins("requirements-nodeps.txt"))}\n'
    )
    return {ROOT / "envs/eqknobs.yaml": env, ROOT / "envs/eqknobs.post-deploy.sh": hook}


if __name__ == "__main__":
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(map(str, stale))}; run python tools/make_env.py" if stale else 0)
    for path, text in files().items():
        path.write_text(text)
