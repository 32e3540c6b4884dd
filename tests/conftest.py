"""What every test needs before torch and moshi are imported."""

import os

# On a CPU, kyutai's package would spend 20 s compiling its norm.
os.environ.setdefault("NO_TORCH_COMPILE", "1")

import torch

# Tests run in processes side by side on small tensors: more threads would only wait for each other.
torch.set_num_threads(1)

# Round as another maker's processor might: see `other_rounding.py`.
if os.environ.get("TTT_OTHER_ROUNDING"):
    import other_rounding

    other_rounding.install()
