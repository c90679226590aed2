"""Networks that a benchmark trains once, and finds again."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from ip_plugin.compare import Study
from ip_plugin.compare.data import Images
from ip_plugin.compare.training import Training
from ip_plugin.utils.atomic import write_whole


def trained(model: nn.Module, path: Path, study: Study, images: Images, seed: int) -> nn.Module:
    """The model, trained; its weights are read from the file if it is there, and kept in it."""
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        Training(model, images, study.training, seed).train()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        write_whole(path, buffer.getvalue())
    return model.eval()
