"""What the report shows: each section's figures, and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tamis.bench import figures
from tamis.bench.figures import Line, Point, Style
from tamis.bench.summary import ONE_FACT, Quality, Speed, Spread, Summary, pareto_front
from tamis.bench.text import (
    NOTHING,
    length_text,
    mebibytes,
    percent,
    perplexity,
    ratio,
    seconds,
)


@dataclass(frozen=True)
class Cell:
    """A table's cell; `score`, from 0 to 1, tints it."""

    text: str
    score: float | None = None


@dataclass(frozen=True)
class Table:
    """A heading per column, and rows whose first `labels` cells are text, not numbers."""

    head: tuple[str, ...]
    rows: list[list[Cell]]
    labels: int = 2


@dataclass(frozen=True)
class Section:
    """A heading, what it says, titled figures in a grid, and their numbers."""

    title: str
    note: str
    table: Table
    panels: list[tuple[str, str]] = field(default_factory=list)
    legend: bool = False


def sections(summary: Summary, depths: int) -> list[Section]:
    """All sections that the results have something for.

    Args:
        depths: parts of the document that the heatmaps tell apart.
    """
    look = figures.styles(summary.plans)
    made: list[Section] = []
    if summary.answers:
        made.append(_scores(summary))
    if summary.readings:
        made.append(_perplexities(summary))
    if summary.answers:
        made.append(_quality_memory(summary, look))
    if summary.timings:
        for title, cost, of in _COSTS:
            made.append(_quality_time(summary, look, title, cost, of))
    if any(answer.task in ONE_FACT for answer in summary.answers):
        made.append(_depths(summary, depths))
    if summary.timings:
        made.append(_memory_over_time(summary, look))
    if any(answer.kind for answer in summary.answers):
        made.append(_styles(summary))
    return made


def overview(summary: Summary) -> Table:
    """One row per plan at the longest documents: quality, and costs against exact attention."""
    lengths = [n for n in summary.lengths if n is not None]
    if not summary.answers:
        lengths = summary.read_lengths or summary.timed_lengths
    length = lengths[-1] if lengths else None
    read = bool(summary.readings)
    rows = []
    for plan in summary.plans:
        memory, speed = summary.memory(plan, length), summary.speed(plan, length)
        memory = memory or (speed.memory if speed else None)
        score = summary.overall(plan, length)
        found = summary.perplexity(plan, length)
        rows.append(
            [
                Cell(plan),
                Cell(percent(score), score),
                *([Cell(perplexity(found.value if found else None))] if read else []),
                Cell(ratio(memory.kept) if memory else NOTHING),
                Cell(ratio(memory.share) if memory else NOTHING),
                Cell(ratio(speed.ttft_ratio.median) if speed else NOTHING),
                Cell(ratio(speed.tpot_ratio.median) if speed else NOTHING),
            ]
        )
    head = (
        f"plan, at {length_text(length)} tokens" if length else "plan",
        "score, %",
        *(["perplexity"] if read else []),
        "KV kept",
        "KV peak",
        "first token",
        "each token",
    )
    return Table(head, rows, labels=1)


def _rows(summary: Summary, lengths: Sequence[int | None]) -> Iterator[tuple[str, int | None]]:
    for length in lengths:
        for plan in summary.plans:
            yield plan, length


def _label(plan: str, length: int | None) -> list[Cell]:
    return [Cell(plan), Cell(length_text(length))]


def _scores(summary: Summary) -> Section:
    counts = {task: _count(summary, task) for task in summary.tasks}
    rows = []
    for plan, length in _rows(summary, summary.lengths):
        cells = {task: summary.cell(plan, task, length) for task in summary.tasks}
        mean = summary.overall(plan, length)
        if mean is not None or any(cell.failed for cell in cells.values()):
            scored = [_quality(cell, counted=not counts[task]) for task, cell in cells.items()]
            rows.append([*_label(plan, length), Cell(percent(mean), mean), *scored])
    heads = [f"{task}, n={n}" if n else task for task, n in counts.items()]
    return Section(
        "Scores",
        "Percent; n is how many answers a number rests on. A score is the share of the values "
        "asked for that stand in the answer, in order; published tasks have their own metrics. "
        "In brackets, where it differs: the share of answers that say the right one and nothing "
        "else. The mean counts every task the same.",
        Table(("plan", "tokens", "mean", *heads), rows),
    )


def _count(summary: Summary, task: str) -> int | None:
    """How many answers every plan has at every length, where that is one number."""
    cells = [summary.cell(plan, task, n) for plan, n in _rows(summary, summary.lengths)]
    counts = {cell.count for cell in cells if cell.count or cell.failed}
    return counts.pop() if len(counts) == 1 else None


