"""Makes `resources/sounds/`: music, other sounds and speech in crops of 3 s that went through one codec at one level.

A developer's tool: neither demo nor tests call it. It needs Debian's archive (`apt-get download`, `dpkg-deb`) and
nothing beside this project's own packages.

    python tools/collect_sounds.py resources/sounds --work work/sounds

Music and other sounds are drawn from the packages in `SOURCES`, each of them free to redistribute; speech from
`resources/corpus`. Every crop is made alike, so that neither codec, level nor length tells a domain from another:
mono, resampled to 16 kHz, cut, set to -23 dBFS, and encoded as Opus at about 14 kbit/s. Long files give crops from
places that sound; short ones of a source are joined, each used once, until 3 s are full. Made again from the same
versions the samples are the same; the files' bytes differ in the serial number that an Ogg stream draws by chance.

"""

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from eqknobs.io import atomic_path, output_folder

RATE = 16_000
SECONDS = 3  # of a crop
SAMPLES = SECONDS * RATE
LEVEL = -23.0  # dBFS, root mean square of a crop
PEAK = 0.98
QUIET = 10 ** (-50 / 20)  # below it a crop, or an end of an effect, counts as silence
LOWEST_RATE = 16_000  # a file of less would tell its domain by its band
OPUS_LEVEL = 0.98  # libsndfile's scale of compression
OF_AN_ENGINE = 25  # crops of speech
CORPUS = Path("resources/corpus")
ABOUT = {  # what a report warns of
    "music": "The music is from two free computer games, in crops of 3 s coded as Opus.",
    "sounds": "The other sounds are effects and ambience of three free computer games, in crops of 3 s coded as Opus.",
    "speech": "The speech is the bundled synthetic corpus, in crops of 3 s coded as Opus.",
}


@dataclass(frozen=True)
class Source:
    """A Debian package and which of its files are of the domain.

    take, leave: patterns of paths; pieces: crops of a long file at most; crops: of the source at most. licence, author:
    of a package whose copyright file is not machine-readable. archive: a zip inside the package that holds the files.
    """

    domain: str
    package: str
    take: tuple[str, ...]
    leave: tuple[str, ...] = ()
    pieces: int = 2
    crops: int = 110
    licence: str = ""
    author: str = ""
    archive: str = ""


UFO_SOUNDS = ("ambience", "doors", "footsteps", "geoscape", "impact", "misc", "ugv", "weapons")  # nobody's voices
SOURCES = [
    Source("music", "hyperrogue-music", ("*/music/*.ogg",), pieces=4, crops=61),
    Source(
        "music",
        "singularity-music",
        ("*/music/*.ogg",),
        pieces=4,
        crops=61,
        licence="CC-BY-SA-3.0",
        author="Max McCracken",
    ),
    Source(
        "sounds",
        "ufoai-sound",
        tuple(f"base/sound/{kind}/*" for kind in UFO_SOUNDS),
        leave=("*/tv[-_]news*",),  # which speaks
        crops=65,
        archive="usr/share/games/ufoai/base/0snd.pk3",
    ),
    Source("sounds", "minetest-data", ("*/minetest_game/mods/*.ogg",)),
    Source("sounds", "colobot-common-sounds", ("*/sounds/sound*.wav",), leave=("*/sound069.wav",)),  # "Ow"
]


@dataclass
class Crop:
    """One crop and what is said of it."""

    domain: str
    source: str
    piece: str  # what it is cut from: no two splits share one
    audio: np.ndarray  # float32 [SAMPLES], 16 kHz
    licence: str
    author: str
    sex: str = ""
    accent: str = ""
    origin: str = ""  # of speech the clip of the bundled corpus, and where in it the crop begins, seconds
    start: float = 0.0


# ---------------------------------------------------------------- packages


def unpack(source: Source, work: Path) -> tuple[Path, str, str]:
    """(folder of a package's files, its version, SHA-256 of the package), fetched if need be."""
    folder = work / source.package
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run(["apt-get", "download", source.package], cwd=folder, check=True, capture_output=True)
        (deb,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, folder / "files"], check=True)
        if source.archive:
            with zipfile.ZipFile(folder / "files" / source.archive) as archive:
                archive.extractall(folder / "files/base")
        (folder / "done").touch()
    (deb,) = folder.glob("*.deb")
    version = subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True).stdout
    return folder / "files", version.strip(), hashlib.sha256(deb.read_bytes()).hexdigest()


def terms(files: Path, source: Source) -> list[tuple[list[str], str, str]]:
    """(patterns, licence, authors) of each paragraph of the package's machine-readable copyright file."""
    if source.licence:
        return [(["*"], source.licence, source.author)]
    text = (files / f"usr/share/doc/{source.package}/copyright").read_text(encoding="utf-8")
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields = {name: value for name, value in re.findall(r"^(\w+):((?:.*\n?(?:[ \t].*\n?)*))", paragraph, re.M)}
        if {"Files", "License"} <= fields.keys():
            author = " ".join(fields.get("Copyright", "").split())
            found.append((fields["Files"].split(), fields["License"].splitlines()[0].strip(), author))
    if not found:
        sys.exit(f"{source.package}: its copyright file names no files; give licence and author in SOURCES")
    return found


