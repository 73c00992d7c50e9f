"""Sufficient statistics of one MoE layer, per expert, as exact sums.

    S_j = 1/|X_j| * sum over x in X_j of g_j(x) * ||f_j(x)||      (arXiv 2510.13999, eq. 9)

needs `weighted_sum` and `count`; the other fields serve the other criteria and their standard
errors. g is the gate of a slot, n = ||f(x)|| its norm. Each addend is computed in fp64: n, n*n and
the applied g*n are exact for fp32 inputs, (g*n)**2 and renormalised gates are rounded once, on
their own. The sums of these addends are exact, so every order and every partition of the tokens
gives the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.statistics.exact import ExactSum, in_range
from reap.statistics.gates import check_gates, read_gates
from reap.statistics.lazyrows import LazyRows
from reap.statistics.logitsums import FIELD as LOGITS
from reap.statistics.logitsums import LogitSums, cells
from reap.statistics.pairs import Pairs
from reap.statistics.setcounts import FIELDS as SETS
from reap.statistics.setcounts import Coalitions, SetCounts, check_coalitions
from reap.statistics.slots import check_slots
from reap.statistics.slotsums import SlotSums
from reap_kernels import triton

SUMS = ("gate_sum", "norm_sum", "norm_sq_sum", "weighted_sum", "weighted_sq_sum")
PAIRS = ("pair_count", "pair_sums")
KINDS = ("pairs", "outputs", "coalitions", "logits")  # what is optional; of both, where two add up
# Slots at a time. On a CPU few enough for torch to stay on one thread: beside a model's own
# threads, waking others costs more than the sum. On a device few enough to bound temporaries.
_CPU_SLOTS = 6_400
_DEVICE_SLOTS = 1 << 20


class LayerStatistics:
    """Counts and exact sums over the slots of one MoE layer, per expert.

    Read as properties, on the CPU: `tokens` int; `count` [E] int64; `gate_sum` (of g), `norm_sum`
    (n), `norm_sq_sum` (n^2), `weighted_sum` (g*n), `weighted_sq_sum` ((g*n)^2), each [E] fp64 and
    rounded once; `peak` [E] fp32, the largest max |f(x)|. With `pairs`, over the unordered pairs of
    slots of one token that chose two different experts: `coselected` [E,E] int64 and `coweighted`
    [E,E] fp64 (g_i n_i g_j n_j), symmetric; their diagonals are `count` and `weighted_sq_sum`.
    Without: None.

    With `outputs`, sums of whole vectors over the expert's slots: `output_sum` (of f(x)) and
    `gated_output_sum` (g*f(x)), each [E,H] fp64; `channel_sum` and `gated_channel_sum`, the same of
    the inner activation h = act(gate x) * up x, [E,I] fp64, None where experts ran as they are and
    did not show it. All four are None without `outputs` and before the first token. They
    are exact sums of what the calls brought, in units of 2**-62; what a call brings is rounded
    (see `reap_kernels.moe_saliency_sums`), so calls cut otherwise give other last bits.

    With `coalitions`, a number: `chosen`, which sets of experts tokens chose, at most so many of
    them (`Coalitions`; see its `level`). With `logits`, over the tokens that counted, of the
    router's logits before any softmax or sigmoid, rounded to multiples of 2**-18: `logit_sum` [E]
    and `logit_products` (of l_i l_j) [E,E] fp64, None where the router does not show them. Both
    are exact, as the first sums are.

    Memory: 840 bytes per expert; `outputs` adds 32 bytes per expert and column, E*(H+I) of them
    (12 MB at E = 128, H = 2048, I = 768); `pairs` adds 168 bytes per pair of experts,
    E*(E-1)/2 of them (1.4 MB at E = 128, 22 MB at E = 512), `logits` 16 (2 MB at E = 512);
    `coalitions` 4*K + 8 bytes per set (2.6 MB for 65,536 of 8).
    """

    def __init__(
        self,
        num_experts: int,
        *,
        name: str = "",
        gates: str = "applied",
        pairs: bool = False,
        outputs: bool = False,
        coalitions: int = 0,
        logits: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        check_gates(gates)
        check_coalitions(coalitions)
        self.num_experts = num_experts
        self.name = name
        self.gates = gates
        self.device = torch.device(device)
        self._slot_sums = SlotSums(num_experts, self.device) if outputs else None
        self._sets = SetCounts(num_experts, coalitions, self.device) if coalitions else None
        self._logits = LogitSums(num_experts, self.device) if logits else None
        # Statistics outlive an inference mode that they may be collected in.
        with torch.inference_mode(False):
            self._allocate(pairs)
        self._fused = self.device.type == "cuda" and triton.available() is None

    def _allocate(self, pairs: bool) -> None:
        E, device = self.num_experts, self.device
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self._count = torch.zeros(E, dtype=torch.int64, device=device)
        self._peak = torch.zeros(E, dtype=torch.float32, device=device)
        self._sums = ExactSum(len(SUMS) * E, device)  # [5*E], one quantity after another
        self._first_cells = torch.arange(0, len(SUMS) * E, E, device=device)[:, None]
        self._pairs = Pairs(E, device) if pairs else None
        # Slots per expert that cannot be summed, then slots with a negative id. Kept on the device,
        # so that a GPU need not stop at every layer; `check` turns them into an error.
        self._faults = torch.zeros(E + 1, dtype=torch.int64, device=device)

    def __repr__(self) -> str:
        return (
            f"<LayerStatistics of {self.name}: {self.num_experts} experts, {self.tokens:,} tokens>"
        )

    @property
    def pairs(self) -> bool:
        return self._pairs is not None

    @property
    def outputs(self) -> bool:
        return self._slot_sums is not None

    @property
    def coalitions(self) -> int:
        """How many sets may be kept; 0: none are recorded."""
        return 0 if self._sets is None else self._sets.limit

    @property
    def logits(self) -> bool:
        return self._logits is not None

    @torch.no_grad()
    def update(
        self,
        top_k_index: Tensor,  # [T,K] int64
        top_k_weights: Tensor,  # [T,K] float
        norms: Tensor,  # [T,K] fp32
        peaks: Tensor,  # [T,K] fp32
        mask: Tensor | None = None,  # [T] bool, True: count this token
        *,
        output_sums: Tensor | None = None,  # over the slots that count [2,E,H] fp32 or fp64
        channel_sums: Tensor | None = None,  # [2,E,I] fp32 or fp64; None: not known
        logits: Tensor | None = None,  # [T,E] float; None: not known
    ) -> None:
        """Add the slots of T tokens, with `outputs` their sums, of which the second has the gates
        as weights, and with `logits` those of the router.

        Slots with an id >= E (expert parallelism's sentinel, no choice of the router) are left out.
        All others count, whatever their gate: one that was rounded to zero was chosen all the same.
        With gates="renormalized" a gate is the weight divided by the sum over the token's K slots,
        and 0 where the weights sum to zero.

        ReapError for wrong shapes or dtypes, and for a gate, norm or peak that is NaN, infinite or
        too large (g*n >= 2**144): at once on a CPU, at the next read or `check` on other devices.
        """
        check_slots(top_k_index, top_k_weights, norms, peaks, mask)
        if self._slot_sums is not None:
            if output_sums is None:
                raise ReapError(
                    f"layer {self.name}: outputs are recorded: update needs output_sums"
                )
            self._slot_sums.add(self.name, output_sums, channel_sums)
        if self._logits is not None:
            self._logits.add(self.name, logits, mask)
        if self._sets is not None:
            self._sets.add(top_k_index, mask)
        tokens, K = top_k_index.shape
        if self._fused:
            self._launch(top_k_index, top_k_weights, norms, peaks, mask)
            return
        rows = max(1, (_CPU_SLOTS if self.device.type == "cpu" else _DEVICE_SLOTS) // max(1, K))
        columns = (top_k_index, top_k_weights, norms, peaks, mask)
        for start in range(0, tokens, rows):
            some = slice(start, start + rows) if tokens > rows else None
            self._add(*(self._here(column, some) for column in columns))
        if self.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """ReapError naming the layer and the expert if a slot so far could not be summed."""
        faults = self._faults.tolist()
        if not any(faults):
            for sums in (self._slot_sums, self._logits):
                if sums is not None:
                    sums.check(self.name)
            return
        if faults[-1]:
            raise ReapError(
                f"layer {self.name}: {faults[-1]} slots have a negative expert id: "
                "the router is broken"
            )
        for expert, slots in enumerate(faults):
            if slots:
                raise ReapError(
                    f"layer {self.name}, expert {expert}: norm, peak or gate is NaN, infinite, "
                    f"negative or too large in {slots} slots: check the model's weights and dtype"
                )

    @property
    def tokens(self) -> int:
        self.check()
        return int(self._tokens)

    @property
    def count(self) -> Tensor:
        self.check()
        return self._count.cpu().clone()

    @property
    def peak(self) -> Tensor:
        self.check()
        return self._peak.cpu().clone()

    @property
    def gate_sum(self) -> Tensor:
        return self._read("gate_sum")

    @property
    def norm_sum(self) -> Tensor:
        return self._read("norm_sum")

    @property
    def norm_sq_sum(self) -> Tensor:
        return self._read("norm_sq_sum")

    @property
    def weighted_sum(self) -> Tensor:
        return self._read("weighted_sum")

    @property
    def weighted_sq_sum(self) -> Tensor:
        return self._read("weighted_sq_sum")

    @property
    def coselected(self) -> Tensor | None:
        return None if self._pairs is None else self._pairs.square(self._pairs.count, self.count)

    @property
    def coweighted(self) -> Tensor | None:
        if self._pairs is None:
            return None
        return self._pairs.square(self._pairs.sums.read(), self.weighted_sq_sum)

    @property
    def output_sum(self) -> Tensor | None:
        return self._vectors("output_sums", 0)

    @property
    def gated_output_sum(self) -> Tensor | None:
        return self._vectors("output_sums", 1)

    @property
    def channel_sum(self) -> Tensor | None:
        return self._vectors("channel_sums", 0)

    @property
    def gated_channel_sum(self) -> Tensor | None:
        return self._vectors("channel_sums", 1)

    @property
    def chosen(self) -> Coalitions | None:
        self.check()
        return None if self._sets is None else self._sets.read()

    @property
    def logit_sum(self) -> Tensor | None:
        products = self._logit_square()
        return None if products is None else products[:-1, -1].clone()

    @property
    def logit_products(self) -> Tensor | None:
        products = self._logit_square()
        return None if products is None else products[:-1, :-1].clone()

    def _logit_square(self) -> Tensor | None:
        self.check()
        return None if self._logits is None else self._logits.read()

    def exact(self, field: str) -> list[int]:
        """The E sums of `field`, one of SUMS, as integers in units of 2**-320: nothing rounded."""
        self.check()
        return self._sums.integers(self._cells(field))

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """The statistics of both, on the CPU. ReapError when they differ in layer or kind."""
        total = LayerStatistics(
            self.num_experts,
            name=self.name,
            gates=self.gates,
            pairs=self.pairs,
            outputs=self.outputs,
            coalitions=self.coalitions,
            logits=self.logits,
        )
        for part in (self, other):
            total.merge(part)
        return total

    def called(self, name: str) -> LayerStatistics:
        """These, not a copy of them, by another name."""
        if name == self.name:
            return self
        other = copy.copy(self)
        other.name = name
        return other

    def merge(self, other: LayerStatistics) -> None:
        """Add `other` to these. ReapError when they differ in layer or kind."""
        for field in ("name", "num_experts", "gates", *KINDS):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise ReapError(f"cannot add layer statistics: {field} {mine!r} against {theirs!r}")
        other.check()
        self._tokens += other._tokens.to(self.device)
        self._count += other._count.to(self.device)
        self._peak = torch.maximum(self._peak, other._peak.to(self.device))
        self._sums.merge(other._sums)
        if self._pairs is not None and other._pairs is not None:
            self._pairs.merge(other._pairs)
        if self._slot_sums is not None and other._slot_sums is not None:
            self._slot_sums.merge(other._slot_sums, self.name)
        if self._sets is not None and other._sets is not None:
            self._sets.merge(other._sets)
        if self._logits is not None and other._logits is not None:
            self._logits.merge(other._logits)

    def __eq__(self, other: object) -> bool:
        """Whether both are of the same layer and kind and every exact sum is the same."""
        if not isinstance(other, LayerStatistics):
            return NotImplemented
        kind = (self.name, self.num_experts, self.gates)
        mine, theirs = self.tensors(), other.tensors()
        return (
            kind == (other.name, other.num_experts, other.gates)
            and mine.keys() == theirs.keys()
            and all(torch.equal(mine[field], theirs[field]) for field in mine)
        )

    __hash__ = None  # type: ignore[assignment]

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, exact and canonical, as CPU tensors: what a file stores.

        "tokens" [1], "count" [E], "pair_count" [E*(E-1)/2] int64; "peak" [E] fp32; each of SUMS
        [E,20] and "pair_sums" [E*(E-1)/2, 20] int32, a row being one little-endian two's complement
        integer in units of 2**-320. The pair of experts i < j is at j*(j-1)/2 + i. "output_sums"
        [E,2,2,H] and "channel_sums" [E,2,2,I] int64: of each expert wholes and fractions in units
        of 2**-62, each of the plain and of the gated sum; "logit_products" [(E+1)*(E+2)/2, 2] int64
        so too, of i <= j at j*(j+1)/2 + i, E standing for a logit of one. "coalition_sets" [N,w]
        int32, "coalition_count" [N] and "coalition_about" [2] (level, tokens) int64 are those of
        `Coalitions`.
        """
        fields = ("tokens", "count", "peak", *SUMS, *(PAIRS if self.pairs else ()), *self.widths)
        fields += tuple(self.varying)
        return {field: self.tensor(field).clone() for field in fields}

    @property
    def widths(self) -> dict[str, int]:
        """Of the sums of vectors that are known, by their field: the columns."""
        return {} if self._slot_sums is None else dict(self._slot_sums.tensors())

    @property
    def varying(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of coalitions and logits that are known, by their field: dtype and shape in a file."""
        found = {} if self._sets is None else self._sets.shapes()
        if self._logits is not None and not self._logits.lost:
            found[LOGITS] = ("I64", (cells(self.num_experts), 2))
        return found

    def tensor(self, field: str) -> Tensor:
        """One of `tensors`, not to be written to."""
        self.check()
        if self._logits is not None and field == LOGITS:
            return self._logits.tensor()
        if self._sets is not None and field in SETS:
            return self._sets.tensor(field)
        if field in SUMS:
            return self._sums.canonical(self._cells(field))
        if self._pairs is not None and field in PAIRS:
            return self._pairs.count if field == "pair_count" else self._pairs.sums.canonical()
        if self._slot_sums is not None and field in self.widths:
            return self._slot_sums.tensor(field)
        return {"tokens": self._tokens, "count": self._count, "peak": self._peak}[field].cpu()

    @classmethod
    def from_tensors(
        cls,
        state: Mapping[str, Tensor | LazyRows],
        *,
        name: str,
        gates: str,
        outputs: bool = False,
        coalitions: int = 0,
        logits: bool = False,
    ) -> LayerStatistics:
        """The inverse of `tensors`, for a state that has been validated. What is stored of pairs,
        vectors, coalitions and logits is read when it is asked for."""
        self = cls(len(state["count"]), name=name, gates=gates, outputs=outputs)
        self._tokens = state["tokens"][:].clone()
        self._count = state["count"][:].clone()
        self._peak = state["peak"][:].clone()
        self._sums = ExactSum.from_canonical(torch.cat([state[field][:] for field in SUMS]))
        if "pair_sums" in state:
            both = (state[field] for field in ("pair_count", "pair_sums"))
            kept = (x if isinstance(x, LazyRows) else x.clone() for x in both)
            self._pairs = Pairs.of(self.num_experts, *kept)
        if outputs:
            self._slot_sums = SlotSums.of(self.num_experts, state)
        if coalitions:
            self._sets = SetCounts.of(self.num_experts, coalitions, state)
        if logits:
            self._logits = LogitSums.of(self.num_experts, state.get(LOGITS))
        return self

    def _here(self, column: Tensor | None, rows: slice | None) -> Tensor | None:
        """These rows of it, on this device; None: all."""
        if column is None:
            return None
        return (column if rows is None else column[rows]).to(self.device)

    def _add(
        self, expert: Tensor, weights: Tensor, norms: Tensor, peak: Tensor, mask: Tensor | None
    ) -> None:
        """Add the slots of a few tokens: [T,K] four times and [T], on this device."""
        expert, peak = expert.long(), peak.float()
        gate, norm = read_gates(weights.double(), self.gates), norms.double()
        counted = expert < self.num_experts  # [T,K] bool
        if mask is not None:
            counted &= mask[:, None]
        self._tokens += len(expert) if mask is None else mask.sum()

        weighted = gate * norm
        # In the order of SUMS, [5,T,K] fp64
        values = torch.stack([gate, norm, norm * norm, weighted, weighted * weighted])
        summable = in_range(values).all(0) & (norm >= 0) & (expert >= 0)
        summable &= (peak >= 0) & (peak < torch.inf)
        self._note_faults(expert, counted & ~summable)
        counted &= summable

        # Shapes must not depend on data on a GPU: what is left out is added as zero to expert 0.
        expert = torch.where(counted, expert, 0)
        values = torch.where(counted, values, 0.0)
        self._count.index_add_(0, expert.flatten(), counted.flatten().long())
        peak = torch.where(counted, peak, 0.0)
        self._peak.scatter_reduce_(0, expert.flatten(), peak.flatten(), "amax")
        cell = self._first_cells + expert.flatten()  # [5,S] int64
        self._sums.add(cell.flatten(), values.flatten())
        if self._pairs is not None:
            self._pairs.add(expert, values[SUMS.index("weighted_sum")], counted)

    def _launch(
        self, expert: Tensor, weights: Tensor, norms: Tensor, peak: Tensor, mask: Tensor | None
    ) -> None:
        """What `_add` does, in one launch of a kernel that gives the same bits."""
        from reap_kernels.triton import statistics

        S, K = expert.numel(), expert.shape[1]
        limbs = self._sums.limbs(S)
        statistics.accumulate(
            tuple(column.to(self.device) for column in (expert, weights, norms, peak)),
            None if mask is None else mask.to(self.device),
            statistics.Accumulators(
                self._tokens,
                self._count,
                self._peak,
                limbs,
                self._faults,
                None if self._pairs is None else self._pairs.live_count,
                None if self._pairs is None else self._pairs.sums.limbs(S * K),
            ),
            renormalized=self.gates == "renormalized",
        )

    def _note_faults(self, expert: Tensor, fault: Tensor) -> None:
        place = torch.where(expert < 0, self.num_experts, expert)
        place = torch.where(fault, place, 0)
        self._faults.index_add_(0, place.flatten(), fault.flatten().long())

    def _read(self, field: str) -> Tensor:
        self.check()
        return self._sums.read(self._cells(field))

    def _vectors(self, field: str, gated: int) -> Tensor | None:
        self.check()
        both = None if self._slot_sums is None else self._slot_sums.read(field)
        return None if both is None else both[gated].contiguous()

    def _cells(self, field: str) -> slice:
        first = SUMS.index(field) * self.num_experts
        return slice(first, first + self.num_experts)


def any_faults(parts: list[LayerStatistics]) -> bool:
    """Whether a slot could not be summed in any of these, which are on one device. Waits for it."""
    faulty = [
        sums.faulty.long()
        for part in parts
        for sums in (part._slot_sums, part._logits)
        if sums is not None
    ]
    noted = [part._faults for part in parts] + faulty
    return bool(torch.cat(noted).any())
