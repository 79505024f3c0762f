"""What every press is checked for on TensorRT, on one architecture."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from deployment.onnx_cases import needs_onnx, parsed
from deployment.tensorrt_cases import (
    TAKEN,
    TARGETS,
    check_prompt,
    check_steps,
    converted,
    distinct_ids,
    long_prefill,
    model_with,
    needs_tensorrt,
    one_layer,
)

LENGTHS = (53, 149)  # neither is an example's


@needs_tensorrt
@pytest.mark.parametrize("name", TAKEN)
class PressOnTensorRT:
    """Through torch_tensorrt, and through ONNX and TensorRT's own parser."""

    arch: ClassVar[str]

    def test_it_computes_the_same_and_is_built(self, name: str) -> None:
        model, phase = model_with(name, self.arch), converted(name, self.arch)
        for tokens in LENGTHS:
            check_steps(one_layer(self.arch), model, tokens, check_prompt(model, [phase], tokens))
        assert phase.network.build(TARGETS)

    @needs_onnx
    def test_onnx_computes_the_same_and_is_built(self, name: str, tmp_path: Path) -> None:
        """The same program: as ONNX Runtime runs it, and as TensorRT's parser reads it."""
        model, (prompts, program) = model_with(name, self.arch), long_prefill(name, self.arch)
        phase = parsed("prefill", prompts.ranges, program, tmp_path)
        for tokens in LENGTHS:
            found = check_prompt(model, [phase], tokens)
            for output, value in phase.evaluate({"input_ids": distinct_ids(tokens)}).items():
                torch.testing.assert_close(value, found[output], atol=2e-5, rtol=1e-4, msg=output)
        assert phase.build(TARGETS)

    @needs_onnx
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_built(self, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
        """Both ways. What it computes is what float32 computes, but for rounding."""
        assert converted(name, self.arch, dtype).network.build(TARGETS)
        prompts, program = long_prefill(name, self.arch, dtype)
        assert parsed("prefill", prompts.ranges, program, tmp_path).build(TARGETS)
