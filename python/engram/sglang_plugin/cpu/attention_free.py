"""Models without attention heads on the CPU.

SGLang pads attention heads on a CPU so that they divide by the tensor-parallel ranks, and looks at
the number of heads for that, which a pure state-space model does not have.
"""

from __future__ import annotations

from typing import Any


def adjust_config_with_unaligned_cpu_tp(model_config: Any, load_config: Any, tp_size: int) -> Any:
    """Return the configuration with sizes padded for `tp_size` ranks, as SGLang's function does.

    A model without attention heads is left as it is; its other sizes must divide by the ranks.
    """
    if not model_config.num_attention_heads:
        return model_config
    from sglang.srt.configs import update_config

    return update_config.adjust_config_with_unaligned_cpu_tp(model_config, load_config, tp_size)
