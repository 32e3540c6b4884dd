"""What every test needs before torch and moshi are imported."""

import os

# On a CPU, kyutai's package would spend 20 s compiling its norm.
os.environ.setdefault("NO_TORCH_COMPILE", "1")
