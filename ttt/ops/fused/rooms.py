"""Scratch memory, and the views of all memory that the arithmetic reads and writes.

Making a view takes as long as a small product. So the views are made once for each place of a chunk in a group, and the
next group, which is laid out in the same memory, uses them again. If every mini-batch has memory of its own, each chunk
has its own views.

A name ends in the shape of one tensor. `_PCO` and the like are lists by mini-batch, inside a list by layer if each
layer has one; `_MPCO` is the whole chunk, and `_RCO` the same as one batch of R = M·P matrices. `later` lists begin at
the second layer.

Shape letters and symbols: see `ttt.ops.fused`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ttt.ops.fused.layout import Block, Dims, Kept, by_step, each

# --- forward ---


class Scratch:
    """Scratch memory of forward, which chunks of mini-batches use in turn."""

    def __init__(self, dims: Dims, chunk: int, like: Tensor) -> None:
        hidden = dims.widths[1:-1]

        def room(width: int, rows: int = dims.size) -> Tensor:
            return like.new_empty((chunk, dims.pairs, rows, width))

        self.first_MPSO = room(dims.widths[1], dims.rows)
        """The first layer's outputs for the keys, in dual form for the queries too."""
        self.outputs_MPCO = [room(width) for width in hidden[1:]]
        """The outputs of the later hidden layers: for the keys, then for the queries."""
        self.squared_MPCO = [room(width) for width in hidden]
        self.gates_MPCO = [room(width) for width in hidden]
        self.pulled_MPCO = [room(width) for width in hidden]
        """`D_l`"""


class ForwardViews:
    """Views for forward of a chunk."""

    def __init__(self, dims: Dims, block: Block, kept: Kept, scratch: Scratch) -> None:
        self.steps = len(block.rate_MPC1)
        self.kept = kept
        self._view_steps(dims, block, kept, scratch)
        self._view_chunk(dims, block, kept, scratch)

    def _view_steps(self, dims: Dims, block: Block, kept: Kept, scratch: Scratch) -> None:
        """Make the views for the loop over mini-batches."""
        steps, size = self.steps, dims.size
        first_MPSO = scratch.first_MPSO[:steps]
        self.stacked_PSJ, self.first_PSO = by_step([block.stacked_MPSJ[:, :, : dims.rows], first_MPSO])
        self.anchors_PCF, self.pushes_PC1 = by_step([block.anchor_MPCF, block.push_MPC1])
        # W̃ that open the mini-batches, and if there is room those after the last; in place, all are the same.
        self.weights_PJO = each(kept.weights_MPJO, steps + 1)
        self.later_weights_POI = [
            tuple(w[:, :fan_in].mT for w in weights)
            for weights, fan_in in zip(self.weights_PJO[1:], dims.widths[1:], strict=False)
        ]
        keys_MPCJ = [x[:, :, :size] for x in kept.inputs_MPSJ]
        self.later_keys_PCJ = by_step(keys_MPCJ)
        # The left factor of (8): pushed keys for the first layer, and each later layer's inputs.
        self.updates_PJC = by_step([x.mT for x in (block.pushed_keys_MPCJ, *keys_MPCJ)])
        self.outputs_PCO = by_step([first_MPSO[:, :, :size], *(x[:steps] for x in scratch.outputs_MPCO)])
        self.values_PCO = by_step(_narrowed(keys_MPCJ, dims.widths[1:]))
        self.squared_PCO, self.gates_PCO, self.pulled_PCO = (
            by_step([x[:steps] for x in room])
            for room in (scratch.squared_MPCO, scratch.gates_MPCO, scratch.pulled_MPCO)
        )
        self.slopes_PCO, self.errors_PCO = each(kept.slopes_MPCO, steps), each(kept.errors_MPCO, steps)
        self.output_PCF = each([kept.output_MPCF], steps)[0]

    def _view_chunk(self, dims: Dims, block: Block, kept: Kept, scratch: Scratch) -> None:
        """Make the views for the whole chunk: what GELU left behind, and what the queries need."""
        steps, size = self.steps, dims.size
        stacks_MPSJ = [block.stacked_MPSJ, *kept.inputs_MPSJ]
        self.squared_MPCO, self.gates_MPCO, self.pulled_MPCO = (
            [x[:steps] for x in room] for room in (scratch.squared_MPCO, scratch.gates_MPCO, scratch.pulled_MPCO)
        )
        self.query_values_MPCO = _narrowed([x[:, :, size:] for x in kept.inputs_MPSJ], dims.widths[1:])
        # `y_l`. Products are fast only into contiguous rows, and the first layer's rows alternate with those of the
        # keys. So they are summed in the memory of `pulled`, which is not read any more.
        self.answered_MPCO = [
            *(x[:steps] for x in (*scratch.pulled_MPCO[:1], *scratch.outputs_MPCO)), kept.answer_MPCF
        ]  # fmt: skip
        self.answered_RCO = [x.flatten(0, 1) for x in self.answered_MPCO]
        self.queries_RCJ = [x[:, :, size:].flatten(0, 1) for x in stacks_MPSJ]
        self.answering_RJO = answering(dims, kept, steps)
        if not dims.dual:
            return
        self.keys_RJC = [x[:, :, :size].flatten(0, 1).mT for x in stacks_MPSJ]
        self.attention_RCC = [x.flatten(0, 1) for x in kept.attention_MPCC]
        self.coefficient_RCC = block.coefficient_MPCC.flatten(0, 1)
        self.first_queries_RCO = scratch.first_MPSO[:steps][:, :, size:].flatten(0, 1)
        self.errors_RCO = [x.flatten(0, 1) for x in kept.errors_MPCO]


