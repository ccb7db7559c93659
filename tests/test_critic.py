"""The turn-level critic: its heads, its targets, and what it reads of games and branches against plain passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch, plant_tree
from archer_fast.config import CriticConfig
from archer_fast.critic import (
    TURN_BUCKETS,
    ActionFeatures,
    PairedMLP,
    StateFeatures,
    TurnCritic,
    ValueHeads,
    next_states,
    read_games,
    read_tree,
)
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, HIDDEN = 37, 24
MakeLM = Callable[..., Any]


def random_games(seed: int = 0) -> list[Trajectory]:
    """Games of 3, 1, 4 and 2 turns; one is truncated, one has no final observation."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(low, high))

    games = []
    for num_turns, truncated in ((3, False), (1, False), (4, True), (2, False)):
        turns = []
        for _ in range(num_turns):
            action = ids(1, 5)
            turns.append(Turn(ids(1, 6), action, -rng.random(action.size), float(rng.normal()), 0))
        final = ids(1, 4) if num_turns != 1 else np.array([], np.int32)
        games.append(Trajectory(tuple(turns), final, not truncated, truncated))
    return games


def batch_of(games: list[Trajectory]) -> PackedBatch:
    return PackedBatch.from_arrays(pack_trajectories(games))


def plain(backbone: Backbone, ids: np.ndarray, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Last hidden state [H] of one sequence alone, and the log-probs [n - 1] of its tokens after the first."""
    tokens = torch.from_numpy(np.asarray(ids, np.int64))
    n = tokens.numel()
    layout = backbone.layout(torch.tensor([0, n], dtype=torch.int32), (n,))
    with torch.no_grad():
        hidden = backbone(tokens, torch.arange(n), layout)
        logprobs = (hidden @ backbone.lm_head_weight.T / temperature).log_softmax(-1)
    return hidden[-1], logprobs[:-1].gather(1, tokens[1:, None]).squeeze(1)


def prefix(game: Trajectory, turn: int) -> np.ndarray:
    """Tokens up to and including the observation that turn `turn` answers."""
    parts = [x for t in game.turns[:turn] for x in (t.observation_ids, t.action_ids)]
    return np.concatenate([*parts, game.turns[turn].observation_ids])


def assert_near(got: Tensor, wanted: list[Tensor]) -> None:
    torch.testing.assert_close(got.detach(), torch.stack(wanted), rtol=1e-5, atol=1e-5)


# -- heads -----------------------------------------------------------------------------------------


def test_paired_heads_are_two_separate_networks() -> None:
    paired = PairedMLP(7, 5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for bias in paired.biases:
            bias.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(2))
    got = paired(x)
    assert got.shape == (2, 11)
    got.square().sum().backward()
    for head in (0, 1):
        layers: list[nn.Module] = []
        for weight, bias in zip(paired.weights, paired.biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[2])
            linear.weight.data, linear.bias.data = weight.data[head].T.contiguous(), bias.data[head, 0].clone()
            layers += [linear, nn.GELU()]
        alone = nn.Sequential(*layers[:-1])
        wanted = alone(x).squeeze(-1)
        torch.testing.assert_close(got[head], wanted)
        wanted.square().sum().backward()
        linears = [layer for layer in alone if isinstance(layer, nn.Linear)]
        for linear, weight, bias in zip(linears, paired.weights, paired.biases, strict=True):
            torch.testing.assert_close(weight.grad[head].T, linear.weight.grad)
            torch.testing.assert_close(bias.grad[head, 0], linear.bias.grad)
    assert (got[0] - got[1]).abs().min() > 1e-3, "the two start apart"


def features(n: int, seed: int = 0) -> tuple[StateFeatures, ActionFeatures]:
    generator = torch.Generator().manual_seed(seed)
    state = StateFeatures(torch.randn(n, HIDDEN, generator=generator), torch.arange(n))
    hidden, logprob = torch.randn(n, HIDDEN, generator=generator), -3 * torch.rand(n, generator=generator)
    return state, ActionFeatures(hidden, logprob, torch.zeros(n))


def make_heads(**config: Any) -> ValueHeads:
    return ValueHeads(HIDDEN, CriticConfig(hidden_size=16, **config), torch.Generator().manual_seed(0))


def test_the_turn_index_alone_changes_every_head() -> None:
    heads, (state, action) = make_heads(), features(6)
    later = state._replace(turn=state.turn + 9)
    for before, after in (
        (heads.value(state), heads.value(later)),
        (heads.q_value(state, action), heads.q_value(later, action)),
    ):
        assert before.shape == (2, 6)
        assert ((before - after).abs() > 1e-4).all()


def test_turns_beyond_the_last_bucket_share_it() -> None:
    heads, (state, _) = make_heads(), features(1)
    values = [heads.value(state._replace(turn=torch.tensor([t])))[0].item() for t in (62, 63, 64, 5000)]
    assert TURN_BUCKETS == 64
    assert values[0] != values[1] == values[2] == values[3]


def test_q_reads_state_action_and_belief_and_v_the_state() -> None:
    heads, (state, action), (other_state, other_action) = make_heads(), features(4), features(4, seed=1)
    base_q, base_v = heads.q_value(state, action), heads.value(state)
    changed_q = [
        heads.q_value(state._replace(hidden=other_state.hidden), action),
        heads.q_value(state, action._replace(hidden=other_action.hidden)),
        heads.q_value(state, action._replace(logprob=other_action.logprob)),
        heads.q_value(state, action._replace(repeated=torch.ones(4))),
    ]
    for changed in changed_q:
        assert (changed != base_q).all()
    assert ((heads.value(state._replace(hidden=other_state.hidden)) - base_v).abs() > 1e-5).all()


def test_hidden_states_enter_at_unit_variance() -> None:
    """A trunk that speaks ten times louder is read alike."""
    heads, (state, action) = make_heads(), features(4)
    louder = StateFeatures(10 * state.hidden + 3, state.turn), action._replace(hidden=7 * action.hidden - 1)
    torch.testing.assert_close(heads.value(louder[0]), heads.value(state), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heads.q_value(*louder), heads.q_value(state, action), rtol=1e-4, atol=1e-4)


def test_an_action_the_model_holds_impossible_is_as_one_it_hardly_believes() -> None:
    heads, (state, action) = make_heads(), features(1)
    q = [heads.q_value(state, action._replace(logprob=torch.tensor([x]))) for x in (-20.0, -1e4, -torch.inf)]
    assert torch.isfinite(q[0]).all() and torch.equal(q[0], q[1]) and torch.equal(q[0], q[2])


def test_heads_read_nothing_that_the_settings_keep_from_them() -> None:
    (state, action), later = features(4), torch.arange(4) + 9
    blind = make_heads(reads_turn=False)
    assert torch.equal(blind.value(state), blind.value(state._replace(turn=later)))
    assert torch.equal(blind.q_value(state, action), blind.q_value(state._replace(turn=later), action))
    deaf = make_heads(reads_logprob=False)
    assert torch.equal(deaf.q_value(state, action), deaf.q_value(state, action._replace(logprob=action.logprob - 1)))
    assert (deaf.value(state) != deaf.value(state._replace(turn=later))).all()
    forgetful = make_heads(reads_repeated=False)
    q = forgetful.q_value(state, action)
    assert torch.equal(q, forgetful.q_value(state, action._replace(repeated=torch.ones(4))))
    assert (q != forgetful.q_value(state, action._replace(logprob=action.logprob - 1))).all()


# -- trunks and targets ----------------------------------------------------------------------------


def make_critic(make_lm: MakeLM, **config: Any) -> tuple[TurnCritic, Backbone, Backbone]:
    reference = Backbone(make_lm(), None).requires_grad_(False)
    actor = reference.frozen_copy().requires_grad_(True)
    return TurnCritic(CriticConfig(hidden_size=16, **config), actor, reference, seed=1), actor, reference


@pytest.mark.parametrize("trunk", ["frozen", "shared", "separate"])
def test_which_weights_get_the_critics_gradient(make_lm: MakeLM, trunk: Any) -> None:
    critic, actor, reference = make_critic(make_lm, trunk=trunk)
    read = read_games(critic.trunk, batch_of(random_games()), 1.0)
    values = critic.heads.q_value(read.state, read.action).sum() + critic.heads.value(read.final).sum()
    values.backward()

    def moved(module: nn.Module) -> set[str]:
        return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    assert moved(critic.heads) == {name for name, _ in critic.heads.named_parameters()}
    inner = {name for name, _ in actor.named_parameters() if "lm_head" not in name}  # no value meets the vocabulary
    assert moved(actor) == (inner if trunk == "shared" else set())
    assert moved(reference) == moved(critic.target_heads) == set()
    if trunk == "separate":
        assert critic.own_trunk is critic.trunk and critic.target_trunk is not None
        assert moved(critic.own_trunk) == inner
        assert moved(critic.target_trunk) == set()

    trained = {id(p) for p in critic.trained_trunk_parameters()}
    wanted = {"frozen": [], "shared": list(actor.parameters()), "separate": list(critic.trunk.parameters())}[trunk]
    assert trained == {id(p) for p in wanted}


def test_a_frozen_trunk_is_the_reference_and_holds_no_copy(make_lm: MakeLM) -> None:
    critic, actor, reference = make_critic(make_lm, trunk="frozen")
    assert critic.trunk is reference and not critic.trains_trunk
    borrowed = {id(p) for model in (actor, reference) for p in model.parameters()}
    assert not borrowed & {id(p) for p in critic.parameters()}
    assert {name.split(".")[0] for name in critic.state_dict()} == {"heads", "target_heads"}


def test_a_shared_trunk_is_the_actor_and_holds_no_copy(make_lm: MakeLM) -> None:
    critic, actor, _ = make_critic(make_lm, trunk="shared")
    assert critic.trunk is actor
    assert {name.split(".")[0] for name in critic.state_dict()} == {"heads", "target_heads"}


def test_a_separate_trunk_begins_as_the_reference(make_lm: MakeLM) -> None:
    critic, _, reference = make_critic(make_lm, trunk="separate")
    batch = batch_of(random_games())
    wanted = read_games(reference, batch, 1.0)
    for trunk in (critic.own_trunk, critic.target_trunk):
        assert trunk is not None and trunk is not reference
        assert torch.equal(read_games(trunk, batch, 1.0).action.hidden, wanted.action.hidden)


@pytest.mark.parametrize("trunk", ["frozen", "separate"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_targets_follow_by_polyak(make_lm: MakeLM, trunk: Any, tau: float) -> None:
    critic, _, _ = make_critic(make_lm, trunk=trunk, tau=tau)
    pairs = [(critic.heads, critic.target_heads)]
    if trunk == "separate":
        assert critic.own_trunk is not None and critic.target_trunk is not None
        pairs.append((critic.own_trunk, critic.target_trunk))
    online = [p for source, _ in pairs for p in source.parameters()]
    target = [p for _, copied in pairs for p in copied.parameters()]
    for p, q in zip(online, target, strict=True):
        assert torch.equal(p, q)
    generator = torch.Generator().manual_seed(0)
    wanted = [q.detach().double() for q in target]
    for _ in range(3):
        with torch.no_grad():
            for p in online:
                p.add_(torch.randn(p.shape, generator=generator))
        before = [p.detach().clone() for p in online]
        critic.update_targets()
        wanted = [(1 - tau) * w + tau * p.detach().double() for w, p in zip(wanted, online, strict=True)]
        for p, kept in zip(online, before, strict=True):
            assert torch.equal(p, kept), "the online weights stay"
    for q, w in zip(target, wanted, strict=True):
        torch.testing.assert_close(q.double(), w, rtol=1e-5, atol=1e-6)
        if tau == 0:
            assert torch.equal(q.double(), w)


def test_targets_still_follow_after_a_state_was_loaded(make_lm: MakeLM) -> None:
    critic, _, _ = make_critic(make_lm, tau=1.0)
    other, _, _ = make_critic(make_lm)
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(2.5)
    critic.load_state_dict(copy.deepcopy(other.state_dict()))
    with torch.no_grad():
        for p in critic.heads.parameters():
            p.fill_(-1.5)
    critic.update_targets()
    assert all((p == -1.5).all() for p in critic.target_heads.parameters())


def test_the_seed_decides_the_heads(make_lm: MakeLM) -> None:
    reference = Backbone(make_lm(), None)

    def first_weight(seed: int) -> Tensor:
        torch.rand(seed + 3)  # what others have drawn does not matter
        return TurnCritic(CriticConfig(hidden_size=4), reference, reference, seed).heads.q.weights[0]

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


# -- reading games ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_games_are_read_as_one_by_one(make_lm: MakeLM, temperature: float) -> None:
    backbone, games = Backbone(make_lm(), None), random_games()
    got = read_games(backbone, batch_of(games), temperature)
    states, actions, beliefs, turns, tokens = [], [], [], [], []
    for game in games:
        for i, turn in enumerate(game.turns):
            before = prefix(game, i)
            states.append(plain(backbone, before)[0])
            hidden, logprobs = plain(backbone, np.concatenate([before, turn.action_ids]), temperature)
            actions.append(hidden)
            beliefs.append(logprobs[-turn.action_ids.size :].sum())
            tokens += logprobs[-turn.action_ids.size :]
            turns.append(i)
    assert_near(got.state.hidden, states)
    assert_near(got.action.hidden, actions)
    assert_near(got.action.logprob, beliefs)
    assert got.state.turn.tolist() == turns
    assert_near(got.final.hidden, [plain(backbone, game.input_ids)[0] for game in games])
    assert got.final.turn.tolist() == [3, 1, 4, 2]
    assert_near(got.token_logprobs, tokens)
    assert got.state.hidden.requires_grad and not got.action.logprob.requires_grad


def test_branches_are_read_as_games_in_which_they_were_played(make_lm: MakeLM) -> None:
    backbone, games, temperature = Backbone(make_lm(), None), random_games(), 0.7
    batch = batch_of(games)
    rng = np.random.default_rng(1)
    chosen = [[0, 2, 2], [3], [7, 4], []]  # turns of the batch; the last game has no branch
    lengths = torch.zeros(4, 3, dtype=torch.int64)
    turn_ids = torch.full((4, 3), -1)
    for game, turns in enumerate(chosen):
        turn_ids[game, : len(turns)] = torch.tensor(turns)
        lengths[game, : len(turns)] = torch.from_numpy(rng.integers(1, 5, len(turns)))
    action_ids = torch.from_numpy(rng.integers(0, VOCAB, (4, 3, 4))).int()
    alternatives = Alternatives(action_ids, torch.zeros(4, 3, 4), lengths, turn_ids)
    tree = plant_tree(batch, alternatives, backbone.layout(batch.cu_seqlens, batch.lengths))
    state, action, logprobs, whole = read_tree(backbone, batch, tree, temperature, taken=True)

    states, actions, beliefs, turns_wanted, token_logprobs = [], [], [], [], []
    for game, row in alternatives.used.nonzero().tolist():
        index = int(turn_ids[game, row]) - int(batch.cu_turns[game])
        ids = action_ids[game, row, : lengths[game, row]].numpy()
        old = games[game].turns[index]
        taken = Turn(old.observation_ids, ids, np.zeros(ids.size), 0.0, 0)
        played = Trajectory((*games[game].turns[:index], taken), np.array([1]), True, False)
        read = read_games(backbone, batch_of([played]), temperature)
        states.append(read.state.hidden[-1].detach())
        actions.append(read.action.hidden[-1].detach())
        beliefs.append(read.action.logprob[-1])
        turns_wanted.append(int(read.state.turn[-1]))
        token_logprobs += plain(backbone, np.concatenate([prefix(games[game], index), ids]), temperature)[1][
            -ids.size :
        ]
    assert len(states) == 6
    assert_near(state.hidden, states)
    assert_near(action.hidden, actions)
    assert_near(action.logprob, beliefs)
    assert_near(logprobs, token_logprobs)
    assert state.turn.tolist() == turns_wanted
    assert not action.hidden.requires_grad

    games_alone = read_games(backbone, batch, temperature)
    assert whole is not None
    for name in ("state", "action", "final"):  # branches in the pass change nothing for the games that carry them
        for got, wanted in zip(getattr(whole, name), getattr(games_alone, name), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.token_logprobs, games_alone.token_logprobs, rtol=1e-5, atol=1e-5)


def test_games_and_branches_tell_which_actions_were_taken_before(make_lm: MakeLM) -> None:
    """Of the games a b a | b ab ab; the same tokens in another game, or in another order, do not count."""
    backbone, a, b, ab, ba = Backbone(make_lm(), None), [1], [2], [1, 2], [2, 1]

    def game(*actions: list[int]) -> Trajectory:
        turns = [Turn(np.array([7]), np.array(ids), np.zeros(len(ids), np.float32), 0.0, 0) for ids in actions]
        return Trajectory(tuple(turns), np.array([8]), True, False)

    batch = batch_of([game(a, b, a), game(b, ab, ab)])
    assert read_games(backbone, batch, 1.0).action.repeated.tolist() == [0, 0, 1, 0, 0, 1]

    asked = [(0, a), (1, a), (2, ab), (2, b)], [(3, b), (4, ba), (5, ab), (5, a)]  # turns of the batch
    action_ids = torch.zeros(2, 4, 2, dtype=torch.int32)
    for row, branches in enumerate(asked):
        for column, (_, ids) in enumerate(branches):
            action_ids[row, column, : len(ids)] = torch.tensor(ids)
    alternatives = Alternatives(
        action_ids,
        torch.zeros(2, 4, 2),
        torch.tensor([[len(ids) for _, ids in branches] for branches in asked]),
        torch.tensor([[turn for turn, _ in branches] for branches in asked]),
    )
    tree = plant_tree(batch, alternatives, backbone.layout(batch.cu_seqlens, batch.lengths))
    assert read_tree(backbone, batch, tree, 1.0).action.repeated.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]


def test_v_after_an_action_is_v_of_the_next_state_or_the_final_observation(make_lm: MakeLM) -> None:
    """The hidden state at turn t + 1 belongs to the state that follows action t; the last is followed by `final`."""
    backbone, game = Backbone(make_lm(), None), random_games()[0]
    whole = read_games(backbone, batch_of([game]), 1.0)
    shorter = Trajectory(game.turns[:1], game.turns[1].observation_ids, False, True)
    cut = read_games(backbone, batch_of([shorter]), 1.0)
    assert_near(whole.state.hidden[1:2], [cut.final.hidden[0].detach()])
    assert whole.state.turn[1] == cut.final.turn[0]
    assert F.mse_loss(whole.state.hidden[1], whole.state.hidden[0]).item() > 1e-3


def test_next_states_are_the_following_turns_and_after_the_last_the_final_ones(make_lm: MakeLM) -> None:
    backbone, games = Backbone(make_lm(), None), random_games()
    batch = batch_of(games)
    read = read_games(backbone, batch, 1.0)
    behind = next_states(read.state, read.final, batch)
    wanted = [
        plain(backbone, prefix(game, i + 1) if i + 1 < game.num_turns else game.input_ids)[0]
        for game in games
        for i in range(game.num_turns)
    ]
    assert_near(behind.hidden, wanted)
    assert behind.turn.tolist() == [1, 2, 3, 1, 1, 2, 3, 4, 1, 2]
