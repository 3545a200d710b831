"""The errors zotune raises on purpose: each says what was wrong, what was wanted, what to do."""

from __future__ import annotations


class ZotuneError(Exception):
    """Base of every error raised by zotune itself."""


class BadInput(ZotuneError, ValueError):
    """A value given by the caller cannot be used."""


class DataError(BadInput):
    """A data set is missing, malformed or does not fit the task."""


class FormatError(BadInput):
    """A checkpoint folder is missing, damaged or of an unknown format."""


class JournalError(ZotuneError):
    """A run's journal cannot be read, or contradicts the run that wants to continue it."""
