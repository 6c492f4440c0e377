"""Training of a small Moshi from scratch on speech with word times; teacher forcing, all streams at once.

Two phases: `copy_steps` on sequences without sound in which the prompt's words are said again, easy ones first, because
a small model does not find out from speech alone that its prompt says what to say (docs/tiny-moshi.md); then `steps` on
speech, with some sequences without sound in every batch. Loss: 3 x text + audio, each codebook with a weight.

Everything random is drawn from (seed, step), so the step number is the whole state of the data cursor and of the random
number generators, and a resumed run equals an uninterrupted one on the same clips.
"""

import copy
import json
import os
import random
import shutil
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pandas as pd
import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256, write_json
from eqknobs.models.mimi import Mimi
from eqknobs.models.moshi.checkpoint import find_files, load_net, save_net
from eqknobs.models.moshi.config import MoshiConfig
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.speaking.clips import (
    SPECIAL,
    Sequences,
    collate,
    encode_speech,
    read_clips,
    sounds,
    write_tokeniser,
)
from eqknobs.stages.speech_lm_training.circuit import write_copying

TEXT_WEIGHT = 3.0
PAD_WEIGHT = 0.5  # of frames in which no word begins, within the text's loss
TOKENISER = "tokenizer_words.model"


class DropCfg(TypedDict):
    """Shares of the input that are hidden in training."""

    tokens: float  # of the agent's codes
    frames: float  # of its frames
    depformer: float  # of the codes that the depformer is given


class SpeechLMTrainingCfg(TypedDict):
    """What `train` reads: of the section `speech_lm_training`, and the run's seed."""

    seed: int
    speech: str  # a folder, see `data`
    codec: str
    levels: int
    start: NotRequired[str]  # the folder of an earlier leg
    model: dict[str, int]  # sizes
    batch: int
    copy_rows: int
    voice_prompts: float
    steps: int
    learning_rate: float
    copy_steps: int
    copy_batch: int
    copy_easy: float
    copy_learning_rate: float
    warmup: int
    decay: float
    weight_decay: float
    drop: DropCfg
    codebook_weights: list[float]
    log_every: int
    validation: int
    bfloat16: bool
    device: NotRequired[str]
    content: NotRequired[Any]  # digests, which decide when to train again, not how


def new_net(config: MoshiConfig, seed: int) -> MoshiNet:
    """A network whose streams add up to about one, with small outputs, and that copies its prompt (`circuit`).

    With PyTorch's embeddings of variance 1 the sum of the streams drowns each of them.
    """
    torch.manual_seed(seed)
    net = MoshiNet(config)
    with torch.no_grad():
        for stream, embedding in enumerate(cast(Sequence[nn.Embedding], net.emb), start=1):
            embedding.weight.normal_(0, 0.1 if stream < config.user.start else 0.02)
        for embedding in (net.text_emb, net.depformer_text_emb, *cast(Sequence[nn.Embedding], net.depformer_emb)):
            embedding.weight.normal_(0, 0.2)
        for name, weight in net.named_parameters():
            if "out_proj" in name or "linear_out" in name or name.startswith("linears"):
                weight.mul_(0.3)
    if config.dim >= 128:
        write_copying(net, SPECIAL)
    return net


def bfloat16_linears(net: MoshiNet) -> None:
    """Let linears multiply in bfloat16, with float32 outside: on a CPU with AMX a step takes two thirds of the time.

    Autocast would run attention in bfloat16 too, whose gradient is ten times as slow there.
    """

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16()).float()

    for module in net.modules():
        if isinstance(module, nn.Linear):
            vars(module)["forward"] = types.MethodType(forward, module)


