"""Every press in both half precisions on TensorRT: the builder takes it for three generations of GPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deployment.onnx_cases import needs_onnx, parsed
from deployment.tensorrt_cases import ARCHITECTURES, TAKEN, TARGETS, converted, in_turn, long_prefill, needs_tensorrt

pytestmark = needs_tensorrt
PARSED = {"knorm", "snapkv", "expected_attention", "streaming_llm", "chunkkv", "key_rerotation"}


def through_onnx() -> list[Any]:
    """Every press on every architecture in both types; if not `--exhaustive`, some of each."""
    return [
        pytest.param(name, arch, dtype, marks=[] if name in PARSED and turn == row % 3 else pytest.mark.exhaustive)
        for row, name in enumerate(TAKEN)
        for column, arch in enumerate(ARCHITECTURES)
        for turn, dtype in ((column, torch.float16), ((column + 1) % 3, torch.bfloat16))
    ]


@pytest.mark.parametrize(("name", "arch"), in_turn(shift=1))
def test_float16_is_built(name: str, arch: str) -> None:
    """Numbers are those of float32, which `test_tensorrt_presses.py` compares with eager's."""
    assert converted(name, arch, torch.float16).network.build(TARGETS)


@pytest.mark.parametrize(("name", "arch"), in_turn(shift=2))
def test_bfloat16_is_built(name: str, arch: str) -> None:
    assert converted(name, arch, torch.bfloat16).network.build(TARGETS)


@needs_onnx
@pytest.mark.parametrize(("name", "arch", "dtype"), through_onnx())
def test_what_the_parser_reads_is_built(name: str, arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    prompts, program = long_prefill(name, arch, dtype)
    assert parsed("prefill", prompts.ranges, program, tmp_path).build(TARGETS)
