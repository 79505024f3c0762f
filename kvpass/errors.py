"""The errors that a caller may want to catch; every message names what was found, where, and the cure."""


class KVPassError(Exception):
    """Root of all errors raised by kvpass."""


class UnsupportedModelError(KVPassError):
    """The model cannot be captured, or not every attention of it can be located."""


class PressError(KVPassError, ValueError):
    """A press, or one of its options, is unknown or does not fit the model."""


class NestingError(PressError, TypeError):
    """A press was put into a wrapper that cannot hold it."""


class MissingTapError(PressError):
    """A press reads a tensor that this model's graph does not have."""


class VerificationError(KVPassError):
    """A pass left a graph that breaks a rule of its form."""


class InputError(KVPassError, ValueError):
    """An input of the compiled model cannot be served; nothing is ever silently ignored."""


class PackageError(KVPassError):
    """A saved model cannot be written, or is not what was written."""


class CacheError(KVPassError, ValueError):
    """A cache does not belong to this model, or is asked for something that it no longer holds."""
