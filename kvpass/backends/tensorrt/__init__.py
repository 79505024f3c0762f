"""Engines of TensorRT, through torch_tensorrt: for data-centre GPUs, or for RTX GPUs, whose builder needs no GPU.

Nothing here imports torch_tensorrt before it is used.
"""

from kvpass.backends.tensorrt.engines import Runner, write

__all__ = ["Runner", "write"]
