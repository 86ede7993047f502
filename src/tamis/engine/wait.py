"""How long a request is going to wait for its first token."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tamis.engine.pace import Costs, Pace
from tamis.engine.scheduler import Scheduler
from tamis.engine.sequence import Sequence, Status


def expected_wait_s(scheduler: Scheduler, sequence: Sequence) -> float:
    """Seconds until a queued sequence gets its first token, as far as one can tell.

    Its own prompt and what the order puts before it are computed at the pace and the costs of the
    steps lately (`prefill_s`); what lies in the prefix cache already costs nothing. Not foreseen
    are requests that come later and go first, and how long those that run now will keep pages that
    it may have to wait for. So it is rather too short than too long.
    """
    left = tokens_left(scheduler)
    n_tokens = left[sequence] + scheduler.order.tokens_ahead(sequence, left)
    n_decoding = sum(not other.in_prompt for other in scheduler.running)
    return prefill_s(
        scheduler.costs, scheduler.pace, n_tokens, n_decoding, scheduler.max_batch_tokens
    )


def tokens_left(scheduler: Scheduler) -> Mapping[Sequence, int]:
    """Of every sequence, the tokens to compute before it goes on to generate."""
    return {
        sequence: _left(sequence)
        for queue in (scheduler.running, scheduler.swapped, scheduler.waiting)
        for sequence in queue
    }


def prefill_s(
    costs: Costs, pace: Pace, n_tokens: int, n_decoding: int, max_batch_tokens: int
) -> float:
    """Seconds to compute `n_tokens` prompt tokens beside `n_decoding` decoding sequences.

    Every step takes as many of them as the pace says, and besides their own cost that of a step
    which only decodes. Where nothing was measured yet, nothing is said: 0.
    """
    if costs.prompt_token_s is None:
        return 0.0
    budget = max(1, max_batch_tokens - n_decoding)
    n_steps = math.ceil(n_tokens / pace.prompt_tokens(costs, n_decoding, budget))
    decode_s = costs.decode_s or 0.0 if n_decoding else 0.0
    return n_tokens * costs.prompt_token_s + n_steps * decode_s


def _left(sequence: Sequence) -> int:
    if not sequence.in_prompt:
        return 0
    if sequence.status is Status.WAITING:
        return max(1, sequence.n_pending - sequence.request.n_reusable)
    return sequence.n_pending
