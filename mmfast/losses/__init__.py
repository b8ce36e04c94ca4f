"""Contrastive losses: plain torch over `mmfast.ops`, one file per system."""

from mmfast.losses.clip import ClipLoss, clip_loss, info_nce

__all__ = ["ClipLoss", "clip_loss", "info_nce"]
