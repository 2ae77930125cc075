"""The fused loss kernels as they are launched for real batches, to be compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case, case

import fused_align as fa
from fused_align.backends.kernel_losses import LossKernel, LossLaunch, cover
from fused_align.backends.triton_.losses import KERNELS, OPTIONS, sizes


def aot_cases() -> Iterator[Case]:
    """One of each formula, with what makes a kernel larger here and there."""
    everything = {"sampler_correction": "token_truncate", "beta": 0.1, "kl_correction": True}
    humanline = fa.Humanline()
    padded, packed, live = _batches()
    for loss, clip, batch in (
        (fa.GRPO(), None, padded),
        (fa.GRPO(delta=2.0, **everything), humanline, live),
        (fa.GSPO(beta=0.1, kl_correction=True), humanline, packed),
        (fa.RLOO(sampler_correction="sequence_mask"), None, padded),
        (fa.CISPO(**everything), humanline, packed),
        (fa.SAPO(beta=0.1), None, live),
        (fa.DPO(), None, padded),
        (fa.DPO(f_divergence="js", label_smoothing=0.1), humanline, live),
        (fa.MADPO(), humanline, padded),
        (fa.DiscoPOP(), None, packed),
        (fa.SimPO(alphapo=0.1), None, live),
        (fa.KTO(), humanline, packed),
    ):
        kernel = cover(loss, clip, _nowhere)
        assert isinstance(kernel, LossKernel), kernel
        launch = kernel.launch(torch.zeros(batch.target.shape), batch, 1.0)
        yield case(KERNELS[launch.kernel], {**launch.arguments, **sizes(launch)}, OPTIONS)


def _nowhere(launch: LossLaunch, device: torch.device) -> None:
    raise RuntimeError(f"{launch.kernel} is to be compiled here, and was launched.")


def _batches() -> tuple[fa.Batch, fa.Batch, fa.Batch]:
    """Batches with the types of real ones, and with every column: padded, packed, live."""
    S, T = 4, 3
    columns = {name: torch.zeros(S, T) for name in ("old_logp", "ref_logp", "sampler_logp", "token_weight")}
    whole = {
        "margin": torch.zeros(S // 2),
        "desirable": torch.zeros(S).bool(),
        "kl": torch.zeros(()),
    }
    target = torch.ones(S, T, dtype=torch.int64)
    padded = fa.Batch(target, advantage=torch.zeros(S), **columns, **whole)
    flat = {name: x.view(-1) for name, x in columns.items()}
    offsets = torch.arange(0, S * T + 1, T, dtype=torch.int32)
    packed = fa.Batch(target.view(-1), cu_seqlens=offsets, advantage=torch.zeros(S * T), **flat, **whole)
    return padded, packed, packed.live()
