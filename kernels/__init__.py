"""Triton kernels, installed as ``mmfast.kernels``; the same stems as ``mmfast.ops``."""
