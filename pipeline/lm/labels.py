"""Whole labels as the beginning of a reply: which tokens must be run for them, and what their log-probabilities are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = -100.0
"""Log-probability that stands for none, so that it can be written as JSON."""

Label = tuple[int, ...]


class Tree(NamedTuple):
    """The proper beginnings of several labels, each once: what a model must read to score them in one pass.

    tokens, depths: (M,) a node's last token and its distance from the prompt (1 = right after it).
    ancestors: (M, M) boolean, [i, j] = node i sees node j, itself included.
    reads: per label, (node, token) pairs whose log-probabilities add up to the label's; node -1 is the prompt's end.
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    ancestors: Tensor
    reads: tuple[tuple[tuple[int, int], ...], ...]


@lru_cache(maxsize=256)
def label_tree(labels: tuple[Label, ...]) -> Tree:
    """Nodes in order of first use, so that a parent comes before its children."""
    nodes: dict[Label, int] = {}
    for label in labels:
        for length in range(1, len(label)):
            nodes.setdefault(label[:length], len(nodes))
    ancestors = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for beginning, index in nodes.items():
        for length in range(1, len(beginning) + 1):
            ancestors[index, nodes[beginning[:length]]] = True
    reads = tuple(tuple((nodes.get(label[:n], -1), label[n]) for n in range(len(label))) for label in labels)
    return Tree(tuple(key[-1] for key in nodes), tuple(len(key) for key in nodes), ancestors, reads)


def read_tree(tree: Tree, logits: Tensor) -> list[float]:
    """Natural-log probability of each label as the reply's beginning.

    logits: (1 + M, V), row 0 at the prompt's end, row 1 + m at node m.
    """
    logps = torch.log_softmax(logits.float(), dim=-1)
    rows = [node + 1 for reads in tree.reads for node, _ in reads]
    tokens = [token for reads in tree.reads for _, token in reads]
    values = iter(logps[rows, tokens].tolist())
    return [max(FLOOR, sum(next(values) for _ in reads)) for reads in tree.reads]


def own_shares(labels: Sequence[Label], logps: Sequence[float]) -> list[float]:
    """Takes from a label's probability what belongs to a longer label that begins with it ("1" and "10")."""
    return [_own(label, logp, labels, logps) for label, logp in zip(labels, logps, strict=True)]


def _own(label: Label, logp: float, labels: Sequence[Label], logps: Sequence[float]) -> float:
    longer = [n for n, other in enumerate(labels) if len(other) > len(label) and other[: len(label)] == label]
    next_ones = [n for n in longer if not any(_begins(labels[m], labels[n]) for m in longer)]
    rest = 1.0 - sum(math.exp(min(0.0, logps[n] - logp)) for n in next_ones)
    return max(FLOOR, logp + math.log(rest)) if rest > 0 else FLOOR


def _begins(short: Label, long: Label) -> bool:
    return len(short) < len(long) and long[: len(short)] == short
