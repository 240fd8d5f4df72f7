"""Files and downloads: they become models, tokenizers and drafters."""
