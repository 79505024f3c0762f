"""Every press in both half precisions on TensorRT: the builder takes it for three generations of GPUs.

Numbers are those of float32, which `test_tensorrt_presses.py` compares with eager's.
"""

from pathlib import Path

import torch
from deployment.onnx_cases import needs_onnx, parsed
from deployment.tensorrt_cases import TARGETS, converted, every_press_in, long_prefill, needs_tensorrt

pytestmark = [needs_tensorrt, every_press_in(torch.float16, torch.bfloat16)]


def test_it_is_built(name: str, arch: str, dtype: torch.dtype) -> None:
    assert converted(name, arch, dtype).network.build(TARGETS)


@needs_onnx
def test_what_the_parser_reads_is_built(name: str, arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    prompts, program = long_prefill(name, arch, dtype)
    assert parsed("prefill", prompts.ranges, program, tmp_path).build(TARGETS)
