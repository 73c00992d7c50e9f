"""Which tensors of a quantised checkpoint make which weight, by names and shapes alone.

A format is rows: where one names a tensor that holds packed numbers, what lies beside it, under
which names, and what becomes of them. `reap.model.formats` is the table. What is packed, and how,
is told by the tensors themselves, held against what the configuration says; modules that were left
as they are need no list. A tensor of a quantiser that makes no weight is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from reap.errors import ReapError
from reap.files.garbage import uncollected

Entries = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype as safetensors calls it, shape
Decode = Callable[..., Tensor]  # of the parts and the shape

# No floating-point numbers by themselves.
PACKED = {"I8", "U8", "F4", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"}


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight. `parts`: what a tensor is for -> its name; `decode` makes of these tensors the
    weight of this dtype (as safetensors calls it) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    decode: Decode


@dataclass(frozen=True)
class Found:
    """What a row found: the tensor `name` with the packed numbers, `parts` as in `Weight`."""

    weight: str  # its name
    name: str
    parts: Mapping[str, str]
    entries: Entries
    peek: Callable[[str], list[int]] | None  # the numbers in a small tensor, if they can be read

    @property
    def module(self) -> str:
        return self.weight.removesuffix(".weight")

    def dtype(self, part: str = "weight") -> str:
        return self.entries[self.parts[part]][0]

    def shape(self, part: str = "weight") -> tuple[int, ...]:
        return self.entries[self.parts[part]][1]

    def expect(self, part: str, *shapes: tuple[int, ...], dtypes: Iterable[str]) -> None:
        """ReapError for a part of another shape or data type."""
        dtype, shape = self.entries[self.parts[part]]
        if shape not in shapes or dtype not in dtypes:
            wanted = " or ".join(str([*one]) for one in dict.fromkeys(shapes))
            raise ReapError(
                f"{self.parts[part]} is {dtype} {[*shape]}: beside {self.name}, "
                f"{self.dtype()} {[*self.shape()]}, it must be {' or '.join(dtypes)} {wanted}"
            )

    def error(self, what: str) -> ReapError:
        return ReapError(f"{self.name} ({self.dtype()} {[*self.shape()]}) {what}")


Made = tuple[str, tuple[int, ...], Decode]


@dataclass(frozen=True)
class Row:
    """Tensors whose name ends in `suffix`, of one of `dtypes`, are packed numbers of the weight
    whose name has `weight` there. `parts`: what for -> the endings that may stand there instead, of
    which the first counts; a ? behind it marks what may be missing."""

    suffix: str
    weight: str
    dtypes: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    make: Callable[[Found], Made]


@dataclass(frozen=True)
class Format:
    """`said`: for people. The rest are endings of names: `idle` of tensors that no weight needs,
    such as scales of activations, `strays` of those that must belong to a weight."""

    said: str
    rows: tuple[Row, ...]
    idle: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()


@dataclass(frozen=True)
class Packing:
    """Of one checkpoint: the weights that are made of several tensors, by name, and the tensors
    that stay what they are."""

    said: str
    weights: Mapping[str, Weight] = field(repr=False)
    plain: tuple[str, ...] = field(repr=False)

    def entries(self, entries: Entries) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The checkpoint as if it had been saved unpacked."""
        found = {name: entries[name] for name in self.plain}
        return found | {name: (w.dtype, w.shape) for name, w in self.weights.items()}


@uncollected()
def unpacking(
    form: Format, entries: Entries, peek: Callable[[str], list[int]] | None = None
) -> Packing:
    """ReapError, with the name of the tensor, for what is no weight of this format."""
    weights: dict[str, Weight] = {}
    taken: set[str] = set()
    dtypes = {dtype for row in form.rows for dtype in row.dtypes}
    for name, (dtype, _) in entries.items():
        if dtype not in dtypes or name.endswith(form.idle):
            continue
        row = next((r for r in form.rows if dtype in r.dtypes and name.endswith(r.suffix)), None)
        if row is None:
            continue
        weight = name.removesuffix(row.suffix) + row.weight
        parts = {"weight": name, **_parts(row, name, entries)}
        if weight in weights or (weight in entries and weight != name):
            raise ReapError(
                f"{weight} is stored twice, packed as {name} too: leave out one of them"
            )
        made = row.make(Found(weight, name, parts, entries, peek))
        weights[weight] = Weight(weight, made[0], made[1], parts, made[2])
        taken.update(parts.values())
    plain = [name for name in entries if name not in taken and not name.endswith(form.idle)]
    for name in plain:
        dtype, shape = entries[name]
        if name.endswith(form.strays) or dtype in PACKED:
            raise ReapError(
                f"{name} ({dtype} {[*shape]}) belongs to no weight that {form.said} has: a tensor "
                "is missing beside it, or it is of another format"
            )
    return Packing(form.said, weights, tuple(plain))


def _parts(row: Row, name: str, entries: Entries) -> dict[str, str]:
    found: dict[str, str] = {}
    stem = name.removesuffix(row.suffix)
    for part, endings in row.parts.items():
        for ending in endings:
            if stem + ending in entries:
                found[part.removesuffix("?")] = stem + ending
                break
        else:
            if not part.endswith("?"):
                dtype, shape = entries[name]
                raise ReapError(
                    f"{name} ({dtype} {[*shape]}) is packed, and {stem}{endings[0]} is not there: "
                    "the checkpoint is not whole, or of another format than its configuration says"
                )
    return found


def blocks(found: Found, shape: tuple[int, ...], stated: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a matrix of this shape that share one of the scales of `found`; `stated`
    by the configuration, which counts where it fits. ReapError where nothing fits."""
    (n, k), scale = shape[-2:], found.shape("scale")
    if not scale or set(scale) == {1}:
        return n, k
    if len(scale) < len(shape) or len(shape) > 2:
        if scale == shape[:-1]:
            return 1, k
        if len(scale) != len(shape) or scale[:-2] != shape[:-2]:
            raise _no_grid(found, shape)
    rows, columns = scale[-2:]
    if stated is not None and (rows, columns) == (-(-n // stated[0]), -(-k // stated[1])):
        return stated
    if 0 in (rows, columns) or n % rows or k % columns:
        raise _no_grid(found, shape)
    return n // rows, k // columns


def _no_grid(found: Found, shape: tuple[int, ...]) -> ReapError:
    return ReapError(
        f"{found.parts['scale']} is {found.dtype('scale')} {[*found.shape('scale')]}: that is no "
        f"grid of blocks of {found.name}, {[*shape]}"
    )
