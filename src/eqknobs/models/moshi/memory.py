"""GPU memory of a Moshi model, computed from shapes before anything is loaded; nothing here imports torch.

What is counted: every parameter in the form in which `load_net` keeps it, keys and values of one conversation, the
codec in float32, and the largest tensors that are alive at once while a clip is heard and answered. What shapes cannot
say, the driver's context and the libraries' workspaces, is the allowance `RESERVE`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.config import (
    FRAME_RATE,
    MoshiConfig,
    Nf4,
    codec_of,
    heads_left,
    read_config,
    read_raw,
    steps_left,
)
from eqknobs.packing.notes import NAME as PACKED
from eqknobs.packing.notes import parts, read_notes
from eqknobs.plan import parse_target

GIB = 1 << 30
MARK = ".quant_state.bitsandbytes__nf4"  # as in `quantise`, which imports torch
RESERVE = GIB  # CUDA context, cuBLAS and cuDNN workspaces, fragmentation: an allowance, not computed
CHUNK = 20.0  # seconds that Mimi encodes and decodes at once (`Mimi.chunk_seconds`)
MIMI_BYTES = 384_606_684  # kyutai/mimi in float32, parameters and buffers
# Mimi at full size, batch 1: peak bytes for each second of sound, measured on a CPU (decoder: 32.1 MiB at 5 s, 29.3 at
# 20 s; encoder: 28.3 and 26.9)
MIMI_WORK = 32 << 20
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
SEVEN_B = MoshiConfig(
    dim=4096,
    layers=32,
    heads=32,
    hidden=11264,
    dep_dim=1024,
    dep_layers=6,
    dep_heads=16,
    dep_hidden=2816,
    text_card=32000,
)
# Checkpoints whose shapes are known without their files. PersonaPlex's other 8 depformer steps are not loaded.
KNOWN = {
    "kyutai/moshiko-pytorch-bf16": SEVEN_B,
    "kyutai/moshika-pytorch-bf16": SEVEN_B,
    "nvidia/personaplex-7b-v1": SEVEN_B,
}


@dataclass(frozen=True)
class Shapes:
    """What is known of a checkpoint: sizes, heads left in every layer, bytes of tensors that its file holds packed."""

    config: MoshiConfig
    heads: tuple[int, ...]
    packed: dict[str, int]
    steps: int | None = None  # of the depformer, where it was shortened


@dataclass(frozen=True)
class Plan:
    """Bytes of one model's parts; `seconds` of sound heard and answered in one piece."""

    model: str
    seconds: float
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """The plan as text, one part a line, in GiB."""
        rows = [*self.parts.items(), ("total", self.total)]
        return [f"  {name:<36} {size / GIB:7.2f} GiB" for name, size in rows]


