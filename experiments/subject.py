"""A model of `models/` under experiment: calibrated on samples, measured masked and merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from experiments import rows
from experiments.setting import MODELS, Setting
from experiments.texts import DOMAINS
from reap.model.load import load_model, load_tokenizer
from reap.planning.plan import Plan, make_plan
from reap.runs.calibration import calibrate
from reap.runs.evaluation import Evaluation, evaluate
from reap.statistics.stats import Statistics
from reap.text.batching import Batch


class Subject:
    def __init__(self, name: str, setting: Setting) -> None:
        torch.set_num_threads(1)
        self.name = name
        self.setting = setting
        self.folder = MODELS[name]
        self.tokenizer = load_tokenizer(self.folder)
        self.model = load_model(self.folder, dtype="float32", device="cpu")
        self._original: Any = None
        self._samples: dict[tuple[str, int, int | None], Statistics] = {}

    def sample(self, domain: str, seed: int, tokens: int | None = None) -> Statistics:
        """Statistics of one sample of one domain's text, mean outputs included."""
        key = (domain, seed, tokens)
        if key not in self._samples:
            given = self.text(domain, seed, tokens)
            self._samples[key] = calibrate(self.model, given, outputs=True)
        return self._samples[key]

    def text(self, domain: str, seed: int, tokens: int | None = None) -> list[Batch]:
        """The sample itself."""
        tokens = self.setting.calibration_tokens if tokens is None else tokens
        return rows.calibration(self.tokenizer, domain, seed, tokens, self.setting.seq_len)

    @property
    def original(self) -> Any:
        """The model once more, to which nothing is done."""
        if self._original is None:
            self._original = copy.deepcopy(self.model)
        return self._original

    def mix(self, seed: int, domains: Sequence[str] = DOMAINS) -> Statistics:
        """Of a sample with as many tokens of each of these domains."""
        return Statistics.total(self.sample(domain, seed) for domain in domains)

    def plan(self, stats: Statistics, criterion: str, ratio: float, seed: int = 0) -> Plan:
        return make_plan(stats, criterion, ratio=str(ratio), seed=seed)

    def measured(self, plans: Mapping[str, Plan], parts: int = 1) -> dict[str, Any]:
        """{plan: {domain: {"loss": increase, "kl": ...}}} on held-out text, in nats per token."""
        found = evaluate(self.model, self.held_out(parts), plans=plans)
        return {name: increases(by_domain) for name, by_domain in found.items()}

    def held_out(self, parts: int = 1) -> list[Batch]:
        setting = self.setting
        return rows.held_out(self.tokenizer, setting.evaluation_tokens, setting.seq_len, parts)


def increases(by_domain: Mapping[str, Evaluation]) -> dict[str, dict[str, float]]:
    """What a domain's tokens cost more than before, and the divergence from the original."""
    found = {}
    for domain, value in by_domain.items():
        assert value.teacher_loss is not None and value.kl is not None
        found[domain] = {"loss": value.loss - value.teacher_loss, "kl": value.kl}
    return found