def _quality(cell: Quality, counted: bool = True) -> Cell:
    if cell.score is None:
        return Cell(f"{cell.failed} failed" if cell.failed else NOTHING)
    exact = "" if cell.exact == cell.score else f" ({percent(cell.exact)})"
    n = f" · n={cell.count}" if counted else ""
    failed = f", {cell.failed} failed" if cell.failed else ""
    return Cell(f"{percent(cell.score)}{exact}{n}{failed}", cell.score)


def _perplexities(summary: Summary) -> Section:
    rows = []
    for plan, length in _rows(summary, summary.read_lengths):
        found = summary.perplexity(plan, length)
        if found is not None:
            failed = f", {found.failed} failed" if found.failed else ""
            rows.append(
                [
                    *_label(plan, length),
                    Cell(perplexity(found.value)),
                    Cell(f"{found.tokens:,}"),
                    Cell(f"{found.windows}{failed}"),
                    Cell(mebibytes(found.memory.peak) if found.memory else NOTHING),
                    Cell(ratio(found.memory.share) if found.memory else NOTHING),
                ]
            )
    return Section(
        "Perplexity of held-out text",
        "Lower is better, and it is in no mean. The first half of every window is the prompt; its "
        "second half is forced upon the model token by token, and each token scored by what the "
        "plan left of those before it.",
        Table(
            (
                "plan",
                "tokens",
                "perplexity",
                "scored tokens",
                "windows",
                "KV peak, MiB",
                "peak to exact",
            ),
            rows,
        ),
    )


def _quality_memory(summary: Summary, look: Mapping[str, Style]) -> Section:
    panels, rows = [], []
    for i, length in enumerate(summary.lengths):
        points = []
        for plan in summary.plans:
            memory, score = summary.memory(plan, length), summary.overall(plan, length)
            if memory is not None and score is not None:
                points.append((Point(plan, memory.peak / 2**20, score), memory))
        front = pareto_front([(point.cost, point.quality) for point, _ in points])
        for (point, memory), on_front in zip(points, front, strict=True):
            rows.append(
                [
                    *_label(point.plan, length),
                    Cell(percent(point.quality), point.quality),
                    Cell(mebibytes(memory.peak)),
                    Cell(mebibytes(memory.end)),
                    Cell(mebibytes(memory.dense)),
                    Cell(ratio(memory.share)),
                    Cell("yes" if on_front else "no"),
                ]
            )
        figure = figures.tradeoff(f"memory-{i}", [p for p, _ in points], "KV peak, MiB", look)
        panels.append((_title(length), figure))
    return Section(
        "Quality against KV memory",
        "Mean score over tasks against the most bytes that the KV pages of one request took, mean "
        "over requests. The dotted line is the Pareto front: filled marks are on it, and no plan "
        "has both a better score and less memory.",
        Table(
            (
                "plan",
                "tokens",
                "score, %",
                "peak, MiB",
                "at its end, MiB",
                "exact attention, MiB",
                "peak to exact",
                "on the front",
            ),
            rows,
        ),
        panels,
        legend=True,
    )


@dataclass(frozen=True)
class _Time:
    absolute: Spread
    relative: Spread


_COSTS: tuple[tuple[str, str, Callable[[Speed], _Time]], ...] = (
    (
        "Quality against time to first token",
        "time to first token",
        lambda speed: _Time(speed.ttft_s, speed.ttft_ratio),
    ),
    (
        "Quality against time per output token",
        "time per output token",
        lambda speed: _Time(speed.tpot_s, speed.tpot_ratio),
    ),
)


def _quality_time(
    summary: Summary,
    look: Mapping[str, Style],
    title: str,
    cost: str,
    of: Callable[[Speed], _Time],
) -> Section:
    panels, rows = [], []
    rounds = max(len({t.repeat for t in summary.timings}), 1)
    for i, length in enumerate(summary.timed_lengths):
        points: dict[str, Point] = {}
        for plan in summary.plans:
            speed, score = summary.speed(plan, length), summary.overall(plan, length)
            if speed is not None and score is not None:
                ms = of(speed).absolute
                points[plan] = Point(plan, 1000 * ms.median, score, 1000 * ms.low, 1000 * ms.high)
        front = pareto_front([(point.cost, point.quality) for point in points.values()])
        on_front = dict(zip(points, front, strict=True))
        for plan in summary.plans:
            speed, score = summary.speed(plan, length), summary.overall(plan, length)
            if speed is None:
                continue
            time = of(speed)
            rows.append(
                [
                    *_label(plan, length),
                    Cell(percent(score), score),
                    Cell(seconds(time.absolute.median)),
                    Cell(f"{seconds(time.absolute.low)} … {seconds(time.absolute.high)}"),
                    Cell(ratio(time.relative.median)),
                    Cell(f"{ratio(time.relative.low)} … {ratio(time.relative.high)}"),
                    Cell({True: "yes", False: "no", None: NOTHING}[on_front.get(plan)]),
                ]
            )
        if points:
            name = f"{cost.replace(' ', '-')}-{i}"
            figure = figures.tradeoff(name, list(points.values()), f"{cost}, ms", look)
            panels.append((_title(length), figure))
    return Section(
        title,
        f"Measured apart from quality, one request at a time, in {rounds} "
        f"round{'s' if rounds > 1 else ''} of exact attention and then every plan: the median, and "
        "the range as bars. Ratios compare with exact attention in the same round.",
        Table(
            (
                "plan",
                "tokens",
                "score, %",
                "median",
                "range",
                "to exact",
                "range of the ratio",
                "on the front",
            ),
            rows,
        ),
        panels,
        legend=True,
    )