def parameters(
    config: MoshiConfig, heads: tuple[int, ...], dep_q: int | None = None
) -> Iterator[tuple[str, str, int, bool]]:
    """(part, module, values, is a linear) of every parameter of `MoshiNet`. heads: those left, layer by layer."""
    c, dep_q = config, dep_q or config.codebooks

    def linear(part: str, name: str, outputs: int, inputs: int) -> tuple[str, str, int, bool]:
        return part, name, outputs * inputs, True

    def rest(part: str, name: str, values: int) -> tuple[str, str, int, bool]:
        return part, name, values, False

    temporal, embeddings, depformer = "temporal transformer", "embeddings and text head", "depformer"
    for layer, left in enumerate(heads):
        stem, width = f"transformer.layers.{layer}", left * c.head_dim
        if width:  # a layer without heads has no projections
            yield linear(temporal, f"{stem}.self_attn.in_proj", 3 * width, c.dim)
            yield linear(temporal, f"{stem}.self_attn.out_proj", c.dim, width)
        yield linear(temporal, f"{stem}.gating.linear_in", 2 * c.hidden, c.dim)
        yield linear(temporal, f"{stem}.gating.linear_out", c.dim, c.hidden)
        yield from (rest(temporal, f"{stem}.{norm}", c.dim) for norm in ("norm1", "norm2"))
    yield rest(temporal, "out_norm", c.dim)
    yield from (rest(embeddings, f"emb.{i}", (c.card + 1) * c.dim) for i in range(c.streams - 1))
    yield rest(embeddings, "text_emb", (c.text_card + 1) * c.dim)
    yield linear(embeddings, "text_linear", c.text_card, c.dim)
    yield rest(depformer, "depformer_text_emb", (c.text_card + 1) * c.dep_dim)
    for q in range(dep_q):
        yield linear(depformer, f"depformer_in.{q}", c.dep_dim, c.dim)
        yield linear(depformer, f"linears.{q}", c.card, c.dep_dim)
        if q:
            yield rest(depformer, f"depformer_emb.{q - 1}", (c.card + 1) * c.dep_dim)
        for layer in range(c.dep_layers):
            stem = f"depformer.layers.{layer}"
            yield linear(depformer, f"{stem}.self_attn.in_projs.{q}", 3 * c.dep_dim, c.dep_dim)
            yield linear(depformer, f"{stem}.self_attn.out_projs.{q}", c.dep_dim, c.dep_dim)
            yield linear(depformer, f"{stem}.gating.{q}.linear_in", 2 * c.dep_hidden, c.dep_dim)
            yield linear(depformer, f"{stem}.gating.{q}.linear_out", c.dep_dim, c.dep_hidden)
    for layer in range(c.dep_layers):
        yield from (rest(depformer, f"depformer.layers.{layer}.{norm}", c.dep_dim) for norm in ("norm1", "norm2"))


def nf4_bytes(values: int, nf4: Nf4) -> int:
    """Bytes of a linear in NF4: half a byte a value, a scale a block, the table of 16 values.

    Scales are float32, or with `double` one byte each, a float32 scale for every 256 of them, their table of 256 values
    and their mean (Dettmers et al. 2023, section 3).
    """
    scales = math.ceil(values / nf4.block)
    size = math.ceil(values / 2) + 4 * 16
    return size + (scales + 4 * math.ceil(scales / 256) + 4 * 256 + 4 if nf4.double else 4 * scales)


def weights(shapes: Shapes, itemsize: int, nf4: Nf4 | None, dep_q: int | None = None) -> dict[str, int]:
    """Bytes of the parameters, part by part. itemsize: bytes of a value that is not packed."""
    found: dict[str, int] = {}
    for part, name, values, is_linear in parameters(shapes.config, shapes.heads, dep_q or shapes.steps):
        if name in shapes.packed:
            size = shapes.packed[name]
        elif nf4 is not None and is_linear and nf4.covers(name):
            size = nf4_bytes(values, nf4)
        else:
            size = values * itemsize
        found[part] = found.get(part, 0) + size
    return found


def activations(config: MoshiConfig, seconds: float, itemsize: int, packed: bool) -> int:
    """Bytes alive at once beside weights and caches: while the clip is heard in one pass, or while Mimi works.

    One pass holds the residual stream, and either the feed-forward layer's input, its two products and what comes of
    them (4 hidden + 2 dim a column) or projected and turned queries, keys and values (the turn is done in float32);
    packed linears are unpacked one at a time.
    """
    columns = math.ceil(seconds * FRAME_RATE) + 1
    feed_forward = (3 * config.dim + 4 * config.hidden) * itemsize
    attention = 7 * config.dim * itemsize + 4 * config.dim * 4
    unpacked = 2 * config.hidden * config.dim * itemsize if packed else 0
    mask = 2 * columns**2 if columns > config.context else 0  # then attention is a band, with a mask of its own
    listening = columns * max(feed_forward, attention) + mask + unpacked
    return int(max(listening, min(seconds, CHUNK) * MIMI_WORK))


