"""Mini-batches of a linear or MLP inner model as one differentiable operation, its backward derived by hand.

Between forward and backward it holds its inputs and the weights that open each group of mini-batches, nothing else. In
backward each group runs once more and is walked back. `docs/backward.md` derives every line; numbers in parentheses
are its equations. `ttt.ops.mlp` computes the same through autograd and is the oracle of the tests.

Two things keep the loop over mini-batches short. Biases ride along as a last row of their weights, `W̃ = (W; b)`, and
as a last column of ones of what a layer is given, `X̃ = (X, 1)`: every product that a bias needs is part of one that is
there anyway. And only what the carry touches is in the loop: the keys' way forward and what their update gives back,
and the queries' first product, which is one with the keys'. The rest of the queries and all that depends on tokens
alone run for a chunk of mini-batches at a time.

Each module imports only those above it:

- `layout`: what the operation is given, tokens laid out for the products, and what backward reads
- `forward`: one chunk of mini-batches forward
- `backward`: one chunk on its way back
- `operator`: which mini-batches run when, the registration with PyTorch, and `fused_scan` and `fused_minibatch`

Shape letters, beside those of `ttt.ops`:

- `P`: heads of all rows, `B·H`; every product is one batched product over them
- `M`: mini-batches of a chunk or a block; `R = M·P`: the same as one batch of matrices; `K = P·C`: single tokens
- `S = 2C`: rows of the keys, and below them rows of the queries
- `I`, `O`: what a layer of the inner model is given and gives; `J = I + 1`: with the ones, or the bias, at the end

Layers of the inner model count from 0 here, so that layer l has the weights `W̃_l [P,J,O]`.

Symbols of `docs/backward.md` under their names here; `d_name` is the gradient of the outer loss with respect to `name`:

| name | symbol | where |
| --- | --- | --- |
| `stacked`, `inputs` | `(X̃_l; x̃_l)`: what keys and queries give layer l; `stacked` is layer 0 | (1), (10) |
| `output`, `outputs` | `Z_l`: what the layers give the keys; `output` is the last layer | (1) |
| `values`, `gates`, `squared` | `φ(Z)`, `σ(2u)` and `Z²`, later `p` | (2), (3) |
| `slopes`, `query_slopes` | `φ'(Z_l)`, `φ'(y_l)` | (3) |
| `bends` | `D_l ⊙ φ''(Z_l)` | (4), (19) |
| `unit`, `mean`, `inverse` | `x̂`, `μ`, `ι = 1/σ` of the last `Z` or `y` | (5), (13) |
| `offset`, `anchor` | `β − t`, `γ (β − t)` | (5) |
| `slope` | `r`, the gradient of the inner loss with respect to `x̂` | (5), (20) |
| `errors` | `E_l = ∂ℓ/∂Z_l` | (6), (7) |
| `pulled` | `D_l = E_{l+1} W_{l+1}ᵀ` | (7) |
| `pushes` | `c`, what an update is multiplied with: `[N,P,1,1]` | (8) |
| `push`, `pushed_keys`, `pushed_errors` | `c η`, `c η K̃`, `c η E_l` | (8), (18) |
| `attention` | `A_l = x̃_l X̃_lᵀ` | (9) |
| `coefficient` | `κ = −s ηᵀ ⊙ mask` | (9) |
| `answered`, `answer` | `y_l`: what the layers give the queries; `answer` is the last layer | (10) |
| `seen_by_next`, `reached` | `ρ_l = X̃_l dW̃'_l`, `V_0 = E_0 dW̃'_0ᵀ` | (18), (24) |
| `turned_error`, `turned_unit` | `−ι E / F`, `−ι x̂ / F` | (20) |
| `along_unit`, `along_error` | `Σ x̂ dE`, `Σ E dE` over the width: `F mean(e x̂)`, `F mean(e E)` | (20) |
| `teaching`, `followed` | `ι`, but 0 if the norm hands no gradient on | (20) |
| `d_hidden` | `dE_l ⊙ bends`: `dZ_l` as far as it came through `D_l` | (19) |
| `next` | what follows hands back: `dW̃'_l`, or `dG̃'_l` of an open mini-batch | (12), (18) |
"""

from ttt.ops.fused.operator import fused_minibatch, fused_scan

__all__ = ["fused_minibatch", "fused_scan"]
