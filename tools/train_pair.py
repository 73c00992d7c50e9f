"""Train the two models of the experiments: a softmax and a sigmoid router on the same text.

    export PYTHONPATH=.
    python tools/train_pair.py softmax --minutes 60      # models/tiny-softmax-moe
    python tools/train_pair.py sigmoid --minutes 60      # models/tiny-sigmoid-moe
    python tools/train_pair.py softmax --minutes 70      # again: continues where it was

Four layers of 32 experts, top-4. They start from `models/tiny-qwen3-moe`: each of its 16 experts is
cut into two halves of its inner channels, which together compute what it did, and training goes on
until the halves are experts of their own, with a rather weak pull towards an even load, so that
they differ in how often and with which gate they are picked. `softmax` is a Qwen3-MoE with Switch's
balance loss; `sigmoid` a GLM-4-MoE with a shared expert, its load held by a correction bias alone
(arXiv 2408.15664). Text, labelled: `experiments/texts.py`. Matrices are updated by Muon (momentum
made orthogonal, all experts of a layer in one batch; arXiv 2502.16982), the rest by AdamW. The
learning rate follows the share of the time that has passed: constant, then down to nothing over the
last third.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from train_tiny import SEQ_LEN, balance_loss, batch_rows, unigram_entropy
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    AutoTokenizer,
    Glm4MoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from experiments.texts import DOMAINS, texts

START = Path("models/tiny-qwen3-moe")
ROWS = {"library": 3, "tests": 2, "prose": 2, "tables": 1}  # of SEQ_LEN tokens, per step
MOST_TOKENS = 2_000_000  # of a domain
BALANCE, BIAS_STEP, CLIP = 0.003, 0.001, 1.0
MUON_RATE, MOMENTUM, ADAM_RATE, WARMUP = 0.008, 0.95, 1e-3, 20
EVERY = 50  # steps between checkpoints
QUICK_ROWS = 8  # held-out rows per domain at a checkpoint; training.json's figures take all
SPLIT = 2  # experts made of one
UNLIKE = 0.3  # noise on their router rows, as a share of these rows' spread


def configs(start: Qwen3MoeConfig) -> dict[str, PreTrainedConfig]:
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads"
    names += " head_dim rms_norm_eps eos_token_id pad_token_id bos_token_id"
    sizes = {name: getattr(start, name) for name in names.split()} | {
        "intermediate_size": start.intermediate_size,
        "moe_intermediate_size": start.moe_intermediate_size // SPLIT,
        "num_experts_per_tok": start.num_experts_per_tok * SPLIT,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": SEQ_LEN,
    }
    experts = start.num_experts * SPLIT
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    return {
        "softmax": Qwen3MoeConfig(**sizes, num_experts=experts, router_aux_loss_coef=BALANCE),
        "sigmoid": Glm4MoeConfig(
            **sizes,
            n_routed_experts=experts,
            n_shared_experts=1,
            first_k_dense_replace=0,
            num_nextn_predict_layers=0,
            use_qk_norm=True,
            rope_parameters=rope,
        ),
    }


ROUTERS = ("softmax", "sigmoid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("router", choices=ROUTERS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="checkpoints, resume")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.out = options.out or Path(f"models/tiny-{options.router}-moe")
    options.work = options.work or Path(f"out/train-{options.router}")
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    train(options, load_rows(options.work))


def load_rows(work: Path) -> dict[str, np.ndarray]:
    """{"library", "library/heldout", ...} -> rows [N, SEQ_LEN + 1] uint16."""
    path = work / "tokens.npz"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(START)
        rows = {}
        for domain in DOMAINS:
            for suffix, held_out in (("", False), ("/heldout", True)):
                ids: list[int] = []
                for text in texts(domain, held_out=held_out):
                    ids += [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
                    if len(ids) > MOST_TOKENS:
                        break
                flat = np.array(ids, np.uint16)
                count = (len(flat) - 1) // SEQ_LEN
                windows = np.lib.stride_tricks.sliding_window_view(flat, SEQ_LEN + 1)
                rows[domain + suffix] = windows[: count * SEQ_LEN : SEQ_LEN].copy()
        with open(path, "wb") as file:
            np.savez(file, **rows)
    with np.load(path) as stored:
        return dict(stored)


def build(router: str) -> PreTrainedModel:
    torch.manual_seed(0)
    start = AutoModel.from_pretrained(START, dtype=torch.float32)
    model = AutoModel.from_config(configs(start.config)[router])
    model.set_experts_implementation("grouped_mm")
    fresh = model.load_state_dict(halved(start.state_dict()), strict=False)
    assert not fresh.unexpected_keys
    for name in fresh.missing_keys:  # what only the new model has begins by doing nothing
        if "down_proj" in name:
            nn.init.zeros_(model.get_parameter(name))
    return model


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every expert cut into SPLIT along its inner channels. Their router rows are alike but for
    some noise, so that they are picked together; a gate then is 1/SPLIT of what it was, for which
    the outputs are larger."""
    found = {}
    for name, weight in weights.items():
        if name.endswith("experts.gate_up_proj"):  # [E,2I,H]
            parts = [half.chunk(SPLIT, 1) for half in weight.chunk(2, 1)]
            pairs = [torch.cat(both, 1) for both in zip(*parts, strict=True)]
            weight = torch.stack(pairs, 1).flatten(0, 1)
        elif name.endswith("experts.down_proj"):  # [E,H,I]
            weight = SPLIT * torch.stack(weight.chunk(SPLIT, 2), 1).flatten(0, 1)
        elif name.endswith("mlp.gate.weight"):  # [E,H]
            weight = weight.repeat_interleave(SPLIT, 0)
            weight = weight + UNLIKE * weight.std() * torch.randn_like(weight)
        found[name] = weight
    return found


