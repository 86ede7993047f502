"""How every method is set where it is measured: one row per method."""

from __future__ import annotations

from dataclasses import dataclass

DENSE = "dense"
BUDGETS = (0.1, 0.25, 0.5)
"""Shares of the prompt at which methods that have a budget are judged."""
TOKENS = 1024
"""Tokens per KV head of methods that have a budget, where they are timed."""

SNAPKV = f"snapkv(budget={TOKENS})"
QUEST = "quest(pages=0.0625, skip_layers=0)"
MINFERENCE = "minference(verticals=500, slashes=50)"
FLEXPREFILL = "flexprefill(gamma=0.2)"


@dataclass(frozen=True)
class Setting:
    """The plans of one method.

    Attributes:
        method: its name in plans.
        timed: plans whose time and memory are measured on random weights; the first is the one
            that stands for the method.
        judged: plans whose answers are judged on the reference model: one per share in `BUDGETS`,
            or a single one of a method that has no budget.
    """

    method: str
    timed: tuple[str, ...]
    judged: tuple[str, ...]

    @property
    def budgeted(self) -> bool:
        """Whether it is judged at every budget."""
        return len(self.judged) == len(BUDGETS)


def _budgeted(method: str, plan: str, *timed: str) -> Setting:
    """A method that has a budget, which stands in `plan` as {}; timed with `TOKENS` tokens, or as
    `timed`."""
    return Setting(
        method, timed or (plan.format(TOKENS),), tuple(plan.format(share) for share in BUDGETS)
    )


def _fixed(method: str, plan: str = "", *timed: str) -> Setting:
    """A method without a budget: judged as `plan`, by default with its defaults, and timed so too
    if not as `timed`."""
    plan = plan or f"{method}()"
    return Setting(method, timed or (plan,), (plan,))


# Methods of the stage `reuse` act on contexts, and these prompts have none; see reuse.py.
#
# Random weights attend to everything alike, so that what adapts to the attention would compute or
# keep all of it. There the prefill methods have sizes that leave most out, and their defaults
# beside them. RazorAttention's buffer of 4,000 tokens would hold most of the judged prompts; a
# smaller one leaves the decision to its share of a fifth.
SETTINGS = (
    _fixed("minference", "", MINFERENCE, "minference(slashes=100)", "minference()"),
    _fixed("flexprefill", "", FLEXPREFILL, "flexprefill()"),
    _budgeted("gemfilter", "gemfilter(budget={})"),
    _fixed("lazyllm"),
    _fixed("pyramidinfer"),
    _budgeted("squeezeattention", "snapkv(budget={}) + squeezeattention()"),
    _budgeted("zigzagkv", "snapkv(budget={}) + zigzagkv()"),
    _budgeted("headadaptive", "snapkv(budget={}) + headadaptive()"),
    _budgeted("streamingllm", "streamingllm(budget={})"),
    _budgeted("h2o", "h2o(budget={})"),
    _budgeted("scissorhands", "scissorhands(budget={})"),
    _budgeted("snapkv", "snapkv(budget={})", SNAPKV),
    _budgeted("lagkv", "lagkv(budget={})"),
    _budgeted("d2o", "d2o(budget={})"),
    _budgeted("kvmerger", "kvmerger(budget={})"),
    _fixed("duoattention"),
    _fixed("razorattention", "razorattention(buffer=800)", "razorattention()"),
    _fixed("kivi"),
    _fixed("gear"),
    _fixed("think"),
    _fixed("minicache"),
    _budgeted("quest", "quest(pages={})", "quest(pages=0.0625)", QUEST),
    _budgeted("sparq", "sparq(k={})", "sparq()"),
    _budgeted("tokenselect", "tokenselect(k={})", "tokenselect()"),
    _fixed("headinfer"),
    _fixed("tokenrecycling"),
)
"""Every method of tamis, in the order of the stages."""
