"""What quantisation metadata says of single experts, and the same of those that stay.

A config.json and files beside it name modules in lists and tables: by exact name, by part of one,
by a glob or a regular expression; or they go through the experts by position. An entry stands for
the modules of the checkpoint that it matches. Afterwards it must match what became of these, and
nothing else: it stays as it is, or is renumbered, or gives way to a list of names; else it is an
error.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from reap.checkpoint.blocks import MTP, PER_EXPERT, Shapes
from reap.checkpoint.removal import Removal
from reap.checkpoint.surgery import Edit
from reap.errors import ReapError
from reap.files.folder import CONFIG

KEY = re.compile(r"(.*_)?quant(ized|ization)?(_.*)?|compression_config")  # in config.json
# hf_quant_config.json (ModelOpt), quantize_config.json (GPTQ), quant_config.json (AWQ),
# qconfig.json (Neural Compressor), ...
SIDE_FILE = re.compile(r"(?!.*index\.json)[\w.-]*(quant|qconfig)[\w.-]*\.json", re.I)

# Tables and lists whose names are globs (ModelOpt, Quark), or regular expressions (GPTQModel).
GLOBS = {"exclude_modules", "quantized_layers", "exclude", "layer_quant_config"}
REGEXES = {"dynamic"}
# Names within a decoder layer, for all layers alike (GPTQ).
IN_LAYER = "modules_in_block_to_quantize"

PREFIX = re.compile(r"re:|[+-]:")  # of a regular expression, which `re.match` then applies
LITERAL = re.compile(r"[\w.-]+")
# Words and "anything": matches an expert whatever its number is.
ANY_NUMBER = re.compile(r"(re:|[+-]:)?\^?([A-Za-z_-]+|\.\*|\*|\\\.|\.(?=[A-Za-z_*]))*\$?")
# An expert's number in any other notation, "experts[3]" or "experts.0-7" say.
NUMBERED = re.compile(r"experts?[\W_]{1,3}\d", re.I)
ONE_EXPERT = re.compile(r"(?P<head>.*experts\\?\.)(?P<id>\d+)(?!\d)(?P<rest>.*)")
# The same where nothing in it is a pattern but what follows the expert.
ONE_NAME = re.compile(
    r"(re:|[+-]:)?\^?(?P<module>(?:[\w-]|\\?\.)+?)\\?\.experts\\?\.\d+((\\?\.|\$).*)?"
)

Match = Callable[[str], bool]


class _View(NamedTuple):
    """Names of the checkpoint's modules as an entry may have them, before -> after (None: gone)."""

    renamed: Mapping[str, str | None]

    def kept(self, match: Match) -> tuple[set[str], set[str]]:
        """What an entry matches, and what became of it."""
        before = {name for name in self.renamed if match(name)}
        return before, {new for name in before if (new := self.renamed[name]) is not None}

    def matched(self, match: Match) -> set[str]:
        return {name for name in self.renamed.values() if name is not None and match(name)}


