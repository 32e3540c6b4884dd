"""What the codes of `ttt check --probe` mean, one for each law that it proves. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LawExplanation:
    """A law that can break: what the probe saw, why it costs a run, and what code does it wrong and right."""

    title: str
    what: str
    why: str
    bad: str
    good: str
    fix: str
    """The way out in one clause."""
    source: str


LAW_EXPLANATIONS: dict[str, LawExplanation] = {
    "TTT901": LawExplanation(
        title="a forward pass that writes",
        what=(
            "A forward and backward pass changed a parameter or buffer of the model, or a second pass over the same "
            "tokens gave other outputs or gradients than the first, or failed."
        ),
        why=(
            "Activation checkpointing runs forward again in backward. A layer that keeps its fast weights on itself "
            "starts that second run where the first one ended: gradients are silently wrong, or PyTorch stops with a "
            "CheckpointError, whatever the group size."
        ),
        bad="def forward(self, x):\n    y, state = self.layer(x, self.fast)\n    self.fast = state\n    return y",
        good="def forward(self, x, state=None):\n    y, state = self.layer(x, state)\n    return y, state",
        fix="keep no fast weights on a module: take a TTTState in and give one out",
        source="PyTorch, torch.utils.checkpoint: the function must do the same when it runs again",
    ),
    "TTT902": LawExplanation(
        title="gradients that depend on rematerialisation",
        what=(
            "In training mode, with this config's checkpoints (the scan's groups, and the backbone's own around them), "
            "outputs or gradients differ from those of the same model that recomputes nothing. Or a TTT layer did not "
            "run as often as the plugin's facts say: its checkpointing is switched on and recomputes nothing."
        ),
        why="The run would train on other gradients than the loss has, and no error would say so.",
        bad="scan(lambda carry, x: inner(carry, x, self.rate), ...)  # and forward changes self.rate",
        good="scan(inner, carry, xs, consts=(rate,))  # a pure function of its arguments",
        fix="make the layer a pure function of its input and its state; no group size and no nesting causes this",
        source="PyTorch, torch.utils.checkpoint; benchmarks/silent_gradients.py measures it",
    ),
    "TTT903": LawExplanation(
        title="the future reaches the past",
        what="On a causal backbone, changing token t changed an output before t, in training mode or outside it.",
        why=(
            "The model reads in training what it must predict: the loss looks splendid, and at inference, where the "
            "future is not there, the model is garbage."
        ),
        bad="attention = q @ k.mT + 1  # every token of the mini-batch learns from all of them",
        good="attention = (q @ k.mT + 1).tril()  # each learns from those up to itself",
        fix="let a token learn only from those up to itself, at the layer and in the model",
        source="TTT-LM (arXiv 2407.04620), section 2.4 and appendix A",
    ),
    "TTT904": LawExplanation(
        title="a stream in pieces is not the whole",
        what="Feeding a sequence in pieces, single tokens where that is possible, gave another result than at once.",
        why=(
            "What was trained on whole windows is not what streams: a mini-batch that a piece leaves open must go on "
            "in the next one, at the weights that opened it."
        ),
        bad="for piece in pieces:\n    y, _ = layer(piece)  # every piece starts fresh",
        good="state = None\nfor piece in pieces:\n    y, state = layer(piece, state)",
        fix="carry the whole state between pieces: weights, open gradients and count",
        source="ttt.state.TTTState",
    ),
    "TTT905": LawExplanation(
        title="rows of a batch that see each other",
        what=(
            "Changing one row of a batch changed another, or a row of a batch ended elsewhere than the same row alone, "
            "or did not survive the reset or pause of its neighbour."
        ),
        why="Fast weights of one recording leak into the next one, and the loss depends on what else is in the batch.",
        bad="self.W1.data.copy_(state.weights[0][0])  # row 0 for all rows",
        good="return y, state  # weights [B, H, in, out]: each row its own",
        fix="keep one state for each row of the batch, and mix nothing across rows",
        source="ttt.state.TTTState",
    ),
    "TTT906": LawExplanation(
        title="a closed gate that is not the plain backbone",
        what="With gates closed, or α at 0, outputs differed from those of the backbone without TTT, be it in one bit.",
        why=(
            "A pretrained model would be damaged before it has learned anything, and the control beside which a run "
            "shows that TTT acts would be none."
        ),
        bad="return x + 0.1 * y",
        good="return self.gate(x, y)  # x + tanh(α) ⊙ y, and x alone where it is closed",
        fix="let the adapter return its input where tanh(α) is 0 or the gate is closed",
        source="ttt.adapter.Gate",
    ),
    "TTT910": LawExplanation(
        title="a TTT layer that does nothing",
        what=(
            "A layer that the config names was not reached by a forward pass, in training mode or outside it, or its "
            "fast weights did not move; one of its parameters got no gradient, or what it reads carries none on; it "
            "does not read the whole sequence; twice its gate has not twice the effect; or its parameters are not "
            "float32."
        ),
        why="The run would train the plain backbone, or a part of the layer, and report success.",
        bad="def forward(self, x):\n    return self.attention(x)  # self.ttt is injected and never called",
        good="def forward(self, x):\n    return self.ttt(self.attention(x))",
        fix="call the adapter in every layer that sites() offers, keep its graph, and let base_lr move its weights",
        source="ttt.evidence.Observation",
    ),
}
"""By code; the number after 9 is the law's."""
