"""Errors a user can cause. Each message says the subject, what was expected, what was found, and the remedy."""


class LlmirError(Exception):
    """Base of every error that a user of LLMIR can cause."""


class UnsupportedModelError(LlmirError):
    """A forward function that no decoder can be derived from: names the operation, its source line and the reason."""


class VerificationError(LlmirError):
    """The derived decoder and the original forward disagree: the decoder is not handed over."""


class CheckpointError(LlmirError):
    """A checkpoint that is missing, truncated, corrupt or of an unknown kind."""


class RequestError(LlmirError):
    """A generation request that cannot be served as asked: bad token ids, an empty prompt, bad sampling parameters."""


class OutOfPagesError(LlmirError):
    """The KV cache has too few pages for what was asked."""


class InvalidIRError(LlmirError):
    """A module or a file of IR that does not parse, does not verify, or that a pass cannot take."""
