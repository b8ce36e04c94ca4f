"""The namespace of all Modules; each is defined beside its functions in `mmfast.losses`."""

from mmfast.losses.clip import ClipLoss

__all__ = ["ClipLoss"]
