"""Triton kernels of the CUDA backend: what is computed element by element, with the adapters' products inside it.

Notation: G adapters, S rows of each, RP a rank padded to a power of two from 16 on. u = x Aᵀ (A already times its
scaling) and t = dy B are (G·S, n, RP) for the n adapted projections of a stack, zero beyond their ranks. A kernel that
holds a part of the sum alone leaves it as float32 *partials* (n_sums, G·S, RP), which the next one adds up, always in
the same order. A low-rank product is never a pass of its own over a wide matrix: who reads the matrix next adds it.
"""
