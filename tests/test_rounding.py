"""What `TTT_OTHER_ROUNDING` promises of the arithmetic that it imitates, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROMISES = """
import torch
import other_rounding
x, w = torch.randn(37, 64), torch.randn(64, 48)
plain = x @ w
other_rounding.install()
found = x @ w
assert not torch.equal(found, plain), "rounded otherwise"
assert (found - plain).abs().max() <= 64 * 2**-23 * (x.abs() @ w.abs()).max(), "and by no more than an order can"
assert torch.equal(x @ w, found), "the same shapes, the same bits"
assert sum(not torch.equal((x[i : i + 1] @ w)[0], found[i]) for i in range(37)) > 30, "a row alone is another shape"
whole = torch.randint(-9, 9, (5, 64)).float()
assert torch.equal(whole[:1] @ whole.T, (whole @ whole.T)[:1]), "what is exact everywhere stays exact"
assert torch.equal(torch.zeros(3, 2).sigmoid(), torch.full((3, 2), 0.5))
linear = torch.nn.Linear(64, 48)
gradients = [torch.autograd.grad(linear(part).square().sum(), linear.weight)[0] for part in (x, x, x[:20], x[20:])]
assert torch.equal(gradients[0], gradients[1]), "in backward too"
assert not torch.equal(gradients[0], gradients[2] + gradients[3])
torch.testing.assert_close(gradients[0], gradients[2] + gradients[3], rtol=1e-4, atol=1e-4)
clip, kernel = torch.randn(2, 8, 30), torch.randn(4, 8, 5)
moved = torch.nn.functional.conv1d(clip, kernel)
assert torch.equal(torch.nn.functional.conv1d(clip, kernel), moved)
assert not torch.equal(torch.nn.functional.conv1d(clip[:1], kernel), moved[:1])
"""


def test_another_makers_rounding_depends_on_shapes_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROMISES],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
