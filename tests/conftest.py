"""One thread a process: the tests' models are too small for more, and a second set of threads slows both down."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