def plan(model: dict[str, Any], seconds: float) -> Plan:
    """What a model of kind moshi needs on a GPU to hear a clip of `seconds` and to answer it.

    model: its configuration with `name`. Raises EqknobsError where neither a folder, nor the hub's cache, nor `KNOWN`
    tells the shapes.
    """
    shapes = read_shapes(model)
    if shapes is None:
        raise EqknobsError(
            f"models.{model['name']}.path: the shapes of {model['path']} are not known here, known are "
            f"{', '.join(KNOWN)}; give a folder, or download it first"
        )
    return _plan(model, shapes, seconds)


def _plan(model: dict[str, Any], shapes: Shapes, seconds: float) -> Plan:
    itemsize = ITEMSIZE[model.get("dtype") or "bfloat16"]  # the default on a GPU
    nf4, config = Nf4.of(model.get("nf4")), shapes.config
    columns = math.ceil(seconds * FRAME_RATE) + 1
    parts = {
        **weights(shapes, itemsize, nf4),
        "keys and values": config.kv_bytes(columns, itemsize, sum(shapes.heads)),
        "codec": _codec_bytes(model),
        "activations": activations(config, seconds, itemsize, nf4 is not None or bool(shapes.packed)),
        "reserve (allowance)": RESERVE,
    }
    return Plan(model["name"], seconds, parts)


def require(model: dict[str, Any], seconds: float, vram_gb: float) -> Plan:
    """The plan of a model. Raises EqknobsError, saying what to lower, where it is above `vram_gb` (GiB)."""
    found = plan(model, seconds)
    room = vram_gb * GIB
    if found.total <= room:
        return found
    helps = []
    for text, change in (
        ("dtype: bfloat16", {"dtype": "bfloat16"}),
        ("nf4: true", {"nf4": True}),
        ("nf4: {linears: ['*']}", {"nf4": {"linears": ["*"]}}),
    ):
        total = plan(model | change, seconds).total
        if total < found.total:
            helps.append(f"{text} ({total / GIB:.2f})")
    low, high = 0, math.floor(seconds)
    while low < high:  # the most seconds that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan(model, middle).total <= room else (low, middle - 1)
    if low:
        helps.append(f"{low} seconds (data.max_seconds or --seconds)")
    lower = f"lower it by {', or by '.join(helps)}; or" if helps else "take a larger card (hardware.vram_gb) or"
    raise EqknobsError(
        f"models.{model['name']}: {found.total / GIB:.2f} GiB for {seconds:g} s do not fit hardware.vram_gb = "
        f"{vram_gb:g}: {lower} set hardware.device: cpu"
    )


def check(config: dict[str, Any]) -> None:
    """Refuse a run whose Moshi targets name a layer that is not there or whose model does not fit on the GPU.

    config: the whole, validated configuration. A model whose shapes are not known before its download passes here.
    Raises EqknobsError, one line.
    """
    device = config["hardware"]["device"]
    for name, model in config["models"].items():
        targets = [target for target in config["run"]["targets"] if parse_target(target)[0] == name]
        if model["kind"] != "moshi" or not targets:
            continue
        model = model | {"name": name}
        shapes = read_shapes(model)
        if shapes is None:
            continue
        for target in targets:
            if int(target.rpartition(".")[2]) >= shapes.config.layers:
                raise EqknobsError(
                    f"config: run.targets: {target!r}: the model has layers 0 to {shapes.config.layers - 1}"
                )
        try:
            if device != "cpu":
                require(model, config["data"]["max_seconds"], config["hardware"]["vram_gb"])
        except EqknobsError:
            from eqknobs.device import pick_device  # asks torch, whose import takes seconds

            if device == "cuda" or pick_device(device) == "cuda":
                raise


