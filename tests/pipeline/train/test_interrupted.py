"""What ends a training before its end, in all trainers: how little is lost, and that the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ResourceError
from pipeline.train import checkpoints
from pipeline.train.best import Best
from pipeline.train.loop import Outcome, Progress
from tests.pipeline.train.ppo_jobs import run_any, save_pair
from tests.pipeline.train.test_ppo import lines, weights
from tests.pipeline.train.tiny_jobs import TRAINERS

ALL = (*TRAINERS, "ppo")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


def killed_at(step: int) -> Callable[[Progress], None]:
    """To be told of every step: ends the training at this one, before its checkpoint."""

    def watch(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return watch


def killed(*_: Any) -> bool:
    raise KeyboardInterrupt


def kept_steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out.with_name(f".{out.name}.training") / "checkpoints").iterdir())


@pytest.mark.parametrize("trainer", ALL)
def test_a_kill_within_an_evaluation_costs_no_step(
    trainer: str, models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"epochs": 2}
    run_any(trainer, data, models, tmp_path / "whole", keys=keys)
    with monkeypatch.context() as patched:
        patched.setattr(Best, "take", killed)
        with pytest.raises(KeyboardInterrupt):
            run_any(trainer, data, models, tmp_path / "out", keys=keys)
    assert kept_steps(tmp_path / "out") == ["step-00000003"]
    seen: list[int] = []
    run_any(trainer, data, models, tmp_path / "out", keys=keys, watch=lambda progress: seen.append(progress.step))
    assert seen == [3, 4, 5, 6]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


@pytest.mark.parametrize("trainer", ["sft", "ppo"])
def test_a_training_saves_after_a_while_though_its_epoch_is_not_over(
    trainer: str, models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_any(trainer, data, models, tmp_path / "whole")
    monkeypatch.setattr(checkpoints, "LATE_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_any(trainer, data, models, tmp_path / "out", watch=killed_at(2))
    assert kept_steps(tmp_path / "out") == ["step-00000001"]
    run_any(trainer, data, models, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_any(trainer, data, models, tmp_path / "set", keys={"save_every": 3}, watch=killed_at(2))
    assert not (tmp_path / ".set.training" / "checkpoints").exists()


@pytest.mark.parametrize("trainer", ALL)
def test_what_out_of_memory_asks_for_goes_on_where_the_training_was(
    trainer: str, models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_any(trainer, data, models, tmp_path / "out", keys={"save_every": 1}, watch=killed_at(3))
    changed = {"microbatch_tokens": 200, "gradient_checkpointing": True, "save_every": 2}
    seen: list[int] = []
    run_any(
        trainer,
        data,
        models,
        tmp_path / "out",
        keys=changed,
        say=said.append,
        watch=lambda progress: seen.append(progress.step),
    )
    assert (seen, said) == ([3], [])
    assert not run_any(trainer, data, models, tmp_path / "out").is_new


@pytest.mark.parametrize(
    ("trainer", "select", "keys"),
    [
        ("sft", "max eval/loss", {}),
        ("rm", "max eval/loss", {"lora": {"r": 4}}),
        ("ppo", "min eval/kl", {}),
        ("ppo", "max eval/kl", {"ema_decay": 0.5}),
    ],
)
def test_damaged_best_weights_are_taken_from_the_checkpoint_of_their_step_or_the_last_ones_are_kept(
    trainer: str, select: str, keys: dict[str, Any], models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    """The first of two evaluations is the best by its metric; both checkpoints are kept."""
    metric, keys = select.partition(" ")[2], {**keys, "epochs": 2, "select": select, "learning_rate": 3e-3}
    whole = run_any(trainer, data, models, tmp_path / "whole", keys=keys)
    assert whole.outcome.step == 3

    def train(out: Path, *damaged: str) -> tuple[Outcome, list[str]]:
        said, work = list[str](), out.with_name(f".{out.name}.training")

        def damage(progress: Progress) -> None:
            for name in damaged if progress.step == 6 else ():
                (work / name / "state.json").write_text("{}")

        return run_any(trainer, data, models, out, keys=keys, watch=damage, say=said.append).outcome, said

    outcome, said = train(tmp_path / "once", "best")
    assert outcome == whole.outcome
    assert weights(tmp_path / "once") == weights(tmp_path / "whole")
    assert said == [f"{tmp_path / '.once.training' / 'best'}: does not hold the whole weights of step 3 any more"]
    outcome, said = train(tmp_path / "twice", "best", "checkpoints/step-00000003")
    assert outcome.step == 6
    assert outcome.metrics[metric] == lines(tmp_path / "twice")[-1][metric] != whole.outcome.metrics[metric]
    assert said[-1] == "the weights of step 6 are kept, and not those of step 3"


def test_damaged_best_weights_are_not_replaced_by_some_beyond_the_kl_budget(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    keys = {"epochs": 2, "select": "min eval/kl", "learning_rate": 3e-3}
    run_any("ppo", data, models, tmp_path / "whole", keys=keys)
    first, last = (line["eval/kl"] for line in lines(tmp_path / "whole")[3::3])

    def damage(progress: Progress) -> None:
        for name in ("best", "checkpoints/step-00000003") if progress.step == 6 else ():
            (tmp_path / ".out.training" / name / "state.json").write_text("{}")

    with pytest.raises(ResourceError, match="not whole any more; delete"):
        run_any("ppo", data, models, tmp_path / "out", keys={**keys, "kl_budget": (first + last) / 2}, watch=damage)
