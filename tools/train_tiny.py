"""Train the small Qwen3-MoE that ships in models/tiny-qwen3-moe: softmax router, 16 experts top-2,
four layers, on the sources (half) and the prose (half) of Python's standard library.

    python tools/train_tiny.py --threads 2            # under an hour on two cores
    python tools/train_tiny.py --steps 2400           # again: continues where it was

Learning rate: warmup, constant, then a linear decay over the last quarter, so that a run can be
stopped and its end moved while it is on the plateau. The balance loss is Switch's (arXiv
2101.03961, eq. 4) per layer: transformers' own averages the layers first, which lets each of them
be lopsided. No text is written, only weights, tokenizer and `training.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from reap.text.stdlib_text import DOMAINS, documents

VOCABULARY = 2048
SEQ_LEN, ROWS = 256, 16  # 4,096 tokens per step, half of the rows from each domain
PEAK_RATE, WARMUP, BALANCE, CLIP = 2e-3, 150, 0.01, 1.0
EVERY = 100  # steps between checkpoints
QUICK_ROWS = 96  # held-out rows per domain at a checkpoint; training.json's figures take all
END, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models/tiny-qwen3-moe"))
    parser.add_argument("--work", type=Path, default=Path("out/train"), help="checkpoints, resume")
    parser.add_argument("--steps", type=int, default=1150)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(options.work)
    streams = load_streams(options.work, tokenizer)
    train(options, tokenizer, streams)


def load_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from equal amounts of code and prose, all from the training part."""
    path = work / "tokenizer.json"
    if not path.exists():
        texts = [[text for _, text in documents(domain, held_out=False)] for domain in DOMAINS]
        amount = min(sum(map(len, domain)) for domain in texts)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            (text for domain in texts for text in take(domain, amount)),
            trainers.BpeTrainer(
                vocab_size=VOCABULARY,
                show_progress=False,
                special_tokens=[END, PAD, "<|im_start|>", "<|im_end|>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        tokenizer.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(path)),
        eos_token=END,
        pad_token=PAD,
        model_max_length=SEQ_LEN,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def take(texts: list[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def load_streams(work: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """{"code", "prose", "code/heldout", "prose/heldout"} -> rows [N, SEQ_LEN + 1] uint16."""
    path = work / "tokens.npz"
    if not path.exists():
        rows = {}
        for domain in DOMAINS:
            for suffix, held_out in (("", False), ("/heldout", True)):
                ids = [
                    [*encoding.ids, tokenizer.eos_token_id]
                    for encoding in tokenizer.backend_tokenizer.encode_batch(
                        [text for _, text in documents(domain, held_out=held_out)]
                    )
                ]
                flat = np.concatenate([np.array(document, np.uint16) for document in ids])
                count = (len(flat) - 1) // SEQ_LEN
                windows = np.lib.stride_tricks.sliding_window_view(flat, SEQ_LEN + 1)
                rows[domain + suffix] = windows[: count * SEQ_LEN : SEQ_LEN].copy()
        with open(path, "wb") as file:
            np.savez(file, **rows)
    with np.load(path) as stored:
        return dict(stored)


def build_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        intermediate_size=480,
        moe_intermediate_size=80,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        router_aux_loss_coef=BALANCE,
        max_position_embeddings=SEQ_LEN,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def losses(model: Qwen3MoeForCausalLM, rows: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """Cross entropy per predicted token [B*SEQ_LEN] fp32, router logits per layer [T,E]."""
    ids = torch.from_numpy(rows.astype(np.int64))
    out = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
    loss = cross_entropy(out.logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return loss, out.router_logits


def balance_loss(router_logits: list[Tensor], top_k: int) -> Tensor:
    """Mean over the layers of E * sum_e share_e * probability_e: 1 when the load is even."""
    total = torch.zeros(())
    for logits in router_logits:
        experts = logits.shape[-1]
        share = one_hot(logits.topk(top_k).indices, experts).float().mean((0, 1))
        total = total + experts * (share * logits.float().softmax(-1).mean(0)).sum()
    return total / len(router_logits)


def learning_rate(step: int, steps: int) -> float:
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP, (steps - step) / (0.25 * steps))


def batch_rows(stream: np.ndarray, step: int, rows: int, seed: int) -> np.ndarray:
    """The step's rows: every epoch is a permutation of its own, so a resumed run sees what an
    uninterrupted one would have seen."""
    per_epoch = len(stream) // rows
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(stream))
    return stream[order[position * rows : (position + 1) * rows]]


def train(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, streams: dict[str, np.ndarray]
) -> None:
    model = build_model()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    checkpoint = options.work / "state.pt"
    first, seconds, history = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, history = state["step"], state["seconds"], state["history"]
    running: Counter[str] = Counter()
    began = time.monotonic()
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps)
        rows = np.concatenate(
            [
                batch_rows(streams[domain], step, ROWS // 2, seed)
                for seed, domain in enumerate(DOMAINS)
            ]
        )
        loss, router_logits = losses(model, rows)
        balance = balance_loss(router_logits, model.config.num_experts_per_tok)
        (loss.mean() + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        running.update(steps=1, loss=loss.mean().item(), balance=balance.item())
        if (step + 1) % EVERY and step + 1 != options.steps:
            continue
        seconds += time.monotonic() - began
        entry = {
            "step": step + 1,
            "seconds": round(seconds),
            "train_loss": round(running["loss"] / running["steps"], 4),
            "balance_loss": round(running["balance"] / running["steps"], 4),
        }
        for domain in DOMAINS:
            heldout = streams[f"{domain}/heldout"]
            quick = heldout[:: len(heldout) // QUICK_ROWS]
            entry[f"heldout_{domain}"] = validate(model, quick)["loss"]
        history.append(entry)
        print(json.dumps(entry), flush=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step + 1,
            "seconds": seconds,
            "history": history,
        }
        torch.save(state, f"{checkpoint}.new")
        os.replace(f"{checkpoint}.new", checkpoint)
        running.clear()
        began = time.monotonic()
    export(model, tokenizer, options.out)
    record = training_record(options, streams, history)
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


@torch.inference_mode()
def validate(model: Qwen3MoeForCausalLM, rows: np.ndarray) -> dict:
    """Loss in nats per token, and of each layer's experts the busiest and the idlest as multiples
    of the mean load."""
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    loads = torch.zeros(model.config.num_hidden_layers, experts, dtype=torch.int64)
    total = 0.0
    for start in range(0, len(rows), 16):
        loss, router_logits = losses(model, rows[start : start + 16])
        total += loss.double().sum().item()
        for load, logits in zip(loads, router_logits, strict=True):
            load += logits.topk(top_k).indices.flatten().bincount(minlength=experts)
    relative = loads / loads.double().mean(1, keepdim=True)
    return {
        "tokens": len(rows) * SEQ_LEN,
        "loss": round(total / (len(rows) * SEQ_LEN), 4),
        "expert_load_max_over_mean": [round(v, 3) for v in relative.amax(1).tolist()],
        "expert_load_min_over_mean": [round(v, 3) for v in relative.amin(1).tolist()],
    }


def unigram_entropy(rows: np.ndarray) -> float:
    """Nats per token of the best predictor that ignores context, fitted on the text it predicts."""
    share = np.bincount(rows[:, 1:].ravel()) / rows[:, 1:].size
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def training_record(
    options: argparse.Namespace, streams: dict[str, np.ndarray], history: list[dict]
) -> dict:
    """What the model card may claim, measured on the exported bf16 weights as they load."""
    model = Qwen3MoeForCausalLM.from_pretrained(options.out, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    domains = {}
    for domain in DOMAINS:
        heldout = streams[f"{domain}/heldout"]
        domains[domain] = {
            "train_tokens": int(streams[domain][:, 1:].size),
            "heldout_unigram_entropy": round(unigram_entropy(heldout), 4),
            "heldout_uniform": round(math.log(VOCABULARY), 4),
            "heldout": validate(model, heldout),
        }
    even = min(len(streams[f"{domain}/heldout"]) for domain in DOMAINS)
    mixed = np.concatenate([streams[f"{domain}/heldout"][:even] for domain in DOMAINS])
    steps = history[-1]["step"]
    return {
        "text": f"standard library of CPython {platform.python_version()}",
        "split": "by hash of the file name, one in sixteen held out",
        "unit": "nats per token; loads are multiples of the mean load of the layer's experts",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * ROWS * SEQ_LEN,
        "seq_len": SEQ_LEN,
        "epochs": {d: round(steps * (ROWS // 2) / len(streams[d]), 2) for d in DOMAINS},
        "seconds": history[-1]["seconds"],
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "domains": domains,
        "half_code_half_prose": validate(model, mixed),
        "history": history,
    }


def export(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A checkpoint as the hub has them: bf16, one tensor per expert, `num_experts` in the config
    (transformers' own save renames it)."""
    copy = Qwen3MoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config.pop("experts_implementation", None)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
