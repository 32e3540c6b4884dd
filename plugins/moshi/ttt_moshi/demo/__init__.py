"""The demo's data: real speech, what it says, the codec and the tokenizer fitted on it. `NOTICE.md` says whence."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
TRAIN_DATA: Final = FOLDER / "dialogue.jsonl"
"""About a minute of two-channel dialogue, in moshi-finetune's format."""
EVAL_DATA: Final = FOLDER / "dialogue_eval.jsonl"
"""Sixteen seconds more, which neither the codec nor the tokenizer was fitted on."""
CODEC: Final = FOLDER / "codec.safetensors"
"""`ttt_moshi.codec.DemoCodec`'s codebooks and settings."""
TOKENIZER: Final = FOLDER / "tokenizer.model"
"""A SentencePiece model with the special ids that Moshi needs: 0 unknown, 1 begin, 2 end, 3 padding."""
