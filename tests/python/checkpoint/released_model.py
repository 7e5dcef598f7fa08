"""The small model that the tests of releases store in many ways."""

import torch
from drafter_checkpoints import PLAIN
from tiny_checkpoints import random_tensors

import dsv4_ascend

IDS = list(range(11))
TENSORS = random_tensors(PLAIN)


def logits(folder, dtype=torch.float32):
    return dsv4_ascend.load(folder, dtype=dtype).forward(IDS)
