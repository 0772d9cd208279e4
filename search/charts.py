"""The report's charts of a search, as plotly figures in SVG, which need no GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, combinations
from typing import Any

from plotly.colors import make_colorscale, sample_colorscale
from plotly.graph_objects import Bar, Figure

from search.comparison import Comparison
from search.evaluation_search import Step
from search.evaluations import Evaluation
from search.space import Space

# They differ for the colour-blind too, on light and on dark.
_BETTER, _WORSE, _WINNER, _PLAIN = "#3987e5", "#e0703a", "#d6246e", "#8d96a5"
_SCALE = ["#6a51a3", "#2a9d8f", "#d19a00"]
# Lines of one colour are one trace: a browser draws few traces of many lines quickly.
_NUM_COLOURS = 12
_STAR = {
    "symbol": "star",
    "color": _WINNER,
    "size": 16,
    "line": {"color": "white", "width": 1},
}


def gains(comparison: Comparison, differences: Sequence[tuple[str, float]]) -> Figure:
    """Draw the paired differences in reward, sorted, with their mean and its interval if any.

    differences: what is shown of each picture's prompt, escaped for HTML, and its CR-Diff - dense.
    """
    ordered = sorted(differences, key=lambda each: each[1])
    values = [value for _, value in ordered]
    figure = Figure(
        Bar(
            x=list(range(1, len(values) + 1)),
            y=values,
            marker={"color": [_WORSE if value < 0 else _BETTER for value in values]},
            marker_line_width=0,
            customdata=[name for name, _ in ordered],
            hovertemplate="%{y:+.4f}<br>%{customdata}<extra></extra>",
        )
    )
    if comparison.low is not None:
        figure.add_hrect(
            comparison.low,
            comparison.high,
            fillcolor=_PLAIN,
            opacity=0.35,
            line_width=0,
            layer="below",
        )
    figure.add_hline(comparison.difference, line={"color": _PLAIN, "width": 2, "dash": "dash"})
    return _laid_out(figure, "pairs of pictures, sorted", "reward, CR-Diff - dense", bargap=0)


def history(steps: Sequence[Step], dense: float | None) -> Figure:
    """Draw each step's reward, the best so far and the dense level; failures at the bottom."""
    numbered = list(enumerate(steps, 1))
    drawn = [
        (n, s.evaluation) for n, s in numbered if s.evaluation.is_complete and not s.lost_race
    ]
    lost = [(n, s.reward) for n, s in numbered if s.lost_race and s.reward is not None]
    failed = [n for n, s in numbered if s.evaluation.failure is not None]
    errors = [evaluation.standard_error for _, evaluation in drawn]
    figure = Figure()
    if dense is not None and steps:
        figure.add_scatter(
            x=[1, max(len(steps), 2)],
            y=[dense, dense],
            mode="lines",
            line={"color": _WORSE, "width": 2, "dash": "dash"},
            hovertemplate="dense: %{y:.4f}<extra></extra>",
            name="dense",
        )
    figure.add_scatter(
        x=[n for n, _ in drawn],
        y=[evaluation.mean for _, evaluation in drawn],
        error_y={
            "array": [0.0 if math.isnan(error) else error for error in errors],
            "thickness": 1,
            "width": 0,
            "color": "rgba(141, 150, 165, 0.5)",
        },
        customdata=[str(evaluation.ratios) for _, evaluation in drawn],
        hovertemplate="step %{x}: %{y:.4f}<br>%{customdata}<extra></extra>",
        mode="markers",
        marker={"color": _PLAIN, "size": 7},
        name="step, with standard error",
    )
    figure.add_scatter(
        x=[n for n, _ in drawn],
        y=list(accumulate((evaluation.mean for _, evaluation in drawn), max)),
        mode="lines",
        line={"shape": "hv", "color": _BETTER, "width": 2.5},
        hovertemplate="best of %{x}: %{y:.4f}<extra></extra>",
        name="best so far",
    )
    if lost:
        figure.add_scatter(
            x=[n for n, _ in lost],
            y=[reward for _, reward in lost],
            mode="markers",
            marker={"symbol": "triangle-down-open", "color": _PLAIN, "size": 8},
            hovertemplate="step %{x}: lost its race, about %{y:.4f}<extra></extra>",
            name="lost its race",
        )
    levels = [value for value in (*(s.reward for s in steps), dense) if value is not None]
    if failed:
        figure.add_scatter(
            x=failed,
            y=[min(levels, default=0.0)] * len(failed),
            mode="markers",
            marker={"symbol": "x", "color": _WORSE, "size": 9},
            hovertemplate="step %{x} failed<extra></extra>",
            name="failed",
        )
    return _laid_out(figure, "step", "mean reward on the search prompts", height=430)


