"""What the workers' server imports once, so that a job starts in milliseconds. Never imported by the command line."""

import gc
import sys

# Importing and tracing make millions of objects that live on; looking through them for cycles takes a fifth of the time.
gc.disable()

# OpenVINO and NNCF report their use to their makers through this package, and do without it where it is missing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, modeling_utils  # noqa: E402, F401

from compiler.workers import THREADS  # noqa: E402

# Before any parallel region: an OpenMP pool does not survive a fork.
torch.set_num_threads(THREADS)
transformers.utils.logging.disable_progress_bar()
gc.freeze()
gc.enable()
gc.set_threshold(200_000, 20, 100)
