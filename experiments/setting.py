"""How large the experiments are: a full run, and a quick one that only shows that they run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from reap.planning.criteria import CRITERIA

ROOT = Path(__file__).resolve().parent.parent
MODELS = {name: ROOT / "models" / f"tiny-{name}-moe" for name in ("softmax", "sigmoid")}
RANKED = tuple(name for name in CRITERIA if name != "random")
MAIN = ("reap", "ean", "frequency")  # those of the paper's tables


@dataclass(frozen=True)
class Setting:
    """A seed is another sample of calibration text; what is measured on is the same for all, but
    for prompts and questions. Tokens, rows, prompts and questions are per domain."""

    models: tuple[str, ...] = tuple(MODELS)
    seeds: int = 4
    noise_seeds: int = 6
    seq_len: int = 256
    calibration_tokens: int = 4_096
    evaluation_tokens: int = 1_024
    ratios: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75)
    settling: tuple[int, ...] = (256, 512, 1_024, 2_048, 4_096, 8_192)
    prompts: int = 32
    scored: int = 8  # of these, whose logits are compared position by position
    prompt_tokens: int = 32
    new_tokens: int = 64
    questions: int = 16
    answer_tokens: int = 8

    @property
    def rows(self) -> int:
        """Held-out rows per domain."""
        return self.evaluation_tokens // self.seq_len

    def to_json(self) -> dict[str, Any]:
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return given | {"weights": {name: digest(MODELS[name]) for name in self.models}}


FULL = Setting()
QUICK = replace(
    FULL,
    models=("softmax",),
    seeds=1,
    noise_seeds=2,
    seq_len=32,
    calibration_tokens=128,
    evaluation_tokens=32,
    ratios=(0.25, 0.5),
    settling=(64, 128),
    prompts=1,
    scored=1,
    prompt_tokens=8,
    new_tokens=8,
    questions=2,
    answer_tokens=4,
)


def digest(folder: Path) -> str:
    """The first digits of the SHA-256 of a model's weights."""
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