def maps(
    space: Space, evaluations: Sequence[Evaluation], winner: Evaluation | None
) -> dict[str, Figure]:
    """Draw where the search looked, by what each chart shows: every two dimensions of the space.

    The reward is the colour, what failed or was stopped early is hollow, the winner is a star. A
    space of one dimension is one chart, with the reward upwards.
    """
    names = list(space.bounds)
    complete = sorted((e for e in evaluations if e.is_complete), key=lambda e: e.mean)
    others = [e for e in evaluations if not e.is_complete]
    if len(names) == 1:
        return {f"reward by {names[0]}": _line(space, names[0], complete, winner)}
    colours = {"cmin": complete[0].mean, "cmax": complete[-1].mean} if complete else {}
    figures = {}
    for x, y in combinations(names, 2):
        figure = Figure()
        for some, marker in (
            (others, {"symbol": "circle-open", "color": _PLAIN, "size": 7}),
            (
                complete,
                {
                    "color": [e.mean for e in complete],
                    "colorscale": _SCALE,
                    "size": 9,
                    "colorbar": {"thickness": 8, "outlinewidth": 0},
                    **colours,
                },
            ),
            ([winner] if winner else [], _STAR),
        ):
            figure.add_scatter(
                x=[_value(space, e, x) for e in some],
                y=[_value(space, e, y) for e in some],
                customdata=[_described(space, e) for e in some],
                hovertemplate="%{customdata}<extra></extra>",
                mode="markers",
                marker=marker,
            )
        figure.update_xaxes(range=_widened(space.bounds[x]))
        figure.update_yaxes(range=_widened(space.bounds[y]))
        figures[f"{x} and {y}"] = _laid_out(figure, x, y, height=300, showlegend=False)
    return figures


def _line(
    space: Space, name: str, complete: Sequence[Evaluation], winner: Evaluation | None
) -> Figure:
    figure = Figure()
    for some, marker in (
        (complete, {"color": _BETTER, "size": 8}),
        ([winner] if winner else [], _STAR),
    ):
        figure.add_scatter(
            x=[_value(space, e, name) for e in some],
            y=[e.mean for e in some],
            customdata=[_described(space, e) for e in some],
            hovertemplate="%{customdata}<extra></extra>",
            mode="markers",
            marker=marker,
        )
    figure.update_xaxes(range=_widened(space.bounds[name]))
    return _laid_out(figure, name, "mean reward", showlegend=False)


def parallel(space: Space, evaluations: Sequence[Evaluation], winner: Evaluation | None) -> Figure:
    """Draw each complete evaluation as a line through its dimensions to its reward.

    Every axis goes from the least to the most; the reward is the colour too.
    """
    complete = sorted((e for e in evaluations if e.is_complete), key=lambda e: e.mean)
    low, high = complete[0].mean, complete[-1].mean
    spans = {**space.bounds, "reward": (low, high)}
    groups: dict[int, list[Evaluation]] = {}
    for evaluation in complete:
        share = _share(evaluation.mean, (low, high))
        groups.setdefault(round(share * (_NUM_COLOURS - 1)), []).append(evaluation)
    levels = [number / (_NUM_COLOURS - 1) for number in range(_NUM_COLOURS)]
    colours = sample_colorscale(make_colorscale(_SCALE), levels)
    figure = Figure()
    lines: list[tuple[list[Evaluation], dict[str, Any]]] = [
        (group, {"color": colours[number], "width": 1.5})
        for number, group in sorted(groups.items())
    ]
    if winner is not None:
        lines.append(([winner], {"color": _WINNER, "width": 4}))
    for group, line in lines:
        x: list[str | None] = []
        y: list[float | None] = []
        texts: list[str] = []
        for evaluation in group:
            x += [*spans, None]
            y += [_share(_value(space, evaluation, name), span) for name, span in spans.items()]
            y.append(None)
            texts += [_described(space, evaluation)] * (len(spans) + 1)
        figure.add_scatter(
            x=x,
            y=y,
            customdata=texts,
            hovertemplate="%{customdata}<extra></extra>",
            mode="lines+markers",
            marker={"size": 4},
            line=line,
        )
    for name, (least, most) in spans.items():
        axis = {"color": _PLAIN, "width": 1}
        figure.add_shape(x0=name, x1=name, y0=0, y1=1, line=axis, layer="below")
        for level, value in ((-0.07, least), (1.07, most)):
            figure.add_annotation(x=name, y=level, text=f"{value:.3g}", showarrow=False)
    figure.update_yaxes(visible=False, range=[-0.12, 1.12])
    return _laid_out(figure, "", "", height=380, showlegend=False)


def _value(space: Space, evaluation: Evaluation, name: str) -> float:
    if name == "reward":
        return evaluation.mean
    suggestion = space.suggestion(evaluation.candidate)
    return math.nan if suggestion is None else suggestion[name]


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return 0.5 if high == low else (value - low) / (high - low)


def _widened(span: tuple[float, float]) -> list[float]:
    low, high = span
    margin = 0.06 * (high - low)
    return [low - margin, high + margin]


def _described(space: Space, evaluation: Evaluation) -> str:
    """Say what a point is, without HTML of anybody's."""
    if evaluation.is_complete:
        outcome = f"reward {evaluation.mean:.4f}"
    else:
        outcome = "failed" if evaluation.failure else "stopped early"
    return f"{space.describe(evaluation.candidate)}<br>{outcome}"


def _laid_out(figure: Figure, x: str, y: str, height: int = 360, **layout: Any) -> Figure:
    """Set what all charts share; the font's colour comes with the page."""
    clear, grid = "rgba(0, 0, 0, 0)", "rgba(141, 150, 165, 0.3)"
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        font={"size": 13},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        # On a phone a finger scrolls the page; it does not drag the chart.
        dragmode=False,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
        **layout,
    )
    figure.update_xaxes(title=x, automargin=True, gridcolor=grid, zeroline=False, fixedrange=True)
    figure.update_yaxes(title=y, automargin=True, gridcolor=grid, zeroline=False, fixedrange=True)
    return figure
