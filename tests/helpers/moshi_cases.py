"""What is compared with the oracle, live and frozen: the same inputs for both."""

import torch

from eqknobs.models.moshi.config import PERSONA_SILENCE, PERSONA_SINE
from helpers.moshi_world import KYUTAI, random_codes

CODES = random_codes(2, 60, KYUTAI.text_card, seed=1)
USER = random_codes(2, 100, KYUTAI.text_card, seed=2)[:, 9:]
SEED = 11
SAMPLED_FRAMES = 40
PERSONA_USER = random_codes(2, 30, KYUTAI.text_card, seed=3)[:, 9:]
VOICE_CODES = random_codes(1, 20, KYUTAI.text_card, seed=4)[0, 1:9]
PROMPT_TOKENS = [5, 17, 40, 8, 41, 5]
SILENCE, SINE = torch.tensor([PERSONA_SILENCE]), torch.tensor([PERSONA_SINE])
PAD, PAUSE = 3, 6
LOGITS_SHOWN = (slice(0, 1), slice(None), slice(0, 50, 7), slice(0, 2048, 32))  # of the audio logits, when frozen
