"""The plain baseline of the benchmark of updates computes what we compute, and its cells run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from archer_fast.backbone import Backbone
from archer_fast.packing import pack_trajectories

pytestmark = pytest.mark.usefixtures("one_thread")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_update

    for name, small in (("VOCAB", 37), ("OBSERVATION", 4), ("ACTION", 3), ("GAMES", 2)):
        monkeypatch.setattr(bench_update, name, small)
    monkeypatch.setattr(bench_update, "MODEL", bench_update.MODEL | {"vocab_size": 37, "hidden_size": 32})
    yield bench_update
    for name in ("bench_update", "row_a_turn"):
        sys.modules.pop(name, None)


def test_a_row_a_turn_scores_actions_as_one_packed_sequence_does(bench: Any, make_lm: Callable[..., Any]) -> None:
    import row_a_turn

    model = make_lm("qwen2")
    played = bench.games(5)
    rows = row_a_turn.make_rows(played)
    assert rows.ids.shape == (10, 5 * 7 + 4)
    plain = row_a_turn.RowATurn.logprobs(model, rows)
    found = []
    for row in range(10):
        assert rows.action_end[row] - rows.state[row] == 3 and rows.next_state[row] - rows.action_end[row] == 4
        found.append(plain[row, rows.state[row] : rows.action_end[row]])

    batch = pack_trajectories(played)
    backbone = Backbone(model, None)
    ids, positions = torch.from_numpy(batch.input_ids).long(), torch.from_numpy(batch.position_ids).long()
    layout = backbone.layout(
        torch.from_numpy(batch.cu_seqlens), tuple((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist())
    )
    at = torch.from_numpy(batch.action_mask.nonzero()[0])
    logits = backbone(ids, positions, layout)[at - 1] @ backbone.lm_head_weight.T
    ours = logits.log_softmax(1).gather(1, ids[at, None]).squeeze(1)
    torch.testing.assert_close(torch.cat(found), ours, rtol=1e-4, atol=1e-5)
    assert rows.done.tolist() == [0, 0, 0, 0, 1] * 2
    torch.testing.assert_close(rows.reward, torch.tensor([t.reward for game in played for t in game.turns]).float())


@pytest.mark.parametrize("who", ["plain", "frozen", "shared", "separate"])
def test_a_cell_of_updates(bench: Any, who: str) -> None:
    found = bench.update_cell(who, 2)
    assert 0 < found["seconds"] < 60 and found["memory"] >= 0
