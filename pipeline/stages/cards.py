"""The datasets' columns, and the cards that explain them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings import ExportSettings
from pipeline.stages.filters import ALWAYS

if TYPE_CHECKING:
    import pyarrow as pa

DATASETS = {
    "sft": (
        "Answers to imitate: `prompt`, `completion`.",
        "A row's id is the record's, a slash, and the text's name: `draft-SAMPLE`, `revision-SAMPLE-ROUND` (rounds "
        "from 1) or `given-SAMPLE`. Ids that begin with `helpful/` are helpful data, mixed in, with "
        "`label_source` `given`.",
    ),
    "preference": (
        "Pairs of answers to one prompt: `prompt`, `chosen`, `rejected`.",
        "`chosen_probability` is the judge's probability that `chosen` is better, from comparing just these two texts, "
        "averaged over principles; it is always above 0.5. `score_chosen` and `score_rejected` are the scores of the "
        "record's whole ranking, null where it did not contain the text. A row's id is the record's, a slash, and the "
        "names of chosen and rejected with a colon between.",
    ),
    "ranked": (
        "All ranked answers to a prompt, the best first: `prompt`, `completions`, `scores`.",
        "Scores are log-odds (Bradley-Terry, mean 0 over the record's candidates), or mean grades in [-1, 1] if the "
        "ranking was graded.",
    ),
    "prompts": ("The prompts alone, for training that samples its own answers.", "Their `label_source` is `none`."),
    "chains": (
        "The whole trace of every record: drafts, critiques and revisions, candidates and comparisons.",
        "`p_ab` is the probability that candidate `a` is better when it is shown first, `p_ba` when it is shown "
        "second, `p` what was made of both; null where the judge abstained or was not asked. In a round, `p` is the "
        "probability that the revision is better than what it revised.",
    ),
}
"""Name -> what a row is, and how to read its columns."""


def card_text(name: str, settings: ExportSettings, *, pairs_from: str = "revisions") -> str:
    """The part of a card below its front matter, in Markdown. Holds no time, host name or folder.

    pairs_from: revisions, samples, both: the texts of which phase are compared.
    """
    what, columns = DATASETS[name]
    is_text = settings.format == "text"
    form = (
        'Prompts are text that ends with "\\n\\nAssistant:", answers are the text that follows, with its leading space.'
        if is_text
        else "Prompts and answers are message lists."
    )
    if name in ("sft", "preference") or (name == "ranked" and pairs_from == "samples"):
        part = "preference" if name == "ranked" else name
        which = f"prompts whose first user turn hashes into the {part} part"
    else:
        which = "prompts of the sft and the preference part"
    split = settings.split
    lines = [
        f"# {name}",
        what,
        f"{form} {columns}",
        "All rows have `id`, `tags`, `principles` (ids of the principles that took part) and `label_source` (`ai`: a "
        "model wrote or judged it under the principles; `given`: it came with the input).",
        f"`train` holds {which}, `test` those of the test part; shares: sft {split.sft:g}, preference "
        f"{split.preference:g}, test {split.test:g}. A split without rows has no file. Rows are sorted by id.",
        "Made with: " + ", ".join(_made_with(name, settings, pairs_from)) + ".",
        "Only the version named in this file's head is current; older ones beside it can be deleted.",
    ]
    return "\n" + "\n\n".join(lines) + "\n"


def _made_with(name: str, settings: ExportSettings, pairs_from: str) -> list[str]:
    filters = sorted({*settings.filters, *ALWAYS})
    said = [f"format {settings.format}"]
    if name == "sft":
        said.append(f"sft {settings.sft}")
        if settings.helpful:
            said.append(f"helpful {Path(settings.helpful.path).name} at share {settings.helpful.share:g}")
    if name == "preference":
        said += [f"pairs {settings.pairs}", f"margin {settings.margin:g}"]
    if name in ("preference", "ranked"):
        said.append(_COMPARED[pairs_from])
    return said + ([f"filters {', '.join(filters)}"] if name in ("sft", "preference", "ranked") else [])


_COMPARED = {
    "revisions": "answers of phase 1",
    "samples": "samples of phase 2's policy",
    "both": "answers of phase 1 and, under ids with `/phase2`, samples of phase 2's policy",
}


def schemas(format: str) -> dict[str, pa.Schema]:
    """The Arrow schema of every dataset. format: messages, or text for strings instead of message lists."""
    import pyarrow as pa

    text, real, whole, yes = pa.string(), pa.float64(), pa.int64(), pa.bool_()

    def rows(**columns: Any) -> Any:
        return pa.list_(pa.struct(columns))

    chat = rows(role=text, content=text) if format == "messages" else text
    own: dict[str, dict[str, Any]] = {
        "sft": {"completion": chat},
        "preference": {
            "chosen": chat,
            "rejected": chat,
            "chosen_probability": real,
            "score_chosen": real,
            "score_rejected": real,
        },
        "ranked": {"completions": pa.list_(chat), "scores": pa.list_(real)},
        "prompts": {},
        "chains": {
            "completions": rows(sample=whole, text=text, model=text, finish_reason=text, num_tokens=whole),
            "chains": rows(
                sample=whole,
                rounds=rows(
                    principle=text,
                    critique=text,
                    revision=text,
                    finish_reason=text,
                    verdict=text,
                    p=real,
                    stopped=yes,
                ),
            ),
            "candidates": rows(origin=text, sample=whole, round=whole, model=text, text=text, score=real, rank=whole),
            "comparisons": rows(
                a=whole,
                b=whole,
                principle=text,
                p_ab=real,
                p_ba=real,
                p=real,
                status=text,
                method=text,
                label_mass=real,
            ),
            "grades": rows(candidate=whole, principle=text, grade=real, method=text, label_mass=real),
            "source": text,
        },
    }
    common = {"tags": pa.list_(text), "principles": pa.list_(text), "label_source": text}
    return {name: pa.schema({"id": text, "prompt": chat, **columns, **common}) for name, columns in own.items()}
