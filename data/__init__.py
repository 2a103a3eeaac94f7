"""From text files to batches: corpora, tokenizer, packed rows, a resumable pipeline."""
