"""How well a critic ranks the actions within a state, from its values and from measured returns: pure NumPy.

S states, K actions of each, M returns of each action: g[s, k, m], the m-th of one state under the same hidden state of
the game for all its actions. Centred over the n(s) valid actions of the state,

    q'[s, k] = q[s, k] - mean_k q[s, k]
    g'[s, k, m] = g[s, k, m] - mean_k g[s, k, m]
    g'[s, k] = mean_m g'[s, k, m]

and pooled, every sum being over the valid actions of all states:

    correlation = sum q' g' / sqrt(sum q'^2  sum g'^2)
    noise       = sum Var_m(g'[s, k, m]) / M            with M - 1 in the variance's denominator
    reliability = 1 - noise / sum g'^2
    ceiling     = sqrt(reliability)                     what the exact advantage itself would reach, on average
    corrected   = correlation / ceiling                 the correlation with the exact advantage (Spearman 1904)

E[sum g'^2] is the exact advantages' sum of squares plus E[noise]: the M returns of a state are independent of one
another, whatever its actions share in each, and are centred before their spread is taken, so neither common random
numbers nor the degree of freedom that centring costs tilts it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Interval = tuple[float, float]

NUM_RESAMPLES = 2000
_SAME = 1e-24  # a sum of squares below this share of the uncentred one is rounding: the values do not differ


class WithinState(NamedTuple):
    """The critic's ranking of actions within states; the formulas are the module's.

    Intervals hold 95 % of bootstrap resamples of whole states. A critic that tells no actions apart has correlation 0.
    nan: not known, because no actions or returns differ, or because noise is all there is (`reliability` <= 0).
    """

    num_states: int  # with at least two valid actions; the others say nothing
    num_actions: int  # valid, in those states
    correlation: float
    correlation_interval: Interval
    reliability: float  # share of the variance of mean returns within states that is no noise
    ceiling: float
    corrected: float
    corrected_interval: Interval
    critic_spread: float  # standard deviation of the critic's advantages, n(s) - 1 degrees of freedom a state
    true_spread: float  # that of the exact advantages: the noise taken out


class TurnCalibration(NamedTuple):
    """What the critic said and what came at one index of the turn."""

    turn: int
    num_turns: int
    mean_predicted: float
    mean_return: float


class Diagnosis(NamedTuple):
    """A critic's figures on some measured states and on the games that they stand in."""

    within: WithinState
    explained_variance: float  # of Q at the actions that were taken
    turn_share: float  # of the variance of returns, that the turn's index alone explains
    calibration: list[TurnCalibration]


def diagnose(
    q: Float64, returns: Float64, mask: Bool, q_taken: Float64, returns_taken: Float64, turn: npt.NDArray[np.int32]
) -> Diagnosis:
    """All figures: q, mask [S, K] and returns [S, K, M] of fresh actions; q_taken, returns_taken, turn [N] of the
    actions that were taken in whole games. All returns are discounted as the critic's."""
    return Diagnosis(
        within_state(q, returns, mask),
        explained_variance(q_taken, returns_taken),
        turn_share(returns_taken, turn),
        calibration(q_taken, returns_taken, turn),
    )