def answering(dims: Dims, kept: Kept, steps: int) -> list[Tensor]:
    """The weights `[R,J,O]` through which the queries of a chunk go: those that opened their mini-batches, if each then
    adds what it has learned; else those after them. In dual form the first layer's may have moved on since.
    """
    found = (w[:steps] if dims.dual else w[-steps:] for w in kept.weights_MPJO)
    return [w.flatten(0, 1) for w in found]


# --- backward ---


class BackwardScratch:
    """Scratch memory of backward, which chunks use in turn: the scratch of forward, and more.

    It may use forward's scratch because a whole group runs forward before its backward starts, and backward reads only
    what was kept.
    """

    def __init__(self, dims: Dims, chunk: int, forward: Scratch) -> None:
        size, width, like = dims.size, dims.widths[0], forward.first_MPSO

        def room(*shape: int) -> Tensor:
            return like.new_empty((chunk, dims.pairs, *shape))

        self.d_outputs_MPSO = [forward.first_MPSO, *(room(dims.rows, fan_out) for fan_out in dims.widths[2:])]
        """`dZ_l`; in dual form `(dZ_l; dy_l)`, as the layers' inputs are kept."""
        self.d_answered_MPCO = [] if dims.dual else [room(size, fan_out) for fan_out in dims.widths[1:]]
        """`dy_l`, if it is not part of `d_outputs`"""
        self.d_errors_MPCO = [*forward.squared_MPCO, room(size, width)]
        self.d_inputs_MPCI = [room(size, width), *forward.gates_MPCO]
        """`dX_l`"""
        self.seen_by_next_MPCO = [*forward.pulled_MPCO, room(size, width)]
        """`ρ_l`"""
        self.reached_MPCJ = room(size, dims.joined(width))
        """`V_0`"""
        self.d_slope_MPCF = room(size, width)
        """`dr`"""
        self.pushed_errors_MPCO = [room(size, fan_out) for fan_out in dims.widths[2:]]
        """`c η E_l` for l ≥ 1"""
        self.pair_MPC2F, self.along_MPC2 = room(size, 2, width), room(size, 2)
        """`(x̂; E)` of each token, and the sums of the two times the token's dE."""
        self.unit_MPCF, self.slope_MPCF = room(size, width), room(size, width)
        """`x̂` and `r`"""
        self.turned_error_MPCF, self.turned_unit_MPCF = room(size, width), room(size, width)
        """`−ι E / F` and `−ι x̂ / F`: the factors of `along` in (20), with the divisor of its mean."""
        self.d_stack_MPSF = room(dims.rows, width)
        """`dZ_0 W_0ᵀ`, in dual form `(dZ_0; dy_0) W_0ᵀ`"""
        # `dD_l`, with zeros for the bias of the next layer.
        self.d_pulled_PCJ = [like.new_zeros((dims.pairs, size, dims.joined(hidden))) for hidden in dims.widths[1:-1]]


