"""The run: check the configuration, assemble the engine, and step through it."""
