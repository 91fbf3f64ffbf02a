"""What the name of a model tells before anything is loaded; no torch."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import EngineRefused


def check_name(model: str, setting: str = "engine.model") -> None:
    """EngineRefused for a path that is no folder, or a folder without a model. Other names may be a hub's.

    setting: that names the model.
    """
    if not Path(model).is_dir():
        if model.count("/") > 1 or model.startswith(("/", ".", "~")):
            raise EngineRefused(f"model {model}: no such folder; check {setting}, or use nano, the embedded model")
    elif not any((Path(model) / name).exists() for name in ("config.json", "adapter_config.json")):
        raise EngineRefused(f"model {model}: the folder holds no config.json; give a Hugging Face model folder")
