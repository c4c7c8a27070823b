"""Triton kernels of the CUDA backend: all but the base products, with the adapters' products fused into them.

Notation: G adapters, S rows of each, RP a rank padded to a power of two of at least 16. u = x Aᵀ (A already times its
scaling) and t = dy B are (G·S, n, RP) for the n adapted projections of a stack, zero beyond their ranks. A kernel that
holds only a part of the sum leaves it as float32 *partials* (n_sums, G·S, RP), which the next one adds up, always in
the same order. A low-rank product never makes a separate pass over a wide matrix: the kernel that reads the matrix next
adds it.
"""
