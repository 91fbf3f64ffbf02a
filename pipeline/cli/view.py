"""A record on the screen: prompt, drafts, rounds with word diffs, ranking, comparisons, losses.

All text of models and prompts is untrusted: it is escaped, never read as markup, and indented, so that no line of it
can pass for one of ours. On a terminal it is wrapped and coloured; elsewhere lines are plain and changes marked.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from pipeline.cli.common import printable
from pipeline.reading import Case
from pipeline.records import Line
from pipeline.worddiff import marked, word_diff

_STYLES = {"same": "", "cut": "red strike", "new": "green"}
_VERDICT_STYLES = {"worse": "bold red", "improved": "bold green"}


class Page:
    """Prints indented text to stdout."""

    def __init__(self) -> None:
        self._console = Console(markup=False, highlight=False, emoji=False)
        self.has_color = self._console.is_terminal and self._console.color_system is not None

    def write(self, indent: int, *parts: str | tuple[str, str]) -> None:
        """parts: texts, or (text, style)."""
        styled = [(part, "") if isinstance(part, str) else part for part in parts]
        text = Text.assemble(*((printable(words), style) for words, style in styled))
        if self._console.is_terminal:
            self._console.print(Padding(text, (0, 0, 0, indent), expand=False))
            return
        print("\n".join(" " * indent + line if line else "" for line in text.plain.split("\n")))

    def write_diff(self, indent: int, before: str, after: str) -> None:
        pieces = word_diff(before, after)
        if before == after:
            self.write(indent, ("(unchanged)", "dim"))
        elif self.has_color:
            self.write(indent, *((piece.text, _STYLES[piece.state]) for piece in pieces))
        else:
            self.write(indent, marked(pieces))


def show_cases(cases: Iterable[Case]) -> None:
    page = Page()
    for place, case in enumerate(cases):
        if place:
            page.write(0, "")
        show_case(page, case)


def show_case(page: Page, case: Case) -> None:
    tags = f"  tags: {', '.join(case.record.tags)}" if case.record.tags else ""
    page.write(0, (f"record {case.record.id}", "bold"), tags)
    for message in case.record.messages:
        page.write(2, (message["role"], "cyan"))
        page.write(6, message["content"])
    _show_answers(page, case)
    if ranked := case.record.lines.get("rank"):
        _show_ranking(page, ranked)
    _show_samples(page, case)
    for state, losses in (("failed", case.failed), ("filtered", case.filtered)):
        for loss in losses:
            page.write(2, (state, "bold red"), f" {_loss(loss)}")


def _show_answers(page: Page, case: Case) -> None:
    """Every answer and, below a draft, what the rounds made of it."""
    for number, text in enumerate(case.record.given):
        page.write(2, (f"given answer {number}", "cyan"))
        page.write(6, text)
    chains = case.record.lines.get("critique-revise", {}).get("chains", [])
    rounds = {chain["sample"]: chain["rounds"] for chain in chains}
    for draft in case.record.lines.get("generate", {}).get("completions", []):
        facts = f" by {draft['model']}, {draft['num_tokens']} tokens" + _ending(draft)
        page.write(2, (f"draft {draft['sample']}", "cyan"), facts)
        page.write(6, draft["text"])
        _show_rounds(page, draft, rounds.get(draft["sample"], []))


def _show_rounds(page: Page, draft: Line, rounds: list[Line]) -> None:
    text, author = draft["text"], draft["model"]
    for number, entry in enumerate(rounds, start=1):
        if entry["stopped"]:
            page.write(4, (f"round {number}", "cyan"), ": stopped, the judge found no fault")
            continue
        p = f", p {entry['p']:.2f}" if "p" in entry else ""
        verdict = (entry["verdict"], _VERDICT_STYLES.get(entry["verdict"], ""))
        page.write(4, (f"round {number}", "cyan"), f" {entry['principle']}: ", verdict, p + _ending(entry))
        if entry["critique"]:
            page.write(6, ("critique", "dim"), _by(entry.get("critic"), author))
            page.write(8, entry["critique"])
        page.write(6, ("revision", "dim"), _by(entry.get("model"), author))
        page.write_diff(8, text, entry["revision"])
        if entry["verdict"] != "worse":
            text = entry["revision"]


def _by(model: str | None, author: str) -> str:
    """Who wrote it, where that is not the author of the draft."""
    return f" by {model}" if model not in (None, author) else ""


def _show_samples(page: Page, case: Case) -> None:
    """What phase 2 sampled and how it was ranked."""
    for sample in case.samples:
        facts = f" by {sample['model']}, {sample['num_tokens']} tokens" + _ending(sample)
        page.write(2, (f"phase 2, sample {sample['sample']}", "cyan"), facts)
        page.write(6, sample["text"])
    if ranked := case.record.lines.get("phase2/rank"):
        _show_ranking(page, ranked)


def _show_ranking(page: Page, ranked: Line) -> None:
    candidates = ranked["candidates"]
    page.write(2, ("ranking", "cyan"))
    for candidate in sorted(candidates, key=lambda candidate: candidate["rank"]):
        page.write(6, f"{candidate['rank']}. {_name(candidate)}, score {candidate['score']:+.2f}")
    for entry in ranked["comparisons"]:
        a, b = _name(candidates[entry["a"]]), _name(candidates[entry["b"]])
        page.write(6, f"{a} against {b}, {entry['principle']}: {_probabilities(entry)}")
    for entry in ranked.get("grades", []):
        name = _name(candidates[entry["candidate"]])
        page.write(6, f"{name}, {entry['principle']}: grade {entry['grade']:.1f}, {_reading(entry)}")


def _probabilities(entry: Line) -> str:
    """p as the mean of both orders, each order, and how well the labels could be read."""
    orders = [f"{words} {entry[key]:.2f}" for key, words in _ORDERS.items() if key in entry]
    shown = f" ({', '.join(orders)})" if orders else ""
    p = f"p {entry['p']:.2f}" if "p" in entry else "no p"
    status = "" if entry["status"] == "ok" else f", {entry['status']}"
    return f"{p}{shown}{status}, {_reading(entry)}"


_ORDERS = {"p_ab": "shown first", "p_ba": "shown second"}


def _reading(entry: Line) -> str:
    return f"{entry['method'] or 'not read'}, label mass {entry['label_mass']:.2f}"


def _name(candidate: Line) -> str:
    number = f"{candidate['sample']}.{candidate['round']}" if candidate["round"] else str(candidate["sample"])
    return f"{candidate['origin']} {number}"


def _ending(line: Line) -> str:
    return "" if line["finish_reason"] == "stop" else f", ended by {line['finish_reason']}"


def _loss(loss: Line) -> str:
    where = [f"sample {loss['sample']}"] if loss["sample"] >= 0 else []
    where += [f"turn {loss['turn']}"] if loss["turn"] >= 0 else []
    tries = "" if loss["attempts"] <= 1 else f" ({loss['attempts']} attempts)"
    return f"in {' '.join([loss['stage'], *where])}, {loss['kind']}: {loss['reason']}: {loss['detail']}{tries}"
