"""A whole CogVideoX in diffusers' layout, small enough to be made on the spot, with random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from ttt_videodit.diffusion import make_scheduler

TEXT_DIM = 32
SENTENCES = ("towers at night, with lights", "cars drive through the city", "clouds pass over the buildings", "blurred")


def write_pretrained(folder: Path) -> Path:
    """Write transformer/, vae/, text_encoder/, tokenizer/ and scheduler/ into a folder, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        tokens = _write_tokenizer(folder / "tokenizer")
        CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            time_embed_dim=32,
            text_embed_dim=TEXT_DIM,
            sample_height=4,
            sample_width=6,
            use_rotary_positional_embeddings=True,
        ).save_pretrained(folder / "transformer")
        AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=16
        ).save_pretrained(folder / "vae")
        T5EncoderModel(
            T5Config(vocab_size=tokens, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ).save_pretrained(folder / "text_encoder")
    make_scheduler().save_pretrained(folder / "scheduler")
    return folder


def _write_tokenizer(folder: Path) -> int:
    """Write a SentencePiece tokenizer in T5's layout; how many tokens it knows."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=content,
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(content.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 226}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(sentencepiece.SentencePieceProcessor(model_proto=content.getvalue()).vocab_size())
