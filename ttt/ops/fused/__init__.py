"""Mini-batches of a linear or MLP inner model as one differentiable operation, its backward derived by hand.

Between forward and backward it holds only its inputs and the weights that open each group of mini-batches. Backward
runs each group once more and then goes through it in reverse. `docs/backward.md` derives every line; numbers in
parentheses are its equations. `ttt.ops.mlp` computes the same through autograd, and the tests compare the two.

Two things keep the loop over mini-batches short. First, a bias is the last row of its weights, `W̃ = (W; b)`, and each
layer's input has a column of ones, `X̃ = (X, 1)`, so that biases need no products of their own; on a GPU, zeros behind
both bring rows to a multiple of 16 bytes. Second, the loop holds only what depends on the carry: the keys' forward
pass, the gradient of their update, and the queries' first product, which is computed together with the keys'. The rest
of the queries, and all that depends on tokens alone, runs for a chunk of mini-batches at a time. If the update is not
causal, all tokens of a mini-batch answer with the same weights, those after it, and the queries go through these.

Each module imports only those above it:

- `products`: matrix products in the precision of a problem
- `pages`: large pages for what is kept, on Linux
- `layout`: the operation's inputs, tokens laid out for the products, and the tensors that backward reads
- `rooms`: scratch memory, and the views of all memory
- `forward`: the forward pass of one chunk of mini-batches
- `backward`: the backward pass of one chunk
- `registration`: makes two passes one operation of PyTorch
- `operator`: the order in which mini-batches run, `fused_scan` and `fused_minibatch`

Shape letters, besides those of `ttt.ops`:

- `P`: heads of all rows, `B·H`; every product is one batched product over them
- `M`: mini-batches of a chunk or a block; `R = M·P`: the same as one batch of matrices
- `S`: rows of the keys, and in dual form below them rows of the queries: `2C`, or else `C`
- `I`, `O`: input and output width of a layer of the inner model; `J`: with the ones, or the bias, and zeros at the end

Layers of the inner model count from 0 here, so that layer l has the weights `W̃_l [P,J,O]`.

Names here and symbols in `docs/backward.md`; `d_name` is the gradient of the outer loss with respect to `name`:

| name | symbol | where |
| --- | --- | --- |
| `stacked`, `inputs` | `(X̃_l; x̃_l)`: the inputs of layer l for keys and queries; `stacked` is layer 0 | (1), (10) |
| `output`, `outputs` | `Z_l`: the layers' outputs for the keys; `output` is the last layer | (1) |
| `values`, `gates`, `squared` | `φ(Z)`, `σ(2u)` and `Z²`, later `p / 3b` | (2), (3) |
| `slopes`, `query_slopes` | `φ'(Z_l)`, `φ'(y_l)` | (3) |
| `bends` | `D_l ⊙ φ''(Z_l)` | (4), (19) |
| `unit`, `mean`, `inverse` | `x̂`, `μ`, `ι = 1/σ` of the last `Z` or `y` | (5), (13) |
| `offset`, `anchor` | `β − t`, `γ (β − t)` | (5) |
| `slope` | `r`, the gradient of the inner loss with respect to `x̂` | (5), (20) |
| `errors` | `E_l = ∂ℓ/∂Z_l` | (6), (7) |
| `pulled` | `D_l = E_{l+1} W_{l+1}ᵀ` | (7) |
| `pushes` | `c`, the factor of an update: `[N,P,1,1]` | (8) |
| `push`, `pushed_keys`, `pushed_errors` | `c η`, `c η K̃`, `c η E_l` | (8), (18) |
| `attention` | `A_l = x̃_l X̃_lᵀ` | (9) |
| `coefficient` | `κ = −s ηᵀ ⊙ mask` | (9) |
| `answering` | the weights that queries go through: `W̃_l`, or `W̃'_l` in (9') | (9'), (16') |
| `answered`, `answer` | `y_l`: the layers' outputs for the queries; `answer` is the last layer | (10) |
| `seen_by_next`, `reached` | `ρ_l = X̃_l dW̃'_l`, `V_0 = E_0 dW̃'_0ᵀ` | (18), (24) |
| `turned_error`, `turned_unit` | `−ι E / F`, `−ι x̂ / F` | (20) |
| `along_unit`, `along_error` | `Σ x̂ dE`, `Σ E dE` over the width: `F mean(e x̂)`, `F mean(e E)` | (20) |
| `teaching`, `followed` | `ι`, but 0 if the norm passes no gradient | (20) |
| `d_hidden` | `dE_l ⊙ bends`: the part of `dZ_l` that comes through `D_l` | (19) |
| `next` | the gradient from the mini-batches that follow: `dW̃'_l`, or `dG̃'_l` of an open mini-batch | (12), (18) |
"""

from ttt.ops.fused.operator import fused_minibatch, fused_scan

__all__ = ["fused_minibatch", "fused_scan"]
