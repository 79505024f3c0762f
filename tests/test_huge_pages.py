"""Weights lie in huge pages, if the system has some, and are what they were."""

import re
import threading
from pathlib import Path

import pytest
import torch
from models import eager_model, token_ids
from torch import Tensor

import kvpass
from kvpass.backends import huge_pages, inductor
from kvpass.backends.huge_pages import HUGE, NEAR, gather_in_huge_pages


def in_huge_pages(tensor: Tensor) -> int:
    """Bytes in huge pages of the mappings that hold a tensor, as Linux counts them."""
    first, last, total = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        start, end = (int(address, 16) for address in entry.split(" ", 1)[0].split("-"))
        if start < last and first < end:
            total += 1024 * int(re.findall(r"AnonHugePages: +(\d+) kB", entry)[0])
    return total


def test_numbers_stay_and_pages_are_huge() -> None:
    numbers = torch.arange(16 * HUGE // 8)
    address, before = numbers.data_ptr(), in_huge_pages(numbers) if huge_pages.SETTING.exists() else 0
    moved = gather_in_huge_pages([numbers, numbers[7:]])
    assert numbers.data_ptr() == address and torch.equal(numbers, torch.arange(len(numbers)))
    if not moved:
        pytest.skip("this system moves no memory into huge pages")
    assert moved == 15 * HUGE, "all but the ends, which share their pages with others"
    assert in_huge_pages(numbers) >= max(before, moved)


def test_a_system_without_them_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numbers = torch.ones(2 * HUGE)
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "none")
    assert gather_in_huge_pages([numbers]) == 0
    (tmp_path / "none").write_text("always madvise [never]")
    assert gather_in_huge_pages([numbers]) == 0


def test_neighbours_are_one_stretch() -> None:
    apart = 8 * NEAR
    stretches = [(apart, apart + 4), (0, 10), (20, 30), (2, 5), (30 + NEAR, 40 + NEAR)]
    assert huge_pages._joined(stretches) == [(0, 30), (30 + NEAR, 40 + NEAR), (apart, apart + 4)]


def test_compiling_moves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []
    done = threading.Event()
    monkeypatch.setattr(inductor, "gather_in_huge_pages", lambda weights: (moved.extend(weights), done.set()))
    model = eager_model("llama")
    compiled = kvpass.compile(model, "knorm", 0.5)
    compiled.generate(token_ids(1, 12), max_new_tokens=2, do_sample=False)
    assert done.wait(10)
    there = {tensor.data_ptr() for tensor in moved}
    assert {p.data_ptr() for name, p in model.named_parameters() if "proj" in name} <= there
