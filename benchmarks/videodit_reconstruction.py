"""What the Video-DiT demo learned, as a picture: `python benchmarks/videodit_reconstruction.py RUN [OUT.png]`.

RUN is a folder that `ttt train --backbone videodit` made. A clip of each split is noised, and denoised in one step by
the run's model as it was before training and as it is after.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ttt.errors import TTTError
from ttt_videodit.pictures import reconstruct, write_reconstruction

OUT = Path("docs/images/videodit_reconstruction.png")


def main() -> int:
    """Write the picture and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.add_argument("--timestep", type=int, default=600, help="how much noise, from 0 to 999")
    parser.add_argument("--window", type=int, default=0, help="which window of each split")
    arguments = parser.parse_args()
    try:
        found = reconstruct(arguments.run, timestep=arguments.timestep, window=arguments.window)
        write_reconstruction(found, arguments.out)
    except TTTError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("| split | timestep | untrained: mean squared error of the latents | trained |")
    print("| --- | ---: | ---: | ---: |")
    for clip in found:
        print(f"| {clip.split} | {clip.timestep} | {clip.untrained_error:.3f} | {clip.trained_error:.3f} |")
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
