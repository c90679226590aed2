"""Made-up images for the examples beside this file."""

import torch


def quarters(count, seed=0):
    """Noise with a bright quarter: images ``(count, 3, 32, 32)``; and the number of the quarter, 0 to 3."""
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, 2, 16, 2, 16, generator=torch.Generator().manual_seed(seed))
    images[torch.arange(count), :, labels // 2, :, labels % 2] += 1
    return images.reshape(count, 3, 32, 32), labels


def squares(count, size, seed=0):
    """Noise with a bright square of half the size: images, boxes (left, top, right, bottom), and masks of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(size // 2, (count, 2), generator=generator).repeat(1, 2)
    boxes[:, 2:] += size // 2
    masks = torch.zeros(count, size, size, dtype=torch.long)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return (torch.rand(count, 3, size, size, generator=generator) + masks[:, None]) / 2, boxes, masks