def within_state(
    q: Float64, returns: Float64, mask: Bool, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> WithinState:
    """q [S, K], returns [S, K, M], mask [S, K] True where an action counts; what is masked may be anything, nan too.

    q need not be centred. Errors: ValueError for shapes that do not fit, or M < 2, which tells nothing of the noise.
    """
    if q.ndim != 2 or mask.shape != q.shape or returns.shape[:2] != q.shape or returns.ndim != 3:
        raise ValueError(
            "q, mask, returns: wanted [S, K], [S, K], [S, K, M], got "
            f"{list(q.shape)}, {list(mask.shape)}, {list(returns.shape)}"
        )
    if returns.shape[2] < 2:
        raise ValueError(f"returns: wanted at least 2 of each action, got {returns.shape[2]}")
    counted = mask.sum(1) >= 2
    q, returns, mask = q[counted].astype(np.float64), returns[counted].astype(np.float64), mask[counted]
    critic = centred(q, mask)
    each = centred(returns, mask[..., None])
    truth = each.mean(2)
    squares = np.where(mask, q, 0) ** 2
    critic[(critic**2).sum(1) <= _SAME * squares.sum(1)] = 0.0
    noise = np.where(mask, each.var(2, ddof=1) / returns.shape[2], 0)
    per_state = np.stack([critic * truth, critic**2, truth**2, noise]).sum(2).T  # [S, 4]

    correlation, reliability = _ratios(per_state.sum(0))
    num_states = len(per_state)
    shares = np.full(num_states, 1 / max(num_states, 1))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_states, shares, num_resamples) if num_states else np.zeros((num_resamples, 0), int)
    resampled, resampled_reliability = _ratios(counts @ per_state)
    _, critic_square, truth_square, noise_square = per_state.sum(0)
    freedom = int(mask.sum()) - num_states
    return WithinState(
        num_states=num_states,
        num_actions=int(mask.sum()),
        correlation=float(correlation),
        correlation_interval=_interval(resampled),
        reliability=float(reliability),
        ceiling=_root(float(reliability)),
        corrected=float(_corrected(correlation, reliability)),
        corrected_interval=_interval(_corrected(resampled, resampled_reliability)),
        critic_spread=_root(critic_square / freedom) if freedom else float("nan"),
        true_spread=_root(max(truth_square - noise_square, 0.0) / freedom) if freedom else float("nan"),
    )


def centred(values: Float64, mask: Bool) -> Float64:
    """values minus their mean over the valid actions of the state (axis 1), 0 where masked: [S, K] or [S, K, M]."""
    valid = np.where(mask, values, 0.0)
    mean = valid.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1)
    made: Float64 = np.where(mask, valid - mean, 0.0)
    return made


def explained_variance(predicted: Float64, returns: Float64) -> float:
    """1 - Var(returns - predicted) / Var(returns): 1 for the returns themselves plus any number, 0 for one number."""
    variance = float(returns.var()) if returns.size else 0.0
    return 1 - float((returns - predicted).var()) / variance if variance else float("nan")


def turn_share(returns: Float64, turn: npt.NDArray[np.int32]) -> float:
    """The explained variance of the best function of the turn's index, its mean return [N] (in sample: of few games
    it is too high by about turns / N)."""
    if not returns.size:
        return float("nan")
    _, place = np.unique(turn, return_inverse=True)
    return explained_variance((np.bincount(place, returns) / np.bincount(place))[place], returns)


def calibration(predicted: Float64, returns: Float64, turn: npt.NDArray[np.int32]) -> list[TurnCalibration]:
    """One row a turn's index, of predicted, returns, turn [N]."""
    return [
        TurnCalibration(
            int(t), int((turn == t).sum()), float(predicted[turn == t].mean()), float(returns[turn == t].mean())
        )
        for t in np.unique(turn)
    ]


def _ratios(sums: Float64) -> tuple[Float64, Float64]:
    """sums [..., 4] of q' g', q'^2, g'^2, noise -> correlation, reliability [...]."""
    product, critic, truth, noise = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = np.where((critic == 0) & (truth > 0), 0.0, product / np.sqrt(critic * truth))
        return correlation, 1 - noise / truth


def _corrected(correlation: Float64, reliability: Float64) -> Float64:
    """nan where the correlation is, or where nothing but noise is left."""
    with np.errstate(divide="ignore", invalid="ignore"):
        made: Float64 = np.where(reliability > 0, correlation / np.sqrt(reliability), np.nan)
        return made


def _interval(resampled: Float64) -> Interval:
    """The middle 95 %; nan if more than one resample in a hundred is."""
    known = resampled[~np.isnan(resampled)]
    if known.size == 0 or known.size < 0.99 * resampled.size:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _root(x: float) -> float:
    return float(np.sqrt(x)) if x >= 0 else float("nan")
