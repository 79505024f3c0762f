"""`kvpass quality`: a table of divergences on the demo's model and text."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from kvpass import smollm2
from kvpass.api import CapturedModel, capture_model
from kvpass.calibrate import calibrate, save
from kvpass.demo.context import long_text
from kvpass.quality.divergence import Divergence, Text, divergences, reference_logits
from kvpass.quality.subjects import LEARNED, subjects

CALIBRATION_SAMPLES, CALIBRATION_TOKENS = 4, 512  # from another part of the text


def run_quality(
    console: Console, tokens: int, continuation: int, ratios: Sequence[float], only: Sequence[str] = ()
) -> str:
    """Measure all presses, or those whose label begins with one of `only`, and return a table in Markdown."""
    torch.manual_seed(0)
    model, tokenizer = smollm2.load()
    ids = torch.tensor([tokenizer(long_text()).input_ids])
    text = Text(ids[:, :tokens], ids[:, tokens : tokens + continuation])
    lines = [f"| press | {' | '.join(map(str, ratios))} |", f"|---|{'---:|' * len(ratios)}"]
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress, torch.no_grad():
        step = progress.add_task("capturing", total=None)
        captured = capture_model(model)
        _learn(captured, ids[:, tokens + continuation :], Path(folder))
        expected = reference_logits(captured, text)
        chosen = {
            label: entry
            for label, entry in subjects(Path(folder)).items()
            if not only or any(label.startswith(name) for name in only)
        }
        progress.update(step, total=len(chosen), completed=0)
        for label, (make, anew) in chosen.items():
            progress.update(step, description=label)
            layers = captured.graphs.located.layer_count
            found: list[Divergence] = []
            for group in ([ratio] for ratio in ratios) if anew else (list(ratios),):
                found += divergences(captured, make(group[0], layers), group, text, expected)
            lines.append(f"| `{label}` | {' | '.join(_cells(found, len(ratios)))} |")
            progress.advance(step)
    return "\n".join(lines) + "\n"


def _cells(found: list[Divergence], columns: int) -> list[str]:
    if len(found) == columns:
        return [f"{one.mean:.3f}" for one in found]
    return [f"{found[0].mean:.3f} (removes {found[0].removed:.2f})", *[""] * (columns - 1)]


def _learn(captured: CapturedModel, ids: torch.Tensor, folder: Path) -> None:
    """What the learned presses need, from text that is not measured."""
    samples = [ids[:, i * CALIBRATION_TOKENS : (i + 1) * CALIBRATION_TOKENS] for i in range(CALIBRATION_SAMPLES)]
    for method in LEARNED:
        save(calibrate(captured, method, samples), folder / f"{method}.safetensors")