class BackwardViews:
    """Views for backward of a chunk."""

    def __init__(self, dims: Dims, block: Block, kept: Kept, scratch: BackwardScratch) -> None:
        self.steps, self.block, self.kept = len(block.rate_MPC1), block, kept
        self.stacks_MPSJ = [block.stacked_MPSJ, *kept.inputs_MPSJ]
        self._view_chunk(dims, scratch)
        self._view_steps(dims, scratch)

    def _of_chunk(self, rooms: Iterable[Tensor]) -> list[Tensor]:
        return [x[: self.steps] for x in rooms]

    def _view_chunk(self, dims: Dims, scratch: BackwardScratch) -> None:
        kept, size, of_chunk = self.kept, dims.size, self._of_chunk
        self.d_outputs_MPSO, self.d_errors_MPCO, self.d_inputs_MPCI = (
            of_chunk(rooms) for rooms in (scratch.d_outputs_MPSO, scratch.d_errors_MPCO, scratch.d_inputs_MPCI)
        )
        apart = of_chunk(scratch.d_answered_MPCO)
        self.d_answered_MPCO = [x[:, :, size:] for x in self.d_outputs_MPSO] if dims.dual else apart
        self.seen_by_next_MPCO, self.pushed_errors_MPCO = (
            of_chunk(rooms) for rooms in (scratch.seen_by_next_MPCO, scratch.pushed_errors_MPCO)
        )
        self.reached_MPCJ, self.d_slope_MPCF, self.pair_MPC2F, self.along_MPC2, self.d_stack_MPSF = of_chunk(
            (scratch.reached_MPCJ, scratch.d_slope_MPCF, scratch.pair_MPC2F, scratch.along_MPC2, scratch.d_stack_MPSF)
        )
        self.unit_MPCF, self.slope_MPCF, self.turned_error_MPCF, self.turned_unit_MPCF = of_chunk(
            (scratch.unit_MPCF, scratch.slope_MPCF, scratch.turned_error_MPCF, scratch.turned_unit_MPCF)
        )
        self.queries_RCJ = [x[:, :, size:].flatten(0, 1) for x in self.stacks_MPSJ]
        self.first_weights_ROI = kept.weights_MPJO[0][: self.steps, :, : dims.widths[0]].flatten(0, 1).mT
        self.answering_ROI = [
            w[:, :fan_in].mT for w, fan_in in zip(answering(dims, kept, self.steps), dims.widths, strict=False)
        ]
        if dims.dual:
            keys_MPCJ = [x[:, :, :size] for x in self.stacks_MPSJ]
            self.keys_RCI = [x.flatten(0, 1) for x in _narrowed(keys_MPCJ, dims.widths)]
            self.errors_RCO = [x.flatten(0, 1) for x in kept.errors_MPCO]
            self.attention_RCC = [x.flatten(0, 1) for x in kept.attention_MPCC]
            self.coefficient_RCC = self.block.coefficient_MPCC.flatten(0, 1)

    def _view_steps(self, dims: Dims, scratch: BackwardScratch) -> None:
        kept, size, hidden = self.kept, dims.size, dims.widths[1:]
        later_MPIO = _narrowed([w[: self.steps].mT for w in kept.weights_MPJO[1:]], hidden)
        self.later_weights_POI = by_step(later_MPIO)
        self.later_weights_PIO = by_step([x.mT for x in later_MPIO])
        self.keys_PCJ = by_step([x[:, :, :size] for x in self.stacks_MPSJ])
        # The left factor of (22), and of what non-causal queries add to it.
        self.stacks_PJS = by_step([x[:, :, : dims.rows].mT for x in self.stacks_MPSJ])
        self.queries_PJC = by_step([x[:, :, size:].mT for x in self.stacks_MPSJ])
        self.errors_PCO, self.slopes_PCO, self.bends_PCO = (
            by_step(x) for x in (kept.errors_MPCO, kept.slopes_MPCO, kept.bends_MPCO)
        )
        self.d_errors_PCO, self.d_outputs_PSO = by_step(self.d_errors_MPCO), by_step(self.d_outputs_MPSO)
        self.last_d_error_PC1F = self.d_errors_MPCO[-1].unsqueeze(-2).unbind(0)
        self.d_answered_PCO, self.later_d_inputs_PCI = by_step(self.d_answered_MPCO), by_step(self.d_inputs_MPCI[1:])
        self.d_keys_PCO = by_step([x[:, :, :size] for x in self.d_outputs_MPSO])
        self.seen_by_next_PCO, self.pushed_errors_PCO = (
            by_step(x) for x in (self.seen_by_next_MPCO, self.pushed_errors_MPCO)
        )
        self.reached_PCJ, self.d_slope_PCF, self.pushes_PC1 = by_step(
            [self.reached_MPCJ, self.d_slope_MPCF, self.block.push_MPC1]
        )
        self.output_PCF, self.means_PC1 = by_step([kept.output_MPCF, kept.mean_MPC1])
        self.pair_PC2F, self.along_PC2 = by_step([self.pair_MPC2F, self.along_MPC2])
        self.along_unit_PC1, self.along_error_PC1 = by_step([self.along_MPC2[..., :1], self.along_MPC2[..., 1:]])
        self.turned_error_PCF, self.turned_unit_PCF = by_step([self.turned_error_MPCF, self.turned_unit_MPCF])
        self.d_pulled_PCI = _narrowed(scratch.d_pulled_PCJ, hidden)
        self.d_pulled_PJC = [x.mT for x in scratch.d_pulled_PCJ]


def _narrowed(tensors: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    """Each layer's tensor without the columns that are joined to its width."""
    return [x[..., :width] for x, width in zip(tensors, widths, strict=False)]
