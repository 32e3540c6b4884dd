"""The demo's data: real speech, its transcript, the codec and the tokenizer fitted on it; `NOTICE.md` has sources."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ttt.packaged import PackagedFiles

FOLDER: Final = Path(__file__).parent
TRAIN_DATA: Final = FOLDER / "dialogue.jsonl"
"""About a minute of two-channel dialogue, in moshi-finetune's format."""
EVAL_DATA: Final = FOLDER / "dialogue_eval.jsonl"
"""Sixteen more seconds; neither the codec nor the tokenizer was fitted on them."""
CODEC: Final = FOLDER / "codec.safetensors"
"""`ttt_moshi.codec.DemoCodec`'s codebooks and settings."""
TOKENIZER: Final = FOLDER / "tokenizer.model"
"""A SentencePiece model with the special ids that Moshi needs: 0 unknown, 1 begin, 2 end, 3 padding."""

SHA256: Final = {
    "dialogue.flac": "16cd038cce965ebd18cab45c2e18e4a6ff30975d1c314839c8fe2604b1a6191a",
    "dialogue.json": "1a7bcfbe4ddf4256ba63a9ecf1761893101194a0b63a00063a30ee7a9143d848",
    "dialogue.jsonl": "49d6f18e9417254f0fa3d5047910583cab568c41b418edb5471fc511ac7e661f",
    "dialogue_eval.flac": "23de402e8aa4746b53f374c2db73a66fcf12b65705ed0fb6febde48556dbb167",
    "dialogue_eval.json": "58ebb700a43d05d8c2ebeabc40ed5cf8b0791b0bfebd9ca174f30e555a831670",
    "dialogue_eval.jsonl": "80a9c13963c1aa9105f0e749732645d784436eee3a29a977c093b502b1e7c1f8",
    "tokenizer.model": "efeac9b4bf99269572ff960a5b4bbddd55f030d76908226569f900ea9f860080",
}
"""SHA-256 of the files that carry no checksum themselves; `sha256sum` prints it for a file that was made again."""

require_whole: Final = PackagedFiles(FOLDER, SHA256, distribution="ttt-moshi").require_whole
"""Check, once in a process, that these files are as shipped."""
