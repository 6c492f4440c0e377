"""Sizes of a Moshi checkpoint, from its config.json or, where that says nothing, from its tensors' shapes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eqknobs.errors import EqknobsError

FRAME_RATE = 12.5  # Hz
# PersonaPlex was trained with these codes (NVIDIA/personaplex, models/lm.py) for an agent that keeps silent and for a
# user who is not there yet, a 440 Hz sine; both were made by Mimi, so other Moshi models read them as such sounds.
PERSONA_SILENCE = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
PERSONA_SINE = (430, 1268, 381, 1611, 1095, 1495, 56, 472)
TEMPORAL_LINEARS = ("transformer.layers.*",)
ALL_LINEARS = ("*",)

# What a config may say of the architecture, and the only values this implementation knows.
_FIXED: dict[str, tuple] = {
    "norm": ("rms_norm_f32",),
    "gating": ("silu",),
    "depformer_gating": ("silu",),
    "positional_embedding": ("rope",),
    "depformer_pos_emb": ("none",),
    "depformer_multi_linear": (True,),
    "depformer_weights_per_step": (True,),
    "causal": (True,),
    "layer_scale": (None,),
    "depformer_layer_scale": (None,),
    "depformer_weights_per_step_schedule": (None,),
    "depformer_low_rank_embeddings": (None,),
    "depformer_norm": (None,),
    "conditioners": (None, {}),
    "cross_attention": (None, False),
    "demux_second_stream": (None, False),
    "demux_second_text_stream": (None, False),
    "bias_proj": (None, False),
    "norm_emb": (None, False),
    "lora": (None, False),
    "quantize": (None, False),
    "kv_repeat": (None, 1),
    "extra_heads_num_heads": (None, 0),
    "text_card_out": (None,),
}
# May be left out: the moshi package then takes a value that is among those above.
_OPTIONAL = {key for key, allowed in _FIXED.items() if None in allowed} | {"causal", "depformer_gating"}


@dataclass(frozen=True)
class MoshiConfig:
    """Sizes of the temporal transformer and the depformer (Défossez et al. 2024, arXiv 2410.00037, section 3.4)."""

    dim: int
    layers: int
    heads: int
    hidden: int  # of the gated feed-forward layer
    dep_dim: int
    dep_layers: int
    dep_heads: int
    dep_hidden: int
    text_card: int
    context: int = 3000  # columns that attention sees
    max_period: float = 10000.0
    delays: tuple[int, ...] = (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
    pad: int = 3  # text token "nothing is said"
    epad: int = 0  # text token "the next word begins"
    card: int = 2048  # codes of each codebook
    codebooks: int = 8  # of each speaker; as many depformer steps are kept
    silence: tuple[int, ...] = PERSONA_SILENCE  # a speaker's codes who keeps silent
    sine: tuple[int, ...] = PERSONA_SINE  # and of a user who is not there

    def __post_init__(self) -> None:
        if any(getattr(self, f.name) < 1 for f in fields(self) if f.type is int and f.name not in ("pad", "epad")):
            raise EqknobsError(f"Moshi config: sizes must be positive: {self}")
        if self.dim % self.heads or self.dep_dim % self.dep_heads or self.dim // self.heads % 2:
            raise EqknobsError("Moshi config: heads must divide dim into even parts, and depformer heads depformer_dim")
        if len(self.delays) != self.streams or self.delays[0] or not {0, 1}.issuperset(self.delays):
            raise EqknobsError(f"Moshi config: delays must be {self.streams} values 0 or 1, text 0; got {self.delays}")
        if any(len(s) != self.codebooks or not 0 <= min(s) <= max(s) < self.card for s in (self.silence, self.sine)):
            raise EqknobsError(
                f"Moshi config: eqknobs.silence and eqknobs.sine must be {self.codebooks} codes below {self.card}, "
                f"those of the model's codec; got {self.silence} and {self.sine}"
            )

    @property
    def streams(self) -> int:
        """Of the grid [B, streams, T]: stream 0 is text."""
        return 1 + 2 * self.codebooks

    @property
    def agent(self) -> slice:
        return slice(1, 1 + self.codebooks)

    @property
    def user(self) -> slice:
        return slice(1 + self.codebooks, self.streams)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def kv_bytes(self, columns: int, itemsize: int, heads: int | None = None) -> int:
        """Bytes of keys and values, batch 1; `heads`: those left in all layers together, by default all."""
        heads = self.layers * self.heads if heads is None else heads
        return 2 * heads * self.head_dim * min(columns, self.context) * itemsize


@dataclass(frozen=True)
class Nf4:
    """Which linears are packed, and how.

    linears: patterns of module names (`transformer.layers.*`); block: values that share a scale; double: scales are
    themselves kept in 8 bits, .4 bits a weight less, but removing heads then moves the other weights a little.
    """

    linears: tuple[str, ...] = TEMPORAL_LINEARS
    block: int = 64
    double: bool = True

    def covers(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.linears)

    @classmethod
    def of(cls, value: bool | dict[str, Any] | None, where: str = "nf4") -> "Nf4 | None":
        """What a model's key `nf4` says: true, a mapping of the fields above, or nothing.

        Raises EqknobsError, naming `where`, for another field.
        """
        if value is None or value is False:
            return None
        given = {} if value is True else value
        if unknown := given.keys() - {"linears", "block", "double"}:
            raise EqknobsError(f"{where}: no option {min(unknown)}; there are linears, block, double")
        return cls(**given | ({"linears": tuple(given["linears"])} if "linears" in given else {}))


def gated_hidden(dim: int, feedforward: int) -> int:
    """Width of a gated feed-forward layer whose config says `feedforward` (moshi's modules/gating.py)."""
    return 21 * dim // 8 if feedforward == 4 * dim else 2 * feedforward // 3


def read_raw(path: Path, where: str) -> dict[str, Any]:
    """A checkpoint's config.json as it is. Raises EqknobsError, naming `where`, for anything else."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EqknobsError(f"{where}: cannot read {path} ({error}); is this a whole checkpoint?") from error
    if not isinstance(raw, dict) or not all(
        isinstance(raw.get(key, ""), str) for key in ("moshi_name", "tokenizer_name")
    ):
        raise EqknobsError(f"{where}: {path} is not a Moshi config; take the model's own file")
    return raw


def codec_of(model: Mapping[str, Any], config_file: Path | None, where: str) -> str:
    """Folder or hub id of a model's codec: `codec` of its configuration, else what its own config.json says.

    That is `eqknobs.codec`, a folder relative to the model's; a model of kyutai's or NVIDIA's says nothing and has
    kyutai/mimi. Raises EqknobsError, naming `where`, for an unreadable config.json.
    """
    if model.get("codec") or config_file is None:
        return str(model.get("codec") or "kyutai/mimi")
    named = read_raw(config_file, where).get("eqknobs", {}).get("codec")
    return str(config_file.parent / named) if named else "kyutai/mimi"


def heads_left(raw: dict[str, Any], config: MoshiConfig, where: str) -> tuple[tuple[int, ...], ...]:
    """Layer by layer, the numbers of the heads that a saved model has left; of one from the hub, all.

    Raises EqknobsError, naming `where`, for a list that cannot be.
    """
    every = range(config.heads)
    try:
        heads = tuple(map(tuple, raw["eqknobs"]["heads"] if "eqknobs" in raw else [every] * config.layers))
        if len(heads) == config.layers and all(kept == tuple(h for h in every if h in kept) for kept in heads):
            return heads
    except (KeyError, TypeError):
        pass
    raise EqknobsError(
        f"{where}: config.json's eqknobs.heads must name, for each of {config.layers} layers, which of "
        f"{config.heads} heads are left; save the model again"
    )


def steps_left(raw: Mapping[str, Any], config: MoshiConfig) -> int:
    """Steps of the depformer of the agent that speaks: fewer than codebooks where a saved model was shortened."""
    return min(int(raw.get("dep_q", config.codebooks)), config.codebooks)


def read_config(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: str) -> MoshiConfig:
    """The sizes in kyutai's config.json; one without `dim`, as PersonaPlex's, gets them from the tensors' shapes.

    The shapes leave open what PersonaPlex took over from Moshi: heads of 128 (depformer 64), context, period, delays.
    Raises EqknobsError, naming `where`, for an architecture that this implementation does not know.
    """
    if "dim" not in raw:
        return _from_shapes(shapes, where)
    for key, allowed in _FIXED.items():
        if key not in raw and key in _OPTIONAL:
            continue
        if raw.get(key) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise EqknobsError(f"{where}: config.json has {key} {raw.get(key)!r}, supported is {wanted}")
    try:
        dim, dep_dim = int(raw["dim"]), int(raw["depformer_dim"])
        scale, codebooks = float(raw["hidden_scale"]), int(raw["n_q"]) // 2
        if raw["n_q"] != 2 * codebooks or not (1 <= raw["dep_q"] <= codebooks or raw["dep_q"] == 2 * codebooks):
            raise EqknobsError(
                f"{where}: config.json has n_q {raw['n_q']} and dep_q {raw['dep_q']}, supported are two speakers: an "
                "even n_q, and dep_q as many, half, or fewer where the depformer was shortened"
            )
        ours = raw.get("eqknobs", {})
        sounds = {key: tuple(map(int, ours[key])) for key in ("silence", "sine") if key in ours}
        dep_feedforward = raw.get("depformer_dim_feedforward")
        return MoshiConfig(
            dim=dim,
            layers=int(raw["num_layers"]),
            heads=int(raw["num_heads"]),
            hidden=gated_hidden(dim, int(scale * dim)),
            dep_dim=dep_dim,
            dep_layers=int(raw["depformer_num_layers"]),
            dep_heads=int(raw["depformer_num_heads"]),
            dep_hidden=gated_hidden(dep_dim, int(scale * dep_dim) if dep_feedforward is None else int(dep_feedforward)),
            text_card=int(raw["text_card"]),
            context=int(raw["context"]),
            max_period=float(raw.get("max_period", 10000)),
            delays=tuple(raw["delays"]),
            pad=int(raw.get("existing_text_padding_id", 3)),
            epad=int(raw.get("existing_text_end_padding_id", 0)),
            card=int(raw["card"]),
            codebooks=codebooks,
            **sounds,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EqknobsError(
            f"{where}: config.json is not a Moshi config ({type(error).__name__}: {error}); take the model's own file"
        ) from error


def _from_shapes(shapes: dict[str, tuple[int, ...]], where: str) -> MoshiConfig:
    try:
        text, dim = shapes["text_emb.weight"]
        dep_dim = shapes["depformer_text_emb.weight"][1]
        hidden = shapes["transformer.layers.0.gating.linear_out.weight"][1]
        dep_hidden = shapes["depformer.layers.0.gating.0.linear_out.weight"][1]
    except (KeyError, ValueError) as error:
        raise EqknobsError(
            f"{where}: neither config.json nor the tensors say what model this is (no {error}); not Moshi's keys"
        ) from error
    counts = [
        sum(f"{stack}.layers.{i}.norm1.alpha" in shapes for i in range(999)) for stack in ("transformer", "depformer")
    ]
    return MoshiConfig(
        dim=dim,
        layers=counts[0],
        heads=dim // 128,
        hidden=hidden,
        dep_dim=dep_dim,
        dep_layers=counts[1],
        dep_heads=dep_dim // 64,
        dep_hidden=dep_hidden,
        text_card=text - 1,
    )


def raw_config(config: MoshiConfig) -> dict[str, Any]:
    """A config.json in kyutai's terms for these sizes (the inverse of `read_config`)."""

    def feedforward(dim: int, hidden: int) -> int:
        found = next(f for f in range(3 * hidden // 2, 3 * hidden // 2 + 3) if 2 * f // 3 == hidden)
        return 4 * dim if 21 * dim // 8 == hidden else found

    return {
        "dim": config.dim,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "hidden_scale": feedforward(config.dim, config.hidden) / config.dim,
        "depformer_dim": config.dep_dim,
        "depformer_num_layers": config.dep_layers,
        "depformer_num_heads": config.dep_heads,
        "depformer_dim_feedforward": feedforward(config.dep_dim, config.dep_hidden),
        "text_card": config.text_card,
        "context": config.context,
        "max_period": config.max_period,
        "delays": list(config.delays),
        "existing_text_padding_id": config.pad,
        "existing_text_end_padding_id": config.epad,
        "card": config.card,
        "n_q": 2 * config.codebooks,
        "dep_q": config.codebooks,
    } | {key: allowed[0] for key, allowed in _FIXED.items() if None not in allowed}
