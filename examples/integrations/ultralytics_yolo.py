"""Prune a YOLO11n, train it with ultralytics, load its checkpoint in a new process and export it, in either space.

On made-up images. What makes it interspace pruning is the flag::

    python examples/integrations/ultralytics_yolo.py
    python examples/integrations/ultralytics_yolo.py --interspace
"""

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from images import squares
from torchvision.utils import save_image
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from ip_plugin import interspace, report
from ip_plugin.methods import prune


class Trainer(DetectionTrainer):
    # `YOLO.train` builds its network anew, in `get_model`: that is the place to convert and prune it.
    def __init__(self, *args, space, sparsity, **options):
        self.space, self.sparsity = space, sparsity
        super().__init__(*args, **options)

    def get_model(self, cfg=None, weights=None, verbose=True):
        model = super().get_model(cfg, weights, verbose)  # with the weights of a trained one, if YOLO has loaded it
        if self.space == "interspace":
            interspace(model)
        return prune(model, sparsity=self.sparsity)


def draw(folder):
    """Write images with a square each, and where it is: class, centre and size, as shares of the image."""
    (folder / "drawn").mkdir()
    for number, (image, box) in enumerate(zip(*squares(12, size=64)[:2], strict=True)):
        save_image(image, folder / "drawn" / f"{number}.png")
        (folder / "drawn" / f"{number}.txt").write_text(f"0 {box[0] / 64 + 0.25} {box[1] / 64 + 0.25} 0.5 0.5\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: drawn\nval: drawn\nnames: [square]\n")


def outputs(model, images):
    return model.predict(images, imgsz=64, conf=0.0, max_det=10, verbose=False)[0].boxes.data


def deploy(folder):
    """Load the checkpoint in a process that knows nothing of the training."""
    image, weights = folder / "drawn" / "0.png", folder / "train" / "weights" / "best.pt"
    model, boxes = YOLO(weights), torch.load(folder / "boxes.pt")
    print(f"loaded:   {report(model.model).prunable.sparsity:.1%} zeros")  # before predicting, which merges layers
    print(f"loaded:   {len(boxes)} boxes, equal:", torch.equal(outputs(model, image), boxes))
    exported = YOLO(YOLO(weights).export(format="onnx", imgsz=64, simplify=False), task="detect")
    print(f"exported: boxes differ by {(outputs(exported, image) - boxes).abs().max():.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--deploy", type=Path, metavar="FOLDER", help="do not train; load what is there, and export it")
    args = parser.parse_args()
    if args.deploy:
        return deploy(args.deploy)
    with tempfile.TemporaryDirectory() as name:
        draw(folder := Path(name))
        trainer = partial(Trainer, space="interspace" if args.interspace else "spatial", sparsity=args.sparsity)
        options = {"epochs": 2, "imgsz": 64, "batch": 6, "device": "cpu", "workers": 0, "plots": False}
        (model := YOLO("yolo11n.yaml")).train(trainer=trainer, data=folder / "data.yaml", project=name, **options)
        torch.save(outputs(model, folder / "drawn" / "0.png"), folder / "boxes.pt")
        return subprocess.run([sys.executable, __file__, "--deploy", name]).returncode


if __name__ == "__main__":
    sys.exit(main())
