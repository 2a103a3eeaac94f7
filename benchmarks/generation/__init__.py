"""Generation on this machine: speed beside other programs, quality by format, memory."""