def terms_of(name: str, paragraphs: list[tuple[list[str], str, str]]) -> tuple[str, str]:
    """(licence, authors) of a file: the last paragraph that names it counts. Paths there are the source package's."""
    found = ("", "")
    for patterns, licence, author in paragraphs:
        if any(pattern == "*" or fnmatch.fnmatch(name, f"*{pattern.lstrip('*')}") for pattern in patterns):
            found = (licence, author)
    if not found[0]:
        sys.exit(f"{name}: no paragraph of the copyright file names it")
    return found


# ---------------------------------------------------------------- sound


def read(path: Path) -> np.ndarray | None:
    """Mono float32 [samples] at 16 kHz; None for a file of a lower rate, or one that is silent."""
    audio, rate = sf.read(path, dtype="float32", always_2d=True)
    if rate < LOWEST_RATE:
        return None
    audio = soxr.resample(audio.mean(axis=1), rate, RATE).astype(np.float32)
    loud = np.flatnonzero(np.abs(audio) > QUIET)
    return audio[loud[0] : loud[-1] + 1] if len(loud) else None


def levelled(audio: np.ndarray) -> np.ndarray:
    """A crop at -23 dBFS, or as near as its peaks let it."""
    audio = audio * (10 ** (LEVEL / 20) / np.sqrt(np.mean(audio**2, dtype=np.float64)))
    return (audio * min(1.0, PEAK / np.abs(audio).max())).astype(np.float32)


