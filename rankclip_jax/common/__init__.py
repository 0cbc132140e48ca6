"""What works everywhere: errors, commands, files, pictures, trees, devices, progress, the tokenizer."""
