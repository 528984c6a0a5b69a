"""Terms of the distillation loss: what each compares, and what it trains or remembers for that."""