def opus(audio: np.ndarray) -> bytes:
    """A crop as an Ogg Opus file, at the level after decoding that it has before."""
    wanted, sent = np.sqrt(np.mean(audio**2, dtype=np.float64)), audio
    for _ in range(2):  # the codec takes some of the level away, of noise more than of tones
        buffer = io.BytesIO()
        sf.write(buffer, sent, RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
        buffer.seek(0)
        heard, _ = sf.read(buffer)
        sent = sent * (wanted / np.sqrt(np.mean(heard**2)))
        sent = (sent * min(1.0, PEAK / np.abs(sent).max())).astype(np.float32)
    return buffer.getvalue()


def stretches(audio: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Up to `count` stretches of 3 s, evenly spread, all of whose seconds sound."""
    room = len(audio) - SAMPLES
    count = min(count, 1 + room // SAMPLES)
    for start in np.linspace(0, room, count + 2)[1:-1].astype(int) if count > 1 else [room // 2]:
        piece = audio[start : start + SAMPLES]
        if np.sqrt((piece.reshape(3, RATE) ** 2).mean(axis=1)).min() > QUIET:
            yield piece


def piece_of(path: Path) -> str:
    """A file's name without the number of its take, as letters, digits and hyphens."""
    stem = re.sub(r"[\W_]*\d*$", "", path.stem) or path.stem
    return re.sub(r"[^a-z0-9]+", "-", (stem if not re.fullmatch(r"sound", stem) else path.stem).lower()).strip("-")


def crops_of(source: Source, files: Path, rng: random.Random) -> list[Crop]:
    """The crops of one package."""
    paragraphs = terms(files, source)
    long: list[Crop] = []
    short: list[tuple[np.ndarray, str, str, str]] = []
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        name = path.relative_to(files).as_posix()
        taken, left = (any(fnmatch.fnmatch(name, x) for x in xs) for xs in (source.take, source.leave))
        if left or not taken:
            continue
        audio = read(path)
        if audio is None:
            continue
        licence, author = terms_of(name, paragraphs)
        if len(audio) >= SAMPLES:
            found = stretches(audio, source.pieces)
            long += [Crop(source.domain, source.package, piece_of(path), crop, licence, author) for crop in found]
        else:
            short.append((audio, piece_of(path), licence, author))
    rng.shuffle(long)
    return (long[: source.crops] + joined(source, short, rng))[: source.crops]


def joined(source: Source, effects: list[tuple[np.ndarray, str, str, str]], rng: random.Random) -> list[Crop]:
    """Crops of short effects one after another, under one licence each; every effect is used once."""
    made = []
    for licence in sorted({effect[2] for effect in effects}):
        own = [effect for effect in effects if effect[2] == licence]
        rng.shuffle(own)
        row: list[tuple[np.ndarray, str, str, str]] = []
        for effect in own:
            row.append(effect)
            if sum(len(audio) for audio, *_ in row) >= SAMPLES:
                audio = np.concatenate([levelled(audio) for audio, *_ in row])[:SAMPLES]
                authors = "; ".join(dict.fromkeys(effect[3] for effect in row))
                made.append(Crop(source.domain, source.package, f"joined-{row[0][1]}", audio, licence, authors))
                row = []
    return made


def speech() -> Iterator[Crop]:
    """The middle 3 s of `OF_AN_ENGINE` clips of each engine in the bundled corpus, its voices taking turns."""
    turns: dict[str, list[tuple[int, str, Crop]]] = {}
    taken: Counter[str] = Counter()
    with (CORPUS / "labels.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            (path,) = CORPUS.glob(f"*/*/{row['id']}.flac")
            audio, _ = sf.read(path, dtype="float32")
            if len(audio) >= SAMPLES:
                start = (len(audio) - SAMPLES) // 2
                about = ("see resources/corpus/LICENSES.md", row["source"], row["sex"], row["accent"])
                source = re.sub(r"[^a-z0-9]+", "-", row["source"].lower())
                cut = audio[start : start + SAMPLES]
                crop = Crop("speech", source, row["speaker"], cut, *about, row["id"], start * SECONDS / SAMPLES)
                turns.setdefault(source, []).append((taken[row["speaker"]], row["speaker"], crop))
                taken[row["speaker"]] += 1
    for _, crops in sorted(turns.items()):
        yield from (crop for *_, crop in sorted(crops, key=lambda turn: turn[:2])[:OF_AN_ENGINE])


# ---------------------------------------------------------------- the folder


def write(out: Path, crops: list[Crop]) -> None:
    """The crops of a domain and its labels CSV."""
    domain = crops[0].domain
    shutil.rmtree(out / domain, ignore_errors=True)
    rows = []
    for crop, name in named(crops):
        path = out / domain / crop.source / f"{name}.opus"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(opus(levelled(crop.audio)))
        speaker = crop.piece if domain == "speech" else f"{crop.source}_{crop.piece}"
        about = dict(sex=crop.sex, accent=crop.accent, source=crop.source, licence=crop.licence, author=crop.author)
        rows.append(dict(id=name, speaker=speaker, **about))
    facts = {"synthetic": domain == "speech", "description": ABOUT[domain]}
    (out / domain / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    table(out / f"{domain}.csv", sorted(rows, key=lambda row: row["id"]))


def write_phones(out: Path, crops: list[Crop]) -> None:
    """`phones.csv` of the crops of speech, from that of the clips that they were cut from."""
    with (CORPUS / "phones.csv").open(encoding="utf-8") as file:
        said: dict[str, list[dict[str, str]]] = {}
        for row in csv.DictReader(file):
            said.setdefault(row["id"], []).append(row)
    rows = []
    for crop, name in named(crops):
        for row in said[crop.origin]:
            start, end = (min(max(float(row[key]) - crop.start, 0), SECONDS) for key in ("start", "end"))
            if round(end, 3) > round(start, 3):
                rows.append(dict(id=name, start=f"{start:.3f}", end=f"{end:.3f}", phone=row["phone"]))
    table(out / "phones.csv", sorted(rows, key=lambda row: (row["id"], float(row["start"]))))


def named(crops: list[Crop]) -> Iterator[tuple[Crop, str]]:
    """Crops with their ids."""
    count: Counter[tuple[str, str]] = Counter()
    for crop in crops:
        yield crop, f"{crop.source}_{crop.piece}_{count[crop.source, crop.piece]:02d}"
        count[crop.source, crop.piece] += 1


def table(path: Path, rows: list[dict]) -> None:
    """A CSV, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=output_folder)
    parser.add_argument("--work", type=Path, default=Path("work/sounds"), help="where packages are unpacked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phones", action="store_true", help="write no more than the phones of the crops of speech")
    args = parser.parse_args()
    if args.phones:
        write_phones(args.out, list(speech()))
        return
    rng = random.Random(args.seed)
    domains: dict[str, list[Crop]] = {"speech": list(speech())}
    sources = []
    for source in SOURCES:
        files, version, digest = unpack(source, args.work)
        crops = crops_of(source, files, rng)
        domains.setdefault(source.domain, []).extend(crops)
        licences = "; ".join(sorted({crop.licence for crop in crops}))
        about = dict(crops=len(crops), pieces=len({crop.piece for crop in crops}), licences=licences)
        url = f"https://packages.debian.org/bookworm/{source.package}"
        where = dict(domain=source.domain, source=source.package, version=version)
        sources.append(where | about | dict(url=url, sha256=digest))
    table(args.out / "sources.csv", sources)
    write_phones(args.out, domains["speech"])
    for domain, crops in domains.items():
        write(args.out, crops)
        print(f"{domain}: {len(crops)} crops, {len(crops) / 20:.1f} min")
    for row in sources:
        print(f"{row['source']}: {row['crops']} crops of {row['pieces']} pieces ({row['licences']})")


if __name__ == "__main__":
    main()
