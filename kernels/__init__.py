"""One folder per op: api (signature, choice), reference (definition), implementations, cases."""
