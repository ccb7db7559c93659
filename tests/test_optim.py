"""The guarded optimizer step against plain AdamW, and what it does with NaN and infinity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archer_fast.meters import Meters
from archer_fast.optim import GuardedStep, NonFiniteLoss
from archer_fast.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")
NO_GAMES = np.zeros(0, np.int64)


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in (4, 3)]


def make_step(parameters: list[nn.Parameter], max_skipped: int = 3, max_grad_norm: float = 0.5) -> GuardedStep:
    groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.01}]
    return GuardedStep("test", groups, max_grad_norm, max_skipped)


def loss_of(parameters: list[nn.Parameter], step: int) -> Tensor:
    """Gradients sometimes above and sometimes below the clipping norm."""
    return sum(((p - step).square().sum() for p in parameters), torch.zeros(())) * 0.02 * (1 + step % 3)


def everything(step: GuardedStep) -> dict[str, Tensor]:
    weights = {f"weight {i}": p.detach().clone() for i, p in enumerate(step.parameters)}
    return weights | {name: value.clone() for name, value in step.state_tensors().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def nan_loss(parameters: list[nn.Parameter]) -> Tensor:
    """The loss is NaN, its gradients are not."""
    return loss_of(parameters, 1) + torch.tensor(torch.nan)


def infinite_loss(parameters: list[nn.Parameter]) -> Tensor:
    return loss_of(parameters, 1) * torch.inf


def nan_gradient(parameters: list[nn.Parameter]) -> Tensor:
    """The loss is finite; the gradient of one weight is 0 * infinity."""
    return loss_of(parameters, 1) + 0.0 * (parameters[1][0] - parameters[1][0].detach()).abs().sqrt()


FAULTS: list[Callable[[list[nn.Parameter]], Tensor]] = [nan_loss, infinite_loss, nan_gradient]


def test_finite_steps_are_plain_adamw_with_clipping() -> None:
    mine, plain = make_parameters(), make_parameters()
    step = make_step(mine)
    groups = [{"params": plain[:1], "lr": 0.1}, {"params": plain[1:], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    norms, meters = [], Meters()
    for i in range(6):
        step(loss_of(mine, i), meters, NO_GAMES)
        optimizer.zero_grad()
        loss_of(plain, i).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(plain, 0.5).item())
        optimizer.step()
    assert min(norms) < 0.5 < max(norms)
    for got, wanted in zip(mine, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert meters.read() == pytest.approx({"test_grad_norm": sum(norms) / 6})
    assert step.num_steps == 6


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_faulty_step_changes_nothing_and_is_counted(
    fault: Callable[[list[nn.Parameter]], Tensor], steps_before: int
) -> None:
    parameters = make_parameters()
    step, meters = make_step(parameters), Meters()
    for i in range(steps_before):
        step(loss_of(parameters, i), meters, NO_GAMES)
    before = everything(step)
    loss = fault(parameters)
    step(loss, meters, NO_GAMES)
    after = everything(step)
    if steps_before:
        assert_same(after, before)
    else:  # the moments did not exist; now they do, as before a first step
        assert_same({k: v for k, v in after.items() if k in before}, before)
        assert all(value.abs().max() == 0 for name, value in after.items() if name not in before)
    step.check(meters)
    row = meters.read()
    assert row["skipped_steps"] == 1
    assert np.isfinite(row["test_grad_norm"])


def test_steps_after_a_fault_go_on_as_if_it_had_not_been() -> None:
    with_fault, without = make_parameters(), make_parameters()
    steps = make_step(with_fault), make_step(without)
    for i in range(4):
        steps[0](loss_of(with_fault, i), Meters(), NO_GAMES)
        if i == 1:
            steps[0](nan_gradient(with_fault), Meters(), NO_GAMES)
        steps[1](loss_of(without, i), Meters(), NO_GAMES)
    assert_same(everything(steps[0]), everything(steps[1]))


def test_too_many_in_a_row_stop_and_name_the_games_of_the_first() -> None:
    parameters = make_parameters()
    step, meters = make_step(parameters, max_skipped=3), Meters()
    for i, bad in enumerate([False, True, False, True, True, True, True]):
        step(nan_loss(parameters) if bad else loss_of(parameters, i), meters, np.array([i, 10 * i]))
    with pytest.raises(NonFiniteLoss, match="test: 3 optimizer steps in a row had a non-finite loss") as caught:
        step.check(meters)
    assert caught.value.trajectory_ids.tolist() == [3, 30]
    assert meters.read()["skipped_steps"] == 5


def test_a_row_of_faults_runs_across_checks_and_a_good_step_ends_it() -> None:
    parameters = make_parameters()
    step, meters = make_step(parameters, max_skipped=3), Meters()

    def run(*faulty: bool) -> None:
        for bad in faulty:
            step(nan_loss(parameters) if bad else loss_of(parameters, 0), meters, np.array([step.num_steps]))
        step.check(meters)

    run(False, True, True)
    run(False, True)  # the row of two was over
    run(True)
    with pytest.raises(NonFiniteLoss) as caught:
        run(True, False)
    assert caught.value.trajectory_ids.tolist() == [6]  # of the games still known, the first faulty
    step.check(meters)  # nothing since: nothing to say


def test_saved_state_continues_bit_by_bit() -> None:
    first, second = make_parameters(), make_parameters()
    steps = make_step(first), make_step(second)
    for i in range(3):
        steps[0](loss_of(first, i), Meters(), NO_GAMES)
    with torch.no_grad():
        for source, target in zip(first, second, strict=True):
            target.copy_(source)
    steps[1].load_state_tensors({name: value.clone() for name, value in steps[0].state_tensors().items()})
    assert_same(everything(steps[0]), everything(steps[1]))
    for i in range(3, 6):
        for step, parameters in zip(steps, (first, second), strict=True):
            step(loss_of(parameters, i), Meters(), NO_GAMES)
    assert_same(everything(steps[0]), everything(steps[1]))


def test_the_state_of_an_optimizer_that_never_stepped_is_empty_and_loads() -> None:
    step = make_step(make_parameters())
    assert step.state_tensors() == {}
    step.load_state_tensors({})
    step(loss_of([nn.Parameter(p) for p in step.parameters], 0) * 0 + step.parameters[0].sum(), Meters(), NO_GAMES)
    assert step.state_tensors()["0.step"].item() == 1


def test_a_group_without_parameters_is_left_out() -> None:
    parameters = make_parameters()
    step = GuardedStep("x", [{"params": parameters, "lr": 0.1}, {"params": [], "lr": 1.0}], 1.0, 1)
    assert len(step.optimizer.param_groups) == 1
    step(loss_of(parameters, 0), Meters(), NO_GAMES)
    assert step.optimizer.param_groups[0]["lr"] == 0.1


class Other(Ranks):
    """Its part of every sum is this number."""

    def __init__(self, number: float) -> None:
        super().__init__(0, 2)
        self.number = number

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor + self.number

    def sum_gradients(self, parameters: object) -> None: ...


@pytest.mark.parametrize(("number", "moves"), [(0.0, True), (float("nan"), False)])
def test_a_loss_that_is_not_finite_on_another_rank_stops_the_step_here_too(number: float, moves: bool) -> None:
    parameters = make_parameters()
    step = GuardedStep("test", [{"params": parameters, "lr": 0.1}], 0.5, 3, Other(number))
    before = everything(step)
    step(loss_of(parameters, 1), Meters(), NO_GAMES)
    assert any(not torch.equal(value, everything(step)[name]) for name, value in before.items()) == moves


# -- master weights ------------------------------------------------------------------------------------


def half_parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    """The first of two in half precision, as a trunk beside its heads."""
    first, second = make_parameters()
    return [nn.Parameter(first.detach().to(dtype)), second]


def test_half_precision_adds_up_steps_that_it_could_not_hold() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    step = GuardedStep("test", [{"params": [weight], "lr": 1e-4}], 1.0, 3)
    for _ in range(200):
        step(weight.sum(), Meters(), NO_GAMES)
    # Adam moves by its rate where the gradient stays the same; the spacing of bfloat16 below 1 is .0039.
    torch.testing.assert_close(weight.detach().float(), torch.full((3,), 0.98), rtol=0, atol=0.002)
    assert step.state_tensors()["0.master"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bucket", [1, 1 << 28])
def test_masters_are_float32_adamw_on_the_same_gradients(
    dtype: torch.dtype, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archer_fast.optim._BUCKET", bucket)
    parameters = half_parameters(dtype)
    twins = [nn.Parameter(p.detach().float()) for p in parameters]
    step = make_step(parameters, max_grad_norm=1e9)
    plain = torch.optim.AdamW(
        [{"params": twins[:1], "lr": 0.1}, {"params": twins[1:], "lr": 0.01}], weight_decay=0.0, fused=True
    )
    for i in range(5):
        loss = loss_of(parameters, i)
        for twin, gradient in zip(twins, torch.autograd.grad(loss, parameters), strict=True):
            twin.grad = gradient.float()
        plain.step()
        step(loss_of(parameters, i), Meters(), NO_GAMES)
        for parameter, twin in zip(parameters, twins, strict=True):
            assert torch.equal(parameter, twin.to(parameter.dtype))
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_masters_alone(fault: Callable[[list[nn.Parameter]], Tensor]) -> None:
    parameters = half_parameters()
    step = make_step(parameters)
    step(loss_of(parameters, 1), Meters(), NO_GAMES)
    before = everything(step)
    step(fault(parameters), Meters(), NO_GAMES)
    assert_same(before, everything(step))


def test_masters_go_on_from_what_was_saved_or_from_the_parameters() -> None:
    parameters = half_parameters()
    step = make_step(parameters)
    step(loss_of(parameters, 1), Meters(), NO_GAMES)
    saved = {name: value.clone() for name, value in step.state_tensors().items()}
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    again = make_step(twins)
    again.load_state_tensors(saved)
    for i in range(3):
        step(loss_of(parameters, i), Meters(), NO_GAMES)
        again(loss_of(twins, i), Meters(), NO_GAMES)
    assert_same(everything(step), everything(again))

    with torch.no_grad():
        twins[0].fill_(0.5)
    again.load_state_tensors({})
    assert again.state_tensors().keys() == {"0.master"}
    assert again.state_tensors()["0.master"].tolist() == [0.5] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_in_the_host_s_memory_steps_as_one_on_the_gpu(dtype: torch.dtype) -> None:
    found = []
    for offload in (False, True):
        parameters = [nn.Parameter(p.detach().to("cuda", dtype)) for p in make_parameters()]
        step = GuardedStep("test", [{"params": parameters, "lr": 0.1}], 0.5, 3, offload=offload)
        for i in range(4):
            loss = sum((p - i).square().sum() for p in parameters)
            assert isinstance(loss, Tensor)
            step(loss, Meters(), NO_GAMES)
        kinds = {value.device.type for name, value in step.state_tensors().items() if not name.endswith("step")}
        assert kinds == {"cpu" if offload else "cuda"}
        found.append([p.detach().float() for p in parameters])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
