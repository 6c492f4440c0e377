"""Whisper in CTranslate2's format, as the recogniser's package holds it, turned into transformers'.

A file is little-endian: u32 version, the name of a specification, u32 its revision, u32 number of variables; a variable
is its name, u8 rank, u32 sizes, u8 type, u32 bytes, data; then u32 number of aliases, each two names. A name is u16
length, a closing zero included, and its bytes.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, require_output

VERSION = 6
TYPES = (np.dtype("<f4"), np.dtype("i1"), np.dtype("<i2"), np.dtype("<i4"), np.dtype("<f2"), "bfloat16")
# Module of a layer in CTranslate2 -> in transformers; the projections of attention come apart, see `_attention`.
NORMS = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}
FEED_FORWARD = {"ffn/linear_0": "fc1", "ffn/linear_1": "fc2"}
FIRST_MULTILINGUAL = 51865  # tokens; English models have one less


class _Reader:
    def __init__(self, name: str, data: bytes):
        self.name, self.data, self.place = name, data, 0

    def take(self, size: int) -> memoryview:
        if self.place + size > len(self.data):
            raise EqknobsError(
                f"{self.name}: cut short: {size} bytes wanted at {self.place}, {len(self.data)} are there; "
                "fetch it again, or give all its parts in order"
            )
        self.place += size
        return memoryview(self.data)[self.place - size : self.place]

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        raw = bytes(self.take(self.number("H"))).removesuffix(b"\0")
        try:
            return raw.decode("ascii")
        except UnicodeDecodeError:
            raise EqknobsError(
                f"{self.name}: no name at byte {self.place}: the file is damaged; fetch it again"
            ) from None

    def variable(self) -> tuple[str, np.ndarray]:
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind, size = self.number("B"), self.number("I")
        if kind >= len(TYPES):
            raise EqknobsError(f"{self.name}: {name} is of type {kind}, which is not known; fetch the file again")
        dtype = np.dtype("<u2") if TYPES[kind] == "bfloat16" else np.dtype(TYPES[kind])
        if size != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise EqknobsError(f"{self.name}: {name} has {size} bytes, not those of {shape}; fetch the file again")
        values = np.frombuffer(self.take(size), dtype).reshape(shape)
        if TYPES[kind] == "bfloat16":  # numpy has none: the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return name, values


def read_variables(parts: Sequence[str | Path], sha256: str | None = None) -> tuple[str, dict[str, np.ndarray]]:
    """Name of the specification ("WhisperSpec") and the variables of a `model.bin`, aliases included.

    parts: the file, or its pieces in order; sha256: what all together must have. Arrays are read-only and have the
    file's types, but bfloat16, which becomes float32. Raises EqknobsError, one line: no such file, another hash, not
    CTranslate2's format, another version of it, a file that is cut, damaged or longer than it says.
    """
    name = str(parts[0])
    try:
        data = b"".join(Path(part).read_bytes() for part in parts)
    except OSError as error:
        raise EqknobsError(
            f"{error.filename}: cannot be read ({error.strerror}); give a CTranslate2 model.bin"
        ) from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise EqknobsError(f"{name}: has the SHA-256 {found}, not the pinned {sha256}; install its package again")
    reader = _Reader(name, data)
    version = reader.number("I") if len(data) >= 4 else None
    if version != VERSION:
        raise EqknobsError(f"{name}: is no CTranslate2 model of format {VERSION} (its first number is {version})")
    spec = reader.text()
    reader.number("I")  # revision of the specification
    variables = dict(reader.variable() for _ in range(reader.number("I")))
    for _ in range(reader.number("I")):
        alias, meant = reader.text(), reader.text()
        if meant not in variables:
            raise EqknobsError(f"{name}: {alias} stands for {meant}, which is not there; fetch the file again")
        variables[alias] = variables[meant]
    if reader.place != len(data):
        raise EqknobsError(f"{name}: {len(data) - reader.place} bytes behind its end; give its parts once, in order")
    return spec, variables


def _layers(variables: Mapping[str, np.ndarray], side: str) -> int:
    return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and name.count("/") > 2})


def _linear(found: Mapping[str, np.ndarray], old: str, new: Sequence[str]) -> dict[str, np.ndarray]:
    """Weights and biases of projections that lie stacked in one, under their new names."""
    made = {}
    for part in ("weight", "bias"):
        for name, rows in zip(new, np.split(found[f"{old}/{part}"], len(new)), strict=True):
            if not (part == "bias" and name.endswith("k_proj")):  # zeros: Whisper's keys have none
                made[f"{name}.{part}"] = rows
    return made


def _norm(found: Mapping[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    return {f"{new}.weight": found[f"{old}/gamma"], f"{new}.bias": found[f"{old}/beta"]}


def _attention(found: Mapping[str, np.ndarray], old: str, new: str, across: bool) -> dict[str, np.ndarray]:
    stacks = (
        [["q_proj"], ["k_proj", "v_proj"], ["out_proj"]] if across else [["q_proj", "k_proj", "v_proj"], ["out_proj"]]
    )
    made: dict[str, np.ndarray] = {}
    for i, names in enumerate(stacks):
        made |= _linear(found, f"{old}/linear_{i}", [f"{new}.{name}" for name in names])
    return made


def whisper_tensors(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of a Whisper under the names of transformers' `WhisperForConditionalGeneration`, in the file's types.

    The output projection is tied to the embedding and left out. Raises EqknobsError where a variable is missing, or
    the weights are quantised to integers.
    """
    if quantised := next((name for name in variables if name.endswith("_scale")), None):
        raise EqknobsError(f"{quantised}: the weights are quantised to integers; give the model in float16 or float32")
    found = dict(variables)
    made: dict[str, np.ndarray] = {}
    try:
        for conv in ("conv1", "conv2"):
            made |= {f"model.encoder.{conv}.{part}": found[f"encoder/{conv}/{part}"] for part in ("weight", "bias")}
        made["model.decoder.embed_tokens.weight"] = found["decoder/embeddings/weight"]
        for side in ("encoder", "decoder"):
            made[f"model.{side}.embed_positions.weight"] = found[f"{side}/position_encodings/encodings"]
            made |= _norm(found, f"{side}/layer_norm", f"model.{side}.layer_norm")
            for i in range(_layers(found, side)):
                old, new = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
                made |= _attention(found, f"{old}/self_attention", f"{new}.self_attn", across=False)
                if side == "decoder":
                    made |= _attention(found, f"{old}/attention", f"{new}.encoder_attn", across=True)
                for name, theirs in NORMS.items():
                    if side == "decoder" or name != "attention":
                        made |= _norm(found, f"{old}/{name}/layer_norm", f"{new}.{theirs}")
                for name, theirs in FEED_FORWARD.items():
                    made |= _linear(found, f"{old}/{name}", [f"{new}.{theirs}"])
    except KeyError as error:
        raise EqknobsError(f"the model has no variable {error.args[0]}: it is no whole Whisper") from None
    return made


