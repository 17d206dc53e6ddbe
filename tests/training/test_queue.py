"""The memory of earlier embeddings: nothing is lost, nothing comes too early, everything is saved."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor

from tests.training.ranks import on_ranks
from training.distributed import rank
from training.queue import FeatureQueue


def rows(first: int, count: int, dim: int = 2) -> Tensor:
    """Rows that hold their own number."""
    return torch.arange(first, first + count).float()[:, None].expand(-1, dim)


def add(queue: FeatureQueue, first: int, count: int) -> None:
    queue.stage(rows(first, count), torch.arange(first, first + count))


def contents(queue: FeatureQueue) -> list[int]:
    """Ids from the oldest row to the newest."""
    at = (int(queue.next) + torch.arange(len(queue))) % len(queue)
    ids: list[int] = queue.ids[at].tolist()
    return [one for one in ids if one >= 0]


def test_a_new_queue_holds_random_unit_vectors_of_no_image() -> None:
    torch.manual_seed(0)
    queue = FeatureQueue(50, 8)
    assert len(queue) == 50
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(50))
    assert queue.rows.mean(0).norm() < 0.5
    assert set(queue.ids.tolist()) == {-1}
    assert queue.filled == 0


def test_what_is_staged_is_not_in_the_queue_before_it_is_flushed() -> None:
    queue = FeatureQueue(5, 2)
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    add(queue, 0, 3)
    for name, value in queue.state_dict().items():
        assert torch.equal(value, before[name]), name
    queue.flush()
    assert contents(queue) == [0, 1, 2]


def test_a_flush_adds_once() -> None:
    queue = FeatureQueue(5, 2)
    add(queue, 0, 2)
    queue.flush()
    queue.flush()
    assert contents(queue) == [0, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 12])
def test_the_last_rows_stay_in_order_wherever_the_ring_closes(count: int) -> None:
    queue = FeatureQueue(5, 2)
    expected: deque[int] = deque(maxlen=5)
    for step in range(11):
        add(queue, step * count, count)
        queue.flush()
        expected.extend(range(step * count, (step + 1) * count))
        assert contents(queue) == list(expected)
        assert queue.filled == len(expected)
        # Rows and ids have not come apart.
        filled = queue.ids >= 0
        assert torch.equal(queue.rows[filled][:, 0], queue.ids[filled].float())


def test_all_that_a_step_stages_is_added_in_order() -> None:
    queue = FeatureQueue(7, 2)
    add(queue, 0, 3)
    add(queue, 10, 3)
    add(queue, 20, 3)
    queue.flush()
    assert contents(queue) == [2, 10, 11, 12, 20, 21, 22]


def test_rows_are_stored_without_their_graph() -> None:
    queue = FeatureQueue(4, 2)
    embeddings = torch.randn(2, 2, requires_grad=True)
    queue.stage(embeddings * 2, torch.arange(2))
    queue.flush()
    assert not queue.rows.requires_grad
    torch.testing.assert_close(queue.rows[:2], embeddings.detach() * 2)


def test_a_loss_can_go_backward_before_the_flush_that_overwrites_its_rows() -> None:
    queue = FeatureQueue(3, 2)
    queries = torch.randn(3, 2, requires_grad=True)
    loss = (queries @ queue.rows.T).sum()
    seen = queue.rows.sum(0).expand(3, -1).clone()
    add(queue, 0, 3)
    loss.backward()
    queue.flush()
    torch.testing.assert_close(queries.grad, seen)


def test_half_precision_becomes_float32_and_a_float64_queue_stays_one() -> None:
    single = FeatureQueue(3, 2)
    single.stage(torch.ones(1, 2, dtype=torch.bfloat16), torch.arange(1))
    single.flush()
    assert single.rows.dtype == torch.float32
    double = FeatureQueue(3, 2).double()
    third = torch.full((1, 2), 1 / 3, dtype=torch.float64)
    double.stage(third, torch.arange(1))
    double.flush()
    assert torch.equal(double.rows[:1], third)


def test_a_saved_queue_goes_on_where_it_stood() -> None:
    queue = FeatureQueue(5, 2)
    add(queue, 0, 4)
    queue.flush()
    resumed = FeatureQueue(5, 2)
    resumed.load_state_dict(queue.state_dict())
    for one in (queue, resumed):
        add(one, 4, 3)
        one.flush()
    assert contents(resumed) == contents(queue) == [2, 3, 4, 5, 6]
    assert all(torch.equal(value, queue.state_dict()[name]) for name, value in resumed.state_dict().items())


def two_steps_on_ranks() -> tuple[list[int], Tensor]:
    torch.manual_seed(rank())
    queue = FeatureQueue(7, 2)
    for step in range(2):
        add(queue, 100 * step + 10 * rank(), 2)
        queue.flush()
    return contents(queue), queue.rows[queue.ids >= 0]


def test_every_rank_gets_the_rows_of_all_in_the_order_of_ranks() -> None:
    (first, first_rows), (second, second_rows) = on_ranks(two_steps_on_ranks)
    assert first == second == [1, 10, 11, 100, 101, 110, 111]
    assert torch.equal(first_rows, second_rows)
