"""The laws, on the toy backbone and on Moshi."""

from __future__ import annotations

from toy import ToyBackbone

from ttt.testing import laws

TestToy = laws(ToyBackbone())
TestMoshi = laws("moshi")
