"""A ranking of one's own, held against the built-in ones.

Everything that the criteria are made of is in the statistics: counts and sums of the gate g, the
norm n, and their products. Here: REAP's mean, made careful. An expert that few tokens chose is
judged by the lower end of what its mean may be, so that a lucky one does not stay for its luck.

    python examples/own_criterion.py models/tiny-qwen3-moe
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import reap


def careful(stats):
    """{layer: [E] fp64}: the mean of g*n less two standard errors; 0 without an error."""
    scores, errors = reap.saliency(stats, "reap"), reap.standard_errors(stats, "reap")
    return {name: (score - 2 * errors[name]).nan_to_num(0.0) for name, score in scores.items()}


def plan_by(stats, name, scores, keep):
    """The `keep` experts with the highest scores in every layer. Routers without groups."""
    kept = {
        layer: tuple(sorted(score.argsort(descending=True, stable=True)[:keep].tolist()))
        for layer, score in scores.items()
    }
    return reap.Plan(model=stats.model, criterion=name, seed=0, kept=kept)


def main(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    text = reap.batches("stdlib:code", AutoTokenizer.from_pretrained(folder), max_tokens=8192)
    stats = reap.calibrate(model, text)
    keep = stats.model.layers[0].num_experts // 2
    own = plan_by(stats, "careful", careful(stats), keep)
    for criterion in ("reap", "frequency", "ean"):
        other = reap.make_plan(stats, criterion, keep=keep)
        same = sum(len(set(own.kept[name]) & set(other.kept[name])) for name in own.kept)
        print(f"keeps the same as {criterion}: {same} of {keep * len(own.kept)}")


if __name__ == "__main__":
    main(sys.argv[1])
