"""Random crops and flips of whole batches in memory, with the same pixels as `train_transform` per image."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CropFlip:
    """A random crop after padding with black, then a random horizontal flip.

    Attributes:
        padding: Pixels on each side; 0 for no crop.
        hflip: Probability of a flip.

    Example:
        >>> crop_flip = CropFlip(padding=4, hflip=0.5)
        >>> drawn = crop_flip.draw(seed=42, epoch=0, indices=torch.arange(128))  # (128, 3)
        >>> batch = crop_flip(pixels[:128], drawn)  # uint8, (128, 3, 32, 32)
    """

    padding: int
    hflip: float

    def draw(self, seed: int, epoch: int, indices: Tensor) -> Tensor:
        """Return the random numbers that torchvision's transforms draw if torch is seeded by (seed, epoch, index).

        Args:
            seed: Seed of the run, below 2^32.
            epoch: Epoch, below 2^32.
            indices: Indices of the images, int64, (N,).

        Returns:
            Top and left of the crop in the padded image, and whether it is flipped; int64, (N, 3).
        """
        numbers = _random32(_mixed_seeds(seed, epoch, indices.numpy()), 3)
        offsets = numbers[:2] % np.uint32(2 * self.padding + 1)  # as torch.randint
        uniform = numbers[2 if self.padding else 0] & np.uint32(2**24 - 1)  # as torch.rand, times 2^24
        flipped = uniform.astype(np.float32) * np.float32(2**-24) < np.float32(self.hflip)
        return torch.from_numpy(np.stack([*offsets, flipped], 1).astype(np.int64))

    def __call__(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """Crop and flip a batch.

        Args:
            pixels: uint8, (N, C, H, W).
            drawn: Result of `draw`, on the same device.
        """
        height, width = pixels.shape[-2:]
        top, left, flip = (part[:, None] for part in drawn.unbind(1))
        rows = top + torch.arange(height, device=pixels.device)
        columns = torch.arange(width, device=pixels.device)
        columns = left + torch.where(flip > 0, width - 1 - columns, columns)
        padded = F.pad(pixels, (self.padding,) * 4)
        images = torch.arange(len(pixels), device=pixels.device)[:, None, None, None]
        channels = torch.arange(pixels.shape[1], device=pixels.device)[:, None, None]
        return padded[images, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _mixed_seeds(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """Return the low 32 bits of ``mix_seeds(seed, epoch, index)`` for each index: NumPy's SeedSequence, vectorised."""
    entropy = [np.full(len(indices), seed, np.uint32), np.full(len(indices), epoch, np.uint32)]
    entropy += [indices.astype(np.uint32), np.zeros(len(indices), np.uint32)]
    constant = 0x43B0D7E5

    def hashed(value: np.ndarray, factor: int) -> np.ndarray:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * factor & 0xFFFFFFFF
        value = value * np.uint32(constant)
        folded: np.ndarray = value ^ value >> np.uint32(16)
        return folded

    pool = [hashed(value, 0x931E8875) for value in entropy]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed = pool[target] * np.uint32(0xCA01F9DD)
                mixed -= hashed(pool[source], 0x931E8875) * np.uint32(0x4973F715)
                pool[target] = mixed ^ mixed >> np.uint32(16)
    constant = 0x8B51F9DD
    low, high = (hashed(value, 0x58F38DED) for value in pool[:2])
    shifted: np.ndarray = low >> np.uint32(1) | high << np.uint32(31)
    return shifted


def _random32(seeds: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` numbers of a Mersenne Twister for each seed, uint32, (count, N)."""
    state, kept = seeds, {0: seeds}
    for i in range(1, 397 + count):
        state = (state ^ state >> np.uint32(30)) * np.uint32(1812433253) + np.uint32(i)
        if i <= count or i >= 397:
            kept[i] = state
    numbers = []
    for i in range(count):
        twisted = kept[i] & np.uint32(0x80000000) | kept[i + 1] & np.uint32(0x7FFFFFFF)
        y = kept[i + 397] ^ twisted >> np.uint32(1) ^ (twisted & np.uint32(1)) * np.uint32(0x9908B0DF)
        y = y ^ y >> np.uint32(11)
        y = y ^ y << np.uint32(7) & np.uint32(0x9D2C5680)
        y = y ^ y << np.uint32(15) & np.uint32(0xEFC60000)
        numbers.append(y ^ y >> np.uint32(18))
    return np.stack(numbers)
