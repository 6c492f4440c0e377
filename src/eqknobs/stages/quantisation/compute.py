"""A codec that is really smaller: sensitivities on val and the plans made of them; then, on test, what each plan costs.

One network is in memory, once. For a plan its packed file is written, read back, and what it holds put into the network
in place: bit for bit the network that the file would load as.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired

import numpy as np
import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from eqknobs.audio import write_flac
from eqknobs.corpus.cache import ActivationCache
from eqknobs.io import array_hash, atomic_path, file_sha256, read_csv, read_json, unused_name, write_csv, write_json
from eqknobs.models import Model
from eqknobs.packing.allocation import Allocator
from eqknobs.packing.files import PackedFile, source_state, stored, write_file
from eqknobs.packing.modules import pack_modules, put_module, replaced
from eqknobs.packing.plan import Plan, mean_bits, packable
from eqknobs.packing.quantise import Packed
from eqknobs.pieces import Pieces
from eqknobs.provenance import code_inputs, content
from eqknobs.shards import of_shard
from eqknobs.sound.metrics import mel_distance
from eqknobs.sound.renders import Clip, OpenedCfg, Sounds, load_clip, open_codec, pick_clips, render_pieces
from eqknobs.stages.quantisation.plans import (
    NONE,
    RANDOM,
    UNIFORM,
    Named,
    Orders,
    in_decoder,
    part_plans,
)

FULL = Plan({}, rest="float32")
TIMED = 5  # decodes, of which the fastest counts
TIMED_SECONDS = 2.0


class PlansCfg(OpenedCfg):
    """What `make_plans` reads of the section `quantisation`, beside the model and site of the target."""

    codebooks: int
    parts: list[str]
    widths: list[int]
    budgets: list[float]  # mean bits
    roundings: list[str]
    group: int | None
    symmetric: bool
    rest: str
    keep: list[str]  # embeddings, codebooks
    random_plans: int
    sensitivity_clips: int
    segment_seconds: float
    seed: int
    content: NotRequired[Any]  # digests, which decide when to compute again, not how


class RendersCfg(OpenedCfg):
    """What `render_plans` reads of the section `quantisation`, beside the model and site of the target."""

    codebooks: int
    parts: list[str]
    clips: int
    heard_clips: int
    heard_parts: list[str]
    heard_widths: list[int]  # uniform plans that are listened to
    heard_budgets: list[float]  # budgets at which the others are
    heard_random: int
    content: NotRequired[Any]


# --- the network -------------------------------------------------------------------------------------------------


def part_state(net: nn.Module, part: str) -> dict[str, Tensor]:
    """The tensors of a part of a network, by their names in its state dict."""
    return {name: value for name, value in source_state(net).items() if part == "codec" or in_decoder(name)}


class Network:
    """A codec whose weights are put into it from packed files. Tensors are quantised once for each width."""

    def __init__(self, model: Model):
        self.model = model
        self.net: nn.Module = model.net  # type: ignore[attr-defined]  # of `models.base.Pretrained`
        self.known: dict[tuple[Any, ...], Packed] = {}

    def packed(self, plan: Plan, name: str, value: Tensor) -> Packed:
        key = (name, plan.bits[name], plan.group, plan.symmetric, plan.rounding)
        if key not in self.known:
            self.known[key] = plan.quantise(name, value).to("cpu")
        return self.known[key]

    def write(self, plan: Plan, part: str, path: Path) -> None:
        """The packed file of a part."""
        state = part_state(self.net, part)
        packed: dict[str, Tensor | Packed] = {
            name: self.packed(plan, name, value) if name in plan.bits else stored(name, value, plan.rest)
            for name, value in state.items()
        }
        write_file(path, packed, plan)

    @contextmanager
    def loaded(self, plan: Plan, part: str, folder: Path) -> Iterator[int]:
        """While the block runs the network has the weights of the part's packed file, whose bytes this gives."""
        path = folder / "packed.safetensors"
        self.write(plan, part, path)
        size = path.stat().st_size
        with PackedFile(path) as file, replaced(self.net, _values(file)):
            yield size

    @contextmanager
    def one(self, plan: Plan, name: str) -> Iterator[None]:
        """While the block runs one tensor is as the plan has it."""
        value = self.packed(plan, name, self.net.state_dict()[name])
        with replaced(self.net, [(name, value.dequantise())]):
            yield

    def linears(self, plan: Plan) -> Plan:
        """Of a plan what stays packed in memory: linears and embeddings; convolutions and codebooks unpack at load."""
        modules = dict(self.net.named_modules())
        kept = {
            name: bits
            for name, bits in plan.bits.items()
            if isinstance(modules.get(name.removesuffix(".weight")), nn.Linear | nn.Embedding)
        }
        return plan.with_bits(kept)

    def bytes_resident(self, plan: Plan, part: str) -> int:
        """Bytes in memory of a part with its linears packed, and all else float32."""
        held = self.linears(plan).bits
        return sum(
            self.packed(plan, name, value).nbytes if name in held else value.numel() * value.element_size()
            for name, value in part_state(self.net, part).items()
        )

    def decode_seconds(self, tokens: np.ndarray, samples: int) -> float:
        found = []
        for _ in range(TIMED):
            begun = time.perf_counter()
            self.model.decode_tokens(tokens, samples)
            found.append(time.perf_counter() - begun)
        return min(found)

    def packed_seconds(self, plan: Plan, tokens: np.ndarray, samples: int) -> float:
        """Of a decode with the linears packed in memory."""
        held = self.linears(plan)
        plain = {
            name.removesuffix(".weight"): self.net.get_submodule(name.removesuffix(".weight")) for name in held.bits
        }
        try:
            pack_modules(self.net, held)
            return self.decode_seconds(tokens, samples)
        finally:
            for name, module in plain.items():
                put_module(self.net, name, module)


