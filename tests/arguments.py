"""The kernels' parameters as csrc/cuda declares them, for tests that read what a launch was given.

given(launch).routing.E          # of a launch that tests/cudart.py recorded
"""

import ctypes
from ctypes import Structure, c_bool, c_float, c_int32, c_int64, c_uint64

MAP_BYTES = 128  # of a CUtensorMap, which is aligned to 128


def _struct(name: str, *fields: tuple[str, type]) -> type[Structure]:
    """From (names, type) each."""
    flat = [(each, kind) for names, kind in fields for each in names.split()]
    return type(name, (Structure,), {"_fields_": flat})


Ids = _struct("Ids", ("data", c_uint64), ("wide", c_bool))
Gates = _struct("Gates", ("data", c_uint64), ("dtype", c_int32))
Zero = _struct("Zero", ("data", c_uint64), ("count", c_int64))
Columns = _struct("Columns", ("count up", c_int32))
Gate = _struct("Gate", ("activation", c_int32), ("alpha limit offset", c_float))
Found = _struct("Routing", ("order offsets first_tile tile_expert", c_uint64))
Projection = _struct(
    "Projection",
    ("data bias", c_uint64),
    ("expert_stride row_stride k_stride bias_expert_stride bias_row_stride", c_int64),
    ("columns", Columns),
)
Walk = _struct("Walk", ("E column_tiles slab group", c_int32))
Routing = _struct(
    "RoutingArgs",
    ("ids", Ids),
    ("counts totals order offsets first_tile tile_expert counters", c_uint64),
    ("E S chunk chunks tile_rows launches", c_int32),
)
GateUp = _struct(
    "GateUpArgs",
    ("hidden", c_uint64),
    ("hidden_stride", c_int64),
    ("weights", Projection),
    ("inner", c_uint64),
    ("routing", Found),
    ("gate", Gate),
    ("pairing", c_int32),
    ("walk", Walk),
    ("K H I pitch tiles", c_int32),
    ("zero", Zero),
)
Combine = _struct(
    "Combine",
    ("order", c_uint64),
    ("gates", Gates),
    ("combined partials", c_uint64),
    ("pitch", c_int64),
    ("K S H first_column", c_int32),
    ("deterministic", c_bool),
)
Down = _struct(
    "DownArgs",
    ("inner", c_uint64),
    ("weights", Projection),
    ("routing", Found),
    ("combine", Combine),
    ("walk", Walk),
    ("I inner_pitch", c_int32),
)
Finish = _struct(
    "FinishArgs",
    ("combined partials", c_uint64),
    ("ids", Ids),
    ("order offsets out norms peaks", c_uint64),
    ("pitch", c_int64),
    ("tokens K E H S parts first_column last_column", c_int32),
    ("deterministic", c_bool),
)
KINDS = {
    "route_kernel": Routing,
    "count_kernel": Routing,
    "scan_kernel": Routing,
    "place_kernel": Routing,
    "gate_up_kernel": GateUp,
    "down_kernel": Down,
    "down_pingpong_kernel": Down,
    "finish_kernel": Finish,
}
MAPS = {
    "gate_up_kernel": 1,
    "down_kernel": 2,
    "down_pingpong_kernel": 2,
}  # behind the same in csrc/cuda/sm90


def _maps_at(kind: type[Structure]) -> int:
    """In csrc/cuda/sm90 a counter of tiles comes first."""
    return -(-(ctypes.sizeof(kind) + ctypes.sizeof(c_uint64)) // MAP_BYTES) * MAP_BYTES


def sizes() -> dict[str, int]:
    """What the stub is to copy: kernel -> bytes."""
    general = {f"reap::cuda::{name}": ctypes.sizeof(kind) for name, kind in KINDS.items()}
    hopper = {
        f"reap::cuda::sm90::{form}{name}": _maps_at(KINDS[name]) + count * MAP_BYTES
        for name, count in MAPS.items()
        for form in ("", "swapped::")
    }
    return general | hopper


def _name(launch) -> str:
    return launch.kernel.partition("<")[0].partition("(")[0].rpartition("::")[2]


def given(launch) -> Structure:
    """The parameter of a recorded launch, without tensor maps."""
    return KINDS[_name(launch)].from_buffer_copy(launch.arguments)


def counter(launch) -> int:
    """Of tiles: the address that a launch of csrc/cuda/sm90 was given."""
    at = ctypes.sizeof(KINDS[_name(launch)])
    return int.from_bytes(launch.arguments[at : at + 8], "little")


def maps(launch) -> list[int]:
    """Which of the recorded maps a launch was given."""
    kind = KINDS[_name(launch)]
    first, numbers = _maps_at(kind), []
    for at in range(first, len(launch.arguments), MAP_BYTES):
        numbers.append(int.from_bytes(launch.arguments[at : at + 8], "little"))
    return numbers
