"""How large the experiments are: what a full run takes, and a quick one that only shows they run."""

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
    noise_seeds: int = 8
    seq_len: int = 256
    calibration_tokens: int = 8_192
    evaluation_tokens: int = 2_048
    ratios: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    settling: tuple[int, ...] = (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)
    prompts: int = 64
    scored: int = 16  # of these, whose logits are compared position by position
    prompt_tokens: int = 32
    new_tokens: int = 96
    questions: int = 25
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
    models=("sigmoid",),
    seeds=2,
    noise_seeds=2,
    seq_len=64,
    calibration_tokens=256,
    evaluation_tokens=128,
    ratios=(0.25, 0.5),
    settling=(128, 256),
    prompts=2,
    scored=2,
    prompt_tokens=8,
    new_tokens=8,
    questions=2,
    answer_tokens=4,
)


def digest(folder: Path) -> str:
    """The first digits of the SHA-256 of a model's weights."""
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
