"""Layers of real models, and what one call of such a layer must compute and move.

Letters: T tokens, K experts per token, S = T*K slots, E experts, H hidden size, I inner size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

BYTES = {"bf16": 2, "fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class Shape:
    """One MoE layer. `of` is the E of the real model where this one has fewer experts."""

    name: str
    E: int
    K: int
    H: int
    I: int  # noqa: E741
    of: int | None = None
    own: bool = False  # gpt-oss's own layout, activation and biases; else SwiGLU without bias

    def __str__(self) -> str:
        scaled = f"(of {self.of})" if self.of else ""
        return f"{self.name} E{self.E}{scaled} K{self.K} H{self.H} I{self.I}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        pattern = r"(\S+) E(\d+)(?:\(of (\d+)\))? K(\d+) H(\d+) I(\d+)"
        if not (found := re.fullmatch(pattern, text)):
            raise ValueError(f"{text!r} is not the text of a Shape")
        name, e, of, *rest = found.groups()
        k, h, i = map(int, rest)
        return cls(name, int(e), k, h, i, int(of) if of else None)

    def flops(self, T: int) -> int:
        """2 per multiply-add of the three projections of every slot: 2 * S * 3HI."""
        return 2 * T * self.K * 3 * self.H * self.I

    def weight_bytes(self, dtype: str) -> int:
        return self.E * 3 * self.H * self.I * BYTES[dtype]

    def floor_bytes(self, T: int, dtype: str) -> float:
        """The least a layer can move: the weights of each expert with a token once, [T,H] in, out.

        Uniform routing over E hits E * (1 - (1 - K/E)^T) experts on average.
        """
        hit = 1 - (1 - self.K / self.E) ** T
        return self.weight_bytes(dtype) * hit + 2 * T * self.H * BYTES[dtype]

    def intensity(self, T: int, dtype: str) -> float:
        """FLOP per byte at the floor."""
        return self.flops(T) / self.floor_bytes(T, dtype)

    def fit(self, dtype: str, budget: int) -> Shape | None:
        """This layer with E halved until its weights are at most `budget` bytes; None if K > E."""
        shape = self
        while shape.weight_bytes(dtype) > budget:
            shape = replace(shape, E=shape.E // 2, of=self.of or self.E)
            if shape.E < shape.K:
                return None
        return shape


REAL = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
        Shape("qwen3-coder-480b", 160, 8, 6144, 2560),
        Shape("glm-4.5-air", 128, 8, 4096, 1408),
        Shape("glm-4.6", 160, 8, 5120, 1536),
        Shape("kimi-k2", 384, 8, 7168, 2048),
        Shape("deepseek-v3", 256, 8, 7168, 2048),
        Shape("minimax-m2", 256, 8, 3072, 1536),
        Shape("gpt-oss-120b", 128, 4, 2880, 2880),
        Shape("gpt-oss-120b-own", 128, 4, 2880, 2880, own=True),
        Shape("llama-4-scout", 16, 1, 5120, 8192),
        Shape("mixtral-8x7b", 8, 2, 4096, 14336),
        Shape("olmoe", 64, 8, 2048, 1024),
        Shape("qwen3-next", 512, 10, 2048, 512),
    )
}
TINY = Shape("tiny", 8, 2, 64, 48)
