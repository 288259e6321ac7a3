"""What one compares unit pruning with: whole blocks removed, features reused."""
