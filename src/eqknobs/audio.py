"""Read and write audio files."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile as sf
import soxr

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256

LARGEST_SAMPLE = 2.0  # +6 dB over full scale
UNKNOWN_SIZE = 0x7E000000  # bytes; larger sizes stand for "unknown" (sox writes 0x7f000000, others more)
UNKNOWN_FRAMES = 2**62  # libsndfile's length of a FLAC that does not tell
_SCALES = (  # what samples are on by their peak, and how to mend that
    (16.0, "a mixdown far over it", "turn it down below full scale"),
    *(
        (
            2.0**bits,
            f"{'an' if bits == 8 else 'a'} {bits}-bit scale",
            f"divide them by {2 ** (bits - 1)}, or convert them",
        )
        for bits in (8, 16, 24, 32)
    ),
    (np.inf, "damaged", "replace or remove the file"),
)
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes at most
_BLOCK = 1 << 20  # samples


class _Data(NamedTuple):
    """Where a file's header says how many bytes of sound follow."""

    at: int  # position of the size
    form: str  # of the size, for `struct`
    size: int  # bytes, from `start` on
    start: int
    extra: int = 0  # bytes that count in the size as written, but stand before `start`


_CHUNKED = {  # by a file's first bytes: where its chunks begin, the form of their sizes, the name of the sound
    b"RIFF": (12, "<I", b"data"),
    b"RF64": (12, "<I", b"data"),
    b"BW64": (12, "<I", b"data"),
    b"RIFX": (12, ">I", b"data"),
    b"FORM": (12, ">I", b"SSND"),
    b"caff": (8, ">q", b"data"),
    b"riff": (40, "<Q", b"data"),  # W64: names of 16 bytes, sizes that count their own header
}


