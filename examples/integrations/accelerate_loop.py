"""Prune a network and train it in a loop with accelerate, save its state, and go on from there, in either space.

On made-up images. What makes it interspace pruning is the flag::

    accelerate launch --cpu examples/integrations/accelerate_loop.py
    accelerate launch --cpu examples/integrations/accelerate_loop.py --interspace
"""

import argparse
import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator, load_checkpoint_in_model
from accelerate.utils import set_seed
from images import quarters
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from ip_plugin import interspace, report
from ip_plugin.methods import lamp, prune


def build(args):
    set_seed(0)
    model = resnet18(num_classes=4)  # stands for a trained network
    if args.interspace:
        interspace(model, sharing="model")
    return prune(model, lamp, sparsity=args.sparsity)


def train(args, folder, resume=0):
    accelerator = Accelerator(cpu=True)
    model = build(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(TensorDataset(*quarters(64)), batch_size=16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resume:
        accelerator.load_state(f"{folder}/{resume}")
    for epoch in range(resume, args.epochs):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        accelerator.save_state(f"{folder}/{epoch + 1}")
    accelerator.save_model(model, folder)
    return accelerator.unwrap_model(model).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()

    images, labels = quarters(64, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        model = train(args, folder)
        outputs = model(images)
        right = (outputs.argmax(1) == labels).float().mean()
        print(f"trained: {report(model).prunable.sparsity:.1%} zeros, {right:.1%} right")

        resumed = train(args, folder, resume=args.epochs - 1)
        print("resumed: outputs equal:", torch.equal(resumed(images), outputs))

        load_checkpoint_in_model(loaded := build(args), folder)
        print("loaded:  outputs equal:", torch.equal(loaded.eval()(images), outputs))


if __name__ == "__main__":
    main()
