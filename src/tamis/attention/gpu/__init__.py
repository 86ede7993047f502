"""Attention and its statistics by Triton kernels: for CUDA, and for Triton's interpreter."""
