"""The benchmark: the losses of this package and their peers at the same work. `python -m bench --help`.

cases      what is computed: shapes of real models, logits, modes, masks, zero coefficients; named suites
reference  the loss formulas, and float64 values and gradients that every provider is held against
providers  who computes it: this package's plans, eager code, torch.compile, and (peers) other libraries
measure    correctness first, then times in turn with the bare GEMMs, then peak memory
kernels    each memory-bound step of the triton and cuda backends by itself, on the inputs of kernel_works
steps      whole training steps with and without the package, and the longest batch that fits
report     tables, comparison of two runs, plots
verdicts   what the rows say of what is promised, and of what the planner takes
"""
