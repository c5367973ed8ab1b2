"""Sources to records to tokenised examples to packed batches; splits; the built-in world."""
