"""Write CIFAR-10 as the one file that ``ip-plugin compare --data FILE`` reads.

From an archive of JPEG images: for "train" and "test" ``<split>_jpeg`` (the files joined, uint8), ``<split>_length``
(bytes of each) and ``<split>_label``::

    python benchmarks/cifar10_npz.py cifar10_jpeg.npz cifar10.npz
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image


def convert(archive: Path, output: Path) -> None:
    """Decode all images of an archive."""
    arrays = {}
    with np.load(archive) as file:
        for split in ("train", "test"):
            joined, ends = file[f"{split}_jpeg"].tobytes(), np.cumsum(file[f"{split}_length"], dtype=np.int64)
            starts = (0, *ends[:-1])
            images = [np.asarray(Image.open(io.BytesIO(joined[a:b]))) for a, b in zip(starts, ends, strict=True)]
            arrays[f"{split}_images"] = np.stack(images)
            arrays[f"{split}_labels"] = file[f"{split}_label"].astype(np.int64)
    np.savez(output, **arrays)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    convert(args.archive, args.output)
