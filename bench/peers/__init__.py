"""What fedspa is measured against: others' procedures in PyTorch, and their own packages."""
