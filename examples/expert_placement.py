"""Which experts an offloader keeps in fast memory, and how to spread experts over devices.

Traffic is the share of tokens that need an expert; two experts that the same tokens choose make one
device wait for itself when they lie on it. Both are in statistics with `pairs`.

    python examples/expert_placement.py models/tiny-qwen3-moe
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import reap

DEVICES, RESIDENT = 2, 4  # devices; experts per layer that stay in fast memory


def resident(layer):
    """The RESIDENT busiest experts, and the share of all choices that finds its expert there."""
    hot = layer.count.argsort(descending=True, stable=True)[:RESIDENT]
    return sorted(hot.tolist()), float(layer.count[hot].sum() / layer.count.sum())


def spread(layer):
    """Experts -> DEVICES lists of equal length. Greedy: the busiest first, each to the device that
    has room and shares the fewest tokens with it."""
    E = layer.num_experts
    together = layer.coselected.double()
    devices: list[list[int]] = [[] for _ in range(DEVICES)]
    for expert in layer.count.argsort(descending=True, stable=True).tolist():
        room = [device for device in devices if len(device) < -(-E // DEVICES)]
        min(room, key=lambda device: float(together[expert, device].sum())).append(expert)
    return [sorted(device) for device in devices]


def collisions(layer, devices):
    """Share of the co-selected pairs that lie on one device."""
    pairs = layer.coselected.double().triu(1)
    same = sum(float(pairs[device][:, device].sum()) for device in devices)
    return same / float(pairs.sum())


def main(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    text = reap.batches("stdlib:code", AutoTokenizer.from_pretrained(folder), max_tokens=8192)
    stats = reap.calibrate(model, text, pairs=True)
    for name in stats.layers:
        layer = stats.layer(name)
        hot, hits = resident(layer)
        devices = spread(layer)
        by_id = [list(range(d, layer.num_experts, DEVICES)) for d in range(DEVICES)]
        print(
            f"{name}: keep {hot} in fast memory ({hits:.0%} of choices); pairs on one device: "
            f"{collisions(layer, devices):.1%}, by id {collisions(layer, by_id):.1%}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
