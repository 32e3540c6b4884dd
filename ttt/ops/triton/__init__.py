"""Mini-batches of a linear or MLP inner model as Triton kernels, one file each, for GPUs.

They compute what `ttt.ops.fused` computes, from the same `Problem` and with the same results, and are proven against
`ttt.ops.reference` in Triton's interpreter. `ttt.ops.select` decides when they run. Importing this package imports no
Triton; its modules do, except `forms`.

Shape letters: see `ttt.ops.fused`.
"""
