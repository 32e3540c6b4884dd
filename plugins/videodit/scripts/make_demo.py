"""Make the demo's codec anew, and its figures: `python plugins/videodit/scripts/make_demo.py`.

The codec is fitted on the part of ttt_videodit/demo/city.mp4 that trains. The figures for NOTICE.md are printed: how
near both parts come back from 16 channels, and how their latents are spread.
"""

from __future__ import annotations

from typing import get_args

from ttt_videodit import demo
from ttt_videodit.clip import Split, demo_frames
from ttt_videodit.codec import DemoCodec, peak_signal_to_noise


def main() -> None:
    DemoCodec.fit(demo_frames("train", width=2 * demo.SIDE)).save(demo.CODEC)
    codec = DemoCodec.load()
    print(f"{demo.CODEC}: {demo.CODEC.stat().st_size:,} bytes")
    for split in get_args(Split):
        frames = demo_frames(split, width=2 * demo.SIDE)[None]
        latents = codec.encode(frames)
        decibels = peak_signal_to_noise(codec.decode(latents), frames)
        deviation = latents.std((0, 1, 3, 4))
        print(
            f"{split}: {decibels:.2f} dB; latents {tuple(latents.shape)}, standard deviation {latents.std():.2f}, "
            f"by channel {deviation.min():.2f} to {deviation.max():.2f}"
        )


if __name__ == "__main__":
    main()
