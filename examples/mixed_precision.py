"""Which experts a quantiser should give more bits.

The error that quantising an expert brings into the layer's output grows with what the expert adds
to it: over a text that is the sum of g*n, the criterion `weighted_ean`. Given a budget of bits per
weight, the experts that add most get the wider format.

    python examples/mixed_precision.py models/tiny-qwen3-moe
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import reap

WIDE, NARROW = 8, 4  # bits per weight


def formats(scores, budget):
    """{layer: [bits]}: WIDE for the largest shares of all layers' scores, so that the mean is at
    most `budget` bits. A score counts as its share of the layer, since layers differ in scale."""
    shares = [
        (float(share), name, expert)
        for name, score in scores.items()
        for expert, share in enumerate(score / score.sum())
    ]
    wide = int(len(shares) * (budget - NARROW) / (WIDE - NARROW))
    bits = {name: [NARROW] * len(score) for name, score in scores.items()}
    for _, name, expert in sorted(shares, reverse=True)[:wide]:
        bits[name][expert] = WIDE
    return bits


def main(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    text = reap.batches("stdlib:code", AutoTokenizer.from_pretrained(folder), max_tokens=8192)
    stats = reap.calibrate(model, text)
    bits = formats(reap.saliency(stats, "weighted_ean"), budget=5)
    every = [each for layer in bits.values() for each in layer]
    assert sum(every) / len(every) <= 5
    for name, row in bits.items():
        print(f"{name}: " + " ".join(map(str, row)))
    few = [e for name in stats.layers for e in stats.layer(name).count.tolist() if e < 100]
    print(
        f"{len(few)} experts saw fewer than 100 tokens: a quantiser's calibration misses them too"
    )


if __name__ == "__main__":
    main(sys.argv[1])
