"""Optimizers and the learning rate of both training loops."""
import contextlib

import torch
from torch.overrides import TorchFunctionMode

from harness import parallel


def make_optimizers(model, cfg):
    """Muon [Jordan et al. 2024] for the matrices inside the blocks, AdamW for everything else, or AdamW for all. Each
    matrix has a Muon of its own, so that they can take their steps side by side."""
    matrices = list(model.blocks.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    adamw = {"lr": cfg.adamw_lr, "betas": (0.9, 0.95), "weight_decay": cfg.weight_decay,
             "fused": parallel.kind == "cuda"}
    if cfg.optimizer == "adamw":
        return [torch.optim.AdamW(matrices + others, **adamw)]
    return [*(torch.optim.Muon([matrix], cfg.lr, weight_decay=cfg.weight_decay) for matrix in matrices),
            torch.optim.AdamW(others, **adamw)]


class WithoutBfloat16(TorchFunctionMode):
    """torch.optim.Muon computes in bfloat16. A processor without such products takes a dozen times as long as in
    float32: longer than the gradient (tests/bench.py optimizer)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].clone() if function is torch.Tensor.bfloat16 else function(*args, **kwargs or {})


def take_step(optimizer):
    with WithoutBfloat16() if parallel.kind == "cpu" else contextlib.nullcontext():  # of this thread alone
        optimizer.step()


def set_learning_rates(optimizers, step, cfg):
    """Linear warm-up, under a linear decay to 0 over all steps; every group has a peak of its own."""
    fraction = min(1.0, (step + 1) / max(1, cfg.warmup)) * (1 - step / cfg.steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * fraction


def update(optimizers, parameters, gradients):
    """One step of every optimizer. A parameter without a gradient (None) stays as it is."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    parallel.in_threads(take_step, optimizers)
