"""What works everywhere: errors, files, devices, progress, the tokenizer."""
