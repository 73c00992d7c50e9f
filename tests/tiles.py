"""Cases that fill, part-fill and overflow the tiles of csrc/cuda."""

from itertools import product
from typing import Any

import cases
from cases import Case

# Sizes in multiples of 8, so that cp.async copies all operands: two column tiles, of which the
# second is nearly empty; slices along k that end early; row tiles that are full, part full and
# several per expert. Each number of rows that a tile can have, and each place of gate and up.
ROWS: dict[int, dict[str, Any]] = {
    32: {"T": 45, "K": 3, "E": 7, "H": 136, "I": 72},
    64: {"T": 70, "K": 4, "E": 5, "H": 200, "I": 72},
    128: {"T": 150, "K": 3, "E": 3, "H": 136, "I": 136},
}
ALIGNED = [
    Case(
        f"{rows} rows {layout.why}",
        gated=layout.gated,
        interleaved=layout.interleaved,
        transposed=layout.transposed,
        bias=layout.bias,
        routing="some_sentinels" if layout.bias else "half_the_experts",
        **sizes,
    )
    for (rows, sizes), layout in product(ROWS.items(), cases.LAYOUTS)
]
# The one expert's last tile is partly empty and ends where all arrays of positions end.
LAST = [Case(f"{name} ends with its arrays", E=1, K=1, T=sizes["T"], H=64, I=64)
        for name, sizes in ROWS.items()]  # fmt: skip
