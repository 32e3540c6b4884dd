"""The mathematics of TTT layers: pure functions of tensors that import nothing of the rest of the library.

Shape legend: `B` batch, `T` tokens, `H` heads, `F` head width, `N` mini-batches, `C` mini-batch size; tensors
carry theirs as a suffix (`q_BHTF`). Fast weights are flat tuples `(W1, b1, W2, b2, …)` with `W [B,H,in,out]` and
`b [B,H,1,out]`, one pair for each layer of the inner model; a linear inner model has one pair.

- `ttt.ops.reference`: the definition, token by token; slow and obvious
- `ttt.ops.linear`, `ttt.ops.mlp`: one mini-batch of a linear or MLP inner model in dual form
- `ttt.ops.minibatch`: a sequence as mini-batches, open ones included
- `ttt.ops.scan`: the scan over mini-batches with checkpoint groups, for any step
- `ttt.ops.fused`: the same for linear and MLP inner models as one operation, its backward by hand
- `ttt.ops.select`: which of these runs
- `ttt.ops.norm`, `ttt.ops.rotary`: what they are made of
"""
