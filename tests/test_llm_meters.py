"""llm.train.meters: phases add up to the whole, and the device is read once."""

from __future__ import annotations

import math

import pytest
import torch

from llm.train.meters import MOST_MARKS, Clock, Meters

CPU = torch.device("cpu")


class Ticking(Clock):
    """A clock whose time the test sets."""

    now = 0.0

    def _now(self) -> float:
        return self.now

    def spend(self, phase: str, seconds: float) -> None:
        self.switch(phase)
        self.now += seconds


def test_time_counts_for_the_running_phase() -> None:
    clock = Ticking(CPU)
    clock.start()
    clock.spend("data", 1.0)
    with clock.phase("probes"):
        clock.now += 2.0
    clock.now += 1.0  # back in data
    clock.spend("forward", 4.0)
    assert clock.shares() == {"data": 0.25, "forward": 0.5, "probes": 0.25}
    clock.now += 3.0  # forward runs on
    clock.spend("backward", 1.0)
    assert clock.shares() == {"data": 0.0, "forward": 0.75, "backward": 0.25, "probes": 0.0}
    clock.stop()
    assert {name: total for name, total in clock.seconds.items() if total} == {
        "data": 2.0,
        "forward": 7.0,
        "backward": 1.0,
        "probes": 2.0,
    }


def test_nothing_counts_before_the_start_and_after_the_end() -> None:
    clock = Ticking(CPU)
    clock.spend("forward", 1.0)
    assert clock.shares() == {}
    clock.start()
    clock.spend("forward", 2.0)
    clock.stop()
    clock.spend("backward", 4.0)
    assert clock.shares() == {"forward": 1.0}
    assert sum(clock.seconds.values()) == 2.0


def test_the_marks_of_a_long_run_do_not_pile_up() -> None:
    clock = Ticking(CPU)
    clock.start()
    for _ in range(MOST_MARKS):
        clock.spend("forward", 1.0)
        clock.spend("backward", 3.0)
    assert len(clock._marks) <= MOST_MARKS + 1
    assert clock.shares() == {"forward": 0.25, "backward": 0.75}


def test_meters_are_means_over_all_ranks_by_one_reduction() -> None:
    meters, reductions = Meters(CPU), []

    def two_equal_ranks(values: torch.Tensor) -> torch.Tensor:
        reductions.append(values.shape)
        return 2 * values

    meters.add("loss", torch.tensor(3.0))
    meters.add("loss", torch.tensor(1.0))
    meters.add("margin", torch.tensor(6.0), 4)
    meters.add_if_finite("norm", torch.tensor(2.0))
    meters.add_if_finite("norm", torch.tensor(math.inf))
    meters.add_if_finite("overflow", torch.tensor(math.nan))
    assert meters.totals() == {"loss": 4.0, "margin": 6.0, "norm": 2.0, "overflow": 0.0}
    assert meters.drain(two_equal_ranks) == {"loss": 2.0, "margin": 1.5, "norm": 2.0}
    assert reductions == [(4, 2)]
    assert meters.drain(two_equal_ranks) == {}


def test_a_loss_that_is_not_a_number_is_not_hidden() -> None:
    meters = Meters(CPU)
    meters.add("loss", torch.tensor(math.nan))
    meters.add("loss", torch.tensor(1.0))
    assert math.isnan(meters.drain(lambda values: values)["loss"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_work_counts_where_it_was_asked_for() -> None:
    """The calls return at once; a wall clock would charge the products to the phase after them."""
    device = torch.device("cuda")
    clock, matrix = Clock(device), torch.ones(4096, 4096, device=device)
    (matrix @ matrix).sum().item()  # warm
    clock.start()
    clock.switch("forward")
    for _ in range(50):
        matrix @ matrix
    clock.switch("other")
    clock.stop()
    assert clock.seconds["forward"] > 0.9 * sum(clock.seconds.values())
