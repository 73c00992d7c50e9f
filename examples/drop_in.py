"""Statistics out of a calibration loop that somebody else wrote.

A quantiser, a distiller, an evaluation: whatever runs the model forward over text that is like its
use can be observed meanwhile. The loop is not changed, and its own results are the same.

    python examples/drop_in.py models/tiny-qwen3-moe
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reap


def somebody_elses_calibration(model, rows):
    """Stands for a library's own loop: here it collects the range of the last hidden states."""
    largest = torch.zeros(())
    with torch.no_grad():
        for row in rows:
            hidden = model(**row, output_hidden_states=True).hidden_states[-1]
            largest = torch.maximum(largest, hidden.abs().max())
    return float(largest)


def main(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["def add(a, b):\n    return a + b\n" * 8, "for x in range(10):\n    print(x)\n" * 8]
    rows = [tokenizer(text, return_tensors="pt") for text in texts]

    with reap.observe(model) as stats:
        observed = somebody_elses_calibration(model, rows)

    alone = somebody_elses_calibration(model, rows)
    assert abs(observed - alone) <= 0.02 * alone
    plan = reap.make_plan(stats, "reap", ratio=0.25)
    print(f"the loop's own result: {observed:.4g}; {stats.tokens} tokens were observed")
    for layer, dropped in plan.dropped.items():
        print(f"{layer} would lose {list(dropped)}")


if __name__ == "__main__":
    main(sys.argv[1])