def read_shapes(model: dict[str, Any]) -> Shapes | None:
    """Shapes from the headers of a checkpoint that is on this machine, else from `KNOWN`; None where neither has them.

    Raises EqknobsError for files that are not a Moshi checkpoint.
    """
    where, path = f"models.{model['name']}", str(model["path"])
    files = _files(path, model.get("revision"), where)
    if files is None:
        known = KNOWN.get(path)
        return None if known is None else Shapes(known, (known.heads,) * known.layers, {})
    config_file, weights_file = files
    raw = read_raw(config_file, where)
    try:
        with safe_open(weights_file, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            sizes = {name: math.prod(shape) * _width(file, name) for name, shape in shapes.items()}
            said = file.metadata()
    except Exception as error:  # OSError, ValueError, SafetensorError
        raise EqknobsError(f"{where}: cannot read the shapes of {path} ({error}); is it a whole checkpoint?") from error
    integers = _packed_integers(weights_file, said, shapes, sizes)
    config = read_config(raw, shapes, where)
    heads = tuple(map(len, heads_left(raw, config, where)))
    packed = integers
    for mark in (name for name in shapes if name.endswith(MARK)):
        source = mark.removesuffix(MARK)
        parts = [part for part in shapes if part == source or (part.startswith(f"{source}.") and part != mark)]
        mean = 4 if f"{source}.nested_absmax" in shapes else 0  # of the scales; it is kept within the mark
        packed[re.sub("[._]weight$", "", source)] = sum(sizes[part] for part in parts) + mean
    return Shapes(config, heads, packed, steps_left(raw, config))


def _packed_integers(
    file: Path, said: dict[str, str] | None, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]
) -> dict[str, int]:
    """Bytes by module of weights that a packed file (docs/packing.md) holds; `shapes` get theirs in place of parts'."""
    if file.name != PACKED:
        return {}
    found = {}
    for name, note in read_notes(said, str(file))[1].items():
        names = [f"{name}.{part}" for part in parts(note)]
        if missing := [part for part in names if shapes.pop(part, None) is None]:
            raise EqknobsError(f"{file}: lacks {missing[0]}; pack it again")
        shapes[name] = tuple(note["shape"])
        found[name.removesuffix(".weight")] = sum(sizes[part] for part in names)
    return found


def _width(file: Any, name: str) -> int:
    """Bytes of one value of a tensor."""
    return {"F32": 4, "I32": 4, "BF16": 2, "F16": 2}.get(file.get_slice(name).get_dtype(), 1)


def _files(path: str, revision: str | None, where: str) -> tuple[Path, Path] | None:
    """config.json and weights of a folder, or of a hub model that was downloaded before."""
    folder = Path(path)
    if folder.is_dir():
        config = folder / "config.json"
        name = read_raw(config, where).get("moshi_name", "model.safetensors")
        return config, folder / (PACKED if (folder / PACKED).is_file() else name)
    if path.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(path, file, revision=revision) for file in ("config.json", "model.safetensors")]
    config_file, weights = (Path(file) if isinstance(file, str) else None for file in found)
    return (config_file, weights) if config_file and weights else None


def _codec_bytes(model: dict[str, Any]) -> int:
    """Bytes of the codec in float32, to which packed ones unpack: by its file's header where it is in a folder, else
    those of kyutai/mimi."""
    total = 0
    where = f"models.{model['name']}"
    files = _files(str(model["path"]), model.get("revision"), where)
    folder = Path(codec_of(model, files and files[0], where))
    for path in sorted([*folder.glob("model*.safetensors"), *folder.glob(PACKED)]):
        try:
            with safe_open(path, framework="np") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                said = file.metadata()
        except Exception as error:  # OSError, SafetensorError
            raise EqknobsError(f"{where}.codec: cannot read {path} ({error}); fetch it again") from error
        _packed_integers(path, said, shapes, dict.fromkeys(shapes, 0))
        total += 4 * sum(map(math.prod, shapes.values()))
    return total or MIMI_BYTES