def _depths(summary: Summary, bins: int) -> Section:
    edges = [f"{100 * i // bins}–{100 * (i + 1) // bins}" for i in range(bins)]  # noqa: RUF001
    lengths = [
        length
        for length in summary.lengths
        if any(a.length == length and a.task in ONE_FACT for a in summary.answers)
    ]
    columns = [length_text(length) for length in lengths]
    panels, rows = [], []
    for i, plan in enumerate(summary.plans):
        found = summary.by_depth(plan, bins)
        if not found:
            continue
        nothing = Quality(None, None, 0, 0)
        grid = [[found.get((length, part), nothing) for length in lengths] for part in range(bins)]
        scores = [[cell.score for cell in row] for row in grid]
        panels.append((plan, figures.heatmap(f"depth-{i}", edges, columns, scores)))
        for edge, row in zip(edges, grid, strict=True):
            counted = [
                Cell(f"{percent(c.score)} · n={c.count}" if c.count else NOTHING, c.score)
                for c in row
            ]
            rows.append([Cell(plan), Cell(edge), *counted])
    tasks = [task for task in summary.tasks if task in ONE_FACT]
    return Section(
        "Needle depth by length",
        f"Percent of {', '.join(tasks)} answered, by where in the document the needed fact lies: "
        "0 is the start, 100 the end, next to the question.",
        Table(("plan", "depth, %", *columns), rows),
        panels,
    )


def _memory_over_time(summary: Summary, look: Mapping[str, Style]) -> Section:
    panels, rows = [], []
    for i, length in enumerate(summary.timed_lengths):
        lines = []
        for plan in summary.plans:
            timing = summary.timeline(plan, length)
            if timing is None:
                continue
            moments = [moment for moment, _ in timing.timeline]
            sizes = [size / 2**20 for _, size in timing.timeline]
            lines.append(Line(plan, moments, sizes, timing.ttft_s))
            rows.append(
                [
                    *_label(plan, length),
                    Cell(mebibytes(timing.kv_bytes_peak)),
                    Cell(mebibytes(timing.kv_bytes)),
                    Cell(mebibytes(timing.kv_bytes_dense)),
                    Cell(seconds(timing.ttft_s)),
                    Cell(seconds(moments[-1])),
                ]
            )
        panels.append((_title(length), figures.timeline(f"timeline-{i}", lines, look)))
    return Section(
        "KV memory over time",
        "Bytes of KV pages after every step of one request, in the round with the median time to "
        "first token; the mark is the first token.",
        Table(
            (
                "plan",
                "tokens",
                "peak, MiB",
                "at its end, MiB",
                "exact attention, MiB",
                "first token",
                "last token",
            ),
            rows,
        ),
        panels,
        legend=True,
    )


def _styles(summary: Summary) -> Section:
    styles = list(dict.fromkeys((a.kind, a.phrasing) for a in summary.answers if a.kind))
    rows = []
    for plan in summary.plans:
        found = summary.by_style(plan)
        if found:
            cells = [found.get((kind or "", how or "")) for kind, how in styles]
            rows.append([Cell(plan), *(_quality(c) if c else Cell(NOTHING) for c in cells)])
    return Section(
        "Kinds of values and phrasings of questions",
        "Percent over all tasks and lengths. Words are mostly one token, numbers several; a "
        "restated question ends with the key it asks for, a natural one does not. Methods that "
        "pool scores over tokens differ on exactly these.",
        Table(("plan", *(f"{kind}, {how}" for kind, how in styles)), rows, labels=1),
    )


def _title(length: int | None) -> str:
    return length_text(length) if length is None else f"{length_text(length)} tokens"