class Routers:
    """The logits [T,E] of every router in a forward, whatever the model returns."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.gates = [layer.mlp.gate for layer in model.model.layers]
        self.logits: list[Tensor] = []
        for gate in self.gates:
            gate.register_forward_pre_hook(self._keep)

    def _keep(self, gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        self.logits.append(linear(hidden.float(), gate.weight.float()))

    def take(self) -> list[Tensor]:
        taken, self.logits = self.logits, []
        return taken

    def choices(self, logits: list[Tensor], top_k: int) -> list[Tensor]:
        """How many slots every expert gets, per layer [E]."""
        counts = []
        for gate, scores in zip(self.gates, logits, strict=True):
            if hasattr(gate, "e_score_correction_bias"):
                scores = scores.sigmoid() + gate.e_score_correction_bias
            picked = scores.topk(top_k).indices.flatten()
            counts.append(picked.bincount(minlength=scores.shape[1]).double())
        return counts

    @torch.no_grad()
    def correct(self, counts: list[Tensor]) -> None:
        """Busy experts' biases down, idle ones' up, by a fixed step."""
        for gate, count in zip(self.gates, counts, strict=True):
            gate.e_score_correction_bias += BIAS_STEP * (count.mean() - count).sign().float()


class Muon:
    """Steps along the momentum's nearest orthogonal matrix, for matrices [...,M,N]."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.momenta = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            direction = orthogonal(parameter.grad.lerp(momentum, MOMENTUM))
            rows, columns = parameter.shape[-2:]
            parameter.sub_(direction, alpha=rate * max(1.0, rows / columns) ** 0.5)
            parameter.grad = None


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of every matrix [...,M,N], by five steps of Newton and Schulz."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def losses(model: PreTrainedModel, rows: np.ndarray) -> Tensor:
    """Cross entropy per predicted token [B*SEQ_LEN] fp32."""
    ids = torch.from_numpy(rows.astype(np.int64))
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


