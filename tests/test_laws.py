"""The laws, on the toy backbones and on Moshi; on a CUDA device too, where there is one."""

from __future__ import annotations

import torch
from toy import ToyBackbone, TwoWayToy

from ttt.testing import laws

TestToy = laws(ToyBackbone())
TestTwoWayToy = laws(TwoWayToy())
TestMoshi = laws("moshi")
if torch.cuda.is_available():
    TestToyOnCuda = laws(ToyBackbone(), device="cuda")
    TestMoshiOnCuda = laws("moshi", device="cuda")
