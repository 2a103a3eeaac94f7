"""One file per benchmark; each has NAME, VERSION and `run(subject) -> Result`."""
