"""GGUF: header, split files, reader and writer."""
