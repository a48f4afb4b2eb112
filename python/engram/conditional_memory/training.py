"""How the paper trains a memory: rows learn five times as fast, and never decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import nn

from engram.conditional_memory.tables.memory import TorchTable

TABLE_LR_SCALE: Final = 5.0
"""Learning rate of the rows over that of the model (paper, section 4)."""


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Two groups for an optimizer: the rows of all tables in ``model``, and everything else.

    Rows get ``lr`` x `TABLE_LR_SCALE` and no decay, the rest ``lr`` and ``weight_decay``.
    """
    tables = [m for m in model.modules() if isinstance(m, TorchTable)]
    rows = {id(p): p for table in tables for p in table.parameters()}
    others = [p for p in model.parameters() if id(p) not in rows]
    return [
        {"params": list(rows.values()), "lr": lr * TABLE_LR_SCALE, "weight_decay": 0.0},
        {"params": others, "lr": lr, "weight_decay": weight_decay},
    ]


def optimizers(
    model: nn.Module, lr: float, weight_decay: float = 0.0
) -> Iterable[torch.optim.Optimizer]:
    """Adam for the rows and AdamW for the rest, as `parameter_groups` splits them.

    Rows with sparse gradients (``sparse_gradients`` of the config) get SparseAdam, which moves only
    the rows of the batch; step all of them together.
    """
    rows, others = parameter_groups(model, lr, weight_decay)
    sparse = any(m.sparse for m in model.modules() if isinstance(m, TorchTable))
    adam = torch.optim.SparseAdam if sparse else torch.optim.Adam
    made: list[torch.optim.Optimizer] = []
    if rows["params"]:
        made.append(adam(rows["params"], lr=rows["lr"]))  # type: ignore[arg-type]
    if others["params"]:
        made.append(torch.optim.AdamW([others]))
    return made
