"""The mathematics of TTT layers: pure functions of tensors that import nothing of the rest of the library.

Shape legend: `B` batch, `T` tokens, `H` heads, `F` head width, `N` mini-batches, `C` mini-batch size; tensors
carry theirs as a suffix (`q_BHTF`). Fast weights are flat tuples `(W1, b1, W2, b2, …)` with `W [B,H,in,out]` and
`b [B,H,1,out]`, one pair for each layer of the inner model; a linear inner model has one pair.

- `ttt.ops.reference`: the definition, token by token; slow and obvious
- `ttt.ops.minibatch`: a sequence as mini-batches, open ones included; what a layer calls
- `ttt.ops.select`: which implementation of a mini-batch or a scan runs
- `ttt.ops.fused`: mini-batches as one operation, its backward by hand
- `ttt.ops.mlp`: the same by autograd, for MLPs of any depth; `ttt.ops.linear`: that of one layer
- `ttt.ops.scan`: the scan over mini-batches with checkpoint groups, for any step
- `ttt.ops.norm`, `ttt.ops.rotary`, `ttt.ops.autocast`, `ttt.ops.constants`: what they are made of

`docs/ops.md` follows a call from the layer to its arithmetic.
"""
