"""Exceptions of crdiff_core: every message is one line that says what, where and the remedy."""


class CRDiffError(Exception):
    """Base of every error a user of crdiff_core may want to catch."""


class RatiosError(CRDiffError, ValueError):
    """Block ratios, or the file that holds them, are not usable."""


class PromptError(CRDiffError, ValueError):
    """A prompt set is empty, unreadable or not what was asked for."""


class PruningError(CRDiffError):
    """A block group cannot be pruned, or a UNet has no such group."""


class ModelError(CRDiffError):
    """A model is missing, of the wrong class, or cannot render the resolution asked for."""


class RewardError(CRDiffError):
    """A reward is unknown or cannot score the pictures it was given."""


class RenderError(CRDiffError):
    """Rendering went wrong: NaN latents, a constant picture or too little memory."""


class TooLittleMemoryError(RenderError):
    """Not even one picture fits into the device's memory."""
