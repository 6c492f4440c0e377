"""Whisper (Radford et al. 2022, arXiv 2212.04356) in transformers: windows of 30 s, cut without overlap.

Its sites are the encoder's layers; its decoder says what it makes of them, edits included.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperModel, WhisperTokenizer

from eqknobs.errors import EqknobsError
from eqknobs.models import ModelCfg
from eqknobs.models.base import LayeredEncoder, captured, inference, one_line, until_last, unwrap

if TYPE_CHECKING:
    from eqknobs.models import SiteEdit

IGNORED = -100  # by `cross_entropy`


@dataclass(frozen=True)
class Heard:
    """What the decoder reads of some clips, edits included.

    states: [windows, positions, width] on the model's device; clips: which clip each window is of, in order, int
    [windows]; count: number of clips.
    """

    states: Tensor
    clips: np.ndarray
    count: int


@dataclass(frozen=True)
class Halfway:
    """What left some of the encoder's layers, before the layers that follow (`Whisper.go_on`).

    acts: site -> [windows, positions, width], the padding to 30 s included, on the CPU; frames: positions that are of
    the clip, int [windows]; clips: as of `Heard`.
    """

    acts: dict[str, Tensor]
    frames: np.ndarray
    clips: np.ndarray


class Said(NamedTuple):
    """What the decoder makes of a window.

    logprob: mean log-probability of its tokens, the end of text included (OpenAI's avg_logprob).
    """

    text: str
    logprob: float
    no_speech_prob: float


class Whisper(LayeredEncoder):
    """Whisper: its encoder's layers, before the final layer norm, and what its decoder makes of them.

    `transcribe`, `no_speech_prob` and `nll` take clips, or what `hear` made of them, so that the encoder runs once for
    all three. Inside `editing` the encoder goes on from what the edit returns (a reconstruction, a steered activation).
    """

    net_class = WhisperModel
    language = "en"  # that multilingual models are told; English models know no other

    def __init__(self, cfg: ModelCfg):
        super().__init__(cfg)
        self._path = str(cfg["path"])
        with one_line(f"models.{self.name}: cannot load the feature extractor of {self._path}"):
            self._extract = WhisperFeatureExtractor.from_pretrained(self._path, revision=self.revision)
        encoder, config = self.net.encoder, self.config
        self.sample_rate = self._extract.sampling_rate
        hop = self._extract.hop_length * encoder.conv1.stride[0] * encoder.conv2.stride[0]
        self.window = config.max_source_positions * hop  # samples
        seconds = self.window / self.sample_rate
        self._set_sites("encoder.layers", config.encoder_layers, config.d_model, hop, seconds)
        self._inside: list[int] = []  # frames of the clip, of each window that the encoder runs just now

    @cached_property
    def generation(self) -> Any:
        """`generation_config.json`: the special tokens, and those that are never said. Raises EqknobsError without."""
        with one_line(f"models.{self.name}: cannot load generation_config.json of {self._path}, which words need"):
            found = GenerationConfig.from_pretrained(self._path, revision=self.revision)
            _ = found.decoder_start_token_id, found.no_timestamps_token_id
            return found

    @cached_property
    def tokenizer(self) -> Any:
        """Whisper's tokeniser; raises EqknobsError where the model's folder has none."""
        with one_line(f"models.{self.name}: cannot load the tokeniser of {self._path}, which words need"):
            return WhisperTokenizer.from_pretrained(self._path, revision=self.revision)

    @property
    def no_speech_token(self) -> int:
        """Id of `<|nospeech|>` (in older tokenisers `<|nocaptions|>`): right before `<|notimestamps|>`."""
        return self.generation.no_timestamps_token_id - 1

    def _prompt(self) -> list[int]:
        """The tokens that a transcription without timestamps begins after."""
        made = self.generation
        spoken = []
        if getattr(made, "is_multilingual", False):
            token = f"<|{self.language}|>"
            if token not in made.lang_to_id:
                raise EqknobsError(f"model {self.name} knows no language {self.language!r}; give a code such as en")
            spoken = [made.lang_to_id[token], made.task_to_id["transcribe"]]
        return [made.decoder_start_token_id, *spoken, made.no_timestamps_token_id]

    # --- the encoder ---

    def _windows(self, wav: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Samples and log-mel spectrogram [1, mels, 2 * positions] of each window, the last one padded."""
        wave = self._wave(wav).cpu().numpy()
        for start in range(0, len(wave), self.window):
            piece = wave[start : start + self.window]
            features = self._extract(piece, sampling_rate=self.sample_rate, return_tensors="pt").input_features
            yield len(piece), features.to(self.device)

    @contextmanager
    def _running(self, samples: Sequence[int]) -> Iterator[None]:
        """The encoder runs windows that hold so many samples of their clips."""
        self._inside = [self.frames(count, "layer.0") for count in samples]
        try:
            yield
        finally:
            self._inside = []

    @contextmanager
    def editing(self, site: str, edit: "SiteEdit", clip_only: bool = False) -> Iterator[None]:
        """See `Model.editing`. The edit gets whole windows [windows, positions, width], the padding to 30 s included.

        clip_only: the frames that stand for padding pass as they are; the edit gets the others, one window at a time
        [1, frames, width].
        """

        def inside(acts: Tensor) -> Tensor:
            if len(self._inside) != len(acts):
                raise EqknobsError(f"model {self.name}: the lengths of the clips are known to its own methods only")
            edited = acts.clone()
            for row, frames in enumerate(self._inside):
                kept = edit(acts[row : row + 1, :frames])
                if kept.shape != (1, frames, acts.shape[2]):
                    shapes = f"{[1, frames, acts.shape[2]]} into {list(kept.shape)}"
                    raise EqknobsError(f"the edit at {self.name}.{site} turned activations {shapes}")
                edited[row, :frames] = kept[0]
            return edited

        with super().editing(site, inside if clip_only else edit):
            yield

    def encode_sites(self, wav: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Activations [frames, width] by site, window after window; what stands for padding is dropped.

        One pass gives all of them, and ends after the last one asked for.
        """
        modules = self._modules(sites)
        out: dict[str, list[Tensor]] = {name: [] for name in modules}
        with inference(), captured(modules, last=[*modules.values()][-1]) as seen:
            for samples, features in self._windows(wav):
                with self._running([samples]):
                    until_last(self.net.encoder, features)
                for name, pieces in out.items():
                    pieces.append(seen[name].pop()[0, : self.frames(samples, name)].cpu())
        return {name: torch.cat(pieces).numpy() for name, pieces in out.items()}

    def hear(self, wavs: Sequence[np.ndarray], batch: int = 1) -> Heard:
        """The encoder's output of clips [samples] each, edits included.

        batch: windows that run at once; on a CPU one by one is the fastest. Raises EqknobsError for an empty clip, or
        none.
        """
        if not len(wavs) or batch < 1:
            raise EqknobsError(f"model {self.name} needs at least one clip and one window at a time")
        todo = ((clip, *window) for clip, wav in enumerate(wavs) for window in self._windows(wav))
        clips: list[int] = []
        states: list[Tensor] = []
        with inference():
            while piece := list(islice(todo, batch)):
                with self._running([samples for _, samples, _ in piece]):
                    features = torch.cat([features for _, _, features in piece])
                    states.append(self.net.encoder(features).last_hidden_state)
                clips += [clip for clip, _, _ in piece]
            return Heard(torch.cat(states), np.array(clips), len(wavs))

    def halfway(self, wavs: Sequence[np.ndarray], sites: Sequence[str]) -> Halfway:
        """What leaves layers of the encoder as it runs over clips [samples] each, so that edits of it need not run what
        came before anew."""
        modules = self._modules(sites)
        kept: dict[str, list[Tensor]] = {name: [] for name in modules}
        frames, clips = [], []
        with inference(), captured(modules, last=[*modules.values()][-1]) as seen:
            for clip, wav in enumerate(wavs):
                for samples, features in self._windows(wav):
                    until_last(self.net.encoder, features)
                    for name in modules:
                        kept[name].append(seen[name].pop().cpu())
                    frames.append(self.frames(samples, "layer.0"))
                    clips.append(clip)
            return Halfway({name: torch.cat(acts) for name, acts in kept.items()}, np.array(frames), np.array(clips))

    def go_on(self, acts: Tensor, site: str) -> Tensor:
        """What the decoder reads, [windows, positions, width], where activations of that shape leave a site."""
        self.site(site)
        encoder = self.net.encoder
        with inference():
            acts = acts.to(self.device)
            for layer in encoder.layers[list(self.sites).index(site) + 1 :]:
                acts = unwrap(layer(acts, attention_mask=None))
            return encoder.layer_norm(acts)

    def _heard(self, clips: Sequence[np.ndarray] | Heard) -> Heard:
        return clips if isinstance(clips, Heard) else self.hear(clips)

    # --- the decoder ---

    def _logits(self, tokens: Tensor, states: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits [windows, tokens, vocabulary] after each of some tokens [windows, tokens], and the decoder's cache."""
        found = self.net.decoder(tokens, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
        return linear(found.last_hidden_state, self.net.decoder.embed_tokens.weight), found.past_key_values

    def transcribe(self, clips: Sequence[np.ndarray] | Heard, max_tokens: int = 224, batch: int = 8) -> list[str]:
        """Words of each clip, decoded greedily without timestamps; of long clips, of its windows one after another.

        max_tokens: at most so many of a window; batch: windows that are decoded at once. Raises EqknobsError without
        `generation_config.json` or a tokeniser.
        """
        room = self.config.max_target_positions - len(self._prompt())
        if not 1 <= max_tokens <= room or batch < 1:
            raise EqknobsError(f"model {self.name} says 1 to {room} tokens a window, not {max_tokens}")
        heard = self._heard(clips)
        said: list[list[str]] = [[] for _ in range(heard.count)]
        pieces = [piece for part in heard.states.split(batch) for piece in self._greedy(part, max_tokens)]
        for clip, piece in zip(heard.clips, pieces, strict=True):
            said[clip].append(piece.text)
        return [" ".join(filter(None, texts)) for texts in said]

    def say(
        self, states: Tensor, max_tokens: int = 224, batch: int = 8, blanks: bool = False, symbols: bool = False
    ) -> list[Said]:
        """What the decoder makes of each window that it reads, [windows, positions, width]; see `transcribe`.

        blanks: the text may end before it begins (OpenAI's suppress_blank off); symbols: brackets, notes and their like
        may be said too, in which Whisper puts what is no speech (OpenAI's suppress_tokens off).
        """
        return [piece for part in states.split(batch) for piece in self._greedy(part, max_tokens, blanks, symbols)]

    def _greedy(self, states: Tensor, max_tokens: int, blanks: bool = False, symbols: bool = False) -> list[Said]:
        """The likeliest tokens of each window.

        By hand, as transformers' `generate` detects languages, reruns what compresses well, and gave loops for a
        multilingual model (5.23).
        """
        made, end = self.generation, self.generation.eos_token_id
        kept = [token for token in made.suppress_tokens or [] if not symbols or token >= end]
        never = torch.tensor(kept, dtype=torch.long, device=states.device)
        begin = [] if blanks else made.begin_suppress_tokens or []
        not_first = torch.tensor(begin, dtype=torch.long, device=states.device)
        tokens = torch.tensor([self._prompt()] * len(states), device=states.device)
        done = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        said: list[Tensor] = []
        nats = torch.zeros(len(states), dtype=torch.float64, device=states.device)
        cache = no_speech = None
        with inference():
            while len(said) < max_tokens and not done.all():
                every, cache = self._logits(tokens, states, cache)
                logits = every[:, -1]
                if no_speech is None:  # after the start of transcript
                    no_speech = every[:, 0].double().softmax(-1)[:, self.no_speech_token]
                logits[:, never] = -torch.inf
                if not said:
                    logits[:, not_first] = -torch.inf
                best = logits.max(-1)
                nats += (logits.logsumexp(-1) - best.values).masked_fill(done, 0.0)
                said.append(best.indices.masked_fill(done, end))
                done |= said[-1] == end
                tokens = said[-1][:, None]
        assert no_speech is not None  # at least one token is asked for
        rows = [[token for token in row if token != end] for row in torch.stack(said, 1).tolist()]
        counts = torch.tensor([len(row) for row in rows], device=nats.device) + done
        return [
            Said(self.tokenizer.decode(row, skip_special_tokens=True).strip(), logprob, unlikely)
            for row, logprob, unlikely in zip(rows, (-nats / counts).tolist(), no_speech.tolist(), strict=True)
        ]

    @contextmanager
    def without_heads(self, heads: Sequence[int]) -> Iterator[None]:
        """The decoder's self-attention without these heads, in every layer: their outputs are zero.

        Raises EqknobsError for a head that is not there.
        """
        count = self.config.decoder_attention_heads
        if bad := [head for head in heads if not 0 <= head < count]:
            raise EqknobsError(f"model {self.name}: its decoder has heads 0 to {count - 1}, not {bad[0]}")

        def mute(_module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            found = inputs[0].unflatten(-1, (count, -1)).clone()
            found[..., list(heads), :] = 0
            return (found.flatten(-2),)

        with ExitStack() as stack:
            for layer in self.net.decoder.layers:
                stack.callback(layer.self_attn.out_proj.register_forward_pre_hook(mute).remove)
            yield

    def no_speech_prob(self, clips: Sequence[np.ndarray] | Heard, batch: int = 8) -> np.ndarray:
        """Probability of `<|nospeech|>` after the start of transcript, float64 [clips]; of long clips the least."""
        heard = self._heard(clips)
        start = self.generation.decoder_start_token_id
        found = np.ones(heard.count)
        with inference():
            for first, states in _batches(heard.states, batch):
                tokens = torch.full((len(states), 1), start, device=states.device)
                shares = self._logits(tokens, states)[0][:, 0].double().softmax(-1)[:, self.no_speech_token]
                np.minimum.at(found, heard.clips[first : first + len(states)], shares.cpu().numpy())
        return found

    def nll(
        self, clips: Sequence[np.ndarray] | Heard, texts: Sequence[str], batch: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """Teacher-forced negative log-likelihood of texts: (nats [clips], tokens [clips]), the end of text included.

        A text counts as it is spelled: Whisper writes sentences, not LibriSpeech's capitals. Raises EqknobsError for a
        clip longer than a window, a text longer than the decoder, and where there is not one text a clip.
        """
        heard = self._heard(clips)
        if len(texts) != heard.count or len(heard.clips) != heard.count:
            raise EqknobsError(
                f"model {self.name}: the likelihood of words needs one text a clip, and clips of up to "
                f"{self.window / self.sample_rate:g} s; got {len(texts)} texts, {heard.count} clips, "
                f"{len(heard.clips)} windows"
            )
        prompt, end = self._prompt(), self.generation.eos_token_id
        spelled = [[*self.tokenizer(" " + text.strip(), add_special_tokens=False).input_ids, end] for text in texts]
        if (longest := max(map(len, spelled)) + len(prompt) - 1) > self.config.max_target_positions:
            limit = self.config.max_target_positions
            raise EqknobsError(f"model {self.name} reads texts of up to {limit} tokens, got one of {longest}")
        nats = []
        with inference():
            for first, states in _batches(heard.states, batch):
                some = spelled[first : first + len(states)]
                width = max(map(len, some))
                wanted = torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in some], device=states.device)
                given = torch.cat([torch.tensor([prompt] * len(some), device=states.device), wanted[:, :-1]], 1)
                logits = self._logits(given.clamp(min=0), states)[0][:, len(prompt) - 1 :]
                losses = cross_entropy(logits.double().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
                nats.append(losses.sum(1).cpu().numpy())
        return np.concatenate(nats), np.array([len(ids) for ids in spelled])


def _batches(states: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """Runs of windows, each with the place of its first."""
    for first in range(0, len(states), batch):
        yield first, states[first : first + batch]
