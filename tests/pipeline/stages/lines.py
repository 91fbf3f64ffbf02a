"""Lines of the stages as tests of the datasets write them by hand."""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]


def entry(revision: str, verdict: str, p: float | None, principle: str = "kind", **more: Any) -> Line:
    line = {"principle": principle, "critique": "It is curt.", "revision": revision, "finish_reason": "stop"}
    return {**line, "verdict": verdict, "stopped": False, **({} if p is None else {"p": p}), **more}


def candidate(origin: str, sample: int, round: int, text: str, score: float, rank: int) -> Line:
    return {
        "origin": origin,
        "sample": sample,
        "round": round,
        "model": "m",
        "text": text,
        "score": score,
        "rank": rank,
    }


def comparison(a: int, b: int, p: float | None, status: str = "ok", principle: str = "calm") -> Line:
    line = {"a": a, "b": b, "principle": principle, "status": status, "method": "logprobs", "label_mass": 0.9}
    return line if p is None else {**line, "p_ab": p, "p_ba": p, "p": p}
