"""Train a timm classifier with layer decay and an average of its weights, and prune it meanwhile, in either space.

On made-up images. What makes it interspace pruning is the flag::

    python examples/integrations/timm_ema.py
    python examples/integrations/timm_ema.py --interspace
"""

import argparse
import tempfile

import timm
import torch
import torch.nn.functional as F
from images import quarters
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, accuracy
from torch.utils.data import DataLoader, TensorDataset

from ip_plugin import interspace, load, prunable, report, save
from ip_plugin.adapters import torch_prune as prune
from ip_plugin.methods import Gradual


def build():
    return timm.create_model("resnet10t", num_classes=4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*quarters(128)), batch_size=16, shuffle=True)
    model = build()
    if args.interspace:
        interspace(model)
    else:  # a plain model must have its masks before the average copies it
        for module, name in prunable(model):
            prune.identity(module, name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs)
    ema = ModelEmaV3(model, decay=0.9)
    steps = args.epochs * len(loader)
    pruning = Gradual(model, sparsity=args.sparsity, begin_step=steps // 4, end_step=3 * steps // 4, update_every=2)

    for epoch in range(args.epochs):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pruning.step()
            ema.update(model)
        scheduler.step(epoch + 1)

    images, labels = quarters(64, seed=1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        outputs = ema.module(images)
        right = accuracy(outputs, labels)[0].item()
        print(f"average: {report(ema.module).prunable.sparsity:.1%} zeros, {right:.1f}% right")
        save(ema.module, f"{folder}/model.safetensors")
        loaded = load(build(), f"{folder}/model.safetensors").eval()
        print("loaded:  outputs equal:", torch.equal(loaded(images), outputs))


if __name__ == "__main__":
    main()
