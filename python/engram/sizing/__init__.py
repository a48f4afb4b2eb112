"""How many bytes a model's state takes, from its config.json alone: without torch, without SGLang.

``config`` reads the file, ``families`` knows the architectures, ``buffers`` the shapes that SGLang
keeps for one slot, ``size`` adds them up.
"""

from engram.sizing.config import read_config
from engram.sizing.families import ARCHITECTURES, Precision
from engram.sizing.size import ModelSize, size_of

__all__ = ["ARCHITECTURES", "ModelSize", "Precision", "read_config", "size_of"]
