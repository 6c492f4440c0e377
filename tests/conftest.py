"""One thread a process, unless the caller says otherwise: the tests' models are too small for more, and a second set of
threads slows both down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Some virtual machines announce AMX and end the process at its first use, which is the first bfloat16 product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
