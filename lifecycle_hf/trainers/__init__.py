"""One trainer per way of training, each beside its options."""
