"""Train Tencent's Hy-MT2 and Hy3 mixture-of-experts models on Megatron."""

__version__ = "0.1.0"
