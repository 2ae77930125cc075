"""The steps as CUDA C++ kernels."""

from ..kernel_steps import KernelSteps
from . import launches
from .logits import logit_gradient, logit_stats


class CudaSteps(KernelSteps):
    logit_stats = staticmethod(logit_stats)
    logit_gradient = staticmethod(logit_gradient)


STEPS = CudaSteps(launches)