def train(options: argparse.Namespace, streams: dict[str, np.ndarray]) -> None:
    model = build(options.router)
    routers = Routers(model)
    top_k = model.config.num_experts_per_tok
    named = dict(model.named_parameters())
    muon_names = [n for n, p in named.items() if p.ndim > 1 and "proj" in n]
    muon = Muon([named[name] for name in muon_names])
    adam = torch.optim.AdamW(
        [named[name] for name in named if name not in muon_names],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    checkpoint = options.work / "state.pt"
    step, seconds, history = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.momenta = state["muon"]
        step, seconds, history = state["step"], state["seconds"], state["history"]
    running: Counter[str] = Counter()
    budget = options.minutes * 60
    began = time.monotonic()
    while seconds < budget:
        passed = seconds + time.monotonic() - began
        share = min(1.0, (step + 1) / WARMUP, max(0.0, 3 * (1 - passed / budget)))
        rows = np.concatenate(
            [
                batch_rows(streams[domain], step, count, seed)
                for seed, (domain, count) in enumerate(ROWS.items())
            ]
        )
        loss = losses(model, rows).mean()
        logits = routers.take()
        balance = balance_loss(logits, top_k)
        if options.router == "sigmoid":
            loss.backward()
            routers.correct(routers.choices(logits, top_k))
        else:
            (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * share
        adam.step()
        muon.step(MUON_RATE * share)
        model.zero_grad()
        step += 1
        running.update(steps=1, loss=loss.item(), balance=balance.item())
        if step % EVERY and passed < budget:
            continue
        seconds += time.monotonic() - began
        entry = {
            "step": step,
            "seconds": round(seconds),
            "train_loss": round(running["loss"] / running["steps"], 4),
            "balance_loss": round(running["balance"] / running["steps"], 4),
        }
        for domain in DOMAINS:
            heldout = streams[f"{domain}/heldout"]
            quick = heldout[:: max(1, len(heldout) // QUICK_ROWS)][:QUICK_ROWS]
            entry[f"heldout_{domain}"] = validate(model, routers, quick)["loss"]
        history.append(entry)
        print(json.dumps(entry), flush=True)
        state = {
            "model": model.state_dict(),
            "adam": adam.state_dict(),
            "muon": muon.momenta,
            "step": step,
            "seconds": seconds,
            "history": history,
        }
        torch.save(state, f"{checkpoint}.new")
        os.replace(f"{checkpoint}.new", checkpoint)
        running.clear()
        began = time.monotonic()
    export(model, options.out)
    record = training_record(options, streams, history)
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


@torch.inference_mode()
def validate(model: PreTrainedModel, routers: Routers, rows: np.ndarray) -> dict:
    """Loss in nats per token, and of each layer's experts the busiest and the idlest as multiples
    of the mean load."""
    total, loads = 0.0, []
    for start in range(0, len(rows), 16):
        total += losses(model, rows[start : start + 16]).double().sum().item()
        counts = routers.choices(routers.take(), model.config.num_experts_per_tok)
        loads.append(torch.stack(counts))
    load = torch.stack(loads).sum(0)
    relative = load / load.mean(1, keepdim=True)
    return {
        "tokens": len(rows) * SEQ_LEN,
        "loss": round(total / (len(rows) * SEQ_LEN), 4),
        "expert_load_max_over_mean": [round(v, 3) for v in relative.amax(1).tolist()],
        "expert_load_min_over_mean": [round(v, 3) for v in relative.amin(1).tolist()],
    }


def training_record(
    options: argparse.Namespace, streams: dict[str, np.ndarray], history: list[dict]
) -> dict:
    """What may be claimed of the model, measured on the exported bf16 weights as they load."""
    model = AutoModel.from_pretrained(options.out, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    routers = Routers(model)
    steps = history[-1]["step"]
    return {
        "start": START.name,
        "text": f"standard library of CPython {platform.python_version()}",
        "split": "by hash of the file name, one in sixteen held out",
        "mix": ROWS,
        "unit": "nats per token; loads are multiples of the mean load of the layer's experts",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * sum(ROWS.values()) * SEQ_LEN,
        "seq_len": SEQ_LEN,
        "epochs": {d: round(steps * rows / len(streams[d]), 2) for d, rows in ROWS.items()},
        "seconds": history[-1]["seconds"],
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "domains": {
            domain: {
                "train_tokens": int(streams[domain][:, 1:].size),
                "heldout_unigram_entropy": round(unigram_entropy(streams[f"{domain}/heldout"]), 4),
                "heldout": validate(model, routers, streams[f"{domain}/heldout"]),
            }
            for domain in DOMAINS
        },
        "history": history,
    }


def export(model: PreTrainedModel, out: Path) -> None:
    """A checkpoint as the hub has them: bf16, one tensor per expert, the config's own names."""
    copy = AutoModel.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(START).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config.pop("experts_implementation", None)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
