"""The mathematics of TTT layers: pure functions of tensors that import nothing from the rest of the library.

Shape letters: `B` batch, `T` tokens, `H` heads, `F` head width, `N` mini-batches, `C` mini-batch size. A tensor's name
ends in its shape (`q_BHTF`). Fast weights are flat tuples `(W1, b1, W2, b2, …)` with `W [B,H,in,out]` and
`b [B,H,1,out]`, one pair for each layer of the inner model; a linear inner model has one pair.

- `ttt.ops.reference`: the definition, token by token; slow and obvious
- `ttt.ops.minibatch`: splits a sequence into mini-batches, open ones included; a layer calls this
- `ttt.ops.tracing`: the inner loss of each token before and after it is learned
- `ttt.ops.select`: chooses the implementation of a mini-batch or a scan
- `ttt.ops.fused`: mini-batches as one operation, with its backward by hand
- `ttt.ops.mlp`: the same by autograd, for MLPs of any depth; `ttt.ops.linear`: the case of one layer
- `ttt.ops.scan`: a scan with checkpoint groups, for any step
- `ttt.ops.norm`, `ttt.ops.rotary`, `ttt.ops.autocast`, `ttt.ops.constants`: the parts they share

`docs/ops.md` follows a call from the layer to its arithmetic.
"""