def _chunks(file: BinaryIO, magic: bytes, at: int) -> Iterator[tuple[bytes, _Data]]:
    """The chunks of a file from position `at` on: the first four bytes of their names, and where they are."""
    form = _CHUNKED[magic][1]
    names, step = (16, 8) if magic == b"riff" else (4, 1 if magic == b"caff" else 2)
    own = names + struct.calcsize(form)
    extra = own if magic == b"riff" else 0
    while True:
        file.seek(at)
        if len(head := file.read(own)) < own:
            return
        (size,) = struct.unpack(form, head[names:])
        yield head[:4], _Data(at + names, form, size - extra, at + own, extra)
        if size < extra:
            return
        at += own + -(-(size - extra) // step) * step


def _find_data(file: BinaryIO) -> _Data | None:
    """The sound's place in a WAV (RIFF, RF64, BW64, W64), AIFF, AU or CAF file; None for anything else."""
    head = file.read(24)
    magic = head[:4]
    if len(head) == 24 and magic in (b".snd", b"dns."):
        start, size = struct.unpack(form := ">II" if magic == b".snd" else "<II", head[4:12])
        return _Data(8, form[:2], size, start)
    if magic not in _CHUNKED:
        return None
    first, _, wanted = _CHUNKED[magic]
    long_size = None  # RF64 keeps it in a chunk of its own
    for name, chunk in _chunks(file, magic, first):
        if name == wanted:
            if chunk.size == 2**32 - 1 and long_size is not None:
                return _Data(long_size, "<Q", _unpack(file, long_size), chunk.start)
            return chunk
        if name == b"ds64":
            long_size = chunk.start + 8
    return None


def _is_empty(file: BinaryIO, sound: _Data) -> bool:
    """Whether a size of 0 is meant: other chunks follow, up to the end. Behind a stream's header there is sound."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    magic, size = file.read(4), file.read(4)
    if sound.size or magic not in _CHUNKED:
        return False
    ends = {end, 8 + int.from_bytes(size, "big" if _CHUNKED[magic][1] == ">I" else "little")}  # RIFF: its own end
    for name, chunk in _chunks(file, magic, sound.start):
        if not all(32 <= letter < 127 for letter in name):
            return False
        if any(0 <= end - chunk.start - chunk.size < 8 for end in ends):  # what fills a chunk up is no other chunk
            return True
    return False


def _unpack(file: BinaryIO, at: int) -> int:
    file.seek(at)
    return int.from_bytes(file.read(8), "little")


def _lost_of_ogg(file: BinaryIO) -> bool:
    """Whether a file is Ogg and ends within a page.

    That the last page lacks the flag for the end of the stream says nothing: Android's and Telegram's recorders never
    set it.
    """
    file.seek(0)
    if file.read(4) != b"OggS":
        return False
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 2 * _OGG_PAGE))
    tail = file.read()
    at = tail.rfind(b"OggS\0")
    if at < 0:
        return False  # what follows the last page is more than a page
    page = tail[at:]
    table = page[27 : 27 + page[26]] if len(page) > 26 else b""
    end = 27 + len(table) + sum(table)
    return len(page) < 27 or len(table) < page[26] or len(page) < end or page[end:] in (b"O", b"Og", b"Ogg", b"OggS")


def _whole(path: Path) -> Path | io.BytesIO:
    """What libsndfile should open: the file, or a copy whose header tells the size that a stream's left open.

    Programs that write to a pipe cannot know the length: they leave a size of 0, −1 or close to the largest
    (0x7ffff000, 0x7fffff00, 0xffffffff …), and everything behind the header is sound, but for chunks that follow a size
    of 0. Raises EqknobsError where the header promises, in earnest, more than there is.
    """
    with open(path, "rb") as file:
        found = _find_data(file)
        if found is None:
            if _lost_of_ogg(file):
                raise EqknobsError(f"{path}: cut short (within a page of Ogg); fetch it again or remove it")
            return path
        there = path.stat().st_size - found.start
        if there <= 0 or 0 < found.size <= there:
            return path
        if 0 < found.size < UNKNOWN_SIZE:
            raise EqknobsError(f"{path}: cut short ({there} of {found.size} bytes); fetch it again or remove it")
        empty = _is_empty(file, found)
        file.seek(0)
        content = bytearray(file.read())
    if empty:  # libsndfile would take the chunks for sound
        return io.BytesIO(content[: found.start])
    largest = 2 ** (8 * struct.calcsize(found.form)) - 1
    struct.pack_into(found.form, content, found.at, min(there + found.extra, largest))
    return io.BytesIO(content)


class _Stream(sf.SoundFile):
    """Read forwards only: after each read soundfile seeks, which GSM and FLAC of unknown length do not take."""

    def seekable(self) -> bool:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[sf.SoundFile]:
    if not path.is_file():
        raise EqknobsError(f"{path}: no such audio file; restore it, or run again for a manifest without it")
    try:
        with _Stream(_whole(path)) as file:
            yield file
    except sf.LibsndfileError as error:
        raise EqknobsError(f"{path}: not readable as audio ({error.error_string}); replace or remove it") from error
    except OSError as error:
        raise EqknobsError(f"{path}: cannot be read ({error.strerror}); mend or remove it") from error


def audio_seconds(path: str | Path) -> float:
    """Length in s by a file's header; by its samples where the header leaves it open.

    Raises EqknobsError when the file is missing, not audio, or visibly cut short.
    """
    with _opened(Path(path)) as file:
        if file.frames < UNKNOWN_FRAMES:
            return file.frames / file.samplerate
        return sum(len(block) for block in _blocks(file)) / file.samplerate


def _blocks(file: sf.SoundFile) -> Iterator[np.ndarray]:
    """All samples, float32 [samples, channels] a block."""
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        yield block


def read_samples(path: str | Path) -> tuple[np.ndarray, int]:
    """Samples of a file as float32 [samples, channels] in −1…1, and their rate (samples/s).

    Reads every format libsndfile knows, streams of unknown length too: the bytes on disk count, not the header. A float
    file may go over full scale, as mixdowns and lossy decoders do, but not over `LARGEST_SAMPLE`: samples on an integer
    scale do, and which one (16, 24, 32 bits) cannot be told for sure from the file, so that it is refused, not
    rescaled. Raises EqknobsError for that, and when the file is missing, not audio, cut short, empty or holds values
    that are not numbers.
    """
    path = Path(path)
    with _opened(path) as file:
        promised, rate = file.frames, file.samplerate
        blocks = list(_blocks(file))
    if not blocks:
        raise EqknobsError(f"{path}: holds no samples; replace or remove it")
    wav = np.concatenate(blocks)
    if len(wav) < promised < UNKNOWN_FRAMES:
        raise EqknobsError(f"{path}: cut short after {len(wav)} samples; fetch it again or remove it")
    if not np.isfinite(wav).all():
        raise EqknobsError(f"{path}: holds NaN or infinite samples; replace or remove it")
    if (peak := np.abs(wav).max()) > LARGEST_SAMPLE:
        likely, mend = next((likely, mend) for most, likely, mend in _SCALES if peak <= most)
        raise EqknobsError(f"{path}: samples up to {peak:g} where full scale is 1 ({likely}?); {mend}")
    return wav, rate


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """Samples of a file as float32 [samples], channels averaged, resampled to `rate` samples/s (soxr HQ).

    Raises EqknobsError as `read_samples` does.
    """
    wav, file_rate = read_samples(path)
    wav = wav.mean(axis=1)
    if file_rate != rate:
        wav = soxr.resample(wav, file_rate, rate)
    if not len(wav):
        raise EqknobsError(f"{path}: holds no samples; replace or remove it")
    return wav


def read_clip(clip: Any, rate: int) -> np.ndarray:
    """Samples [samples] of a manifest row (its `path` and `sha256`) at `rate` samples/s, as `read_audio` gives them.

    Raises EqknobsError also when the file is not the one that the manifest was drawn from.
    """
    path = Path(clip.path)
    if not path.is_file():
        raise EqknobsError(f"{path}: no such audio file; restore it, or run again, and the manifest is drawn anew")
    if file_sha256(path) != clip.sha256:
        raise EqknobsError(f"{path}: changed since the manifest was drawn; run again, and the manifest is drawn anew")
    return read_audio(path, rate)


def write_flac(path: str | Path, wav: np.ndarray, rate: int, kind: str = "FLAC") -> None:
    """Write [samples] in −1…1 as 16-bit mono FLAC (`kind` WAV: as WAV), atomically; louder samples are clipped.

    Raises EqknobsError on NaN or infinite samples, and where the file cannot be written.
    """
    wav = np.asarray(wav, dtype=np.float64)
    if not np.isfinite(wav).all():
        raise EqknobsError(f"{path}: the sound to write holds NaN or infinite samples; weaken the edit")
    pcm = np.clip(np.rint(wav * 32768), -32768, 32767).astype(np.int16)
    with atomic_path(path) as temporary:
        try:
            sf.write(temporary, pcm, rate, format=kind, subtype="PCM_16")
        except (sf.SoundFileError, AssertionError) as error:  # libsndfile hides the system's reason
            raise EqknobsError(f"{path}: cannot be written; is the disk full? ({error})") from error
