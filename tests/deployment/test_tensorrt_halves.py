"""Every press in both half precisions on TensorRT: the builder takes it for three generations of GPUs."""

import pytest
import torch
from deployment.tensorrt_cases import ARCHITECTURES, TAKEN, TARGETS, model_with, needs_tensorrt, prefills

pytestmark = needs_tensorrt

HALVES = (torch.float16, torch.bfloat16)
# A press meets two architectures, one a dtype; an architecture meets each dtype in every third press.
CASES = [
    pytest.param(name, ARCHITECTURES[(place + shift) % 3], dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for place, name in enumerate(TAKEN)
    for shift, dtype in enumerate(HALVES)
]


@pytest.mark.parametrize(("name", "arch", "dtype"), CASES)
def test_it_is_built(name: str, arch: str, dtype: torch.dtype) -> None:
    """Numbers are those of float32, which `test_tensorrt_presses.py` compares with eager's on all architectures."""
    for phase in prefills(model_with(name, arch, dtype)):
        assert phase.network.build(TARGETS)