def losses(
    net: MoshiNet, codes: Tensor, dialogue: Tensor, drop: DropCfg | None = None, generator: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropies of the dialogue's frames: text [n], the tokens due [n], those expected [n], audio [8].

    codes [B, streams, T]; dialogue [B, T]; what is dropped is drawn from the generator. Audio is averaged over frames
    with sound; NaN where there is none.
    """
    agent, card = net.config.agent, net.config.card
    columns = net.columns(codes)
    inputs, targets = columns[:, :, :-1].clone(), columns[:, :, 1:].transpose(1, 2)
    if drop:
        batch, _, steps = inputs.shape
        hide = torch.rand(batch, net.config.codebooks, steps, generator=generator) < drop["tokens"]
        hide |= torch.rand(batch, 1, steps, generator=generator) < drop["frames"]
        inputs[:, agent] = inputs[:, agent].masked_fill(hide, -1)
    hidden = net.temporal(net.embed(inputs))
    due = targets[:, :, 0][dialogue]
    logits = net.text_linear(hidden[dialogue])
    text = F.cross_entropy(logits, due, reduction="none")
    sound = dialogue & (codes[:, agent.start] >= 0)
    if not sound.any():
        return text, due, logits.argmax(-1), text.new_full((net.config.codebooks,), float("nan"))
    wanted = targets[sound]
    given = wanted.clone()
    if drop:
        hide = torch.rand(len(wanted), net.config.codebooks, generator=generator) < drop["depformer"]
        given[:, agent] = given[:, agent].masked_fill(hide, -1)
    audio = net.audio_logits(hidden[sound][:, None], given[..., None])[:, :, 0]
    wanted = wanted[:, agent]
    real = (wanted >= 0) & (wanted < card)
    entropies = F.cross_entropy(audio.transpose(1, 2), wanted.clamp(0, card - 1), reduction="none") * real
    return text, due, logits.argmax(-1), entropies.sum(0) / real.sum(0).clamp(min=1)


def batch_of(step: int, cfg: SpeechLMTrainingCfg, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The batch of a step: before `copy_steps` without sound; then clips of about one length and a few without."""
    rng = random.Random(f"{cfg['seed']}-{step}")
    if step < cfg["copy_steps"]:
        ease = min(1.0, max(0.0, 2 - step / (cfg["copy_easy"] * cfg["copy_steps"])))  # easy, then a line to hard
        return collate([sequences.copying(rng, ease) for _ in range(cfg["copy_batch"])])
    size, clips = cfg["batch"], sequences.clips
    epoch, place = divmod(step - cfg["copy_steps"], max(1, len(clips) // size))
    order = random.Random(f"{cfg['seed']}-epoch-{epoch}")
    ranked = sorted(range(len(clips)), key=lambda i: clips[i].codes.shape[2] + order.uniform(-4, 4))
    starts = list(range(0, max(1, len(clips) // size * size), size))
    order.shuffle(starts)
    chosen = ranked[starts[place] : starts[place] + size]
    voice_frames = rng.randint(10, 25) if rng.random() < cfg["voice_prompts"] else 0
    rows = [sequences.draw(clips[i], voice_frames, rng) for i in chosen]
    return collate(rows + [sequences.copying(rng, 0.0) for _ in range(cfg["copy_rows"])])


def learning_rate(cfg: SpeechLMTrainingCfg, step: int) -> float:
    """Warm-up, then the peak, then over the last `decay` of the phase a line to nothing (to a fifth, of copying)."""
    speech = step >= cfg["copy_steps"]
    peak, length = (cfg["learning_rate"], cfg["steps"]) if speech else (cfg["copy_learning_rate"], cfg["copy_steps"])
    at = step - cfg["copy_steps"] if speech else step
    left = (length - at) / (cfg["decay"] * length)
    return peak * min(1.0, (at + 1) / cfg["warmup"], left if speech else max(0.2, left))


def right(due: Tensor, expected: Tensor) -> float:
    """Share of the words due that are expected."""
    word = due >= SPECIAL
    return (expected == due)[word].float().mean().item()


@torch.no_grad()
def validate(net: MoshiNet, sequences: Sequences, rows: int) -> dict[str, float]:
    """Teacher-forced figures on held-out clips, each with its text and a voice as prompt.

    text: nats a frame; words: share of the words that come at the right frame; copied: the same of sequences without
    sound; codebook_1 ...: nats.
    """
    net.eval()
    totals: list[dict[str, float]] = []
    chosen = sorted(sequences.clips[:rows], key=lambda clip: clip.codes.shape[2])
    for first in range(0, len(chosen), 16):
        items = []
        for clip in chosen[first : first + 16]:
            rng = random.Random(clip.text)
            prompt = sequences.prompt(clip.text, sequences.voice_codes(clip.voice, 20, rng))
            items.append((torch.cat([prompt, sequences.spoken(clip)], 1), prompt.shape[1]))
        text, *words, audio = losses(net, *collate(items))
        silent = collate([sequences.copying(random.Random(first + i), 0.0) for i in range(16)])
        figures = {"text": text.mean().item(), "words": right(*words), "copied": right(*losses(net, *silent)[1:3])}
        totals.append(figures | {f"codebook_{k + 1}": value for k, value in enumerate(audio.tolist())})
    net.train()
    return pd.DataFrame(totals).mean().to_dict()


def begin(cfg: SpeechLMTrainingCfg, folder: Path, codec: Mimi) -> tuple[MoshiNet, sentencepiece.SentencePieceProcessor]:
    """The network and tokeniser of a first leg or, with `start`, of the leg before.

    Raises EqknobsError if `start` holds a model of other sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokeniser(folder / TOKENISER)
    tokeniser = sentencepiece.SentencePieceProcessor(model_file=str(folder / TOKENISER))
    shape: dict[str, Any] = cfg["model"] | sounds(codec, cfg["model"]["codebooks"])
    config = MoshiConfig(**shape, text_card=len(tokeniser), card=codec.config.codebook_size)
    if not cfg.get("start"):
        return new_net(config, cfg["seed"]), tokeniser
    files = find_files("start", cfg["start"])
    net = load_net(files)
    ours = None if files.tokenizer is None else file_sha256(files.tokenizer)
    if net.config != config or ours != file_sha256(folder / TOKENISER):
        raise EqknobsError(f"speech_lm_training.start: {cfg['start']} has other sizes, sounds or words than the config")
    for weight in net.parameters():
        weight.data = weight.data.clone()  # not the file's own pages
    return net.requires_grad_(True), tokeniser


def adam(net: MoshiNet, decay: float) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices but embeddings."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, weight in net.named_parameters():
        groups[weight.ndim == 2 and "emb" not in name].append(weight)
    options = [{"params": groups[True], "weight_decay": decay}, {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(options, betas=(0.9, 0.95), fused=True)


def train(cfg: SpeechLMTrainingCfg, out: str | Path, work: str | Path, stop_after: int | None = None) -> None:
    """Train and write a checkpoint folder that `kind: moshi` reads to `out`, resuming from what is in `work`.

    New clips in the folder are taken up when training is started again. `stop_after`: end at that step, after a
    checkpoint.

    Raises EqknobsError: bad speech, a checkpoint of another seed or model, a loss that is not finite.
    """
    out, work = Path(out), Path(work)
    codec = Mimi({"name": "codec", "kind": "mimi", "path": cfg["codec"], "device": "cpu"})
    net, tokeniser = begin(cfg, work, codec)
    encode_speech(cfg["speech"], work / "codes.npz", codec, net.config.codebooks, cfg["levels"], cfg["seed"])
    parts = read_clips(cfg["speech"], work / "codes.npz")
    if len(parts["train"]) < cfg["batch"] or not parts["val"]:
        raise EqknobsError(f"{cfg['speech']}: too few clips to train on and to validate with; add more")
    training, validation = (Sequences(parts[part], tokeniser, net.config) for part in ("train", "val"))
    if cfg["bfloat16"]:
        bfloat16_linears(net)
    optimizer = adam(net, cfg["weight_decay"])
    identity = json.dumps(cfg["model"] | {"seed": cfg["seed"], "start": cfg.get("start")}, sort_keys=True)
    done, log, running = 0, [], []
    if (work / "checkpoint.pt").exists():
        state = torch.load(work / "checkpoint.pt", weights_only=True)
        if state["identity"] != identity:
            raise EqknobsError(f"{work / 'checkpoint.pt'}: of another model, seed or start; delete it")
        done, log = state["step"], state["log"]
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    total = cfg["copy_steps"] + cfg["steps"]
    for step in range(done, total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        running.append(update(net, optimizer, step, cfg, training))
        last = step + 1 in (cfg["copy_steps"], total, stop_after)
        if (step + 1) % cfg["log_every"] == 0 or last:
            facts = {"step": step + 1, "clips": len(parts["train"]), "learning_rate": learning_rate(cfg, step)}
            log.append(facts | {"loss": float(np.mean(running))} | validate(net, validation, cfg["validation"]))
            running = []
            print(" ".join(f"{k} {v:.4g}" for k, v in log[-1].items()), flush=True)
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "log": log}
            with atomic_path(work / "checkpoint.pt") as temporary:
                torch.save(state | {"identity": identity}, temporary)
        if step + 1 == stop_after:
            break
    export(net, out, cfg, work / TOKENISER, log)


def update(
    net: MoshiNet, optimizer: torch.optim.Optimizer, step: int, cfg: SpeechLMTrainingCfg, data: Sequences
) -> float:
    """One step of the optimizer; returns the loss. Raises EqknobsError if it is not finite."""
    return descend(net, optimizer, step, cfg, *batch_of(step, cfg, data))


def descend(
    net: MoshiNet,
    optimizer: torch.optim.Optimizer,
    step: int,
    cfg: SpeechLMTrainingCfg,
    codes: Tensor,
    dialogue: Tensor,
) -> float:
    """`update` on a batch: codes [B, streams, T], of which dialogue [B, T] is learnt."""
    generator = torch.Generator().manual_seed((cfg["seed"] << 32) + step)
    text, due, _, audio = losses(net, codes, dialogue, cfg["drop"], generator)
    loss = TEXT_WEIGHT * (text * torch.where(due == net.config.pad, PAD_WEIGHT, 1.0)).mean()
    if not audio.isnan().any():
        loss = loss + (audio * torch.tensor(cfg["codebook_weights"])).sum()
    if not torch.isfinite(loss):
        raise EqknobsError(f"speech LM training: the loss is not finite at step {step}; lower the learning rate")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def export(net: MoshiNet, out: Path, cfg: SpeechLMTrainingCfg, tokeniser: Path, log: list[dict[str, Any]]) -> None:
    """Write the checkpoint in half precision, with training.json and log.csv. Other files of `out` stay as they are."""
    before = Path(cfg["start"]) / "training.json" if cfg.get("start") else None
    facts = {
        "config": {key: value for key, value in cfg.items() if key not in ("speech", "codec", "start", "scores")},
        "clips": log[-1]["clips"] if log else 0,
        "steps_done": log[-1]["step"] if log else 0,
        **({"before": json.loads(before.read_text())} if before and before.is_file() else {}),
    }
    finished = out.with_name(f"{out.name}.new")
    save_net(copy.deepcopy(net).half(), finished, tokeniser, os.path.relpath(cfg["codec"], out))
    write_json(finished / "training.json", facts)
    pd.DataFrame(log).to_csv(finished / "log.csv", index=False, float_format="%.5g", lineterminator="\n")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(finished.iterdir()):
        path.chmod(0o644)
        os.replace(path, out / path.name)
    shutil.rmtree(finished)
