"""Fixtures of this folder."""

from tests.shared_programs import shared_programs

__all__ = ["shared_programs"]
