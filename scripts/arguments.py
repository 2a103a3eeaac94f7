"""Values on a verb's command line: read strictly, so that a slip is a sentence and not a crash."""

import argparse
import math

from configs.checks import UserError, require_text


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite; a `type` of argparse's options."""
    value = float(text)  # argparse makes a sentence of its ValueError
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number")
    return value


def positive(text: str) -> float:
    """A finite number above 0; a `type` of argparse's options."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be greater than 0")
    return value


def utf8(text: str) -> str:
    """Text that is UTF-8; a `type` of argparse's options.

    The shell hands on any bytes: Python keeps those that are no UTF-8 as lone surrogates, which no
    tokenizer takes.
    """
    try:
        require_text(text, "the text")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


finite.__name__ = positive.__name__ = "number"  # as argparse names them: "invalid number value"
