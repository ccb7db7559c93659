"""report.md of a comparison: sentences and tables, each made from the figures."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from archer_fast.compare.estimates import Estimate
from archer_fast.compare.figures import Contestant, Figures, Step
from archer_fast.compare.races import Difference, Race
from archer_fast.display import clock_text

NONE = "–"
LEGEND = {"kl": "KL to the start", "invalid": "invalid turns", "guess": "guesses", "repeat": "repeated turns"}


def render(figures: Figures, pictures: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The whole page; `pictures`: file names beside it, `notes`: lines about what it lacks."""
    parts = [
        f"# {', '.join(figures.contestants)} on {figures.played}",
        _facts(figures),
        _bullets([*findings(figures), *warnings(figures), *notes]),
        *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures),
        "## At the end of the budget",
        _ends(figures),
        "## Trajectories needed to reach a return",
        _ladder(figures),
        "## Difference at the end",
        _differences(figures),
        "## Behaviour at the end",
        _behaviour(figures),
        "## Settings in which they differ",
        _settings(figures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# -- sentences ---------------------------------------------------------------------------------------


def findings(figures: Figures) -> list[str]:
    """What the races and the differences say, in words."""
    races = dict.fromkeys(race_text(race, figures.plan.trajectories) for race in figures.races)
    return [*races, *(difference_text(difference, figures.confidence) for difference in figures.differences)]


def race_text(race: Race, budget: int) -> str:
    """`archer reached ppo's best return (-10.30) after 2,304 trajectories; ppo took 9,600, 4.2 times as many.`"""
    if not race.gain > 0:
        return f"{race.rival} never rose above its start: there is nothing to race {race.subject} for."
    goal = "best return" if race.share == 1 else f"return at {race.share:.0%} of its gain"
    goal = f"{race.rival}'s {goal} ({race.level:.2f})"
    took = f"{race.rival} took {race.rival_trajectories:,.0f}"
    if math.isinf(race.subject_trajectories):
        best = f"its own best is {race.subject_best:.2f}"
        text = f"{race.subject} did not reach {goal} in {budget:,} trajectories ({best}); {took}"
    elif race.ratio >= 1:
        text = f"{race.subject} reached {goal} after {race.subject_trajectories:,.0f} trajectories; {took}"
        text += f", {race.ratio:.1f} times as many" if race.ratio > 1 else ", as many"
    else:
        text = f"{race.subject} reached {goal} after {race.subject_trajectories:,.0f} trajectories; {took}"
        text += f", {1 / race.ratio:.1f} times fewer"
    by_seed = ", ".join(f"{ratio:.1f}" if ratio else "not reached" for ratio in race.ratios.values())
    return text + (f" (by seed, {race.rival} : {race.subject}: {by_seed})." if len(race.ratios) > 1 else ".")


def difference_text(difference: Difference, confidence: float) -> str:
    """`At the end archer is 1.90 above ppo (95 % interval 0.41 to 3.39, 3 seeds in pairs).`"""
    d, one = difference, difference.estimate
    text = f"At the end {d.subject} is {abs(one.mean):.2f} {'above' if one.mean >= 0 else 'below'} {d.rival}"
    if one.n == 1:
        return f"{text}; of one seed, which says nothing of others."
    interval = f"{_percent(confidence)} interval {one.low:+.2f} to {one.high:+.2f}, {one.n} seeds in pairs"
    if one.low <= 0 <= one.high:
        return f"{text}, which these seeds cannot tell from no difference ({interval})."
    return f"{text} ({interval})."


def warnings(figures: Figures) -> list[str]:
    """Runs that are not in the means, that collapsed, or whose log has holes; algorithms without a curve."""
    lines = (
        [f"**Not finished**, and in no mean where another seed is: {_pairs(figures.missing)}."]
        if figures.missing
        else []
    )
    unfinished = [c.name for c in figures.contestants.values() if c.seeds and c.ends["end"] is None]
    if unfinished:
        lines.append(f"No run is finished of {', '.join(unfinished)}: curves are of what there is.")
    if figures.offline:
        lines.append(
            f"{', '.join(figures.offline)}: learns offline, from the games of its first iterations, so it has no curve."
        )
    if figures.collapsed:
        lines.append(f"**Collapsed**: {_pairs(figures.collapsed)}.")
    if figures.faulty:
        holes = {name: f"iterations {', '.join(map(str, some))}" for name, some in figures.faulty.items()}
        lines.append(f"Without a finite return, and left out: {_pairs(holes)}.")
    return lines


def _pairs(texts: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({text})" for name, text in texts.items())


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in lines)


def _facts(figures: Figures) -> str:
    plan = figures.plan
    first, last = plan.seed_range()[0], plan.seed_range()[-1]
    seeds = f"seed {first}" if plan.seeds == 1 else f"seeds {first} to {last}"
    lines = [
        f"{plan.trajectories:,} trajectories a run, {seeds}. "
        f"A point of a curve is the mean return of the last {plan.window:,} games played while training, drawn where "
        f"the last of them ends; bands and intervals are Student-t of {_percent(figures.confidence)} over seeds. Time "
        "is of training alone, without warm start, evaluations and checkpoints, with the other runs beside."
    ]
    lines += [f"{made['date']}, commit `{made['commit']}`, {made['machine']}." for made in plan.made]
    commands = dict.fromkeys(made["command"] for made in plan.made)
    code = [f"```sh\n{command}\n```" for command in commands]
    return "\n\n".join([*(textwrap.fill(line, 120) for line in lines), *code])


# -- tables ------------------------------------------------------------------------------------------


def _ends(figures: Figures) -> str:
    header = ["", "start", "end", "best", "greedy, end", "won, end", "training time", "seeds"]
    rows = [
        [
            one.name,
            *(_mean_se(one.ends[name]) for name in ("start", "end", "best", "greedy")),
            _mean_se(one.ends["win_rate"], "{:.0%}"),
            NONE if one.ends["seconds"] is None else clock_text(one.ends["seconds"].mean),
            _seeds(one),
        ]
        for one in figures.contestants.values()
    ]
    text = (
        "Mean return of sampled games (`eval.final_games` a run) ± standard error over seeds. Best: of the policy that "
        "the evaluations of the run chose, or the last one where it is better, which makes it a little too good."
    )
    return f"{textwrap.fill(text, 120)}\n\n{table(header, rows)}"


def _seeds(one: Contestant) -> str:
    return ", ".join(map(str, one.seeds)) or NONE


def _ladder(figures: Figures) -> str:
    if not figures.ladder:
        return "No mean curve rose above the start."
    names = list(next(iter(figures.ladder.values())))
    rows = [[f"{level:g}", *(step_text(steps[name]) for name in names)] for level, steps in figures.ladder.items()]
    text = (
        "Until a seed's smoothed curve first is at that return: median over seeds; in brackets how many seeds reached "
        "it, where not all did."
    )
    return f"{textwrap.fill(text, 120)}\n\n{table(['return', *names], rows)}"


def step_text(step: Step) -> str:
    """`1,280`, `2,560 (2 of 3)`, `not reached (1 of 3)`."""
    text = f"{step.median:,.0f}" if math.isfinite(step.median) else "not reached"
    return text if step.reached == len(step.by_seed) else f"{text} ({step.reached} of {len(step.by_seed)})"


def _differences(figures: Figures) -> str:
    rows = [
        [
            f"{d.subject} - {d.rival}",
            f"{d.estimate.mean:+.2f}",
            NONE if d.estimate.n == 1 else f"{d.estimate.low:+.2f} to {d.estimate.high:+.2f}",
            ", ".join(f"{value:+.2f}" for value in d.by_seed.values()),
        ]
        for d in figures.differences
    ]
    if not rows:
        return "No seed is finished of two algorithms."
    return table(["return", "mean", f"{_percent(figures.confidence)} interval", "by seed"], rows)


def _behaviour(figures: Figures) -> str:
    some = figures.contestants.values()
    names = [name for name in next(iter(some)).behaviour if any(one.behaviour[name] for one in some)]
    form = {name: "{:.1%}" if name in ("guess", "repeat", "invalid") else "{:.3g}" for name in names}
    rows = [[one.name, *(_mean_se(one.behaviour[name], form[name]) for name in names)] for one in some]
    text = (
        "Of the evaluation at the end; of a run that has not ended, of its last iterations "
        f"({figures.plan.window:,} games). Shares are of turns. ± standard error over seeds."
    )
    return f"{textwrap.fill(text, 120)}\n\n{table(['', *(LEGEND.get(name, name) for name in names)], rows)}"


def _settings(figures: Figures) -> str:
    names = list(figures.contestants)
    tables = []
    for some in (figures.settings, figures.updates):
        rows = [
            [f"`{setting}`", *(f"`{json.dumps(values[name])}`" if name in values else NONE for name in names)]
            for setting, values in some.items()
        ]
        tables.append(table(["", *names], rows) if rows else "None.")
    parts = [tables[0], "How the actor of each moves, whatever its section is called:", tables[1]]
    tuned = [f"- {one.name}: {one.tuning}" for one in figures.contestants.values() if one.tuning]
    return "\n\n".join([*parts, *(["How each was tuned:", "\n".join(tuned)] if tuned else [])])


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _mean_se(one: Estimate | None, form: str = "{:.2f}") -> str:
    if one is None:
        return NONE
    return form.format(one.mean) + (f" ± {form.format(one.se)}" if math.isfinite(one.se) else "")


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
