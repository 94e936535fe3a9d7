"""What to run after a stage, in one line."""

from __future__ import annotations

import shlex
from dataclasses import fields

from ..settings.ranges import Settings

NEXT = {
    "data": "ppcl calibrate --model {teacher} --run FOLDER --shards {result}",
    "calibrate": "ppcl probe {shared}",
    "probe": "ppcl detect {shared}",
    "detect": "ppcl distill-depth {shared}",
    "distill-depth": "ppcl detect-width {shared}",
    "detect-width": "ppcl distill-width {shared}",
    "distill-width": "ppcl polish {shared}",
    "polish": "ppcl variants {shared}",
    "variants": "ppcl evaluate {shared}",
    "finetune": "ppcl evaluate {shared}",
    "evaluate": "ppcl export {shared}",
    "export": "ppcl inspect --path {result}",
    "adapt-lora": "ppcl export {shared}, and {result} in a LoRA loader behind that model",
    "fold": "ppcl inspect --path {result}",
    "sparsify": "ppcl inspect --path {result}",
    "merge": "ppcl inspect --path {result}",
    "import": "ppcl inspect --path {result}",
    "inspect": "ppcl generate --path {path} --prompt TEXT (a bundle needs --base MODEL too)",
    "generate": "ppcl bench --path {path} (a bundle needs --base MODEL too)",
    "bench": "ppcl generate --path {path} --prompt TEXT (a bundle needs --base MODEL too)",
    "demo": "ppcl calibrate --model MODEL --run FOLDER --dry-run, for a model of your own",
}
"""stage -> the command after it. {shared}: the settings that both have and that differ from the defaults; {path}: the file that the
stage looked at; {result}: what it made; {teacher}: the model that drew"""
SHARED = ("model", "run", "device", "dtype", "streamed", "seed")


def next_step(stage: str, config: Settings, result: object) -> str:
    """The line; empty after a dry run, and where the stage looked at no file."""
    path = getattr(config, "path", None)
    template = NEXT[stage]
    if getattr(config, "dry_run", False) or ("{path}" in template and path is None):
        return ""
    values = {"path": path, "result": result, "teacher": getattr(config, "teacher", None)}
    quoted = {name: shlex.quote(str(value)) for name, value in values.items()}
    return "next: " + template.format(shared=_shared(config), **quoted)


def _shared(config: Settings) -> str:
    """The shared settings that are not as they are by default, as they are written."""
    words = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in SHARED or value == field.default:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        words += [] if value is True else [shlex.quote(str(value))]
    return " ".join(words)
