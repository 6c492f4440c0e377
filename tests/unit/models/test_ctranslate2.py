"""The reader of CTranslate2's format and what is made of it, on a model of a few kilobytes."""

import json
import struct

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256
from eqknobs.models.ctranslate2 import convert_whisper, read_variables

WIDTH, LAYERS, HEADS = 8, 2, 2
SPECIALS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>"]
SPECIALS += ["<|nospeech|>", "<|notimestamps|>"]
CONVOLUTIONS = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def small_whisper():
    torch.manual_seed(0)
    sizes = dict(encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS)
    sizes |= dict(decoder_attention_heads=HEADS, encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=80)
    sizes |= dict(max_source_positions=1500, max_target_positions=20, vocab_size=20)
    ids = dict(pad_token_id=10, bos_token_id=10, eos_token_id=10, decoder_start_token_id=11)
    net = WhisperForConditionalGeneration(WhisperConfig(d_model=WIDTH, **sizes, **ids))
    for parameter in net.parameters():  # biases and norms too, which start at zeros and ones
        torch.nn.init.normal_(parameter, std=0.2)
    return net.half().float()


def theirs(net):
    """The variables that CTranslate2 would have for a model of transformers."""
    state = {name: value.detach().numpy().astype(np.float16) for name, value in net.model.state_dict().items()}
    out = {}

    def stack(old, new, names):
        for part in ("weight", "bias"):
            rows = [state.get(f"{new}.{name}.{part}", np.zeros(WIDTH, np.float16)) for name in names]
            out[f"{old}/{part}"] = np.concatenate(rows)

    def norm(old, new):
        out[f"{old}/gamma"], out[f"{old}/beta"] = state[f"{new}.weight"], state[f"{new}.bias"]

    for side in ("encoder", "decoder"):
        out[f"{side}/num_heads"] = np.array(HEADS, np.int16)
        out[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(LAYERS):
            old, new = f"{side}/layer_{i}", f"{side}.layers.{i}"
            stack(f"{old}/self_attention/linear_0", f"{new}.self_attn", ["q_proj", "k_proj", "v_proj"])
            stack(f"{old}/self_attention/linear_1", f"{new}.self_attn", ["out_proj"])
            norm(f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
            if side == "decoder":
                stack(f"{old}/attention/linear_0", f"{new}.encoder_attn", ["q_proj"])
                stack(f"{old}/attention/linear_1", f"{new}.encoder_attn", ["k_proj", "v_proj"])
                stack(f"{old}/attention/linear_2", f"{new}.encoder_attn", ["out_proj"])
                norm(f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
            for part in ("weight", "bias"):
                out[f"{old}/ffn/linear_0/{part}"] = state[f"{new}.fc1.{part}"]
                out[f"{old}/ffn/linear_1/{part}"] = state[f"{new}.fc2.{part}"]
            norm(f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    out |= {f"encoder/{name}".replace(".", "/"): state[f"encoder.{name}"] for name in CONVOLUTIONS}
    out["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    return out


def text(name):
    raw = name.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def written(variables, aliases=(), spec="WhisperSpec", version=6):
    out = [struct.pack("<I", version), text(spec), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        out += [text(name), struct.pack("<B", value.ndim), struct.pack(f"<{value.ndim}I", *value.shape)]
        out += [struct.pack("<BI", TYPES[str(value.dtype)], value.nbytes), value.tobytes()]
    out += [struct.pack("<I", len(aliases)), *(text(a) + text(b) for a, b in aliases)]
    return b"".join(out)


@pytest.fixture(scope="module")
def net():
    return small_whisper()


@pytest.fixture
def folder(net, tmp_path):
    """A CTranslate2 folder, its weights in two pieces."""
    data = written(theirs(net), [("decoder/projection/weight", "decoder/embeddings/weight")])
    (tmp_path / "part1").write_bytes(data[:5001])
    (tmp_path / "part2").write_bytes(data[5001:])
    (tmp_path / "whole").write_bytes(data)
    config = {"suppress_ids": [3, 1], "suppress_ids_begin": [2, 10], "alignment_heads": [[1, 0]], "lang_ids": [12]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = [{"id": 10 + i, "content": word} for i, word in enumerate(SPECIALS)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    return tmp_path


def test_variables_of_a_file_and_of_its_pieces(net, folder):
    spec, variables = read_variables([folder / "part1", folder / "part2"])
    assert spec == "WhisperSpec" and variables["encoder/num_heads"] == HEADS
    assert variables["decoder/projection/weight"] is variables["decoder/embeddings/weight"]
    assert all(np.array_equal(variables[name], value) for name, value in theirs(net).items())
    assert read_variables([folder / "whole"], file_sha256(folder / "whole"))[1].keys() == variables.keys()


def test_converted_model_is_the_model(net, folder):
    out = folder / "out"
    convert_whisper([folder / "part1", folder / "part2"], folder, out)
    made, info = WhisperForConditionalGeneration.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    features, tokens = torch.randn(1, 80, 3000), torch.tensor([[11, 17, 4]])
    with torch.inference_mode():
        ours, own = (m.eval()(features, decoder_input_ids=tokens).logits for m in (made, net))
    assert torch.equal(ours, own)
    generation = made.generation_config
    assert generation.decoder_start_token_id == 11 and generation.no_timestamps_token_id == 17
    assert generation.suppress_tokens == [1, 3] and generation.is_multilingual is False
    before = file_sha256(out / "model.safetensors")
    convert_whisper([folder / "whole"], folder, out)
    assert file_sha256(out / "model.safetensors") == before


def test_bfloat16(tmp_path):
    value = np.array([1.5, -2.0, 0.0], np.float32)
    data = written({"x": (value.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)})
    (tmp_path / "model.bin").write_bytes(data.replace(struct.pack("<BI", 2, 6), struct.pack("<BI", 5, 6)))
    assert np.array_equal(read_variables([tmp_path / "model.bin"])[1]["x"], value)


def refused(folder, data, match):
    (folder / "bad").write_bytes(data)
    with pytest.raises(EqknobsError, match=match) as error:
        convert_whisper([folder / "bad"], folder, folder / "out")
    assert "\n" not in str(error.value) and not (folder / "out").exists()


def test_bad_files_are_refused_in_one_line(net, folder):
    whole = (folder / "whole").read_bytes()
    for size in (0, 3, 40, 5001, len(whole) - 1):
        refused(folder, whole[:size], "cut short|is no CTranslate2 model")
    refused(folder, whole + b"x", "1 bytes behind its end")
    refused(folder, written(theirs(net), version=7), "of format 6")
    refused(folder, written(theirs(net), spec="TransformerSpec"), "not a Whisper")
    refused(folder, written(theirs(net), [("a", "nowhere")]), "stands for nowhere")
    refused(folder, whole.replace(b"encoder/conv1/bias", b"encoder/conv1/bios"), "no variable encoder/conv1/bias")
    refused(folder, written(theirs(net) | {"a/weight_scale": np.ones(2, np.float32)}), "quantised to integers")
    refused(folder, whole.replace(b"encoder/conv1/bias", b"encoder/conv1/\xffias"), "damaged")
    with pytest.raises(EqknobsError, match="not the pinned"):
        read_variables([folder / "whole"], "0" * 64)
    with pytest.raises(EqknobsError, match="cannot be read"):
        read_variables([folder / "nowhere"])
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    refused(folder, whole, r"lack '<\|endoftext\|>'")
    (folder / "tokenizer.json").unlink()
    refused(folder, whole, "tokenizer.json: is not to be read")
