"""Every press in both half precisions on TensorRT: the builder takes it for three generations of GPUs."""

import pytest
import torch
from deployment.tensorrt_cases import TARGETS, converted, in_turn, needs_tensorrt

pytestmark = needs_tensorrt


@pytest.mark.parametrize(("name", "arch"), in_turn(shift=1))
def test_float16_is_built(name: str, arch: str) -> None:
    """Numbers are those of float32, which `test_tensorrt_presses.py` compares with eager's."""
    assert converted(name, arch, torch.float16).network.build(TARGETS)


@pytest.mark.parametrize(("name", "arch"), in_turn(shift=2))
def test_bfloat16_is_built(name: str, arch: str) -> None:
    assert converted(name, arch, torch.bfloat16).network.build(TARGETS)