@dataclass(frozen=True)
class Renaming:
    """What becomes of the modules of a checkpoint."""

    removals: Sequence[Removal]
    modules: Mapping[str, str | None]  # name before -> after

    @classmethod
    def of(
        cls, removals: Sequence[Removal], shapes: Shapes, edits: Mapping[str, Edit | None]
    ) -> Renaming:
        modules: dict[str, str | None] = {}
        for name in shapes:
            edit = edits.get(name, Edit(name, ()))
            new = edit.name if edit else None
            module = name.rpartition(".")[0]
            if module.endswith("experts"):  # a parameter of all experts is named like a module
                modules[name] = new
            modules[module or name] = new and (new.rpartition(".")[0] or new)
        return cls(removals, modules)

    @cached_property
    def _kept(self) -> dict[str, tuple[int, ...]]:
        return {removal.block.module: removal.kept for removal in self.removals}

    @cached_property
    def _blocks(self) -> set[str]:
        """All modules with experts, also those that are left alone."""
        matches = map(PER_EXPERT.fullmatch, self.modules)
        return {match["module"] for match in matches if match} | set(self._kept)

    @cached_property
    def _views(self) -> tuple[_View, ...]:
        """The names as they are in the files, without the model's prefix, and with one."""

        def shorter(name: str) -> str:
            return name.partition(".")[2] or name

        edits = (str, shorter, "model.{}".format)
        return tuple(
            _View({edit(old): new and edit(new) for old, new in self.modules.items()})
            for edit in edits
        )

    def config(self, config: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
        """A config.json with its quantisation rewritten, at any depth."""
        new = dict(config)
        for key, value in config.items():
            if KEY.fullmatch(key):
                new[key] = self.tree(value, CONFIG, (*path, key))
            elif isinstance(value, dict):
                new[key] = self.config(value, (*path, key))
        return new

    def tree(self, value: Any, file: str, path: tuple[str, ...] = ()) -> Any:
        """Quantisation metadata rewritten; ReapError, naming `file`, for what cannot be."""
        place = _Place(file, path)
        if isinstance(value, dict):
            ids = self._positions(value.values(), place) if _is_numbered(value) else None
            if ids is not None:
                return {str(new): value[str(old)] for new, old in enumerate(ids)}
            if value and place.of_experts and self._is_sparse(value):
                raise place.error("names experts by number")
            return {
                name: self.tree(item, file, (*path, key))
                for key, item in value.items()
                for name in self._entry(key, place)
            }
        if isinstance(value, str) and NUMBERED.search(value):
            raise place.error(f"has {value!r}, which names experts")
        if not isinstance(value, list):
            return value
        if path and path[-1] == IN_LAYER:
            return self._in_layer(value, place)
        if not any(isinstance(item, str) and "." in item for item in value):
            ids = self._positions(value, place)
            if ids is not None:
                return [value[i] for i in ids]
            if value and place.of_experts and all(type(item) is int for item in value):
                raise place.error("names experts by number")
        new: list[Any] = []
        for i, item in enumerate(value):
            if isinstance(item, str):
                new += self._entry(item, place)
            else:
                new.append(self.tree(item, file, (*path, str(i))))
        return new

    def _is_sparse(self, value: Mapping[str, Any]) -> bool:
        """Whether it has some experts by number; not so layers, with an entry per expert each."""
        totals = {removal.total for removal in self.removals}
        whole = (isinstance(one, list | dict) and len(one) in totals for one in value.values())
        return all(key.isdigit() for key in value) and not all(whole)

    def _positions(self, value: Collection[Any], place: _Place) -> tuple[int, ...] | None:
        """The ids that stay of what has an entry per expert; None for what has not."""
        steps = [step for key in ("", *place.path) for step in key.split(".")]
        numbers = {int(step) for step in steps if step.isdigit()}
        layers = [r for r in self.removals if r.block.number in numbers] or self.removals
        found = [r for r in layers if r.total == len(value) and (r.total > 2 or place.of_experts)]
        if not found or "layer" in steps[-1]:
            return None
        if all(isinstance(v, list | dict) and len(v) == len(value) for v in value):
            return None  # of layers, as many as a layer has experts: these are in its entries
        depth = max(r.block.number for r in self.removals) + 1
        told = place.of_experts or layers is not self.removals
        if not told and len(value) == depth:
            return None  # an entry per layer
        kept = {r.kept for r in found}
        if not told or len(kept) > 1 or len(found) < len(layers):
            raise place.error(
                f"has {len(value)} entries, as many as there are experts, and does not say of "
                "which layer they are"
            )
        return kept.pop()

    def _entry(self, entry: str, place: _Place) -> list[str]:
        """What stands where `entry` stood: its new text, names, or nothing if all of it is gone."""
        if ANY_NUMBER.fullmatch(entry):
            return [entry]
        if LITERAL.fullmatch(entry):
            exact = PER_EXPERT.fullmatch(entry)
            ids = self._ids(exact["module"]) if exact else None
            if exact and ids is not None:
                old, rest = int(exact["id"]), exact["rest"] or ""
                return [f"{exact['module']}.experts.{ids.index(old)}{rest}"] if old in ids else []
            if exact and exact["module"] in self._blocks:
                return [entry] if self.modules.get(entry, entry) is not None else []
            if not NUMBERED.search(entry):
                return [entry]
        for view in self._views:
            told = self._by_match(entry, view, place)
            if told is not None:
                return told
        return self._by_name(entry, place)

    def _by_match(self, entry: str, view: _View, place: _Place) -> list[str] | None:
        """The same as `_entry` for an entry that matches experts in this view, else None."""
        readings = []
        for read in _readings(entry, place.path):
            before, after = view.kept(read(entry))
            if before:
                readings.append((read, before, after))
        if not any(PER_EXPERT.fullmatch(name) for _, before, _ in readings for name in before):
            return None

        if not any(after for _, _, after in readings):
            return []

        def fits(new: str) -> bool:
            return all(view.matched(read(new)) == after for read, _, after in readings)

        if fits(entry):
            return [entry]
        one = ONE_EXPERT.fullmatch(entry)
        if one:
            experts = {
                (match["module"], int(match["id"]))
                for _, before, _ in readings
                for name in before
                if (match := PER_EXPERT.fullmatch(name))
            }
            kept = [(self._ids(module), old) for module, old in experts]
            ids = {ids.index(old) if ids and old in ids else None for ids, old in kept}
            if len(ids) == 1 and {old for _, old in experts} == {int(one["id"])}:
                (new,) = ids
                renumbered = f"{one['head']}{new}{one['rest']}"
                if new is not None and fits(renumbered):
                    return [renumbered]
        wanted = readings[0][2]
        if any(after != wanted for _, _, after in readings):
            raise place.error(f"has {entry!r}, which can be read in two ways")
        prefix = PREFIX.match(entry)
        if place.path[-1:] and place.path[-1] in REGEXES:
            mark = prefix[0] if prefix else ""
            return [f"{mark}^{re.escape(name)}$" for name in sorted(wanted)]
        return sorted(wanted)

    def _by_name(self, entry: str, place: _Place) -> list[str]:
        """The same for an entry that matches nothing and is a name under another prefix."""
        named, one = ONE_NAME.fullmatch(entry), ONE_EXPERT.fullmatch(entry)
        ids = self._ids(named["module"].replace("\\", "")) if named else None
        if ids is None or not one:
            if not named and NUMBERED.search(entry):
                raise place.error(f"has {entry!r}, which names experts")
            return [entry]
        old = int(one["id"])
        return [f"{one['head']}{ids.index(old)}{one['rest']}"] if old in ids else []

    def _ids(self, module: str) -> tuple[int, ...] | None:
        """The experts that stay of the block with this name, which may have another prefix."""
        if module in self._kept:
            return self._kept[module]
        if module in self._blocks or any(map(MTP.match, module.split("."))):
            return None
        end = re.search(r"[^.]+\.\d+(\.|$).*", module)
        found = [m for m in self._kept if end and f".{m}".endswith(f".{end[0]}")]
        return self._kept[found[0]] if len(found) == 1 else None

    def _in_layer(self, value: list[Any], place: _Place) -> list[Any]:
        """Groups of names within a layer: those that name nothing any more are taken out."""
        view = self._views[0]
        listed = set(_strings(value))
        left = {end for name in view.renamed.values() if name for end in _ends(name)}
        found, wanted = view.kept(lambda name: any(end in listed for end in _ends(name)))
        known = {end for name in found for end in _ends(name)}
        stays = {name for name in listed if name in left or name not in known}
        if view.matched(lambda name: any(end in stays for end in _ends(name))) != wanted:
            raise place.error("names some experts for all layers alike, which keep different ones")

        def filtered(items: list[Any]) -> list[Any]:
            new = [filtered(i) if isinstance(i, list) else i for i in items]
            return [i for i in new if (i if isinstance(i, list) else i in stays)]

        return filtered(value)


@dataclass(frozen=True)
class _Place:
    """Where an entry is, for messages."""

    file: str
    path: tuple[str, ...]

    @property
    def of_experts(self) -> bool:
        """Whether this is under a name such as "experts"."""
        return any("expert" in key.lower() for key in self.path)

    def error(self, what: str) -> ReapError:
        return ReapError(
            f"{self.file}: {'.'.join(self.path) or 'it'} {what}: what would be left after pruning "
            "cannot be told; write it as a list of full module names first"
        )


def _readings(entry: str, path: tuple[str, ...]) -> Iterator[Callable[[str], Match]]:
    """The ways in which programs may read an entry."""
    if PREFIX.match(entry) or any(key in REGEXES for key in path):
        yield _regex
    elif LITERAL.fullmatch(entry):
        yield lambda text: lambda name: text in name
        yield lambda text: lambda name: name.startswith(text)
        yield lambda text: lambda name: name.endswith(text)
    else:
        yield lambda text: lambda name: fnmatch.fnmatchcase(name, text)
        if not any(key in GLOBS for key in path):
            yield _regex


def _regex(text: str) -> Match:
    try:
        pattern = re.compile(PREFIX.sub("", text, count=1))
    except re.error:
        return lambda name: False
    return lambda name: pattern.match(name) is not None


def _is_numbered(value: Mapping[str, Any]) -> bool:
    return set(value) == {str(i) for i in range(len(value))}


def _strings(value: Iterable[Any]) -> Iterator[str]:
    for item in value:
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            yield from _strings(item)


def _ends(name: str) -> Iterator[str]:
    """A name and what is left of it without its first parts."""
    while name:
        yield name
        name = name.partition(".")[2]
