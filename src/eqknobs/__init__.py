"""Find and turn the knobs inside neural audio codecs and speech language models."""

import os

# Progress bars redraw every few seconds, so that logs and pipes stay readable; tqdm reads this when imported.
os.environ.setdefault("TQDM_MININTERVAL", "3")