def whisper_config(variables: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], eot: int) -> dict[str, Any]:
    """Keyword arguments of transformers' `WhisperConfig`, read off shapes. eot: id of `<|endoftext|>`."""
    embedding = tensors["model.decoder.embed_tokens.weight"]
    sizes: dict[str, Any] = {"vocab_size": len(embedding), "d_model": embedding.shape[1]}
    sizes["num_mel_bins"] = tensors["model.encoder.conv1.weight"].shape[1]
    sizes["max_source_positions"] = len(tensors["model.encoder.embed_positions.weight"])
    sizes["max_target_positions"] = len(tensors["model.decoder.embed_positions.weight"])
    for side in ("encoder", "decoder"):
        layers = _layers(variables, side)
        sizes[f"{side}_layers"] = layers
        sizes[f"{side}_ffn_dim"] = len(tensors[f"model.{side}.layers.0.fc1.weight"])
        sizes[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
    sizes["num_hidden_layers"] = sizes["encoder_layers"]
    ids = {"pad_token_id": eot, "bos_token_id": eot, "eos_token_id": eot, "decoder_start_token_id": eot + 1}
    return sizes | ids | {"dtype": "float16", "architectures": ["WhisperForConditionalGeneration"]}


def generation_config(config: Mapping[str, Any], tokens: Mapping[str, int], multilingual: bool) -> dict[str, Any]:
    """Keyword arguments of transformers' `GenerationConfig`. config: CTranslate2's; tokens: ids of special tokens.

    The token of no speech is, as transformers has it, the one before `<|notimestamps|>`.
    """
    eot = tokens["<|endoftext|>"]
    made = {
        "bos_token_id": eot,
        "pad_token_id": eot,
        "eos_token_id": eot,
        "decoder_start_token_id": tokens["<|startoftranscript|>"],
        "no_timestamps_token_id": tokens["<|notimestamps|>"],
        "prev_sot_token_id": tokens["<|startofprev|>"],
        "suppress_tokens": sorted(config["suppress_ids"]),
        "begin_suppress_tokens": sorted(config["suppress_ids_begin"]),
        "alignment_heads": config["alignment_heads"],
        "is_multilingual": multilingual,
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "return_timestamps": False,
    }
    if multilingual:
        spoken = set(config["lang_ids"])
        made["lang_to_id"] = {name: id for name, id in sorted(tokens.items()) if id in spoken}
        made["task_to_id"] = {name: tokens[f"<|{name}|>"] for name in ("transcribe", "translate")}
    return made


def convert_whisper(
    parts: Sequence[str | Path], beside: str | Path, out: str | Path, sha256: str | None = None
) -> None:
    """Write a Whisper of CTranslate2's format as a folder that transformers and `eqknobs.models` load offline.

    parts, sha256: see `read_variables`; beside: the folder of its `config.json` and `tokenizer.json`; out: the folder
    to write, whole or not at all, an earlier one there is replaced. The weights keep their type; the same files make
    the same bytes. Raises EqknobsError, one line, for whatever is missing, damaged or no Whisper.
    """
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor

    require_output(out, folder=True, name="OUT")
    config, tokeniser = (_json(Path(beside) / name) for name in ("config.json", "tokenizer.json"))
    spec, variables = read_variables(parts, sha256)
    if spec != "WhisperSpec":
        raise EqknobsError(f"{parts[0]}: is a CTranslate2 model of kind {spec}, not a Whisper")
    tensors = whisper_tensors(variables)
    try:
        tokens = {token["content"]: int(token["id"]) for token in tokeniser["added_tokens"]}
        sizes = whisper_config(variables, tensors, tokens["<|endoftext|>"])
        generation = generation_config(config, tokens, sizes["vocab_size"] >= FIRST_MULTILINGUAL)
    except (KeyError, TypeError) as error:
        raise EqknobsError(f"{beside}: config.json or tokenizer.json lack {error}; give Whisper's own") from None
    with atomic_path(out) as temporary:
        temporary.mkdir()
        WhisperConfig(**sizes).save_pretrained(temporary)
        GenerationConfig(**generation).save_pretrained(temporary)
        WhisperFeatureExtractor(feature_size=sizes["num_mel_bins"]).save_pretrained(temporary)
        shutil.copyfile(Path(beside) / "tokenizer.json", temporary / "tokenizer.json")
        (temporary / "tokenizer_config.json").write_text(json.dumps(_tokeniser_config(), indent=1))
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})


def _tokeniser_config() -> dict[str, Any]:
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "WhisperTokenizer",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EqknobsError(f"{path}: is not to be read ({error}); it belongs to the CTranslate2 model") from error
