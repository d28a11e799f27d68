"""The parts of `shardlab.jagged`, which is the name to import from."""
