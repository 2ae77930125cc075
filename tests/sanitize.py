"""Launches every kernel once or more at small sizes: compute-sanitizer python tests/sanitize.py

Sizes are multiples of nothing, so that reads and writes past an edge would show.
"""

from __future__ import annotations

import itertools

import torch

import fused_align as fa

S, T, H, V = 6, 11, 72, 1031


def main() -> None:
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    target = torch.randint(V, (S, T))
    target[:, ::4] = -100
    columns = {name: -7 + torch.rand(S, T) for name in ("old_logp", "ref_logp", "sampler_logp")}
    batch = fa.Batch(
        target, **columns, advantage=torch.randn(S), desirable=torch.arange(S) % 2 == 0,
        kl=torch.zeros(()), margin=torch.randn(S // 2),
    )  # fmt: skip
    heads = ({}, {"bias": torch.randn(V), "softcap": 5.0, "temperature": 0.5 + torch.rand(S, T)})
    for dtype, head, static in itertools.product((torch.float32, torch.bfloat16), heads, (False, True)):
        hidden, weight = torch.randn(S, T, H).to(dtype), torch.randn(V, H).to(dtype)
        options = {"backend": "triton", "max_live": S * T if static else None, **head}
        for plan in ("score", "fused"):
            fa.token_stats(hidden, weight, target, entropy=True, lse=True, plan=plan, **options)
        for frozen, entropy in itertools.product((False, True), repeat=2):
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
            out = fa.token_stats(*leaves, target, entropy=entropy, **options)
            (out.logp if out.entropy is None else out.logp + out.entropy).sum().backward()
        for loss in (
            fa.SFT(label_smoothing=0.1),
            fa.DPO(wpo=True),
            fa.DPO(),
            fa.MADPO(),
            fa.KTO(),
            fa.GRPO(),
            fa.GSPO(),
        ):
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            fa.align_loss(*leaves, batch, loss, **options).loss.backward()
        logits = torch.randn(S, T, V).to(dtype).requires_grad_()
        for overwrite in (False, True):
            found = fa.stats_from_logits(logits, target, backend="triton", entropy=True, overwrite=overwrite)
            assert found.entropy is not None
            (found.logp + found.entropy).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
