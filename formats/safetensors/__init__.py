"""safetensors: header, reader and writer."""
