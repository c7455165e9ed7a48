"""The parts of a model that PEFT trains: adapters, and their names."""