def _values(file: PackedFile) -> Iterator[tuple[str, Tensor]]:
    for name in file.names:
        value = file.get(name)
        if isinstance(value, Packed):
            yield name, value.dequantise()
        elif value.is_floating_point():
            yield name, value


def allocator(net: nn.Module, part: str, cfg: PlansCfg) -> Allocator:
    """Widths for the tensors of a part that `cfg` lets be packed."""
    shapes = packable(net, "embeddings" not in cfg["keep"], "codebooks" not in cfg["keep"])
    state = part_state(net, part)
    options = {"group": cfg["group"], "symmetric": cfg["symmetric"], "rounding": cfg["roundings"][0]}
    kept = {name: shape for name, shape in shapes.items() if name in state}
    return Allocator(state, kept, sorted(cfg["widths"]), {**options, "rest": cfg["rest"]})


# --- sensitivity and plans ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Segment:
    """The middle of a clip of val, and what the intact codec makes of it."""

    clip: Clip
    wav: np.ndarray
    acts: np.ndarray
    tokens: np.ndarray
    decoded: np.ndarray


class _Sensitivity:
    """How far the sound moves when one tensor alone is quantised."""

    def __init__(self, network: Network, cfg: PlansCfg, pieces: Pieces):
        self.network, self.model, self.cfg = network, network.model, cfg
        kept = [cfg["codebooks"], cfg["group"], cfg["symmetric"], cfg["roundings"][0]]
        self.pieces = pieces.within([[content(file) for file in sorted(code_inputs(__file__))], kept])

    def segment(self, clip: Clip) -> _Segment:
        samples = min(len(clip.wav), round(self.cfg["segment_seconds"] * self.model.sample_rate))
        wav = clip.wav[(len(clip.wav) - samples) // 2 :][:samples]
        acts = self.model.encode(wav, self.cfg["site"])
        tokens = self.model.tokens(acts, self.cfg["site"], self.cfg["codebooks"])
        return _Segment(clip, wav, acts, tokens, self.model.decode_tokens(tokens, samples))

    def sound(self, part: str, name: str, at: _Segment) -> np.ndarray:
        """The segment through the codec as it is now, from the last that the tensor cannot have changed."""
        tokens = at.tokens
        if part == "codec" and (name.startswith("quantizer.") or not in_decoder(name)):
            acts = at.acts if name.startswith("quantizer.") else self.model.encode(at.wav, self.cfg["site"])
            tokens = self.model.tokens(acts, self.cfg["site"], self.cfg["codebooks"])
        return self.model.decode_tokens(tokens, len(at.wav))

    def rows(self, part: str, allocate: Allocator, segments: Sequence[_Segment]) -> list[dict[str, Any]]:
        """Columns id, speaker, split, part, tensor, bits, mel_distance (dB, to what the intact codec makes)."""
        plan = allocate.uniform(allocate.widths[0])
        found = []
        with tqdm(desc=f"sensitivity, {part}", total=len(allocate.shapes) * len(allocate.widths)) as progress:
            for name in allocate.shapes:
                where = "decoder" if in_decoder(name) and not name.startswith("quantizer.") else part
                made_of = [where, name, [array_hash(at.wav) for at in segments]]
                with self.pieces.pack("quantisation-sensitivity", made_of) as known:
                    for width in allocate.widths:
                        progress.update()
                        if str(width) not in known:
                            with self.network.one(plan.with_bits(plan.bits | {name: width}), name):
                                known[str(width)] = [self._moved(part, name, at) for at in segments]
                        for at, moved in zip(segments, known[str(width)], strict=True):
                            clip = {"id": at.clip.id, "speaker": at.clip.speaker, "split": at.clip.split}
                            found.append({**clip, "part": part, "tensor": name, "bits": width, "mel_distance": moved})
        return found

    def _moved(self, part: str, name: str, at: _Segment) -> float:
        return mel_distance(at.decoded, self.sound(part, name, at), self.model.sample_rate)


def make_plans(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    maps_json: str | Path | None,
    out_dir: str | Path,
    sensitivity_csv: str | Path,
    cfg: PlansCfg,
    pieces: Pieces | None = None,
) -> None:
    """Measure each tensor alone at each width on clips of val, and write the plans.

    maps_json: the importance maps; None: plans by maps are left out. `out_dir`: a plan's file each, as `eqknobs
    compress --plan` takes it, and `index.csv`: condition, part, plan, seed, rounding, budget (mean bits whose bytes the
    plan may use), bits_mean, file. sensitivity_csv: see `_Sensitivity.rows`. The damage that the measured plan adds up
    is the mean square of these distances: errors of several tensors add in power.
    """
    clips = pick_clips(read_csv(manifest_csv), "val", cfg["sensitivity_clips"])
    found = None if maps_json is None else read_json(maps_json)
    composition = None if found is None else np.array(found["maps"]["composition"])
    chosen = None if found is None or found["chosen"] == "composition" else np.array(found["maps"][found["chosen"]])
    rows, plans, states = [], [], {}
    with ActivationCache(cache_h5) as cache, open_codec(cfg, cache) as model:
        network = Network(model)
        measure = _Sensitivity(network, cfg, render_pieces(pieces, model, cfg))
        segments = [measure.segment(load_clip(model, cache, row)) for row in clips.itertuples(index=False)]
        for part in cfg["parts"]:
            allocate = allocator(network.net, part, cfg)
            states[part] = allocate.state
            rows += measure.rows(part, allocate, segments)
            table = pd.DataFrame(rows)
            squares = table[table["part"] == part].assign(damage=lambda t: t["mel_distance"] ** 2)
            mean = squares.groupby(["tensor", "bits"])["damage"].mean().to_dict()
            damages = {name: {width: mean[name, width] for width in allocate.widths} for name in allocate.shapes}
            orders = Orders(composition, chosen, damages)
            budgets = sorted(cfg["budgets"], reverse=True)
            plans += part_plans(part, allocate, orders, budgets, cfg["random_plans"], cfg["roundings"], cfg["seed"])
    with atomic_path(out_dir) as folder:
        folder.mkdir()
        index = []
        for named in plans:
            write_json(folder / f"{named.key}.json", named.plan.to_json())
            index.append({**_about(named), "file": f"{named.key}.json"})
            index[-1]["bits_mean"] = mean_bits(states[named.part], named.plan)
        write_csv(folder / "index.csv", pd.DataFrame(index))
    write_csv(sensitivity_csv, pd.DataFrame(rows))


def _about(named: Named) -> dict[str, Any]:
    about = {"condition": named.key, "part": named.part, "plan": named.name, "seed": named.seed}
    return about | {"rounding": named.plan.rounding, "budget": named.budget}


# --- renders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Condition:
    """A plan, or nothing (`none`), on test."""

    about: dict[str, Any]
    plan: Plan
    heard: bool

    @property
    def part(self) -> str:
        return self.about["part"]


def conditions(plans_dir: Path, cfg: RendersCfg) -> list[_Condition]:
    """Every plan of the folder, and of each part nothing quantised."""
    rows = read_csv(plans_dir / "index.csv")
    first = rows["rounding"].iloc[0]
    found = []
    for part in cfg["parts"]:
        about = {"condition": f"{part}.{NONE}", "part": part, "plan": NONE, "seed": None, "rounding": None}
        found.append(_Condition(about | {"budget": None, "bits_mean": 32.0}, FULL, part in cfg["heard_parts"]))
    for row in rows.to_dict("records"):
        plan = Plan.from_json(read_json(plans_dir / row.pop("file")), row["condition"])
        seed = None if pd.isna(row["seed"]) else int(row["seed"])
        heard = row["part"] in cfg["heard_parts"] and row["rounding"] == first
        heard &= row["budget"] in cfg["heard_widths" if row["plan"] == UNIFORM else "heard_budgets"]
        heard &= row["plan"] != RANDOM or (seed is not None and seed < cfg["heard_random"])
        found.append(_Condition({**row, "seed": seed}, plan, heard))
    return found


class _Intact:
    """A clip and what the intact codec passes on of it; made before any weight is another."""

    def __init__(self, model: Model, cache: ActivationCache, row: Any, cfg: RendersCfg, heard: str | None):
        self.clip = load_clip(model, cache, row)
        self.sound = heard  # what its file is called, if it is one of those that are listened to
        self.made_of = f"{self.clip.sha256} {array_hash(self.clip.acts)}"
        self.total = float(np.square(self.clip.acts - cache.mean, dtype=np.float64).sum())
        self.tokens = model.tokens(self.clip.acts, cfg["site"], cfg["codebooks"])


class _Run:
    """A clip through the codec as it is now."""

    def __init__(self, model: Model, cfg: RendersCfg, part: str, at: _Intact):
        self.model, self.cfg, self.part, self.at = model, cfg, part, at

    @cached_property
    def acts(self) -> np.ndarray:
        return self.at.clip.acts if self.part == "decoder" else self.model.encode(self.at.clip.wav, self.cfg["site"])

    @cached_property
    def tokens(self) -> np.ndarray:
        if self.part == "decoder":  # what the sender has sent is intact
            return self.at.tokens
        return self.model.tokens(self.acts, self.cfg["site"], self.cfg["codebooks"])

    @cached_property
    def wav(self) -> np.ndarray:
        return self.model.decode_tokens(self.tokens, len(self.at.clip.wav))

    def measured(self) -> dict[str, float]:
        return {
            "mel_distance": mel_distance(self.at.clip.wav, self.wav, self.model.sample_rate),
            "latent_sq_error": float(np.square(self.acts - self.at.clip.acts, dtype=np.float64).sum()),
            "tokens_flipped": int((self.tokens != self.at.tokens).sum()),
            "tokens": int(self.at.tokens.size),
        }


class _Weights:
    """The weights of a condition, in the network from when something is asked for to the end of the block."""

    def __init__(self, network: Network, condition: _Condition):
        self.network, self.condition = network, condition
        self._open: Any = None
        self._size = 0

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._open is not None:
            self._open.__exit__(*error)
            self._folder.cleanup()

    def load(self) -> int:
        """Bytes of the packed file that was written and read back."""
        if self._open is None:
            self._folder = TemporaryDirectory()
            plan, part = self.condition.plan, self.condition.part
            self._open = self.network.loaded(plan, part, Path(self._folder.name))
            self._size = self._open.__enter__()
        return self._size


class _Test:
    """Test clips through the network of one condition after another."""

    def __init__(self, network: Network, intact: list[_Intact], cfg: RendersCfg, pieces: Pieces):
        self.network, self.intact, self.cfg = network, intact, cfg
        self.pieces = pieces.within([[content(file) for file in sorted(code_inputs(__file__))], cfg["codebooks"]])
        model = network.model
        sample = intact[0].clip.wav[: round(TIMED_SECONDS * model.sample_rate)]
        self.samples = len(sample)
        self.spoken = model.tokens(model.encode(sample, cfg["site"]), cfg["site"], cfg["codebooks"])

    @cached_property
    def plain_seconds(self) -> float:
        return self.network.decode_seconds(self.spoken, self.samples)

    def signal(self, one: _Condition, sounds: Sounds) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """Of each clip its row of scores and, where its sound was written, of the index of sounds."""
        made_of = [one.part, one.plan.to_json()]
        with self.pieces.pack("quantisation", made_of) as known, _Weights(self.network, one) as weights:
            if "bytes" not in known:
                known["resident"] = self.network.bytes_resident(one.plan, one.part)
                known["bytes"] = weights.load()
            sizes = {"bytes": known["bytes"], "bytes_resident": known["resident"], "heard": one.heard}
            for at in self.intact:
                run, name = _Run(self.network.model, self.cfg, one.part, at), at.made_of
                if name not in known:
                    weights.load()
                    known[name] = run.measured()
                clip = {"id": at.clip.id, "speaker": at.clip.speaker, "split": at.clip.split}
                seconds = len(at.clip.wav) / self.network.model.sample_rate
                row = {**clip, **one.about, **sizes, "seconds": seconds, **known[name], "latent_sq_total": at.total}
                sound = None
                if one.heard and at.sound:
                    file = f"{one.about['condition']}/{at.sound}"
                    self._write(run, sounds, file, known, weights)
                    sound = {"id": at.clip.id, **one.about, "file": file, "judged": True}
                yield row, sound

    def _write(self, run: _Run, sounds: Sounds, file_name: str, known: dict[str, Any], weights: _Weights) -> None:
        """The sound as FLAC, one of the last time or of a shard where that is the same."""
        name, file = f"flac {run.at.made_of}", sounds.folder / file_name
        if name in known and sounds.take(file_name, known[name]):
            return
        weights.load()
        write_flac(file, run.wav, run.model.sample_rate)
        known.setdefault(name, file_sha256(file))

    def seconds(self, one: _Condition) -> dict[str, float]:
        """decode_seconds with the condition's packed linears, decode_seconds_full with plain ones."""
        made_of = [one.part, one.plan.to_json(), array_hash(self.spoken)]
        with self.pieces.pack("quantisation-time", made_of) as known:
            if "decode_seconds" not in known:
                known["decode_seconds_full"] = self.plain_seconds
                known["decode_seconds"] = self.network.packed_seconds(one.plan, self.spoken, self.samples)
            return dict(known)


def render_plans(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    plans_dir: str | Path,
    out_dir: str | Path,
    signal_csv: str | Path,
    time_csv: str | Path,
    cfg: RendersCfg,
    pieces: Pieces | None = None,
) -> None:
    """Build the codec of every plan, and run test clips through it.

    Part `decoder`: the tokens of the intact codec, decoded by packed weights; part `codec`: all of it packed. Of each
    condition a packed file is really written and read back, and then deleted.

    Writes FLACs of the first `heard_clips` clips of the conditions that are listened to, `out_dir/index.csv` as
    `render_conditions` does, and `signal_csv`: id, speaker, split, condition, part, plan, seed, rounding, budget,
    bits_mean, bytes (of the file), bytes_resident (see `Network.bytes_resident`), heard, seconds, mel_distance (dB, to
    the untouched clip), latent_sq_error = Σ(encoded − cached)², latent_sq_total = Σ(cached − train mean)²,
    tokens_flipped of tokens. time_csv, of what is listened to: condition, part, plan, seed, rounding, budget,
    decode_seconds with packed linears, decode_seconds_full with plain ones: the fastest of TIMED on this machine.
    """
    chosen = conditions(Path(plans_dir), cfg)
    clips = pick_clips(read_csv(manifest_csv), "test", cfg["clips"])
    names: set[str] = set()
    files = [unused_name(f"{id}.flac", names) for id in clips["id"][: cfg["heard_clips"]]]
    chosen_clips = of_shard(list(zip_longest(clips.itertuples(index=False), files)), cfg.get("shard"))
    rows: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    times, sounds = [], Sounds(out_dir, cfg.get("shard"))
    with ActivationCache(cache_h5) as cache, open_codec(cfg, cache) as model, sounds.made() as folder:
        loaded = [_Intact(model, cache, row, cfg, heard) for row, heard in chosen_clips]
        test = _Test(Network(model), loaded, cfg, render_pieces(pieces, model, cfg))
        for one in tqdm(chosen, desc="plans", unit="plan"):
            rows += test.signal(one, sounds)
            if one.heard and one.about["plan"] != NONE and not sounds.shard:
                times.append({**one.about, **test.seconds(one)})
        if sounds.shard:
            return
        _write_table(folder / "index.csv", [sound for _, sound in rows if sound], ["id", "condition", "file", "judged"])
    _write_table(signal_csv, [row for row, _ in rows], ["id", "speaker", "split", "condition"])
    columns = ["condition", "part", "plan", "seed", "rounding", "budget", "decode_seconds", "decode_seconds_full"]
    write_csv(time_csv, pd.DataFrame(times, columns=columns))


def _write_table(path: str | Path, rows: list[dict[str, Any]], head: list[str]) -> None:
    """Rows with the columns of `head` first; without rows these alone."""
    found = pd.DataFrame(rows, columns=None if rows else head)
    write_csv(path, found[head + [name for name in found if name not in head]])
