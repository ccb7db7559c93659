"""Passes of the embedded engine as CUDA graphs. Without a GPU a graph's replay is the same pass, run as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine import STOP, VOCAB, Babbler, assert_scored_right, decode, encode

from archer_fast.backbone import Backbone
from archer_fast.rollout import cuda_graphs
from archer_fast.rollout.cuda_graphs import GraphedPasses
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.rollout.interact import play_games
from archer_fast.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
SLOTS = 5


@pytest.fixture
def backbone(make_lm: Callable[..., Any]) -> Backbone:
    return Backbone(make_lm(seed=2, vocab_size=VOCAB, max_position_embeddings=200), None)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the passes that were captured, in turn."""
    sizes: list[int] = []

    def capture(self: GraphedPasses, size: int) -> Callable[[], None]:
        sizes.append(size)
        return lambda: self._run(size)

    monkeypatch.setattr(GraphedPasses, "_capture", capture)
    return sizes


def graphed_engine(backbone: Backbone) -> EmbeddedEngine:
    generator = torch.Generator(backbone.device).manual_seed(0)
    engine = EmbeddedEngine(
        backbone,
        STOP,
        num_slots=SLOTS,
        max_new_tokens=6,
        generator=generator,
        cuda_graphs=backbone.device.type == "cuda",
    )
    if engine._graphs is None:
        engine._graphs = GraphedPasses(backbone, SLOTS, engine.max_tokens)
        engine.reset()
    return engine


def play(engine: EmbeddedEngine, num_games: int = 30) -> list[Trajectory]:
    return play_games(engine, Babbler, encode, decode, range(num_games)).trajectories


def test_tokens_that_fill_a_pass_are_nobodys(backbone: Backbone, captured: list[int]) -> None:
    engine = graphed_engine(backbone)
    games = play(engine)
    assert_scored_right(backbone, games, 1.0)
    assert set(captured) >= {1, 2, 4, 8, 16, 24, 32}
    # Counted is what a game has, not what fills a pass.
    expected = sum(g.num_tokens - g.final_observation_ids.size - 1 for g in games)
    assert engine.num_forward_tokens == expected


def test_counts_are_those_of_the_same_passes_kernel_by_kernel(backbone: Backbone, captured: list[int]) -> None:
    plain = EmbeddedEngine(
        backbone, STOP, num_slots=SLOTS, max_new_tokens=6, generator=torch.Generator().manual_seed(0)
    )
    counted = []
    for engine in (plain, graphed_engine(backbone)):
        before = copy.copy(backbone.counts.read)
        games = play(engine)
        after = backbone.counts.read
        counted.append((after.tokens - before.tokens, after.pairs - before.pairs, after.rows - before.rows))
        assert len(games) == 30
    assert counted[0] == counted[1] and captured


def test_a_cache_that_has_grown_gets_new_graphs(backbone: Backbone, captured: list[int]) -> None:
    engine = graphed_engine(backbone)
    engine.observe(0, [1, 2, 3])
    engine.step()  # makes room for 64 tokens, kernel by kernel
    assert captured == []
    engine.step()
    engine.step()
    assert captured == [1]
    engine.begin(0)
    engine.observe(0, [1 + i % 9 for i in range(70)])
    engine.step()  # makes room for 128
    engine.step()
    assert captured == [1, 1]


def test_weights_that_have_moved_get_new_graphs_and_those_that_have_changed_do_not(
    backbone: Backbone, captured: list[int]
) -> None:
    engine = graphed_engine(backbone)
    play(engine)
    captured.clear()
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.mul_(0.9)
    engine.reset()
    assert_scored_right(backbone, play(engine), 1.0)
    assert captured == []
    for parameter in backbone.model.parameters():
        parameter.data = parameter.data.clone()
    engine.reset()
    play(engine)
    assert captured


def test_what_cannot_be_captured_goes_kernel_by_kernel(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(self: GraphedPasses, size: int) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(GraphedPasses, "_capture", capture)
    with caplog.at_level(logging.WARNING):
        assert_scored_right(backbone, play(graphed_engine(backbone)), 1.0)
    (record,) = caplog.records
    assert "goes kernel by kernel: operation not permitted" in record.getMessage()


def test_long_passes_go_kernel_by_kernel(
    backbone: Backbone, captured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "SIZES", (1, 2))
    assert_scored_right(backbone, play(graphed_engine(backbone)), 1.0)
    assert sorted(set(captured)) == [1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_graphs_of_a_gpu(make_lm: Callable[..., Any], family: str) -> None:
    """The log-probs of plain passes on the CPU, before and after an update in place."""
    model = make_lm(family, seed=2, vocab_size=VOCAB, max_position_embeddings=200)
    twin = Backbone(copy.deepcopy(model), None)
    engine = graphed_engine(Backbone(model.to("cuda"), None))
    for _ in range(2):
        engine.reset()
        assert_scored_right(twin, play(engine), 1.0)
        assert engine._graphs is not None and len(engine._graphs._graphs) > 3
        assert not engine._graphs._is_impossible
        with torch.no_grad():
            for parameter in (*twin.model.parameters(), *engine.backbone.model.parameters()):
                parameter.mul_(0.9)
