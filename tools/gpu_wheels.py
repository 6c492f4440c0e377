"""The wheels that travel to a machine with a GPU and no network: `bash tools/gpu_check.sh --pack` (docs/gpu.md).

Fetches, at the versions of requirements.txt, what an image with PyTorch and transformers lacks, takes out of
bitsandbytes the libraries of other cards, and says whether checkout and wheels stay below the limit.
"""

import argparse
import csv
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from eqknobs.errors import EqknobsError, one_line_errors  # noqa: E402
from eqknobs.io import output_folder  # noqa: E402

LIMIT = 64 << 20  # bytes that travel, the checkout's files and the wheels together
NEEDED = ("bitsandbytes", "soundfile", "soxr", "librosa", "audioread", "pooch")
PLATFORMS = [f"manylinux{tag}_x86_64" for tag in ("_2_31", "_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]
KEPT = re.compile(r"libbitsandbytes_(cpu|cuda130)\.so")  # CUDA 13.0 serves drivers from 580 on


def versions(text: str) -> dict[str, str]:
    """Name, in small letters, -> version, of a file of requirements."""
    return {name.lower().replace("_", "-"): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}


def fetch(name: str, version: str, python: str, folder: Path) -> Path:
    """A package's wheel for x86-64 Linux. Raises EqknobsError where pip finds none."""
    platforms = [word for tag in PLATFORMS for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as scratch:
        words = ["download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", python]
        command = [sys.executable, "-m", "pip", *words, "--implementation", "cp", *platforms, "-d", scratch]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
        found = list(Path(scratch).glob("*.whl"))
        if not found:
            said = done.stderr.strip().splitlines()[-1:] or ["no wheel"]
            raise EqknobsError(f"{name} {version}: {said[0]}")
        return found[0].rename(folder / found[0].name)


def thin(wheel: Path, kept: re.Pattern[str] = KEPT) -> None:
    """Take the shared libraries that `kept` does not fit out of a wheel, and out of its RECORD, in place."""
    new = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        gone = {n for n in old.namelist() if n.endswith(".so") and not kept.fullmatch(Path(n).name)}
        for name in old.namelist():
            if name in gone:
                continue
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                rows = [row for row in csv.reader(io.StringIO(data.decode())) if row and row[0] not in gone]
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(rows)
                data = text.getvalue().encode()
            out.writestr(name, data)
    new.replace(wheel)


def tree_bytes(root: Path = ROOT) -> int:
    """Bytes of the files of a checkout that travel: tracked, or new and not ignored."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=root, capture_output=True, check=True).stdout.split(b"\0")
    files = [root / name.decode() for name in names if name]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=output_folder)
    parser.add_argument("--python", default="3.12", help="version of the interpreter there, default 3.12")
    args = parser.parse_args(arguments)
    with one_line_errors():
        known = versions((ROOT / "requirements.txt").read_text())
        args.out.mkdir(exist_ok=True)
        for old in args.out.glob("*.whl"):
            old.unlink()
        for name in NEEDED:
            if name not in known:
                raise EqknobsError(f"requirements.txt: has no {name}")
            wheel = fetch(name, known[name], args.python, args.out)
            if name == "bitsandbytes":
                thin(wheel)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
        wheels, tree = sum(file.stat().st_size for file in args.out.glob("*.whl")), tree_bytes()
        print(f"wheels {wheels / 2**20:.1f} MiB, checkout {tree / 2**20:.1f} MiB, at most {LIMIT / 2**20:g} MiB")
        if wheels + tree > LIMIT:
            raise EqknobsError("wheels and checkout are too large to travel; clean the checkout of untracked files")


if __name__ == "__main__":
    main()
