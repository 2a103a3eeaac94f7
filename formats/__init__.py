"""File formats of others, read and written as bytes: nothing here knows a model."""
